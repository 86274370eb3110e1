"""Full disks, size limits, missing permission: one line, what is there is whole, and the run goes on afterwards."""

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trust_cases import OTHER_USER, SMALLEST_FLAGS, open_to_all, run, write_images

from almrr_ref.run.checkpoint import read_checkpoint

OPTIONS: dict[str, Any] = {"presets": {"save_minutes": 0.0}, "constants": {"REPORT_EVERY": 2}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted only by the superuser")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    write_images(tmp_path / "good", 4)
    return ["--data", str(tmp_path / "good"), *SMALLEST_FLAGS, "--steps", "12"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(folder / "last.pt")["weights"]
    return found


def assert_same_weights(a: Path, b: Path) -> None:
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_training_on_a_disk_that_fills_up_stops_whole_and_goes_on_when_there_is_space(
    flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    """Two checkpoints have no room beside each other from the moment on when a large file appears."""
    assert run("train", [*flags, "--out", str(tmp_path / "whole")], tmp_path / "io", **OPTIONS).code == 0
    size = (tmp_path / "whole" / "last.pt").stat().st_size
    folder, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(3 * 2**20 - int(1.9 * size) - (tmp_path / "whole" / "synthetic.png").stat().st_size))
    ended = run("train", [*flags, "--out", str(folder)], tmp_path / "io", **OPTIONS)
    assert "last.pt': the disk is full" in ended.error_line
    step = read_checkpoint(folder / "last.pt")["training"]["step"]
    assert 0 < step < 12
    assert not list(folder.glob(".*"))
    assert all(json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    ballast.unlink()
    assert run("train", [*flags, "--out", str(folder), "--resume"], tmp_path / "io", **OPTIONS).code == 0
    assert_same_weights(tmp_path / "whole", folder)


def test_a_log_without_space_is_named_and_the_checkpoint_goes_on(
    flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    assert run("train", [*flags, "--out", str(tmp_path / "whole")], tmp_path / "io", **OPTIONS).code == 0
    never = {"presets": {"save_minutes": 1e9}, "constants": {"REPORT_EVERY": 1}}
    folder = small_disk / "run"
    folder.mkdir()
    free = os.statvfs(small_disk)
    sheet = (tmp_path / "whole" / "synthetic.png").stat().st_size
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - sheet - 4096))
    ended = run("train", [*flags, "--out", str(folder)], tmp_path / "io", **never)
    assert "the disk is full" in ended.error_line
    assert str(folder) in ended.error_line


def test_training_beyond_a_size_limit_stops_and_resumes(flags: list[str], tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run("train", [*flags, "--out", str(whole)], tmp_path / "io", **OPTIONS).code == 0
    limit = (whole / "last.pt").stat().st_size - 1
    ended = run("train", [*flags, "--out", str(folder)], tmp_path / "io", file_limit=limit, **OPTIONS)
    assert "last.pt': the file would exceed the size limit" in ended.error_line
    assert not list(folder.glob("*last.pt*"))
    assert run("train", [*flags, "--out", str(folder), "--resume"], tmp_path / "io", **OPTIONS).code == 0
    assert_same_weights(whole, folder)


def test_predict_on_a_full_disk_keeps_whole_rows_and_maps(flags: list[str], small_disk: Path, tmp_path: Path) -> None:
    assert run("train", [*flags, "--out", str(tmp_path / "run")], tmp_path / "io").code == 0
    write_images(tmp_path / "in", 200)
    arguments = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--input", str(tmp_path / "in")]
    ended = run("predict", [*arguments, "--out", str(small_disk / "out")], tmp_path / "io")
    assert "the disk is full" in ended.error_line
    with (small_disk / "out" / "scores.csv.part").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 10 < len(rows) < 200
    assert all(row["score"] for row in rows)
    maps = list((small_disk / "out" / "maps").iterdir())
    assert len({path.stat().st_size for path in maps}) == 1
    assert not [path for path in (small_disk / "out").rglob(".*")]


@pytest.mark.parametrize("name", ["train", "predict", "evaluate"])
def test_an_output_folder_without_permission_is_one_line(flags: list[str], tmp_path: Path, name: str) -> None:
    assert run("train", [*flags, "--out", str(tmp_path / "run")], tmp_path / "io").code == 0
    open_to_all(tmp_path)
    write_images(tmp_path / "set" / "train" / "good", 1)
    write_images(tmp_path / "set" / "test" / "good", 1)
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "last.pt")]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    arguments = {
        "train": flags,
        "predict": [*checkpoint, "--input", str(tmp_path / "good")],
        "evaluate": [*checkpoint, "--data", str(tmp_path / "set")],
    }[name]
    ended = run(name, [*arguments, "--out", str(closed / "out")], tmp_path / "io", user=OTHER_USER)
    assert "permission denied" in ended.error_line
    assert str(closed / "out") in ended.error_line
