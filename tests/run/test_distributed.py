"""Several processes as one run: shares, agreement, one checkpoint, one CSV, and what happens when one of them fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import (
    Rank,
    broken_predict,
    command,
    die,
    die_in_backward,
    error_lines,
    fill_the_disk,
    in_ranks,
    interrupt,
    ruin_a_weight,
    terminate,
    watched_train,
)
from trust_cases import MEMORY_FLAGS, ROOT, SMALLEST_FLAGS, TIMEOUT, read_scores, run, same, weights, write_images

from almrr_ref.run.checkpoint import read_checkpoint

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 7)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    return ["--data", str(data), *SMALLEST_FLAGS, "--batch-size", "4", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def separate(flags: list[str]) -> list[str]:
    """Without the U-Net no layer looks across the batch: batch norm and dice see the images of one rank."""
    return [*flags, "--frm-input", "none", "--standardise", "channel"]


@pytest.fixture(scope="module")
def single(separate: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("single")
    assert run("train", [*separate, "--out", str(folder)], folder / "io").code == 0
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images in two folders, one of them torn."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "a", 4, seed=1, size=40)
    write_images(folder / "new\nline", 7, seed=2)
    (folder / "a" / "002.png").write_bytes((folder / "a" / "001.png").read_bytes()[:200])
    return folder


def assert_close(a: Path, b: Path) -> None:
    """Biases before a norm are left out: their gradient is rounding alone, which Adam turns into steps."""
    for name, value in weights(a).items():
        if name in ("mfrm.decoder.deconv1.bias", "mfrm.decoder.deconv2.bias"):
            continue
        message = f"{name}: {float((value - weights(b)[name]).abs().max())}"
        torch.testing.assert_close(value, weights(b)[name], atol=1e-6, rtol=0, msg=message)


def predict_flags(run: Path, inputs: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(run / "last.pt"), "--input", str(inputs), "--out", str(out), "--batch-size", "2"]


def assert_one_line(ranks: list[Rank], text: str) -> None:
    lines = error_lines(ranks)
    assert len(lines) == 1, ranks
    assert text in lines[0]
    assert all(rank.code in (2, -9) for rank in ranks), ranks


def test_torchrun_trains_on_two_processes_as_one_does(separate: list[str], single: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    arguments = [*start, "almrr_ref.train", *separate, "--out", str(out)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(arguments, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("to train on") == 1
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.jsonl", "synthetic.png", "calibration.json"}
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [STEPS]
    assert_close(single, out)
    thresholds = [read_checkpoint(folder / "last.pt")["threshold"] for folder in (single, out)]
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-6)


def test_two_ranks_predict_into_one_csv_in_the_order_of_the_files(single: Path, inputs: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("predict", [*predict_flags(single, inputs, one), "--threshold", "0"], tmp_path / "io").code == 1
    ranks = in_ranks(command, ["predict", [*predict_flags(single, inputs, two), "--threshold", "0"]], tmp_path / "io2")
    assert ranks[0].code == 1, ranks
    assert sum(line.startswith("not read: ") for line in error_lines(ranks)) == 1
    assert [rank.out.count("10 images in") for rank in ranks] == [1, 0]
    assert {path.relative_to(one) for path in one.rglob("*.*")} == {path.relative_to(two) for path in two.rglob("*.*")}
    for path in sorted(path.relative_to(one) for path in one.rglob("*.js")):  # of the same row in both
        assert len({(out / path).read_text().partition('"levels"')[0] for out in (one, two)}) == 1
    boxes = [json.loads((out / "boxes.json").read_text()) for out in (one, two)]
    assert boxes[0]["images"] == boxes[1]["images"]
    assert [[entry["image_id"] for entry in content["annotations"]] for content in boxes] == [[*range(1, 11)]] * 2
    expected, rows = read_scores(one), read_scores(two)
    for column in ("path", "error", "label"):
        assert [row[column] for row in expected] == [row[column] for row in rows]
    scores = [[float(row["score"]) for row in table if row["score"]] for table in (expected, rows)]
    assert len(set(scores[0])) > 5, "scores that hardly differ prove nothing"
    assert scores[0] == pytest.approx(scores[1], abs=1e-6, rel=0)


def test_shares_do_not_overlap_and_all_ranks_end_with_the_weights_that_are_written(
    flags: list[str], tmp_path: Path
) -> None:
    """With U-Net and memory: what rank 0 alone has measured is everywhere, running statistics are averaged."""
    arguments = [*flags, *MEMORY_FLAGS, "--holdout", "0", "--out", str(tmp_path / "run")]
    ranks = in_ranks(watched_train, [[*arguments, "--set", "balance=false"]], tmp_path / "io")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    (first, drawn0), (second, drawn1) = (rank.result for rank in ranks)
    assert sorted(drawn0 + drawn1) == list(range(4 * STEPS))
    assert len(drawn0) == len(drawn1)
    written = weights(tmp_path / "run")
    assert same(first, written)
    assert same(second, written)
    assert float(written["memory.patches"].std()) > 0
    assert [path.name for path in tmp_path.rglob("*.pt*")] == ["last.pt"]
    assert [line for line in ranks[1].out.splitlines() if not line.startswith("[Gloo] Rank 1 is")] == []  # torch 2.8


@pytest.mark.parametrize(("act", "code", "count"), [(interrupt, 130, 4), (terminate, 143, 1)])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_number_of_ranks_goes_on(
    separate: list[str], single: Path, tmp_path: Path, act: Any, code: int, count: int
) -> None:
    out = tmp_path / "run"
    ranks = in_ranks(watched_train, [[*separate, "--out", str(out)], act], tmp_path / "io")
    assert [rank.code for rank in ranks] == [code, 0], ranks
    assert [len(rank.result[1]) for rank in ranks] == [4, 4]
    assert len(error_lines(ranks)) == 1
    assert read_checkpoint(out / "last.pt")["training"]["step"] == 2
    ranks = in_ranks(watched_train, [[*separate, "--out", str(out), "--resume"]], tmp_path / "io", count=count)
    assert [rank.code for rank in ranks] == [0] * count, ranks
    assert_close(single, out)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (ruin_a_weight, "not finite at step 2"),
        (die, "another process of this run is gone"),
        (die_in_backward, "another process of this run is gone"),
    ],
)
def test_a_rank_that_fails_to_train_ends_the_run_in_one_line(
    flags: list[str], tmp_path: Path, act: Any, text: str
) -> None:
    assert_one_line(in_ranks(watched_train, [[*flags, "--out", str(tmp_path / "run")], act], tmp_path / "io"), text)
    assert not list(tmp_path.rglob("*.pt*"))


@pytest.mark.parametrize(
    ("act", "text"), [(fill_the_disk, "the disk is full"), (die, "another process of this run is gone")]
)
def test_a_rank_that_fails_to_predict_ends_the_run_in_one_line_without_a_csv(
    single: Path, data: Path, tmp_path: Path, act: Any, text: str
) -> None:
    arguments = [predict_flags(single, data, tmp_path / "out"), act]
    assert_one_line(in_ranks(broken_predict, arguments, tmp_path / "io"), text)
    assert not (tmp_path / "out" / "scores.csv").exists()


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        ("train", "--batch-size 3", "multiple of the 2 processes"),
        ("train", "--data nowhere", "nowhere"),
        ("train", "--lr x", "lr"),
        ("evaluate", "", "without torchrun"),
    ],
)
def test_a_mistake_that_all_ranks_see_is_named_once(
    flags: list[str], tmp_path: Path, name: str, more: str, text: str
) -> None:
    arguments = [*flags, "--out", str(tmp_path / "run"), *more.split()]
    if name == "evaluate":
        arguments = ["--checkpoint", "last.pt", "--data", "set"]
    assert_one_line(in_ranks(command, [name, arguments], tmp_path / "io"), text)
