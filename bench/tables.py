"""The paper's Tables 1-3 and 5-7: train and evaluate what a table compares, and print paper beside measured.

    python bench/tables.py --data mvtec --table 3 --seeds 0 1 2 -- --anomaly-source dtd/images
    python bench/tables.py --data mt_defect --table 5 7 --weights resnet18.pth -- --preset plus --backbone resnet18

--data is a data set in any layout that train knows (one category), or a folder of several, such as MVTec-AD. What
follows ``--`` are flags of train: they hold for every training, unless a table's variant overrides them. Each category,
variant and seed is one ``python -m almrr_ref.train`` in a folder of its own below --out. What has its metrics there is
not trained again, so the same command goes on where an earlier one was stopped. What fails is named, is tried again by
the next command, and costs nothing but itself (exit code 1).

Written to --out: tableN.md, .csv and .json. Each network is that of its last step: nothing is chosen by a test part.
"""

import argparse
import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, make_parser, markdown_table, number, spread, write_json
from paper_tables import CATEGORIES, PAPER

from almrr_ref.data.layouts import layout_of
from almrr_ref.run.cli import path_argument, run_command
from almrr_ref.run.files import atomic_write, make_folder
from almrr_ref.run.text import one_line
from almrr_ref.train import build_parser as train_parser


@dataclass(frozen=True)
class Table:
    """What a table compares: its metrics, and for each variant the flags of train that make it."""

    title: str
    metrics: tuple[str, ...]
    variants: dict[str, dict[str, Any]]


PIXEL = ("pixel_auroc", "pixel_ap")
ENCODERS = {"CNN(1x1)": "cnn1x1", "CNN(3x3)": "cnn3x3", "Transformer": "transformer", "Mamba": "mamba"}
BACKBONES = ("VGG19", "ResNet18", "ResNet34", "ResNet50")
BLOCKS = ((1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
TABLES = {
    "1": Table("detection", ("image_auroc",), {"ALMRR": {}}),
    "2": Table("localisation", PIXEL, {"ALMRR": {}}),
    "3": Table("encoder", PIXEL, {name: {"encoder": encoder} for name, encoder in ENCODERS.items()}),
    "5": Table("refinement", ("image_auroc", *PIXEL), {"without FRM": {"frm_input": "none"}, "with FRM": {}}),
    "6": Table("backbone", PIXEL, {name: {"backbone": name.lower()} for name in BACKBONES}),
    "7": Table("blocks", PIXEL, {f"blocks {' '.join(map(str, blocks))}": {"blocks": blocks} for blocks in BLOCKS}),
}
DEFAULTS = {"encoder": "mamba", "frm_input": "mean", "backbone": "resnet50", "blocks": (1, 2, 3)}
OWN_AVERAGE, PAPERS_AVERAGE = "avg of these", "paper's five textures, avg"  # "avg": where both are of the same five


@dataclass
class Cell:
    """One training of a table, and what came of it: metrics.json, or why it failed."""

    category: str
    variant: str
    seed: int
    flags: list[str]
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def metrics_file(self) -> Path:
        return self.folder / "evaluation" / "metrics.json"


def find_categories(root: Path, chosen: list[str] | None) -> dict[str, Path]:
    """Data sets by name: the root itself, or those of its sub-folders that are one; ValueError if there is none."""
    folders = [root.resolve()] if layout_of(root) else sorted(folder for folder in root.iterdir() if folder.is_dir())
    categories = {folder.name: folder.resolve() for folder in folders if layout_of(folder)}
    if not categories:
        raise ValueError(
            f"{one_line(root)} is no data set with a test part, and holds none; see README, Your own images"
        )
    if missing := [name for name in chosen or [] if name not in categories]:
        raise ValueError(f"--categories: there is no {', '.join(missing)}; found: {', '.join(categories)}")
    return {name: categories[name] for name in chosen or categories}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings -> flags of train: {"blocks": (1, 2)} -> --blocks 1 2."""
    flags: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def make_cells(table: Table, categories: dict[str, Path], options: argparse.Namespace) -> list[Cell]:
    """Every training of a table; what a variant leaves as it is has no flag, so tables share it (folder "base")."""
    train_flags = ["--preset", "paper", "--backbone", "resnet50", *options.train_flags]
    parsed = vars(train_parser().parse_args(train_flags))
    base = {name: parsed.get(name, default) for name, default in DEFAULTS.items()}
    weights = dict(entry.rpartition("=")[::2] for entry in options.weights)
    known = {base["backbone"], *map(str.lower, BACKBONES)}
    if unknown := weights.keys() - {"", *known}:
        raise ValueError(f"--weights {min(unknown)}=FILE: the backbones are {', '.join(sorted(known))}")
    cells = []
    for variant, settings in table.variants.items():
        changed = settings if as_flags(base | settings) != as_flags(base) else {}
        folder = "_".join(as_flags(changed)).replace("--", "") or "base"
        backbone = changed.get("backbone", base["backbone"])
        file = weights.get(backbone) or (weights.get("") if backbone == base["backbone"] else None)
        flags = [*train_flags, *as_flags(changed), *(["--weights", file] if file else [])]
        for category, data in categories.items():
            for seed in options.seeds:
                cell_flags = [*flags, *as_flags({"data": data, "seed": seed})]
                cells.append(Cell(category, variant, seed, cell_flags, options.out / category / folder / f"seed{seed}"))
    return cells


def refuse_other_flags(cell: Cell) -> None:
    """Raise a ValueError if the cell's folder was trained with other flags; a training that failed at once was none."""
    path, trained = cell.folder / "flags.json", cell.metrics_file.exists() or (cell.folder / "last.pt").exists()
    if trained and path.exists() and (flags := json.loads(path.read_text())["flags"]) != cell.flags:
        raise ValueError(f"{cell.folder} was trained with other flags ({' '.join(flags)}); name another --out")


def run_cell(cell: Cell) -> None:
    """Train and evaluate, unless that is done; the cell has its metrics then, or the reason why not."""
    if not cell.metrics_file.exists():
        make_folder(cell.folder)
        write_json(cell.folder / "flags.json", {"flags": cell.flags})
        command = [sys.executable, "-m", "almrr_ref.train", *cell.flags, "--out", str(cell.folder), "--resume"]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        log = cell.folder / "train.log"
        with log.open("a") as file:
            ended = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path})
        if not cell.metrics_file.exists():
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            cell.failure = f"exit code {ended.returncode}: {one_line(last)}"
            return
    cell.metrics = json.loads(cell.metrics_file.read_text())


