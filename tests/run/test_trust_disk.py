"""Full disks, size limits, missing permission: one line, what is there is whole, and the run goes on afterwards."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trust_cases import OTHER_USER, SMALLEST_FLAGS, open_to_all, run, same, weights, write_images

from almrr_ref.run.checkpoint import read_checkpoint


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good images and the run of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write_images(folder / "good", 4)
    assert run("train", [*flags(folder), "--out", str(folder / "run")], folder / "io").code == 0
    return folder


def flags(whole: Path, save_minutes: int = 0) -> list[str]:
    settings = ["--steps", "6", "--set", f"save_minutes={save_minutes}"]
    return ["--data", str(whole / "good"), *SMALLEST_FLAGS, *settings]


@pytest.mark.parametrize("cause", ["the disk is full", "the file would exceed the size limit"])
def test_training_without_space_stops_whole_and_resumes(
    cause: str, whole: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The disk has room for one checkpoint, not for a second beside it; the limit is below a single one."""
    expected, folder, full = whole / "run", tmp_path / "run", "disk" in cause
    limits: dict[str, Any] = {"constants": {"REPORT_EVERY": 2}}  # a checkpoint every second step
    ballast, size = tmp_path / "disk" / "ballast", (expected / "last.pt").stat().st_size
    if full:
        folder = request.getfixturevalue("small_disk") / "run"
        ballast.write_bytes(bytes(3 * 2**20 - int(1.9 * size) - (expected / "synthetic.png").stat().st_size))
    else:
        limits["file_limit"] = size - 1
    ended = run("train", [*flags(whole), "--out", str(folder)], tmp_path / "io", **limits)
    assert f"last.pt': {cause}" in ended.error_line
    assert not list(folder.glob(".*"))
    assert all(json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    if full:
        assert 0 < read_checkpoint(folder / "last.pt")["training"]["step"] < 6
        ballast.unlink()
    assert run("train", [*flags(whole), "--out", str(folder), "--resume"], tmp_path / "io").code == 0
    assert same(weights(folder), weights(expected))


def test_a_log_without_space_is_named(whole: Path, small_disk: Path, tmp_path: Path) -> None:
    free, sheet = os.statvfs(small_disk), (whole / "run" / "synthetic.png").stat().st_size
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - sheet - 4096))
    arguments = [*flags(whole, save_minutes=1000), "--out", str(small_disk / "run")]
    line = run("train", arguments, tmp_path / "io", constants={"REPORT_EVERY": 1}).error_line
    assert f"cannot write '{small_disk / 'run'}" in line
    assert "the disk is full" in line


def test_an_output_folder_without_permission_is_one_line(whole: Path, tmp_path: Path) -> None:
    closed, out = tmp_path / "closed", ["--out", str(tmp_path / "closed" / "out")]
    closed.mkdir(mode=0o555)
    for folder in (tmp_path, whole / "run"):
        open_to_all(folder)
    arguments = ["--checkpoint", str(whole / "run" / "last.pt"), "--input", str(whole / "good"), *out]
    for ended in (
        run("train", [*flags(whole), *out], tmp_path / "io", user=OTHER_USER),
        run("predict", arguments, tmp_path / "io", user=OTHER_USER),
    ):
        assert f"cannot write '{closed / 'out'}': permission denied" in ended.error_line
