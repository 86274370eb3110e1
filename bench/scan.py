"""Time the scan backends against each other and, on a GPU, against mamba_ssm's CUDA scan and the hardware's floor.

    python bench/scan.py                    all backends on CUDA, reference and chunked on a CPU
    python bench/scan.py --json scan.json --plot scan.png
    python bench/scan.py --device cpu --batch 1 4 --length 256 --threads 2

Per shape and backend: both directions of a Vim block (d 384, n 16), forward, and forward with backward. Agreement with
the float64 oracle is asserted before anything is timed. The floor is the larger of two times: all inputs and outputs
moved once, and one exponential per (b, d, l, n, direction); it is known for the GPUs in FLOORS.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from almrr_ref.kernels import bidirectional_scan, selective_scan

D, N = 384, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = {"A100": (2.0e12, 2.4e12), "H100": (3.35e12, 3.7e12), "H200": (4.8e12, 3.9e12)}  # bytes/s, exponentials/s
CHECKED_ELEMENTS = 1 << 21  # of u; a longer or wider problem is checked on a part of it
Arguments = dict[str, Tensor]
Row = dict[str, Any]


def make_arguments(b: int, l: int, dtype: torch.dtype, device: str, directions: int) -> Arguments:
    """Draw the arguments of `bidirectional_scan` or `selective_scan` as a Vim block makes them, in the layout its
    device likes.
    """
    generator = torch.Generator().manual_seed(0)

    def sequence(rows: int) -> Tensor:
        if device == "cpu":  # as a linear layer leaves it
            return torch.randn(b, l, rows, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(b, rows, l, generator=generator).to(device, dtype)

    made = {"z": sequence(D)}
    for suffix in ("", "_b")[:directions]:
        made |= {f"{name}{suffix}": sequence(rows) for name, rows in (("u", D), ("delta", D), ("B", N), ("C", N))}
        made[f"A{suffix}"] = -torch.arange(1.0, N + 1, device=device).repeat(D, 1)
        made[f"D{suffix}"] = torch.ones(D, device=device)
        made[f"delta_bias{suffix}"] = torch.full((D,), -4.0, device=device)
    return {name: value.detach().requires_grad_() for name, value in made.items()}


def run_ours(arguments: Arguments, backend: str) -> Tensor:
    """Both directions at once, or one if the arguments are those of one."""
    if "u_b" not in arguments:
        y = selective_scan(**arguments, delta_softplus=True, backend=backend)
        assert isinstance(y, Tensor)
        return y
    return bidirectional_scan(**arguments, delta_softplus=True, scale=1.0, backend=backend)


def run_mamba(arguments: Arguments) -> Tensor:
    """Both directions as Vim does them with mamba_ssm: flips, two launches, two gates."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    names = ("u", "delta", "A", "B", "C", "D")
    z, bias = arguments["z"], arguments["delta_bias"]
    y = selective_scan_fn(*(arguments[name] for name in names), z, bias, True)
    if "u_b" not in arguments:
        return y
    backward = [arguments[f"{name}_b"].flip(-1) if name not in ("A", "D") else arguments[f"{name}_b"] for name in names]
    y_b = selective_scan_fn(*backward, z.flip(-1), arguments["delta_bias_b"], True)
    return y + y_b.flip(-1)


