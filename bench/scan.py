"""Time the scan backends against each other, against the peers that are installed, and against a GPU's floor.

    python bench/scan.py                    all backends that the device has
    python bench/scan.py --device cpu --batch 1 4 --length 256 --json scan.json

Peers: mamba_ssm's CUDA scan; on a CPU transformers' slow path, and mambapy's pscan and PyTorch's associative_scan over
decays and inputs of every step. Per shape and backend: both directions of a Vim block (d 384, n 16), forward, and
forward with backward. Agreement with the float64 oracle is checked before anything is timed. "graph ms" is the GPU's
own time: the same launches replayed as a CUDA graph, without Python's part, which is most of a short call. The floor is
the larger of two times: all inputs and outputs moved once, and one exponential per (b, d, l, n, direction); it is known
for the GPUs in FLOORS.
"""

import argparse
import functools
import importlib
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import as_line, environment, markdown_row, markdown_table, measuring_parser, number, quantiles, write_json
from torch import Tensor

from almrr_ref import kernels  # not from almrr_ref.kernels: ruff would sort that before common
from almrr_ref.deploy.cuda_graph import record
from almrr_ref.run.cli import pick_device, positive, run_command

D, N = 384, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = {"A100": (2.0e12, 2.4e12), "H100": (3.35e12, 3.7e12), "H200": (4.8e12, 3.9e12)}  # bytes/s, exponentials/s
CHECKED_ELEMENTS = 1 << 21  # of u; a longer or wider problem is checked on a slice of it
PEERS = {
    "cuda": [("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")],
    "cpu": [
        ("transformers", "transformers.models.mamba.modeling_mamba", "mamba_selective_scan"),
        ("mambapy", "mambapy.pscan", "pscan"),
    ],
}
COLUMNS = ["backend", "dtype", "pass", "b", "l", "ms", "p20", "p80", "graph ms", "floor", "peak MiB", "error"]
REPLAYS = 10  # at a time: one alone would be timed with the wait for it
Arguments = dict[str, Tensor]


def make_arguments(b: int, l: int, dtype: torch.dtype, device: torch.device, time_last: bool) -> Arguments:
    """Draw the arguments of `bidirectional_scan`: channels side by side, as linear layers leave them, or time."""
    generator = torch.Generator().manual_seed(0)

    def sequence(rows: int) -> Tensor:
        drawn = torch.randn(b, l, rows, generator=generator).to(device, dtype).mT
        return drawn.contiguous() if time_last else drawn

    made = {"z": sequence(D)}
    for suffix in ("", "_b"):
        made |= {f"{name}{suffix}": sequence(rows) for name, rows in (("u", D), ("delta", D), ("B", N), ("C", N))}
        made[f"A{suffix}"] = -torch.arange(1.0, N + 1, device=device).repeat(D, 1)
        made[f"D{suffix}"] = torch.ones(D, device=device)
        made[f"delta_bias{suffix}"] = torch.full((D,), -4.0, device=device)
    return {name: value.detach().requires_grad_() for name, value in made.items()}


def run_ours(arguments: Arguments, backend: str) -> Tensor:
    return kernels.bidirectional_scan(**arguments, delta_softplus=True, scale=1.0, backend=backend)


