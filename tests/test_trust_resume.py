"""Killed and stopped runs: nothing is lost, and what is resumed ends bit for bit as if it had never been stopped."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from time import monotonic
from typing import Any

import pytest
import torch
from trust_cases import SMALLEST_FLAGS, TIMEOUT, Running, run, write_images

from almrr_ref.checkpoint import read_checkpoint

KILLS, TORN = 25, 5  # in all, and at least so many while a checkpoint was being written
# A checkpoint every second step, of some megabytes: about half of the time goes into writing it.
OPTIONS: dict[str, Any] = {
    "presets": {"save_minutes": 0.0, "decoder_channels": (128, 192)}, "constants": {"REPORT_EVERY": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 5)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    return ["--data", str(data), *SMALLEST_FLAGS, "--steps", "20"]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run("train", [*flags, "--out", str(folder)], folder / "io", **OPTIONS).code == 0
    return folder


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def content(folder: Path) -> dict[str, Any]:
    """A checkpoint without the state of the global generator, from which every start takes a number it never uses."""
    loaded = read_checkpoint(folder / "last.pt")
    return loaded


def assert_equal_runs(a: Path, b: Path) -> None:
    assert same(content(a), content(b))
    assert losses(a) == losses(b)
    assert (a / "synthetic.png").read_bytes() == (b / "synthetic.png").read_bytes()
    assert not list(b.glob(".*.part")), "a temporary file is left"


def wait_until(process: Running, happened: Callable[[], bool]) -> None:
    """Return as soon as something has happened, or the process has ended."""
    deadline = monotonic() + TIMEOUT
    while process.process.exitcode is None and not happened():
        assert monotonic() < deadline, "it never happened"
        process.process.join(0.0002)


def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments of the whole run, every other one in the middle of writing a checkpoint."""
    choose = random.Random(0)
    started = monotonic()
    run("train", [*flags, "--out", str(tmp_path / "timed")], tmp_path / "io", **OPTIONS)
    life = monotonic() - started
    kills = torn = finished = 0
    folder = tmp_path / "0"
    part, last = folder / ".last.pt.part", folder / "last.pt"
    while kills < KILLS or torn < TORN or finished == 0:
        assert kills < 4 * KILLS, f"only {torn} of {kills} kills came while a checkpoint was being written"
        process = Running("train", [*flags, "--out", str(folder), "--resume"], tmp_path / "io", **OPTIONS)
        enough = kills >= KILLS and torn >= TORN
        if not enough and kills % 2:
            wait_until(process, part.exists)
        elif not enough:
            process.process.join(choose.uniform(0, life))
        if not enough:
            process.kill()
        ended = process.end()
        if ended.code == -SIGKILL:
            kills += 1
            torn += part.exists()
            if last.exists():
                read_checkpoint(last)
            continue
        assert ended.code == 0, ended
        assert_equal_runs(whole, folder)
        finished += 1
        folder = tmp_path / str(finished)
        part, last = folder / ".last.pt.part", folder / "last.pt"


@pytest.mark.parametrize(
    ("which", "code", "workers"),
    [
        (SIGINT, 130, "2"),
        (SIGTERM, 0, "0"),
        (SIGTERM, 0, "2"),
    ],
)
def test_a_signal_to_all_processes_saves_and_the_run_goes_on_exactly(
    flags: list[str], whole: Path, tmp_path: Path, which: Signals, code: int, workers: str
) -> None:
    """As Ctrl-C in a terminal and a stopping service do it: the workers get the signal as well."""
    folder = tmp_path / "run"
    flags = [*flags, "--out", str(folder), "--workers", workers]
    process = Running("train", flags, tmp_path / "io", **OPTIONS)
    log = folder / "log.jsonl"
    wait_until(process, lambda: log.exists() and log.stat().st_size > 0)
    process.kill(which)
    ended = process.end()
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    assert f"stopped by {which.name} after step" in ended.err
    assert 0 < read_checkpoint(folder / "last.pt")["training"]["step"] < 20
    assert run("train", [*flags, "--resume"], tmp_path / "io", **OPTIONS).code == 0
    assert same(read_checkpoint(whole / "last.pt")["weights"], read_checkpoint(folder / "last.pt")["weights"])


@pytest.mark.parametrize("moment", ["loading", "evaluating", "predicting"])
def test_ctrl_c_at_any_other_moment_is_one_line_and_code_130(
    flags: list[str], whole: Path, data: Path, tmp_path: Path, moment: str
) -> None:
    many, out = tmp_path / "many", tmp_path / "out"
    for folder in (many / "train" / "good", many / "test" / "good"):
        folder.mkdir(parents=True)
        for i in range(1500):
            (folder / f"{i}.png").hardlink_to(data / "000.png")
    checkpoint = ["--checkpoint", str(whole / "last.pt"), "--out", str(out)]
    name, arguments, sign = {
        "loading": ("train", ["--data", str(many), *flags[2:], "--out", str(out)], out),
        "evaluating": ("evaluate", [*checkpoint, "--data", str(many)], out / "overlays"),
        "predicting": ("predict", [*checkpoint, "--input", str(many)], out / "overlays"),
    }[moment]
    process = Running(name, arguments, tmp_path / "io", **OPTIONS)
    wait_until(process, sign.exists)
    process.kill(SIGINT)
    ended = process.end()
    assert ended.code == 130, ended
    assert ended.err == f"python -m almrr_ref.{name}: stopped\n"
    if moment != "loading":
        assert not (out / "scores.csv").exists(), "that name means complete"
        assert (out / "scores.csv.part").read_bytes().endswith(b"\r\n")