def assert_agreement(run: Callable[[Arguments], Tensor], arguments: Arguments, dtype: torch.dtype) -> float:
    """Raise unless `run` agrees with the float64 oracle on one batch entry of 32 to 384 channels; return the error."""
    l = arguments["u"].shape[2]
    d = max(4, min(D, CHECKED_ELEMENTS // l // 8 * 8))
    part = {
        name: (value[:1] if name.startswith(("B", "C")) else value[:1, :d] if value.dim() == 3 else value[:d]).detach()
        for name, value in arguments.items()
    }
    expected = run_ours({name: value.cpu().double() for name, value in part.items()}, "chunked")
    head = min(l, 256)  # the fast float64 backend is held to the plain one on the part that is short enough for it
    short = {n: v[..., :head].cpu().double() if v.dim() == 3 else v.cpu().double() for n, v in part.items()}
    plain = run_ours(short, "reference")
    torch.testing.assert_close(run_ours(short, "chunked"), plain, rtol=1e-9, atol=1e-9)
    error = ((run(part).cpu().double() - expected).abs().max() / expected.abs().max()).item()
    limit = 5e-6 if dtype == torch.float32 else 1e-2
    if not error <= limit:
        raise SystemExit(f"relative error {error:.1e} against the oracle, expected at most {limit:.0e}: nothing timed")
    return error


def measure(run: Callable[[], object], device: str, seconds: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the run time in milliseconds, after a warm-up, over about `seconds`."""
    run()
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 200):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun) * 1e3)
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[3]


def floor_ms(b: int, l: int, dtype: torch.dtype, device: str, directions: int) -> float | None:
    """The forward floor of this GPU in milliseconds, None where it is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for known, (bandwidth, exponentials) in FLOORS.items():
        if known in name:
            return 1e3 * max(
                moved_bytes(b, l, dtype, directions) / bandwidth, directions * b * D * l * N / exponentials
            )
    return None


def moved_bytes(b: int, l: int, dtype: torch.dtype, directions: int) -> int:
    """Bytes of all inputs and outputs of one forward pass."""
    return b * l * (2 * D + directions * (2 * D + 2 * N)) * torch.empty(0, dtype=dtype).element_size()


def bench_shape(backend: str, b: int, l: int, dtype_name: str, options: argparse.Namespace) -> list[Row]:
    """Check and time one backend at one shape: a row for forward and one for forward with backward."""
    device, dtype = options.device, DTYPES[dtype_name]
    arguments = make_arguments(b, l, dtype, device, options.directions)

    def run(values: Arguments) -> Tensor:
        return run_mamba(values) if backend == "mamba_ssm" else run_ours(values, backend)

    error = assert_agreement(run, arguments, dtype)
    gradient = torch.ones_like(arguments["u"])
    leaves = list(arguments.values())

    def forward() -> None:
        with torch.no_grad():
            run(arguments)

    def both() -> None:
        torch.autograd.grad(run(arguments), leaves, gradient)

    rows = []
    for what, function in (("forward", forward), ("forward+backward", both)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        median, p20, p80 = measure(function, device, options.seconds)
        floor = floor_ms(b, l, dtype, device, options.directions) if what == "forward" else None
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        row: Row = {"backend": backend, "b": b, "l": l, "dtype": dtype_name, "what": what, "error": error}
        row |= {"ms": median, "p20": p20, "p80": p80, "floor_ms": floor, "peak_mib": peak}
        row["gb_per_s"] = moved_bytes(b, l, dtype, options.directions) / median / 1e6 if what == "forward" else None
        row["gexp_per_s"] = options.directions * b * D * l * N / median / 1e6 if what == "forward" else None
        rows.append(row)
    return rows


def print_row(row: Row) -> None:
    """Print one line of the table; what is not known is a dash."""
    share = f"{100 * row['floor_ms'] / row['ms']:.0f}%" if row["floor_ms"] else "-"
    rates = [f"{row[name]:.1f}" if row[name] is not None else "-" for name in ("gb_per_s", "gexp_per_s", "peak_mib")]
    print(
        f"{row['backend']:10} {row['b']:3} {row['l']:6} {row['dtype']:5} {row['what']:17}"
        f"{row['ms']:10.3f} {row['p20']:10.3f} {row['p80']:10.3f} {share:>6}"
        f"{rates[0]:>9} {rates[1]:>8} {rates[2]:>9} {row['error']:9.1e}",
        flush=True,
    )


def draw_plot(rows: list[Row], path: Path) -> None:
    """Plot forward time against length, a line per backend, dtype and batch; say so if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"drew no plot: matplotlib is not installed (pip install matplotlib), {path} not written")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, what in zip(axes, ("forward", "forward+backward"), strict=True):
        for key in sorted({(row["backend"], row["dtype"], row["b"]) for row in rows}):
            line = [row for row in rows if (row["backend"], row["dtype"], row["b"]) == key and row["what"] == what]
            axis.plot(
                [r["l"] for r in line], [r["ms"] for r in line], marker="o", label=f"{key[0]} {key[1]} b={key[2]}"
            )
        axis.set(title=what, xlabel="length l", ylabel="milliseconds", xscale="log", yscale="log")
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the scan backends (both directions, d 384, n 16).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", help="default 1 4 16 64 on CUDA, 1 4 on a CPU")
    parser.add_argument("--length", type=int, nargs="+", help="default 256 1024 4096 16384 65536 on CUDA, 256 on a CPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", help="default fp32 bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--directions", type=int, choices=(1, 2), default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw time against length to this PNG (needs matplotlib)")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU is available; use --device cpu")
    options.batch = options.batch or ([1, 4, 16, 64] if cuda else [1, 4])
    options.length = options.length or ([256, 1024, 4096, 16384, 65536] if cuda else [256])
    options.dtype = options.dtype or (["fp32", "bf16"] if cuda else ["fp32"])
    return options


def main() -> None:
    """Run the bench and print its table."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    backends = ["reference", "chunked"] + (["triton"] if options.device == "cuda" else [])
    if options.device == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
        backends.append("mamba_ssm")
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{hardware}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}; median, p20, p80 in ms")
    print(f"{'backend':10} {'b':>3} {'l':>6} dtype {'what':17}{'ms':>10} {'p20':>10} {'p80':>10} {'floor':>6}", end="")
    print(f"{'GB/s':>9} {'Gexp/s':>8} {'peak MiB':>9} {'error':>9}")
    rows: list[Row] = []
    for l in options.length:
        for b in options.batch:
            for dtype_name in options.dtype:
                for backend in backends:
                    if backend in ("reference", "chunked") and options.device == "cuda" and b * l > 1 << 16:
                        continue  # minutes per run, gigabytes of graph
                    for row in bench_shape(backend, b, l, dtype_name, options):
                        rows.append(row)
                        print_row(row)
    if options.json:
        report = {"hardware": hardware, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1))
    if options.plot:
        draw_plot(rows, options.plot)


if __name__ == "__main__":
    main()