def measured(cells: list[Cell], category: str, variant: str, metric: str) -> list[float | None]:
    """One figure in percent for each seed, None where it is missing; an average is one over all categories."""
    by_seed: dict[int, list[float]] = {}
    for cell in cells:
        if cell.variant == variant and category in (cell.category, "avg", OWN_AVERAGE):
            value = cell.metrics.get(metric)
            by_seed.setdefault(cell.seed, []).append(math.nan if value is None else 100 * value)
    means = map(statistics.fmean, by_seed.values())
    return [None if math.isnan(mean) else mean for mean in means]


def paper_value(key: str, category: str, variant: str, metric: str) -> float | None:
    """The paper's figure in percent; None where it has none."""
    values = PAPER[key][variant].get("avg" if category == PAPERS_AVERAGE else category)
    return None if values is None else values[TABLES[key].metrics.index(metric)]


def markdown(key: str, cells: list[Cell], where: dict[str, Any]) -> str:
    """A table for each metric: a row for each category, paper and measured for each variant."""
    table = TABLES[key]
    lines = [f"## Table {key}: {table.title}", "", f"`{where['command']}`", ""]
    lines += [f"Mean ± sample standard deviation over the seeds {where['seeds']}; {where['device']}.", ""]
    rows = list(dict.fromkeys(cell.category for cell in cells))
    if {*rows, "avg"} == set(CATEGORIES):
        rows.append("avg")
    else:
        rows += [*[OWN_AVERAGE] * (len(rows) > 1), PAPERS_AVERAGE]
    for metric in table.metrics:
        heads = [f"{metric.replace('_', ' ')}, percent"]
        for name in table.variants:
            heads += [f"{name} paper", f"{name} measured"]
        body = []
        for category in rows:
            row = [one_line(category)]
            for name in table.variants:
                row.append(number(paper_value(key, category, name, metric), 1))
                row.append(spread(measured(cells, category, name, metric)))
            body.append(row)
        lines += [markdown_table(heads, body), ""]
    failed = (cell for cell in cells if cell.failure)
    lines += [f"- failed: {cell.category}, {cell.variant}, seed {cell.seed}: {cell.failure}" for cell in failed]
    return "\n".join(lines).rstrip() + "\n"


def write_table(key: str, cells: list[Cell], where: dict[str, Any], out: Path) -> None:
    """Print the Markdown, and write it, the CSV and the JSON."""
    text, lines = markdown(key, cells, where), io.StringIO()
    print("\n" + text, flush=True)
    writer = csv.writer(lines)
    writer.writerow(("table", "category", "variant", "seed", "metric", "measured", "paper"))
    for cell in cells:
        for metric in TABLES[key].metrics:
            paper = paper_value(key, cell.category, cell.variant, metric)
            [value] = measured([cell], cell.category, cell.variant, metric)
            writer.writerow((key, cell.category, cell.variant, cell.seed, metric, value, paper))
    atomic_write(out / f"table{key}.md", text)
    atomic_write(out / f"table{key}.csv", lines.getvalue())
    entries = [{**vars(cell), "folder": str(cell.folder)} for cell in cells]
    write_json(out / f"table{key}.json", {"table": key, **where, "cells": entries})


def command(options: argparse.Namespace) -> int:
    categories = find_categories(options.data, options.categories)
    tables = {key: make_cells(TABLES[key], categories, options) for key in options.table}
    for cells in tables.values():
        for cell in cells:
            refuse_other_flags(cell)  # before hours of work
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"seeds": options.seeds}
    where["command"] = " ".join(["python bench/tables.py", *map(one_line, options.argv)])
    for key, cells in tables.items():
        done = sum(cell.metrics_file.exists() for cell in cells)
        print(f"table {key}: {len(cells)} trainings, {done} of them done", flush=True)
        for cell in cells:
            run_cell(cell)
            if cell.failure:
                print(f"failed: {cell.folder}: {cell.failure}", file=sys.stderr, flush=True)
        write_table(key, cells, where, options.out)
    return int(any(cell.failure for cells in tables.values() for cell in cells))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=path_argument, required=True, metavar="ROOT", help="a data set, or a folder of data sets")
    add("--table", nargs="+", choices=TABLES, required=True, help="which of the paper's tables")
    add("--categories", nargs="+", metavar="NAME", help="folders below ROOT (default: all that are data sets)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    weights = "the backbone's weights as for train; or NAME=FILE for each backbone of Table 6"
    add("--weights", nargs="+", default=[], metavar="FILE", help=weights)
    add("--out", type=path_argument, default=Path("runs/tables"), metavar="DIR", help="default: runs/tables")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser.set_defaults(argv=argv, train_flags=argv[end + 1 :])
    return run_command(command, parser, argv[:end])


if __name__ == "__main__":
    sys.exit(main())
