"""bench/tables.py: cells are trained once, killed runs go on, failures are named, and figures are the measured ones."""

import argparse
import contextlib
import csv
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trust_cases import write_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import tables  # noqa: E402
from cells import Cell, hold_folder  # noqa: E402
from paper_tables import PAPER  # noqa: E402
from table_output import Results, draw_bars, markdown, spread  # noqa: E402

from almrr_ref import train  # noqa: E402
from almrr_ref.config import make_configs  # noqa: E402
from almrr_ref.run.checkpoint import read_checkpoint  # noqa: E402

FLAGS = [
    *("--preset", "small", "--backbone", "resnet18", "--weights", "random", "--blocks", "1", "--image-size", "32"),
    *("--batch-size", "2", "--device", "cpu"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One category, a name of the paper's, whose test part has a bright square for a defect."""
    root = tmp_path / "grid"
    for part, seed in (("train/good", 0), ("test/good", 1), ("test/hole", 2)):
        write_images(root / part, 3, seed)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 4:12] = 255
    (root / "ground_truth" / "hole").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(mask).save(root / "ground_truth" / "hole" / f"{i:03}_mask.png")
    return root


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=-3, stderr=-3)


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    deadline = monotonic() + 300
    while not happened():
        assert process.poll() is None, "it ended too early"
        assert monotonic() < deadline, "it never happened"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)


def percent(file: Path, metric: str) -> str:
    return f"{100 * json.loads(file.read_text())[metric]:.2f}"


