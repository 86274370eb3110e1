"""The paper's Tables 1-3 and 5-7: train and evaluate what a table compares, and print paper beside measured.

    python bench/tables.py --data mvtec --table 3 --anomaly-source dtd/images --seeds 0 1 2
    python bench/tables.py --data mt_defect --table 5 7 --preset small --backbone resnet18 --weights resnet18.pth

--data is a data set in any layout that train knows (one category), or a folder of several, such as MVTec-AD. Every flag
of train can be given and holds for all cells; a table's variant overrides it. Each cell (variant, category, seed) is
trained once into --out/cells and never again; a stopped run goes on where it was with the same command, and a cell that
fails is named, tried again by the next run, and costs nothing but itself (exit code 1). A cell keeps its checkpoint.

Written to --out: tableN.md, .csv, .json, tableN_maps.png (Figs. 5-7: image | mask | map of each variant) and, for
Table 7, table7_bars.png (Fig. 8). Each network is that of its last step: nothing is chosen by a test part.
"""

import argparse
import dataclasses
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, Place, hold_folder, make_flags, run_cell
from common import environment
from table_output import Results, write_table

from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, make_configs
from almrr_ref.data.layouts import layout_of
from almrr_ref.metrics import METRICS
from almrr_ref.run.cli import add_device_flag, add_flags, path_argument, pick_device, run_command
from almrr_ref.run.text import one_line


@dataclass(frozen=True)
class Table:
    """What a table compares: its metrics, and for each variant the settings that make it."""

    title: str
    metrics: tuple[str, ...]
    variants: dict[str, dict[str, Any]]


