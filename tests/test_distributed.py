"""Several processes as one run: shares, agreement, one checkpoint, one CSV, and what happens when one of them fails."""

import csv
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import (
    Rank,
    die,
    error_lines,
    evaluate_once,
    fill_the_disk,
    in_ranks,
    interrupt,
    not_a_number,
    terminate,
    watched_predict,
    watched_train,
)
from trust_cases import ROOT, SMALLEST_FLAGS, TIMEOUT, run, write_images

from almrr_ref.run.checkpoint import read_checkpoint

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 7)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    return ["--data", str(data), *SMALLEST_FLAGS, "--batch-size", "4", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def network(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single process, without the U-Net and so without batch norm in training."""
    folder = tmp_path_factory.mktemp("single")
    assert run("train", [*flags, "--frm-input", "none", "--out", str(folder)], folder / "io").code == 0
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images in two folders, and a torn one."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "a", 4, seed=1, size=40)
    write_images(folder / "new\nline", 7, seed=2)
    (folder / "a" / "002.png").write_bytes((folder / "a" / "001.png").read_bytes()[:200])
    return folder


def torchrun(name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*start, "-m", f"almrr_ref.{name}", *arguments],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(folder / "last.pt")["weights"]
    return found


def assert_close(a: Path, b: Path) -> None:
    """Equal but for the order of sums: Adam turns differences of 1e-7 in a gradient near 0 into visible ones."""
    for name, value in weights(a).items():
        torch.testing.assert_close(
            value, weights(b)[name], atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name} {m}"
        )


def predict_flags(network: Path, inputs: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(network / "last.pt"), "--input", str(inputs), "--out", str(out), "--batch-size", "2"]


def assert_same_results(a: Path, b: Path) -> None:
    """The same files, and the same rows in the same order, but for the rounding of scores in other batches."""
    assert {path.relative_to(a) for path in a.rglob("*.*")} == {path.relative_to(b) for path in b.rglob("*.*")}
    tables = []
    for folder in (a, b):
        with (folder / "scores.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert [row["path"] for row in tables[0]] == [row["path"] for row in tables[1]]
    assert [row["error"] for row in tables[0]] == [row["error"] for row in tables[1]]
    scores = [[float(row["score"]) for row in table if row["score"]] for table in tables]
    assert len(set(scores[0])) > 5, "scores that hardly differ prove nothing"
    assert scores[0] == pytest.approx(scores[1], abs=1e-6, rel=0)


def test_torchrun_trains_on_two_processes_as_one_does(
    flags: list[str], network: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = torchrun("train", [*flags, "--frm-input", "none", "--out", str(out)])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("to train on") == 1
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.jsonl", "synthetic.png"}
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [STEPS]
    assert read_checkpoint(out / "last.pt")["training"]["step"] == STEPS


def test_torchrun_predicts_into_one_csv_in_the_order_of_the_files(network: Path, inputs: Path, tmp_path: Path) -> None:
    assert run("predict", predict_flags(network, inputs, tmp_path / "one"), tmp_path / "io").code == 1
    ended = torchrun("predict", predict_flags(network, inputs, tmp_path / "two"))
    assert ended.returncode == 1
    assert ended.stderr.count("not read: ") == 1
    assert "11 images" not in ended.stdout
    assert ended.stdout.count("10 images in") == 1
    assert_same_results(tmp_path / "one", tmp_path / "two")


def test_shares_do_not_overlap_nothing_is_missing_and_all_ranks_end_with_the_weights_that_are_written(
    flags: list[str], tmp_path: Path
) -> None:
    """With the U-Net: its batch norms see different images on each rank, their running statistics are averaged."""
    ranks = in_ranks(watched_train, [[*flags, "--out", str(tmp_path / "run")]], tmp_path / "io")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    (first, drawn0), (second, drawn1) = (rank.result for rank in ranks)
    assert sorted(drawn0 + drawn1) == list(range(4 * STEPS))
    assert len(drawn0) == len(drawn1)
    assert first.keys() == second.keys() == weights(tmp_path / "run").keys()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, first[name]), name
        assert torch.equal(value, second[name]), name
    assert [path.name for path in tmp_path.rglob("*.pt*")] == ["last.pt"]
    said = [line for line in ranks[1].out.splitlines() if not line.startswith("[Gloo] Rank 1 is")]  # of torch 2.8
    assert said == []


def test_two_ranks_train_the_weights_of_one_process_where_no_layer_looks_across_the_batch(
    flags: list[str], network: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    in_ranks(watched_train, [[*flags, "--frm-input", "none", "--out", str(out)]], tmp_path / "io")
    assert_close(network, out)
    initial = read_checkpoint(network / "last.pt")
    assert initial["threshold"] == pytest.approx(read_checkpoint(out / "last.pt")["threshold"], abs=1e-4)


@pytest.mark.parametrize(("act", "code"), [(interrupt, 130), (terminate, 0)])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_number_of_ranks_goes_on(
    flags: list[str], network: Path, tmp_path: Path, act: Any, code: int
) -> None:
    out = tmp_path / "run"
    arguments = [*flags, "--frm-input", "none", "--out", str(out)]
    ranks = in_ranks(watched_train, [arguments, 3, act], tmp_path / "io")
    assert [rank.code for rank in ranks] == [code, 0], ranks
    assert [len(rank.result[1]) for rank in ranks] == [6, 6]
    assert len(error_lines(ranks)) == 1
    assert read_checkpoint(out / "last.pt")["training"]["step"] == 3
    ranks = in_ranks(watched_train, [[*arguments, "--resume"]], tmp_path / "io", count=4)
    assert [rank.code for rank in ranks] == [0] * 4, ranks
    assert_close(network, out)


def assert_one_line(ranks: list[Rank], text: str) -> None:
    lines = error_lines(ranks)
    assert len(lines) == 1, ranks
    assert text in lines[0]
    assert all(rank.code in (2, -9) for rank in ranks), ranks


@pytest.mark.parametrize(
    ("act", "text"), [(not_a_number, "not finite at step 2"), (die, "another process of this run is gone")]
)
def test_a_rank_that_fails_ends_the_run_in_one_line(flags: list[str], tmp_path: Path, act: Any, text: str) -> None:
    ranks = in_ranks(watched_train, [[*flags, "--out", str(tmp_path / "run")], 2, act], tmp_path / "io")
    assert_one_line(ranks, text)
    assert not list(tmp_path.rglob("*.pt*"))


@pytest.mark.parametrize(
    ("more", "text"),
    [(["--batch-size", "3"], "multiple of the 2 processes"), (["--data", "nowhere"], "nowhere"), (["--lr", "x"], "lr")],
)
def test_a_mistake_that_all_ranks_see_is_named_once(
    flags: list[str], tmp_path: Path, more: list[str], text: str
) -> None:
    ranks = in_ranks(watched_train, [[*flags, "--out", str(tmp_path / "run"), *more]], tmp_path / "io")
    assert_one_line(ranks, text)


def test_predicted_shares_do_not_overlap_and_a_single_process_gets_the_same_files(
    network: Path, inputs: Path, tmp_path: Path
) -> None:
    single, ranks = (
        in_ranks(watched_predict, [predict_flags(network, inputs, tmp_path / str(n))], tmp_path / "io", count=n)
        for n in (1, 3)
    )
    assert [rank.code for rank in single] == [1]
    assert [rank.code for rank in ranks] == [1, 0, 0], ranks
    assert [len(rank.result) for rank in ranks] == [4, 4, 3]
    assert sorted(chain(*(rank.result for rank in ranks))) == sorted(single[0].result)
    assert_same_results(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize(
    ("act", "text"), [(fill_the_disk, "the disk is full"), (die, "another process of this run is gone")]
)
def test_a_rank_that_fails_to_predict_ends_the_run_in_one_line_without_a_csv(
    network: Path, inputs: Path, tmp_path: Path, act: Any, text: str
) -> None:
    (tmp_path / "in").mkdir()
    for number, image in enumerate(sorted((inputs / "new\nline").iterdir())):
        (tmp_path / "in" / f"{number}.png").hardlink_to(image)
    arguments = [predict_flags(network, tmp_path / "in", tmp_path / "out"), 2, act]
    ranks = in_ranks(watched_predict, arguments, tmp_path / "io")
    assert_one_line(ranks, text)
    assert not (tmp_path / "out" / "scores.csv").exists()
    if act is not die:  # as after any SIGKILL, one temporary file may be left then
        assert not [path for path in (tmp_path / "out").rglob(".*")]


def test_a_command_that_is_one_process_refuses_several(network: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(network / "last.pt"), "--data", str(data)]
    assert_one_line(in_ranks(evaluate_once, [arguments], tmp_path / "io"), "without torchrun")


@pytest.mark.parametrize(("ranks", "printed"), [("1", "done\nat exit\n"), ("2", "done\n")])
def test_a_rank_that_leaves_flushes_and_runs_no_destructor(ranks: str, printed: str) -> None:
    program = "import atexit; from almrr_ref.run.distributed import leave; atexit.register(print, 'at exit')"
    ended = subprocess.run(
        [sys.executable, "-c", program + "; print('done'); leave(3)"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks,
             "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (3, printed)
