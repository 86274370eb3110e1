"""Cost of the Mamba and the Transformer encoder against the number of tokens: ``python bench/sequence.py``.

Timed is the encoder alone, at the paper's width and depth, with random weights, in inference, from 256 tokens (the
paper's) to 16,384. "x2" is the cost divided by that of half the tokens: 2 is linear, 4 is quadratic. Memory is the
height of one run beside weights and input (`peak_memory`). The Transformer uses PyTorch's
scaled_dot_product_attention, which avoids the (l, l) matrix where it can: its memory is linear, its time is not.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import as_line, environment, markdown_row, markdown_table, measuring_parser, number, quantiles, write_json
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.mfrm import fuse_encoder
from almrr_ref.encoders import build_encoder
from almrr_ref.run.cli import pick_device, positive, run_command
from almrr_ref.run.memory import MMAP_THRESHOLD, keep_freed_memory

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
COLUMNS = ["encoder", "tokens", "median ms", "p20", "p80", "runs", "time x2", "MiB", "memory x2"]
MOST_RUNS, LEAST_RUNS = 30, 3


def build_encoders(config: ModelConfig, device: torch.device) -> dict[str, nn.Module]:
    """Mamba as trained and as deployed, and the Transformer, of one width and depth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mamba = build_encoder(config).to(device).eval()
        transformer = build_encoder(dataclasses.replace(config, encoder="transformer")).to(device).eval()
    return {"Mamba": mamba, "Mamba, fused": fuse_encoder(mamba).eval(), "Transformer": transformer}


def time_encoder(encoder: nn.Module, tokens: Tensor, seconds: float) -> list[float]:
    """Seconds of each run: LEAST_RUNS to MOST_RUNS, as many as fit; it has run before, for the memory."""
    times: list[float] = []
    for _ in common.rounds(seconds, LEAST_RUNS, MOST_RUNS):
        start = time.perf_counter()
        out = encoder(tokens, (1, tokens.shape[1]))
        finite = bool(torch.isfinite(out).all())  # on a GPU, this also waits for the result
        times.append(time.perf_counter() - start)
        if not finite:
            raise ValueError(f"the encoder's output for {tokens.shape[1]} tokens is not finite")
    return times


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Memory in MiB that ``run`` needs at its height beyond what is held before it (weights, input); None if unknown.

    On CUDA these are PyTorch's allocated bytes. On a CPU it is the resident memory that Linux reports, which includes
    the buffers of libraries. Call it after `give_back_freed_memory`, and not for the first run, whose threads and
    compiled kernels stay.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed inside the heap
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    except (OSError, AttributeError, TypeError):  # no Linux, or another C library than glibc
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """This process's resident memory in MiB: now ("VmRSS") or at its height ("VmHWM")."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def give_back_freed_memory() -> None:
    """Let glibc give every freed block of 64 KiB and more back at once: those that it keeps would blur `peak_memory`.

    Nothing large may have been freed before.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # as in `peak_memory`
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)


@torch.inference_mode()
def measure(lengths: list[int], config: ModelConfig, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Memory of every encoder at every length, then the times: one row for each, printed as it comes."""
    generator = torch.Generator().manual_seed(0)
    give_back_freed_memory()
    encoders = build_encoders(config, device)
    inputs = {l: torch.randn(1, l, config.d_model, generator=generator).to(device) for l in lengths}
    memory = {}
    for name, encoder in encoders.items():
        for l, tokens in inputs.items():
            encoder(tokens[:, :16], (1, 16))
            memory[name, l] = peak_memory(partial(encoder, tokens, (1, l)), device)
    keep_freed_memory()  # as in use: times are taken so
    print(markdown_table(COLUMNS, []))
    rows: dict[tuple[str, float], dict[str, Any]] = {}  # by encoder and tokens
    for (name, l), mib in memory.items():
        times = time_encoder(encoders[name], inputs[l], seconds)
        median, p20, p80 = (1e3 * value for value in quantiles(times))
        half = rows.get((name, l / 2))
        time_x2 = median / half["ms"] if half else None
        memory_x2 = mib / half["mib"] if half and mib and half["mib"] else None
        row = {"encoder": name, "tokens": l, "mib": mib, "ms": median, "p20": p20, "p80": p80, "runs": len(times)}
        rows[name, l] = row | {"time_x2": time_x2, "memory_x2": memory_x2}
        cells = [name, f"{l:,}", *(number(value, 1) for value in (median, p20, p80)), str(len(times))]
        cells += [number(time_x2, 2), number(mib, 1), number(memory_x2, 2)]
        print(markdown_row(cells), flush=True)
        yield rows[name, l]


def command(options: argparse.Namespace) -> int:
    device = pick_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = ModelConfig()
    where = environment(device) | {"d_model": config.d_model, "depth": config.depth}
    print(as_line(where) + "\n", flush=True)
    rows = []
    for row in measure(sorted(options.lengths), config, device, options.seconds):
        rows.append(row)
        if options.json:
            write_json(options.json, {**where, "rows": rows})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = measuring_parser(__file__, __doc__)
    add = parser.add_argument
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help=f"tokens (default: {' '.join(map(str, LENGTHS))})")
    add("--seconds", type=positive, default=2, help=f"for each figure, but {LEAST_RUNS} runs at least (default: 2)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
