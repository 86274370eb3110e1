"""What the benches share: the package on the path, where it was measured, statistics, memory, Markdown, JSON."""

import contextlib
import ctypes
import gc
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(
        str(Path(__file__).resolve().parent.parent)
    )  # a checkout that is not installed; every bench imports this module first

from almrr_ref.run.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


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


@contextlib.contextmanager
def exact_memory() -> Iterator[None]:
    """Within this block, glibc gives every freed block of 64 KiB and more back at once (elsewhere: no effect).

    Blocks that glibc keeps for later would blur `peak_memory`. Nothing large may have been freed before this block.
    Afterwards glibc keeps them again, as is usual for a process that has freed large blocks: take times there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 16)
    yield
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Memory in MiB that ``run`` needs at its height beyond what is held before it (weights, input); None if unknown.

    On CUDA these are PyTorch's allocated bytes. On a CPU it is the resident memory that Linux reports, which includes
    the buffers of libraries. Call it within `exact_memory`, and not for the first run, whose threads and compiled
    kernels stay.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)  # gives back what was freed inside the heap
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        resident = _resident("VmRSS")
        run()
        return _resident("VmHWM") - resident
    except OSError:  # no Linux
        return None


def _resident(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned to the left, the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    return "\n".join([markdown_row(columns), rule, *map(markdown_row, rows)])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result at once: a reader sees the old file or all of the new one; ValueError for NaN and infinity."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
