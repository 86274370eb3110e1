"""Killed and stopped runs: nothing is lost, and what is resumed ends bit for bit as if it had never been stopped."""

import json
import os
import random
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals
from time import monotonic
from typing import Any

import pytest
from PIL import Image
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, Running, run, same, weights, write_images

from almrr_ref.run.checkpoint import read_checkpoint

KILLS, TORN = 4, 2  # in all, and at least so many while a checkpoint was being written
STEPS = 8
OFTEN: dict[str, Any] = {"constants": {"REPORT_EVERY": 2}}  # a checkpoint every second step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 5)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    """A network of some megabytes, so that much of the time goes into writing it."""
    settings = ("--set", "decoder_channels=(128,192)", "--set", "save_minutes=0")
    return ["--data", str(data), *SMALLEST_FLAGS, *MEMORY_FLAGS, *settings, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run("train", [*flags, "--out", str(folder)], folder / "io", **OFTEN).code == 0
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_equal_runs(a: Path, b: Path) -> None:
    """The same checkpoints (weights, optimiser, threshold, settings), losses and sheet of samples."""
    assert same(read_checkpoint(a / "last.pt"), read_checkpoint(b / "last.pt"))
    assert losses(a) == losses(b)
    assert (a / "synthetic.png").read_bytes() == (b / "synthetic.png").read_bytes()
    assert not list(b.glob(".*")), "a temporary file is left"


def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments of the whole run, every other one in the middle of writing a checkpoint."""
    choose = random.Random(0)
    started = monotonic()
    run("train", [*flags, "--out", str(tmp_path / "timed")], tmp_path / "io", **OFTEN)
    life = monotonic() - started
    kills = torn = finished = 0
    while kills < KILLS or torn < TORN or finished == 0:
        assert kills < 4 * KILLS, f"only {torn} of {kills} kills came while a checkpoint was being written"
        folder = tmp_path / str(finished)
        half_written = folder / ".last.pt.part"
        process = Running("train", [*flags, "--out", str(folder), "--resume"], tmp_path / "io", **OFTEN)
        if kills < KILLS or torn < TORN:
            if kills % 2:
                process.wait_until(half_written.exists)
            else:
                process.process.join(choose.uniform(0, life))
            process.kill()
        ended = process.end()
        if ended.code == -SIGKILL:
            kills += 1
            torn += half_written.exists()
            if (folder / "last.pt").exists():
                read_checkpoint(folder / "last.pt")
        else:
            assert ended.code == 0, ended
            assert_equal_runs(whole, folder)
            finished += 1


@pytest.mark.parametrize(("which", "code", "workers"), [(SIGINT, 130, "2"), (SIGTERM, 143, "0")])
def test_a_signal_to_all_processes_saves_and_the_run_goes_on_exactly(
    flags: list[str], whole: Path, tmp_path: Path, which: Signals, code: int, workers: str
) -> None:
    """As Ctrl-C in a terminal and a stopping service do it: the workers get the signal as well."""
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    flags = [*flags, "--out", str(folder), "--workers", workers]
    process = Running("train", flags, tmp_path / "io", **OFTEN)
    process.wait_until(lambda: log.exists() and log.stat().st_size > 0)
    process.kill(which)
    ended = process.end()
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    assert f"stopped by {which.name} after step" in ended.err
    stopped = read_checkpoint(folder / "last.pt")
    assert 0 < stopped["training"]["step"] < STEPS
    assert "memory_alone" in stopped["calibration"]  # until training ends
    assert run("train", [*flags, "--resume"], tmp_path / "io", **OFTEN).code == 0
    assert same(weights(whole), weights(folder))
    assert read_checkpoint(folder / "last.pt")["threshold"] == read_checkpoint(whole / "last.pt")["threshold"]


@pytest.mark.parametrize("name", ["train", "predict"])
def test_ctrl_c_at_any_other_moment_is_one_line_and_code_130(
    flags: list[str], whole: Path, data: Path, tmp_path: Path, name: str
) -> None:
    """While images are loaded and predicted."""
    many, out = tmp_path / "many", tmp_path / "out"
    many.mkdir()
    for i in range(1500):
        (many / f"{i}.png").hardlink_to(data / "000.png")
    settings = {
        "train": ["--data", str(many), *flags[2:]],
        "predict": ["--input", str(many), "--checkpoint", str(whole / "last.pt")],
    }
    process = Running(name, [*settings[name], "--out", str(out)], tmp_path / "io")
    process.wait_until((out if name == "train" else out / "overlays").exists)
    process.kill(SIGINT)
    ended = process.end()
    assert (ended.code, ended.err) == (130, f"python -m almrr_ref.{name}: stopped\n")
    if name != "train":
        assert not (out / "scores.csv").exists(), "that name means complete"
        assert (out / "scores.csv.part").read_bytes().endswith(b"\r\n")


def test_a_run_that_another_process_is_at_is_refused_until_that_process_is_gone(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    """The first process is frozen in the middle, refused to share, and killed, while its workers live on."""
    folder = tmp_path / "run"
    flags = [*flags, "--out", str(folder)]
    first = Running("train", [*flags, "--workers", "1"], tmp_path / "first", **OFTEN)
    first.wait_until((folder / "last.pt").exists)
    first.kill(SIGSTOP)
    before = (folder / "last.pt").read_bytes()
    for more in ("--resume", "--overwrite"):
        line = run("train", [*flags, more], tmp_path / "io").error_line
        assert f"'{folder}' is in use by process {first.process.pid} on " in line
    assert (folder / "last.pt").read_bytes() == before
    os.kill(first.process.pid or 0, SIGKILL)
    first.end()
    resumed = run("train", [*flags, "--resume"], tmp_path / "io", **OFTEN)
    first.kill()  # its workers
    assert resumed.code == 0, resumed
    assert "continuing after step" in resumed.out
    assert same(weights(whole), weights(folder))
    assert not (folder / ".lock").exists()


def test_a_run_goes_on_with_moved_copies_of_its_images_but_not_with_other_ones(tmp_path: Path) -> None:
    """What else may change is in tests/data/test_split.py. The torn image makes the exit code 1."""
    good, out = tmp_path / "good", tmp_path / "run"
    write_images(good, 4)
    (good / "torn.png").write_bytes(b"?")
    command = ["--data", str(good), "--out", str(out), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", command, tmp_path / "io").code == 1
    command[1] = str(good := good.rename(tmp_path / "moved"))
    for path in good.iterdir():
        os.utime(path, (1, 1))
    ended = run("train", [*command, "--resume"], tmp_path / "io")
    assert ended.code == 1, ended
    assert "continuing after step 1" in ended.out
    with Image.open(good / "000.png") as image:
        image.rotate(90).save(good / "torn.png")
    refused = f"not those that the run in {out} began with: changed images: 1 (first: torn.png); put all back"
    assert refused in run("train", [*command, "--resume"], tmp_path / "io").error_line
