"""Cost of the Mamba and the Transformer encoder against the number of tokens: ``python bench/sequence.py``.

Timed is the encoder alone, at the paper's width and depth, with random weights, in inference, from 256 tokens (the
paper's) to 16,384. "x2" is the cost divided by that of half the tokens: 2 is linear, 4 is quadratic. Memory is the
height of one run beside weights and input (``common.peak_memory``). The Transformer uses PyTorch's
scaled_dot_product_attention, which avoids the (l, l) matrix where it can: its memory is linear, its time is not.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from common import number
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.mfrm import fuse_encoder
from almrr_ref.encoders import build_encoder
from almrr_ref.run.cli import add_device_flag, pick_device, positive, run_command

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
COLUMNS = ["encoder", "tokens", "median ms", "p20", "p80", "runs", "us a token", "time x2", "MiB", "memory x2"]
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
    begin = time.perf_counter()
    while len(times) < LEAST_RUNS or (len(times) < MOST_RUNS and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        out = encoder(tokens, (1, tokens.shape[1]))
        finite = bool(torch.isfinite(out).all())  # on a GPU, this also waits for the result
        times.append(time.perf_counter() - start)
        if not finite:
            raise ValueError(f"the encoder's output for {tokens.shape[1]} tokens is not finite")
    return times


@torch.inference_mode()
def measure(lengths: list[int], config: ModelConfig, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Memory of every encoder at every length, then the times: one row for each, printed as it comes."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    with common.exact_memory():
        encoders = build_encoders(config, device)
        inputs = {l: torch.randn(1, l, config.d_model, generator=generator).to(device) for l in lengths}
        for name, encoder in encoders.items():
            for l, tokens in inputs.items():
                encoder(tokens[:, :16], (1, 16))
                mib = common.peak_memory(lambda e=encoder, t=tokens: e(t, (1, t.shape[1])), device)  # type: ignore[misc]
                rows.append({"encoder": name, "tokens": l, "mib": mib})
    print(common.markdown_table(COLUMNS, []))
    half: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        times = time_encoder(encoders[row["encoder"]], inputs[row["tokens"]], seconds)
        row["ms"], row["p20"], row["p80"] = (1e3 * value for value in common.quantiles(times))
        row["runs"] = len(times)
        before = half.get((row["encoder"], row["tokens"]))
        row["time_x2"] = row["ms"] / before["ms"] if before else None
        row["memory_x2"] = row["mib"] / before["mib"] if before and row["mib"] and before["mib"] else None
        half[row["encoder"], 2 * row["tokens"]] = row
        cells = [row["encoder"], f"{row['tokens']:,}", *(number(row[name], 1) for name in ("ms", "p20", "p80"))]
        cells += [str(row["runs"]), number(1e3 * row["ms"] / row["tokens"], 1), number(row["time_x2"], 2)]
        print(common.markdown_row([*cells, number(row["mib"], 1), number(row["memory_x2"], 2)]), flush=True)
    return rows


def command(options: argparse.Namespace) -> int:
    device = pick_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = ModelConfig(d_model=options.d_model, depth=options.depth)
    where = common.environment(device) | {"d_model": config.d_model, "depth": config.depth}
    print(common.as_line(where) + "\n", flush=True)
    rows = measure(sorted(options.lengths), config, device, options.seconds)
    if options.json:
        common.write_json(options.json, {**where, "rows": rows})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python bench/sequence.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help=f"tokens (default: {' '.join(map(str, LENGTHS))})")
    add("--seconds", type=positive, default=2, help=f"for each figure, but {LEAST_RUNS} runs at least (default: 2)")
    add("--d-model", type=positive, default=192, help="width of a token (default: 192, the paper's)")
    add("--depth", type=positive, default=8, help="blocks (default: 8, the paper's)")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    add_device_flag(parser)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
