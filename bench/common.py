"""What the benches share: the package on the path, their parser, where it was measured, statistics, Markdown, JSON."""

import argparse
import contextlib
import importlib.util
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if importlib.util.find_spec("almrr_ref") is None:  # a checkout that is not installed; every bench imports this first
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from almrr_ref.report.scores import write_metrics as write_json  # noqa: F401 (for any result)
from almrr_ref.run import cli

ROOT = Path(__file__).resolve().parents[1]


def make_parser(file: str, description: str | None) -> argparse.ArgumentParser:
    """A bench's parser: its ``__file__`` and ``__doc__`` -> a help with the whole docstring."""
    return cli.make_parser(Path(file).name, description or "", "python bench/")


def measuring_parser(file: str, description: str | None) -> argparse.ArgumentParser:
    """`make_parser`, with ``--json`` and ``--device``."""
    parser = make_parser(file, description)
    parser.add_argument("--json", type=cli.path_argument, metavar="FILE", help="also write everything measured")
    cli.add_device_flag(parser)
    return parser


def environment(device: torch.device) -> dict[str, Any]:
    """Where it was measured: device, versions, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        if device.type == "cpu":
            name = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip(" \t:")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    return {"device": f"{device.type} ({name})", "versions": versions, "threads": torch.get_num_threads()}


def as_line(values: dict[str, Any]) -> str:
    """Names and values as one line: "device cpu, threads 2"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def rounds(budget: float, least: int, most: int | None = None) -> Iterator[int]:
    """Count from 0 until the budget in seconds is used up: ``least`` times at least, ``most`` times at most."""
    begin = time.perf_counter()
    for done in itertools.count():
        if done >= least and (done == most or time.perf_counter() - begin > budget):
            return
        yield done


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return median, p20, p80


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """One value for each seed -> "mean ± sample standard deviation"; None stands for a seed without one."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return text if len(known) == len(values) else f"{text} (n={len(known)})"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned to the left, the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    return "\n".join([markdown_row(columns), rule, *map(markdown_row, rows)])