PIXEL = ("pixel_auroc", "pixel_ap")
TABLES = {
    "1": Table("detection", ("image_auroc",), {"ALMRR": {}}),
    "2": Table("localisation", PIXEL, {"ALMRR": {}}),
    "3": Table(
        "encoder of the reconstruction module",
        PIXEL,
        {
            "CNN(1x1)": {"encoder": "cnn1x1"},
            "CNN(3x3)": {"encoder": "cnn3x3"},
            "Transformer": {"encoder": "transformer"},
            "Mamba": {"encoder": "mamba"},
        },
    ),
    "5": Table(
        "feature refinement module", ("image_auroc", *PIXEL), {"without FRM": {"frm_input": "none"}, "with FRM": {}}
    ),
    "6": Table(
        "backbone",
        PIXEL,
        {name: {"backbone": name.lower()} for name in ("VGG19", "ResNet18", "ResNet34", "ResNet50")},
    ),
    "7": Table(
        "blocks of the backbone",
        PIXEL,
        {
            "blocks " + " ".join(map(str, blocks)): {"blocks": blocks}
            for blocks in ((1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
        },
    ),
}
_LADDER: dict[str, dict[str, Any]] = {  # each step on top of those before it; the last is plus
    "small": {},
    "+ positions": {"standardise": "position"},
    "+ varied": {"anomaly_style": "varied"},
    "+ projection": {"frm_input": "projection"},
    "+ memory": {"memory": 48000, "memory_weight": 0.6, "distance_weight": 0.4, "balance": True},
    "+ score of places": {"score_share": 0.005, "score_margin": 12},
    "+ memory seen": {"frm_input": "memory"},
}
TABLES["plus"] = Table(
    "from small to plus, step by step (ours; run it with --preset small, on a check set)",
    METRICS,
    {
        label: {name: value for step in list(_LADDER.values())[: count + 1] for name, value in step.items()}
        for count, label in enumerate(_LADDER)
    },
)
SETTINGS = {entry.name for config in (ModelConfig, TrainConfig) for entry in dataclasses.fields(config)}


def find_categories(root: Path, chosen: list[str] | None) -> dict[str, Path]:
    """Data sets by name: the root itself, or those of its sub-folders that are one.

    Raises:
        ValueError: if there is none, or one that was chosen is not there.
    """
    if not root.is_dir():
        raise ValueError(f"data folder {one_line(root)} does not exist or is no folder")
    if layout_of(root):
        found = {root.resolve().name: root}
    else:
        found = {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir() and layout_of(folder)}
    if not found:
        raise ValueError(f"{one_line(root)} is no data set with a test part, and holds none; see README, Data layouts")
    missing = [name for name in chosen or [] if name not in found]
    if missing:
        raise ValueError(f"--categories: there is no {', '.join(missing)}; found: {', '.join(found)}")
    return {name: found[name] for name in chosen or found}


def choose_weights(given: list[str], backbone: str, base: str) -> str | None:
    """The weights of a backbone out of BACKBONE=FILE entries; an entry without a name belongs to the base backbone."""
    named = [entry.rpartition("=")[::2] for entry in given]
    weights = {name or base: file for name, file in named}.get(backbone)
    return weights if weights in (None, "random") else str(Path(weights).resolve())


def make_cells(key: str, categories: dict[str, Path], options: argparse.Namespace) -> dict[Place, Cell]:
    """Every cell of a table by (category, variant, seed).

    Raises:
        ValueError: if a setting is out of its range.
    """
    given = {name: value for name, value in vars(options).items() if name in SETTINGS - {"weights", "data"}}
    if "anomaly_source" in given:
        given["anomaly_source"] = str(Path(given["anomaly_source"]).resolve())
    model, train = make_configs(options.preset, given)
    base = {**dataclasses.asdict(train), **dataclasses.asdict(model)}
    cells = {}
    for label, own in TABLES[key].variants.items():
        make_configs(options.preset, {**given, **own})
        changed = {name: value for name, value in own.items() if base[name] != value}
        settings = {**given, **changed}  # nothing that the base has by itself: it is one cell for all tables
        settings["weights"] = choose_weights(options.weights, settings.get("backbone", model.backbone), model.backbone)
        folder = "_".join(make_flags(changed)).replace("--", "") or "base"
        for category, data in categories.items():
            for seed in options.seeds:
                places = {"data": data.resolve(), "preset": options.preset, "seed": seed, "device": options.device}
                cells[category, label, seed] = Cell(
                    f"table {key}, {one_line(category)}, {label}, seed {seed}",
                    data.resolve(),
                    options.out / "cells" / category / folder / f"seed{seed}",
                    make_flags(places | settings),
                )
    return cells


def run_table(key: str, cells: dict[Place, Cell], options: argparse.Namespace, lock: int | None) -> Results:
    """Run the cells of a table that are not finished; a failed one is named and left out."""
    done = sum(cell.finished() for cell in cells.values())
    print(f"table {key}: {len(cells)} cells, {done} of them finished", flush=True)
    failed: dict[Place, str] = {}
    for place, cell in cells.items():
        reason = "" if cell.finished() else run_cell(cell, lock)
        if reason:
            failed[place] = reason
            print(f"failed: {cell.name}: {reason} ({cell.folder / 'train.log'})", file=sys.stderr, flush=True)
    table, categories = TABLES[key], list(dict.fromkeys(category for category, _, _ in cells))
    return Results(key, table.title, table.metrics, categories, list(table.variants), options.seeds, cells, failed)


def command(options: argparse.Namespace) -> int:
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds are distinct numbers; got {options.seeds}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the cell at work saves and ends
    categories = find_categories(options.data, options.categories)
    where = environment(pick_device(options.device))
    where["command"] = " ".join(["python bench/tables.py", *map(one_line, options.argv)])
    failures = 0
    with hold_folder(options.out) as lock:
        planned = {key: make_cells(key, categories, options) for key in options.table}
        for cells in planned.values():
            for cell in cells.values():
                cell.stored()  # wrong settings show before hours of work
        for key, cells in planned.items():
            results = run_table(key, cells, options, lock)
            write_table(results, where, options.out)
            failures += len(results.failed)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python bench/tables.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    add_flags(parser, TrainConfig)
    add_flags(parser, ModelConfig)
    add = parser.add_argument
    add("--data", type=path_argument, required=True, metavar="ROOT", help="a data set, or a folder of data sets")
    add("--table", nargs="+", choices=TABLES, required=True, help="which of the paper's tables")
    add("--categories", nargs="+", metavar="NAME", help="folders below ROOT (default: all that are data sets)")
    add("--seeds", "--seed", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    add("--preset", choices=PRESETS, default="paper", help="sizes and schedule of train (default: paper)")
    help_weights = "the backbone's weights as for train; for other backbones of Table 6 BACKBONE=FILE each"
    add("--weights", nargs="+", default=[], metavar="FILE", help=help_weights)
    add("--out", type=path_argument, default=Path("runs/tables"), metavar="DIR", help="default: runs/tables")
    add_device_flag(parser)
    parser.set_defaults(argv=sys.argv[1:] if argv is None else argv)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
