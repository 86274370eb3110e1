"""What the benches share: the package on the path, where it was measured, quantiles, memory, Markdown tables, plots."""

import contextlib
import ctypes
import gc
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from almrr_ref.run.files import atomic_write

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def environment(device: torch.device) -> dict[str, Any]:
    """Where it was measured: device, versions, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        if device.type == "cpu":
            name = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip(" \t:")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    return {"device": f"{device.type} ({name})", "versions": versions, "threads": torch.get_num_threads()}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return median, p20, p80


@contextlib.contextmanager
def exact_memory() -> Iterator[None]:
    """Within this block, glibc gives every freed block of 64 KiB and more back at once (elsewhere: no effect).

    Blocks that it kept for later would blur `peak_memory`. Large things must not have been freed before the block.
    Afterwards glibc keeps them, as it does by itself once it has seen large ones freed: take times there.
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

    On CUDA: PyTorch's allocated bytes. On a CPU: resident memory of this process as Linux counts it, so that buffers
    of libraries are in it; call it within `exact_memory`, and not for the first run: what stays after that (threads,
    compiled kernels) is no part of it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
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
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status does not tell {name}")
    return int(found[1]) / 1024


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result at once, not by halves.

    Raises:
        OutputError: if it cannot be written.
    """
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def load_pyplot(path: Path) -> Any | None:
    """matplotlib's pyplot, drawing into files; None, and one line that says so, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"drew no plot: matplotlib is not installed (pip install matplotlib), {path} not written")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
