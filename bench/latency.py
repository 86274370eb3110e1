"""Table 4, time per image for each encoder, plain and deployed: ``python bench/latency.py``. Random weights will do.

Timed is the whole of ``predict``: a batch of 8-bit images on the CPU -> device -> maps and scores on the CPU. With a
GPU both ends lie in pinned memory, allocated before, and a run ends with one wait for the copies. All networks of a
table take turns, so that a busy or throttled machine slows all of them alike: compare the ratios. Each runs twice a
round and the second run counts, because in use one image follows another; the first still finds another network's
weights in the caches, and onnxruntime's threads spinning. All share one backbone and one refinement network.

There are three tables: for the paper's patches of 4 cells (256 tokens), and, without the plain form, for patches of 2
and 1 (1,024 and 4,096 tokens), because the paper does not say how many tokens its alternatives saw. The stages are
*features*, from the image to the maps of the backbone's blocks (plain: resized and concatenated); *encoder*, with
reduction, patch embedding and positions before it; *decoder*, with the 1x1 convolution back (fused: with the sums over
channels); *FRM*, with everything after it. Of `plus`, whose forms search its memory at different times, they are not
told apart.

Before anything is timed, maps must be finite, equal between two runs (to 1e-6), and those of a deployed form, and the
tokens of its encoder, close to the plain network's (forms.py says how close). GMAC are products of convolutions and
matrices; the paper's seconds are of an A100 and its own code.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from typing import Any

import torch
from common import as_line, environment, markdown_table, measuring_parser, number, quantiles, rounds, write_json
from forms import FORMS, NAMES, STAGES, Row, build_rows, check, draw_images, one_run
from torch import Tensor

from almrr_ref.config import PRESETS, make_configs
from almrr_ref.run.cli import pick_device, positive, run_command

PAPER = {"cnn1x1": 0.10, "cnn3x3": 0.13, "transformer": 0.18, "mamba": 0.12}  # seconds an image
MOST_RUNS, LEAST_RUNS = 100, 3  # rounds; `check` has warmed up


def measure(rows: list[Row], images: Tensor, device: torch.device, seconds: float) -> None:
    """Take LEAST_RUNS to MOST_RUNS rounds, as many as fit into the seconds."""
    for _ in rounds(seconds, LEAST_RUNS, MOST_RUNS):
        for row in rows:
            one_run(row, images, device)
            total, stages, _ = one_run(row, images, device)
            row.totals.append(total)
            row.stages += [stages] if stages else []


def summary(rows: list[Row], batch: int) -> list[dict[str, Any]]:
    """What is printed and written: milliseconds a batch, ratios as medians over the rounds."""
    plain = {row.encoder: row.totals for row in rows if row.form == "plain"}
    mamba = {row.form: row.totals for row in rows if row.encoder == "mamba"}
    entries = []
    for row in rows:
        median, p20, p80 = (1e3 * value for value in quantiles(row.totals))
        entry: dict[str, Any] = {"encoder": NAMES[row.encoder], "form": row.form}
        entry |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "images_per_second": 1e3 * batch / median}
        stages = zip(*row.stages) if row.stages else [None] * len(STAGES)
        entry |= {f"{name}_ms": t and 1e3 * statistics.median(t) for name, t in zip(STAGES, stages)}
        for name, base in (("of_plain", plain.get(row.encoder)), ("of_mamba", mamba.get(row.form))):
            entry[name] = base and statistics.median(time / other for time, other in zip(row.totals, base))
        entry |= {"parameters": row.parameters, "gmac": row.gmac, "paper_s": PAPER[row.encoder], "runs_s": row.totals}
        entries.append(entry)
    return entries


def print_table(entries: list[dict[str, Any]], paper: bool) -> None:
    columns = ["encoder", "form", "median ms", "p20", "p80", *STAGES, "of plain", "of Mamba", "images/s"]
    columns += ["M param.", "GMAC"] + ["paper s"] * paper
    table = []
    for e in entries:
        times = [number(e[f"{name}_ms"], 1) for name in ("median", "p20", "p80", *STAGES)]
        ratios = [number(e[name], 2) for name in ("of_plain", "of_mamba", "images_per_second")]
        costs = [number(e["parameters"] and e["parameters"] / 1e6, 1), number(e["gmac"], 2)]
        table.append([e["encoder"], e["form"], *times, *ratios, *costs, *[f"{e['paper_s']:.2f}"] * paper])
    print(markdown_table(columns, table, left=2), flush=True)


def command(options: argparse.Namespace) -> int:
    device = pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    settings = {"backbone": options.backbone, "weights": "random", "image_size": options.image_size}
    settings |= {"standardise": "position"} if options.preset == "plus" else {}
    base = make_configs(options.preset, settings)[0]
    configs = [dataclasses.replace(base, patch_size=size) for size in options.patch_sizes]
    size = "{}x{}".format(*base.size)
    where = environment(device) | {"preset": options.preset, "image_size": size, "batch": options.batch}
    print(as_line(where), flush=True)
    images, tables, rows_of, difference = draw_images(options.batch, base), [], [], 0.0
    images = images.pin_memory() if device.type == "cuda" else images
    for config in configs:
        rows = build_rows(config, options.encoders, options.forms, options.batch, device)
        difference = max(difference, check(rows, images, device))
        rows_of.append([row for row in rows if row.timed])
    print(f"checked: finite, equal between runs, deployed maps at most {difference:.1e} from plain ones", flush=True)
    for config, rows in zip(configs, rows_of):
        measure(rows, images, device, options.seconds)
        tokens = math.prod(config.feature_size) // config.patch_size**2
        print(f"\nPatch size {config.patch_size}, {tokens:,} tokens; {len(rows[0].totals)} runs each\n")
        entries = summary(rows, options.batch)
        print_table(entries, paper=config.patch_size == 4)
        tables.append({"patch_size": config.patch_size, "tokens": tokens, "rows": entries})
        if options.json:
            write_json(options.json, {**where, "difference": difference, "tables": tables})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = measuring_parser(__file__, __doc__)
    add = parser.add_argument
    help_seconds = f"for the rounds of each table, but {LEAST_RUNS} at least, {MOST_RUNS} at most (default: 60)"
    add("--seconds", type=positive, default=60, help=help_seconds)
    add("--batch", type=positive, default=1, help="images a run (default: 1)")
    add("--patch-sizes", type=positive, nargs="+", default=[4, 2, 1], help="a table for each (default: 4 2 1)")
    add("--encoders", nargs="+", choices=NAMES, default=list(NAMES), help=f"default: {' '.join(NAMES)}")
    help_forms = f"of {', '.join(FORMS)} (default: plain fused)"
    add("--forms", nargs="+", choices=FORMS, default=["plain", "fused"], help=help_forms)
    add("--preset", choices=PRESETS, default="paper", help="sizes of the network (default: paper)")
    add("--backbone", default="resnet50", help="default: resnet50, the paper's")
    add("--image-size", nargs="+", type=positive, default=[256], help="side, or height and width, in pixels (256)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