def test_a_killed_run_goes_on_and_trains_no_cell_twice(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--table", "5", *FLAGS, "--steps", "60", "--out", str(out)]
    first, second = (out / "cells" / "grid" / name / "seed0" for name in ("frm-input_none", "base"))
    process = start(*arguments)
    wait_until(process, (second / "log.jsonl").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((first / "cell.json").read_text())["finished"]
    assert not json.loads((second / "cell.json").read_text())["finished"]
    before = (first / "train.log").read_bytes(), (first / "last.pt").stat().st_mtime_ns
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert "2 cells, 1 of them finished" in ended.stdout
    assert before == ((first / "train.log").read_bytes(), (first / "last.pt").stat().st_mtime_ns)
    assert (second / "train.log").read_text().count("percent ") == 1 + (
        "continuing" in (second / "train.log").read_text()
    )
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
        own = [percent(folder / "evaluation" / "metrics.json", metric) for folder in (first, second)]
        row = next(part for part in ended.stdout.split("| " + metric.replace("_", " "))[1:]).splitlines()[2]
        paper = {"image_auroc": ("92.0", "100.0"), "pixel_auroc": ("98.6", "99.5"), "pixel_ap": ("55.3", "61.3")}[
            metric
        ]
        assert row == f"| grid | {paper[0]} | {own[0]} ± - | {paper[1]} | {own[1]} ± - |"
    with Image.open(out / "table5_maps.png") as sheet:
        assert sheet.width > 4 * 192
    assert "2 cells, 2 of them finished" in run(*arguments).stdout


def test_a_failed_cell_is_named_and_the_rest_goes_on(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "leather" / "train" / "good"  # alphabetically after grid; both lie in tmp_path
    broken.mkdir(parents=True)
    (broken / "0.png").write_bytes(b"no image")
    shutil.copytree(data, tmp_path / "wood")
    out = tmp_path / "out"
    ended = run(
        "--data",
        str(tmp_path),
        "--table",
        "1",
        *FLAGS,
        "--steps",
        "2",
        "--out",
        str(out),
        "--categories",
        "leather",
        "wood",
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("failed: table 1, leather, ALMRR, seed 0: exit code 2: ")
    assert "0.png" in ended.stderr
    text = (out / "table1.md").read_text()
    assert "- failed: table 1, leather, ALMRR, seed 0: exit code 2: " in text
    value = percent(out / "cells" / "wood" / "base" / "seed0" / "evaluation" / "metrics.json", "image_auroc")
    assert "| leather | 100.0 | 98.2 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | - |\n" in text
    assert f"| wood | 99.1 | 99.6 | 99.2 | 96.3 | 100.0 | 99.6 | 100.0 | {value} ± - |\n" in text
    with (out / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["measured"] != "") for row in rows] == [("leather", False), ("wood", True)]
    assert [entry["failed"] is None for entry in json.loads((out / "table1.json").read_text())["cells"]] == [
        False,
        True,
    ]


def test_sigterm_saves_the_cell_at_work(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("--data", str(data), "--table", "1", *FLAGS, "--steps", "100000", "--out", str(out))
    folder = out / "cells" / "grid" / "base" / "seed0"
    wait_until(process, lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert 0 < read_checkpoint(folder / "last.pt")["training"]["step"] < 100000
    assert not json.loads((folder / "cell.json").read_text())["finished"]


def options(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    """The parsed command line."""
    seen: list[argparse.Namespace] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "command", lambda found: seen.append(found) or 0)
        tables.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    return seen[0]


def test_cells_of_the_same_settings_are_shared_between_tables(tmp_path: Path) -> None:
    found = options(tmp_path, "--table", "1", "--seeds", "0", "4", "--lr", "0.01", "--backbone", "resnet50")
    made = {
        (key, label): cell
        for key in PAPER
        for (_, label, seed), cell in tables.make_cells(key, {"grid": tmp_path}, found).items()
        if seed == 4
    }
    base = tmp_path / "out" / "cells" / "grid" / "base" / "seed4"
    full = {("1", "ALMRR"), ("2", "ALMRR"), ("3", "Mamba"), ("5", "with FRM"), ("6", "ResNet50"), ("7", "blocks 1 2 3")}
    folders = {place: cell.folder for place, cell in made.items()}
    assert {place for place, folder in folders.items() if folder == base} == full
    assert len({made[place].flags for place in full}) == 1
    assert len(set(folders.values())) == len(folders) - len(full) + 1
    assert folders["7", "blocks 2 3"].parent.name == "blocks_2_3"


def test_every_variant_makes_flags_that_train_understands(tmp_path: Path) -> None:
    found = options(
        tmp_path, "--table", "6", "--weights", "r.pth", "vgg19=v.pth", "resnet34=random", "--preset", "small"
    )
    base = {name: value for config in make_configs("small", {}) for name, value in asdict(config).items()}
    for key in tables.TABLES:
        for (_, label, seed), cell in tables.make_cells(key, {"grid": tmp_path}, found).items():
            parsed = vars(train.build_parser().parse_args(cell.flags))
            assert (parsed["seed"], parsed["preset"], parsed["data"]) == (seed, "small", str(tmp_path))
            for name, value in tables.TABLES[key].variants[label].items():
                known = parsed.get(name, base[name])
                assert list(known) == list(value) if isinstance(value, tuple) else known == value
            if key == "6":
                weights = {"VGG19": "v.pth", "ResNet34": "random", "ResNet50": "r.pth"}.get(label)
                assert Path(parsed.get("weights", "")).name == (weights or "")


def test_a_cell_of_other_settings_is_not_taken_for_one_of_these(data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out" / "cells" / "grid" / "base" / "seed0"
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"flags": ["--steps", "9"], "finished": True}))
    assert tables.main(["--data", str(data), "--table", "1", *FLAGS, "--out", str(tmp_path / "out")]) == 2
    assert "holds a cell with other settings (--steps 9)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--table", "1", "--categories", "carpet"], "there is no carpet; found: grid"),
        (["--table", "1", "--seeds", "1", "1"], "distinct"),
        (["--table", "1", "--image-size", "33"], "--image-size"),
        (["--table", "5", "--distance-weight", "1"], "--distance-weight"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_trained(
    arguments: list[str], told: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert tables.main(["--data", str(data), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "cells").exists()


def test_data_sets_are_found_in_the_root_and_below_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert tables.find_categories(data, None) == {"grid": data}
    assert tables.find_categories(tmp_path, None) == {"grid": data}
    with pytest.raises(ValueError, match="is no data set"):
        tables.find_categories(tmp_path / "notes", None)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Table 7 of two categories and two seeds, by hand: one cell failed, one has no image metrics."""
    figures = {"blocks 1 2": (0.9, 0.5), "blocks 2 3": (0.8, 0.25)}
    made, places = {}, [(c, v, s) for c in ("grid", "wood") for v in figures for s in (0, 1)]
    for category, variant, seed in places:
        cell = Cell(f"{category} {variant} {seed}", tmp_path, tmp_path / category / variant / str(seed), ())
        auroc, ap = figures[variant]
        values = {"pixel_auroc": auroc + seed / 100, "pixel_ap": ap, "reasons": {}, "unreadable": []}
        if (category, variant) == ("wood", "blocks 2 3"):
            values |= {"pixel_ap": None, "reasons": {"pixel_ap": "no defective pixel"}}
        cell.metrics_file.parent.mkdir(parents=True)
        cell.metrics_file.write_text(json.dumps(values))
        made[category, variant, seed] = cell
    failed = {("wood", "blocks 1 2", 1): "exit code 2: no images"}
    metrics = ("pixel_auroc", "pixel_ap")
    return Results("7", "blocks", metrics, ["grid", "wood"], list(figures), [0, 1], made, failed)


def test_markdown_has_mean_and_sample_deviation_and_says_what_is_missing(results: Results) -> None:
    text = markdown(results, {"command": "c", "device": "d", "versions": "v"})
    deviation = f"{statistics.stdev([90.0, 91.0]):.2f}"
    assert f" 98.4 | 90.50 ± {deviation} | 99.2 | 80.50 ± {deviation} |" in text
    assert f" 97.5 | 90.00 ± - (n=1) | 98.3 | 80.50 ± {deviation} |" in text
    assert f" - | 90.00 ± - (n=1) | - | 80.50 ± {deviation} |" in text
    assert "| 97.9 | - | 98.7 | - |" in text
    assert " 74.9 | 50.00 ± - (n=1) | 80.4 | - |" in text
    assert "- failed: wood blocks 1 2 1: exit code 2: no images" in text
    assert text.count("- undefined: wood blocks 2 3") == 2
    assert spread([], 2) == "-"


def test_bars_have_the_measured_height(results: Results, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    heights = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: heights.extend([p.get_height() for p in figure.axes[0].patches]))
        draw_bars(results, tmp_path / "bars.png")
    assert heights == pytest.approx([90.5, 90.0, 90.0, 0.0, 80.5, 80.5, 80.5, 0.0])
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.width > 400


WAIT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cells import hold_folder
with hold_folder(Path(sys.argv[2])):
    print("entered", (Path(sys.argv[2]) / "ended").exists())
"""


def test_a_training_that_outlives_its_bench_keeps_the_folder(tmp_path: Path) -> None:
    """A second run waits for it; here, for a process that inherited the lock and ends when told."""
    train_code = f"input(); open({str(tmp_path / 'ended')!r}, 'w').close()"
    with hold_folder(tmp_path) as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", train_code], stdin=subprocess.PIPE, pass_fds=[lock])
    command = [sys.executable, "-c", WAIT, str(ROOT / "bench"), str(tmp_path)]
    second = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(b"waiting: ")
    assert not select.select([second.stdout], [], [], 1.0)[0], "it went on"
    child.communicate(b"\n")
    assert second.communicate(timeout=60)[0] == b"entered True\n"