def run_peer(scan: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """Both directions as Vim does them with mamba_ssm: flips, two launches, two gates."""
    y = torch.zeros(())
    for suffix, flip in (("", lambda t: t), ("_b", lambda t: t.flip(-1))):
        u, delta, B, C = (flip(arguments[f"{name}{suffix}"]) for name in ("u", "delta", "B", "C"))
        A, D, bias = (arguments[f"{name}{suffix}"] for name in ("A", "D", "delta_bias"))
        y = y + flip(scan(u, delta, A, B, C, D, flip(arguments["z"]), bias, True))
    return y


def scan_materialised(combine: Callable[[Tensor, Tensor], Tensor], *arguments: Tensor) -> Tensor:
    """A scan of mamba_ssm's arguments by ``combine``: decays and inputs of all steps, (b, l, d, n) -> all states."""
    dtype = arguments[0].dtype
    u, delta, A, B, C, D, z, bias = (argument.float() for argument in arguments[:8])
    dt = F.softplus(delta + bias[:, None]).mT  # (b, l, d)
    h = combine(torch.exp(dt[..., None] * A), (dt * u.mT)[..., None] * B.mT[:, :, None])
    y = (h @ C.mT[..., None])[..., 0].mT + D[:, None] * u
    return (y * F.silu(z)).to(dtype)


def combine_associatively(decay: Tensor, x: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan  # here, because the oldest torch lacks it

    def join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return associative_scan(join, (decay, x), dim=1, combine_mode="generic")[1]


def find_peers(cuda: bool) -> dict[str, Callable[..., Tensor]]:
    """The peers' scans in mamba_ssm's signature; one that is not installed is named."""
    peers: dict[str, Callable[..., Tensor]] = {}
    if not cuda:
        peers["associative_scan"] = functools.partial(scan_materialised, combine_associatively)
    for name, module, function in PEERS["cuda" if cuda else "cpu"]:
        try:
            scan = getattr(importlib.import_module(module), function)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        peers[name] = functools.partial(scan_materialised, scan) if name == "mambapy" else scan
    return peers


def check_agreement(run: Callable[[Arguments], Tensor], arguments: Arguments, dtype: torch.dtype) -> float:
    """Relative error of ``run`` against the float64 oracle on part of one batch entry; ValueError if it is large."""
    l = arguments["u"].shape[2]
    d = max(4, min(D, CHECKED_ELEMENTS // l // 8 * 8))
    small = {
        name: (value[:1] if name.startswith(("B", "C")) else value[:1, :d] if value.dim() == 3 else value[:d]).detach()
        for name, value in arguments.items()
    }
    exact = {name: value.cpu().double() for name, value in small.items()}
    expected = run_ours(exact, "chunked")  # fast in float64; on its start it is held to the step-by-step reference
    start = {name: value[..., :256] if value.dim() == 3 else value for name, value in exact.items()}
    torch.testing.assert_close(run_ours(start, "chunked"), run_ours(start, "reference"), rtol=1e-9, atol=1e-9)
    error = float((run(small).cpu().double() - expected).abs().max() / expected.abs().max())
    limit = 5e-6 if dtype == torch.float32 else 1e-2
    if not error <= limit:
        raise ValueError(f"relative error {error:.1e} against the oracle, expected at most {limit:.0e}: nothing timed")
    return error


def time_runs(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of each run, after two to warm up: at least 5, at most 200, over about ``seconds``."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    for _ in common.rounds(seconds, 7, 202):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return times[2:]


def replay_ms(run: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """Milliseconds of ``run`` as a CUDA graph; None, and a line that says why, if it cannot be one."""
    try:
        graph, _ = record(run, device)
    except RuntimeError as error:
        print(f"no CUDA graph: {error}".splitlines()[0], flush=True)
        return None

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return quantiles(time_runs(replay, device, seconds))[0] / REPLAYS


def bench_shape(backend: str, b: int, l: int, dtype_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time one backend at one shape: a row for forward and one for forward with backward, printed too."""
    device, dtype, peers = options.device, DTYPES[dtype_name], options.peers
    cuda = device.type == "cuda"
    arguments = make_arguments(b, l, dtype, device, time_last=cuda and backend in peers)

    def run(values: Arguments) -> Tensor:
        return run_peer(peers[backend], values) if backend in peers else run_ours(values, backend)

    def forward() -> None:
        with torch.no_grad():
            run(arguments)

    def both() -> None:
        ones = torch.ones_like(arguments["u"])
        torch.autograd.grad(run(arguments), list(arguments.values()), ones, allow_unused=True)  # B, C at one step

    error = check_agreement(run, arguments, dtype)
    rows = []
    for what, function in (("forward", forward), ("forward+backward", both)):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = quantiles(time_runs(function, device, options.seconds))
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
        graph = replay_ms(function, device, options.seconds) if cuda else None
        floor = floor_ms(b, l, dtype, device) if what == "forward" else None
        row = {"backend": backend, "dtype": dtype_name, "pass": what, "b": b, "l": l}
        cells = [*map(str, row.values()), *(number(value, 3) for value in times)]
        checked = f"{error:.1e}" if what == "forward" else "-"
        print(markdown_row([*cells, number(graph, 4), number(floor, 3), number(peak, 1), checked]), flush=True)
        row |= dict(zip(("ms", "p20", "p80"), times))
        row |= {"graph_ms": graph, "floor_ms": floor, "peak_mib": peak}
        rows.append(row | {"error": error if what == "forward" else None})
    return rows


def floor_ms(b: int, l: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """The forward floor of this GPU in milliseconds; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    moved = b * l * (2 * D + 2 * (2 * D + 2 * N)) * dtype.itemsize
    exponentials = 2 * b * D * l * N
    rates = [rate for known, rate in FLOORS.items() if known in name]
    return 1e3 * max(moved / rates[0][0], exponentials / rates[0][1]) if rates else None


def command(options: argparse.Namespace) -> int:
    options.device = pick_device(options.device)
    cuda = options.device.type == "cuda"
    options.peers = find_peers(cuda)
    numba = kernels.checks.HAS_NUMBA and not cuda
    every = ["reference", "chunked", *["triton"] * cuda, *["numba"] * numba, *options.peers]
    where = environment(options.device)
    print(as_line(where) + "\n")
    print(markdown_table(COLUMNS, [], left=3))
    rows = []
    for l, b, dtype, backend in itertools.product(
        options.length or ([256, 1024, 4096, 16384, 65536] if cuda else [256]),
        options.batch or ([1, 4, 16, 64] if cuda else [1, 4]),
        options.dtype or (["fp32", "bf16"] if cuda else ["fp32"]),
        options.backend or every,
    ):
        if backend in ("reference", "chunked") and cuda and b * l > 1 << 16:
            continue  # minutes per run, gigabytes of graph
        rows += bench_shape(backend, b, l, dtype, options)
        if options.json:
            write_json(options.json, {**where, "rows": rows})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = measuring_parser(__file__, __doc__)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", help="default: 1 4 16 64 on CUDA, 1 4 on a CPU")
    add("--length", type=positive, nargs="+", help="default: 256 1024 4096 16384 65536 on CUDA, 256 on a CPU")
    add("--dtype", choices=DTYPES, nargs="+", help="default: fp32 bf16 on CUDA, fp32 on a CPU")
    add("--backend", nargs="+", metavar="NAME", help="default: all that there are")
    add("--seconds", type=float, default=1.0, help="time for each figure (default: 1)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
