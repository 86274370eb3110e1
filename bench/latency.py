"""Table 4, time per image for each encoder, plain and deployed: ``python bench/latency.py``. Random weights will do.

Timed is the whole pipeline of ``predict``: a batch of 8-bit images on the CPU -> device -> maps and scores on the CPU.
All networks of a table take turns, two runs each a round, so that a busy or throttled machine slows all of them alike:
compare the ratios. The second run of the two counts, because in use an image follows another, not another network
with its own weights in the caches, its own memory to give back, and, with onnxruntime, threads that keep turning for a
while after the end. They share one backbone and one refinement network, as the paper's comparison does.

Printed are three tables: for the paper's patches of 4 cells (256 tokens), and, without the plain form, for patches of 2
and 1 (1,024 and 4,096 tokens): the paper does not say how many tokens its alternatives saw, and attention is cheap for
256. Stages: *features*, from the image to the maps of the backbone's blocks (plain: resized and concatenated);
*encoder*, with reduction, patch embedding and positions before it; *decoder*, with the 1x1 convolution back (fused:
with the sums over channels); *FRM*, with everything after it.

Before anything is timed, outputs must be finite, equal between two runs (to 1e-6), and those of a deployed form equal
to the plain network's (how closely: forms.py). What the time does not allow is named, and a dash in the table.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, exact_memory, markdown_table, number, quantiles, write_json
from forms import FORMS, NAMES, STAGES, Row, build_rows, check, draw_images, one_run
from torch import Tensor

from almrr_ref.config import PRESETS, ModelConfig, make_configs
from almrr_ref.run.cli import add_device_flag, pick_device, positive, run_command

PAPER = {"cnn1x1": 0.10, "cnn3x3": 0.13, "transformer": 0.18, "mamba": 0.12}  # seconds on an A100
MOST_RUNS, LEAST_RUNS, WARM_UP = 100, 3, 1  # rounds; `check` has warmed up already
SHARES = {4: 0.2, 2: 0.05, 1: 0.12}  # of the time, for the rounds of a table; other patch sizes get 0.05


def measure(rows: list[Row], image: Tensor, device: torch.device, runs: int | None, seconds: float) -> None:
    """Time batch 1: ``runs`` rounds, or MOST_RUNS, or as many as fit into the seconds, after the warm-up."""
    begin = time.perf_counter()
    for done in range(-WARM_UP, runs or MOST_RUNS):
        if runs is None and done >= LEAST_RUNS and time.perf_counter() - begin > seconds:
            break
        for row in rows:
            one_run(row, image, device)
            total, stages, _ = one_run(row, image, device)
            if done >= 0:
                row.totals.append(total)
                row.stages += [stages] if stages else []


def measure_batches(rows: list[Row], images: Tensor, batches: list[int], device: torch.device, end: float) -> None:
    """Time one run (on a GPU: the faster of two) of each larger batch, as long as it should be over by ``end``."""
    repeats, left_out = 2 if device.type == "cuda" else 1, []
    for row in sorted(rows, key=lambda row: row.form == "plain"):  # the deployed forms first
        for batch in batches:
            if time.perf_counter() + repeats * batch * statistics.median(row.totals) > end:
                left_out.append(f"{row.name}, batch {batch}")
                continue
            row.rates[batch] = batch / min(one_run(row, images[:batch], device)[0] for _ in range(repeats))
    if left_out:
        print(f"\nleft out, the time does not allow it (--seconds): {'; '.join(left_out)}")


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """What is printed and written: milliseconds an image, ratios as medians over the rounds."""
    plain = {row.encoder: row.totals for row in rows if row.form == "plain"}
    mamba = {row.form: row.totals for row in rows if row.encoder == "mamba"}
    found = []
    for row in rows:
        median, p20, p80 = (1e3 * value for value in quantiles(row.totals))
        entry: dict[str, Any] = {"encoder": NAMES[row.encoder], "form": row.form}
        entry |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
        stages = zip(*row.stages) if row.stages else [None] * len(STAGES)
        entry |= {f"{name}_ms": t and 1e3 * statistics.median(t) for name, t in zip(STAGES, stages)}
        for name, base in (("of_plain", plain.get(row.encoder)), ("of_mamba", mamba.get(row.form))):
            entry[name] = base and statistics.median(own / other for own, other in zip(row.totals, base))
        entry |= {"images_per_second": row.rates, "memory_mib": row.memory, "parameters": row.parameters}
        entry |= {"gmac": row.gmac, "paper_s": PAPER[row.encoder], "paper_of_mamba": PAPER[row.encoder] / 0.12}
        found.append(entry | {"runs_s": row.totals})
    return found


def print_table(entries: list[dict[str, Any]], batches: list[int], paper: bool) -> None:
    columns = ["encoder", "form", "median ms", "p20", "p80", *STAGES, "of plain", "of Mamba"]
    columns += [f"images/s, batch {batch}" for batch in batches]
    known = entries[0]["memory_mib"] is not None
    columns += ["MiB"] * known + ["M param.", "GMAC"] + ["paper s", "paper of Mamba"] * paper
    table = []
    for e in entries:
        times = [number(e[f"{name}_ms"], 1) for name in ("median", "p20", "p80", *STAGES)]
        ratios = [number(e["of_plain"], 2), number(e["of_mamba"], 2)]
        rates = [number(e["images_per_second"].get(batch), 2) for batch in batches]
        millions = None if e["parameters"] is None else e["parameters"] / 1e6
        costs = [number(e["memory_mib"], 0)] * known + [number(millions, 1), number(e["gmac"], 2)]
        costs += [f"{e['paper_s']:.2f}", f"{e['paper_of_mamba']:.2f}"] * paper
        table.append([e["encoder"], e["form"], *times, *ratios, *rates, *costs])
    print(markdown_table(columns, table, left=2), flush=True)


def bench_table(config: ModelConfig, rows: list[Row], options: argparse.Namespace, end: float) -> dict[str, Any]:
    """Time the networks of one patch size, checked before, and print their table."""
    device, is_papers = pick_device(options.device), config.patch_size == 4
    batches = options.batch if is_papers else []
    images = draw_images(max([1, *batches]), config)
    measure(rows, images[:1], device, options.runs, options.seconds * SHARES.get(config.patch_size, 0.05))
    measure_batches(rows, images, batches, device, end)
    tokens = (config.feature_size // config.patch_size) ** 2
    print(f"\nPatch size {config.patch_size}, {tokens:,} tokens; batch 1, {len(rows[0].totals)} runs each\n")
    entries = summary(rows)
    print_table(entries, batches, is_papers)
    return {"patch_size": config.patch_size, "tokens": tokens, "rows": entries}


def command(options: argparse.Namespace) -> int:
    begin, device = time.perf_counter(), pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    given = {"backbone": options.backbone, "weights": "random", "image_size": options.image_size}
    base = make_configs(options.preset, given)[0]
    configs = [dataclasses.replace(base, patch_size=size) for size in options.patch_sizes]
    where = environment(device) | {"dtype": "float32", "image_size": base.image_size, "preset": options.preset}
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    image, difference, tables = draw_images(1, base), 0.0, []
    for config in configs:
        with contextlib.ExitStack() as stack:
            if config is configs[0]:  # the one whose memory is taken: all others are slower to build so
                stack.enter_context(exact_memory())
            rows = build_rows(config, options.encoders, options.forms, device)
            difference = max(difference, check(rows, image, device, memory=config is configs[0]))
        tables.append([row for row in rows if row.timed])
    print(f"checked: finite, equal between runs, deployed maps at most {difference:.1e} from plain ones", flush=True)
    print(f"set up in {time.perf_counter() - begin:.0f} s", flush=True)
    left = [sum(SHARES.get(c.patch_size, 0.05) for c in configs[i + 1 :]) for i in range(len(configs))]
    found = []
    for config, rows, later in zip(configs, tables, left):
        found.append(bench_table(config, rows, options, begin + options.seconds * (1 - later)))
        if options.json:
            write_json(options.json, {**where, "difference": difference, "tables": found})
    print("\nOf plain, of Mamba: median of the ratios within a round. MiB: height of one run, beside the weights.")
    print("GMAC: products of convolutions and matrices. The paper's seconds: an A100, its own code.")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python bench/latency.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=positive, help=f"rounds at batch 1 (default: {MOST_RUNS}, or what the time allows)")
    add("--seconds", type=positive, default=260, help="time for all of it, roughly (default: 260)")
    add("--batch", type=positive, nargs="*", default=[16, 64], help="larger batches, for images/s (default: 16 64)")
    add("--patch-sizes", type=positive, nargs="+", default=[4, 2, 1], help="a table for each (default: 4 2 1)")
    add("--encoders", nargs="+", choices=NAMES, default=list(NAMES), help=f"default: {' '.join(NAMES)}")
    add(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=["plain", "fused"],
        help=f"of {', '.join(FORMS)} (default: plain fused)",
    )
    add("--preset", choices=PRESETS, default="paper", help="sizes of the network (default: paper)")
    add("--backbone", default="resnet50", help="default: resnet50, the paper's")
    add("--image-size", type=positive, default=256, help="side in pixels (default: 256, the paper's)")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    add_device_flag(parser)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
