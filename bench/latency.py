"""Table 4, time per image for each encoder, plain and fused: ``python bench/latency.py``. Random weights will do.

Timed is the whole pipeline of ``predict``: a batch of 8-bit images on the CPU -> device -> maps and scores on the CPU.
All eight networks take turns, one run each a round, so that a busy or throttled machine slows all of them alike:
compare the ratios. They share one backbone and one refinement network, as the paper's comparison does.

Stages: *features*, from the image to the maps of the backbone's blocks (plain: resized and concatenated); *encoder*,
with reduction, patch embedding and positions before it; *decoder*, with the 1x1 convolution back (fused: with the sums
over channels); *FRM*, with everything after it.
Before anything is timed, outputs must be finite, equal between two runs (to 1e-6), and fused ones equal to plain ones
(to 1e-5).
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

try:
    import almrr_ref  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from almrr_ref.cli import add_device_flag, pick_device, positive, run_command
from almrr_ref.config import ModelConfig
from almrr_ref.model import ALMRR, parameter_counts

NAMES = {"cnn1x1": "CNN(1x1)", "cnn3x3": "CNN(3x3)", "transformer": "Transformer", "mamba": "Mamba"}
PAPER = {"cnn1x1": 0.10, "cnn3x3": 0.13, "transformer": 0.18, "mamba": 0.12}  # seconds on an A100
STAGES = ("features", "encoder", "decoder", "FRM")
MOST_RUNS, LEAST_RUNS, SECONDS = 100, 5, 200.0  # by default, as many runs as fit into the time
WARM_UP = 3  # rounds


@dataclasses.dataclass
class Row:
    """One network: how it is called, what it costs on paper, and what was measured, in seconds."""

    encoder: str
    form: str
    model: ALMRR
    parameters: int
    gmac: float
    totals: list[float]
    stages: list[list[float]]


class Clock:
    """Time between the stages of one run; on a GPU by events, which do not make it wait."""

    def __init__(self, model: ALMRR, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []  # type: bool, list[Any]
        mfrm = model.mfrm
        self.hooks = [
            mfrm.register_forward_pre_hook(self.mark),
            mfrm.encoder.register_forward_hook(self.mark),
            mfrm.register_forward_hook(self.mark),
        ]

    def mark(self, *_: Any) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def stages(self) -> list[float]:
        """Seconds between the marks; takes the hooks away."""
        for hook in self.hooks:
            hook.remove()
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]


def build_rows(config: ModelConfig, device: torch.device) -> list[Row]:
    """All encoders, plain and fused, sharing backbone and refinement network within each form."""
    rows: list[Row] = []
    shared: dict[str, ALMRR] = {}
    image = torch.rand(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    for encoder in NAMES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*random.*")  # random weights are meant
            plain = ALMRR(dataclasses.replace(config, encoder=encoder)).to(device).eval()
        for form, model in (("plain", plain), ("fused", plain.fuse())):
            first = shared.setdefault(form, model)
            model.extractor, model.frm = first.extractor, first.frm
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                model(image.to(device))
            parameters = sum(parameter_counts(model).values())
            rows.append(Row(encoder, form, model, parameters, counter.get_total_flops() / 2e9, [], []))
    return rows


def check(rows: list[Row], predict: Callable[[ALMRR], Tensor]) -> float:
    """Check every network's maps, and return the largest difference between a fused and a plain one.

    Raises:
        ValueError: naming the network, if its maps are not finite, not the same twice, or not those of the plain one.
    """
    largest, plain = 0.0, torch.empty(0)
    for row in rows:
        name, maps = f"{NAMES[row.encoder]}, {row.form}", predict(row.model)
        if not bool(torch.isfinite(maps).all()):
            raise ValueError(f"{name}: the maps are not finite")
        if float((predict(row.model) - maps).abs().max()) > 1e-6:
            raise ValueError(f"{name}: two runs on the same images give different maps")
        if row.form == "plain":
            plain = maps
        largest = max(largest, float((maps - plain).abs().max()))
        if largest > 1e-5:
            raise ValueError(f"{name}: the maps are {largest:.1e} away from the plain network's, allowed is 1e-5")
    return largest


def measure(rows: list[Row], images: Tensor, device: torch.device, runs: int | None) -> None:
    """Time ``runs`` rounds (or MOST_RUNS, or as many as fit into SECONDS) after the warm-up; fills the rows."""

    def one_run(row: Row) -> tuple[float, list[float]]:
        clock = Clock(row.model, device)
        start = time.perf_counter()
        clock.mark()
        maps, scores = row.model.predict(images.to(device).float() / 255)
        clock.mark()
        maps.cpu(), scores.cpu()
        return time.perf_counter() - start, clock.stages()

    for _ in range(WARM_UP):
        for row in rows:
            one_run(row)
    begin = time.perf_counter()
    for done in range(runs or MOST_RUNS):
        if runs is None and done >= LEAST_RUNS and time.perf_counter() - begin > SECONDS:
            break
        for row in rows:
            total, stages = one_run(row)
            row.totals.append(total)
            row.stages.append(stages)


def summary(rows: list[Row], batch: int) -> list[dict[str, Any]]:
    """What is printed and written: times in milliseconds per image, ratios as medians over the rounds."""
    plain = {row.encoder: row.totals for row in rows if row.form == "plain"}
    mamba = {row.form: row.totals for row in rows if row.encoder == "mamba"}
    found = []
    for row in rows:
        p20, median, p80 = np.quantile(row.totals, [0.2, 0.5, 0.8]).tolist()
        entry: dict[str, Any] = {"encoder": NAMES[row.encoder], "form": row.form}
        entry |= {
            name: 1e3 * value / batch for name, value in (("median_ms", median), ("p20_ms", p20), ("p80_ms", p80))
        }
        entry |= {f"{name}_ms": 1e3 * statistics.median(t) / batch for name, t in zip(STAGES, zip(*row.stages))}
        entry["images_per_second"] = batch / median
        for name, base in (("of_plain", plain[row.encoder]), ("of_mamba", mamba[row.form])):
            entry[name] = statistics.median(own / other for own, other in zip(row.totals, base))
        entry |= {"parameters": row.parameters, "gmac": row.gmac, "paper_s": PAPER[row.encoder]}
        found.append(entry | {"paper_of_mamba": PAPER[row.encoder] / PAPER["mamba"], "runs_s": row.totals})
    return found


def print_table(entries: list[dict[str, Any]]) -> None:
    columns = ["encoder", "form", "median ms", "p20", "p80", *STAGES, "of plain", "of Mamba", "M param.", "GMAC"]
    print("| " + " | ".join([*columns, "paper s", "paper of Mamba"]) + " |")
    print("|" + "|".join(["---"] * 2 + ["---:"] * (len(columns))) + "|")
    for e in entries:
        times = [f"{e[name]:.1f}" for name in ("median_ms", "p20_ms", "p80_ms", *(f"{s}_ms" for s in STAGES))]
        ratios = [f"{e[name]:.2f}" for name in ("of_plain", "of_mamba")]
        costs = [
            f"{e['parameters'] / 1e6:.1f}",
            f"{e['gmac']:.2f}",
            f"{e['paper_s']:.2f}",
            f"{e['paper_of_mamba']:.2f}",
        ]
        print("| " + " | ".join([e["encoder"], e["form"], *times, *ratios, *costs]) + " |")


def environment(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        if device.type == "cpu":
            name = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip(" \t:")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    return {"device": f"{device.type} ({name})", "versions": versions, "threads": torch.get_num_threads()}


def command(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    config = ModelConfig(weights="random", image_size=arguments.image_size)
    shape = (arguments.batch, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    where = environment(device) | {"dtype": "float32", "batch": arguments.batch, "image_size": config.image_size}
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    rows = build_rows(config, device)
    difference = check(rows, lambda model: model.predict(images.to(device).float() / 255)[0].cpu())
    print(f"checked: finite, equal between runs; fused maps at most {difference:.1e} from plain ones", flush=True)
    measure(rows, images, device, arguments.runs)
    entries = summary(rows, arguments.batch)
    print(
        f"per image, {len(rows[0].totals)} runs each after {WARM_UP} to warm up; ratios are medians over the rounds\n"
    )
    print_table(entries)
    print("\nGMAC: products of convolutions and matrices. The paper's seconds: an A100, its own code.")
    if arguments.json:
        arguments.json.write_text(json.dumps({**where, "fused_difference": difference, "rows": entries}, indent=1))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python bench/latency.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=positive, help=f"runs of each network (default: {MOST_RUNS}, or what {SECONDS:.0f} s allow)"
    )
    parser.add_argument("--batch", type=positive, default=1, help="images a run (default: 1)")
    parser.add_argument("--image-size", type=positive, default=256, help="side in pixels (default: 256, the paper's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    add_device_flag(parser)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
