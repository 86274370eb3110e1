"""Checks of the arguments, and the choice of a backend.

A fault is one ValueError that names the argument, what came and what was expected, before any work is done.
"""

import importlib.util
import warnings

import torch
from torch import Tensor

from .operands import Direction

MAX_STATES = 256  # the limit of mamba_ssm's kernel, kept so that code can move between the two
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_CPU = ("reference", "chunked", "numba")  # backends of the scan, the best last
HAS_NUMBA = importlib.util.find_spec("numba") is not None


def exporting() -> bool:
    """Whether torch.export is tracing: then only operators that other programs know may be used.

    For torch.compile of PyTorch 2.8 `is_exporting` is always true.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def check_numbers(name: str, value: object, may_be_complex: bool = False) -> None:
    """Raise a ValueError unless `value` is a tensor of 16, 32 or 64 bits, real or, if allowed, complex."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor")
    if value.dtype in (torch.complex64, torch.complex128):
        if may_be_complex:
            return
        raise ValueError(
            f"{name} is {value.dtype}: expected real values; where A is complex, so may B, C and states be"
        )
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"{name} is {value.dtype}: expected float16, bfloat16, float32 or float64")


def check_tensor(
    name: str, value: Tensor, axes: str, sizes: dict[str, int], device: torch.device, may_be_complex: bool = False
) -> None:
    """Raise a ValueError unless `value` is of the shape that `axes` spell ("bdl"), on `device`, and real if it must."""
    check_numbers(name, value, may_be_complex)
    expected = tuple(sizes[axis] for axis in axes)
    if tuple(value.shape) != expected:
        letters = f"({', '.join(axes)}{',' * (len(axes) == 1)})"
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {letters} = {expected}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: expected {device}, where the first argument is; move it there")


def check_sequence(name: str, value: Tensor) -> dict[str, int]:
    """Raise a ValueError unless `value` is a real tensor (b, d, l) that is not empty; return its sizes by letter."""
    check_numbers(name, value)
    if value.dim() != 3 or 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (b, d, l) with every size at least 1")
    return dict(zip("bdl", value.shape))


def check_scan(
    direction: Direction, z: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, suffix: str = ""
) -> None:
    """Check one direction of a scan against the contract of `selective_scan`; `suffix` is added to its names."""
    u, delta, A, B, C, D, delta_bias = direction
    sizes = check_sequence(f"u{suffix}", u)
    d = sizes["d"]
    check_numbers(f"A{suffix}", A, may_be_complex=True)
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] == 0:
        raise ValueError(f"A{suffix} has shape {tuple(A.shape)}: expected (d, n) = ({d}, n) with n at least 1")
    sizes["n"] = A.shape[1]
    if sizes["n"] > MAX_STATES:
        raise ValueError(f"A{suffix} has shape {tuple(A.shape)}: expected a state size n of at most {MAX_STATES}")
    check_tensor(f"A{suffix}", A, "dn", sizes, u.device, may_be_complex=True)
    check_tensor(f"delta{suffix}", delta, "bdl", sizes, u.device)
    check_seq_idx(seq_idx, sizes, u.device)
    for name, projection in ((f"B{suffix}", B), (f"C{suffix}", C)):
        check_projection(name, projection, sizes, u.device, A.is_complex())
    for name, value, axes in (
        (f"D{suffix}", D, "d"),
        ("z", z, "bdl"),
        (f"delta_bias{suffix}", delta_bias, "d"),
        ("initial_state", initial_state, "bdn"),
    ):
        if value is not None:
            check_tensor(name, value, axes, sizes, u.device, axes == "bdn" and A.is_complex())


def check_projection(
    name: str, value: Tensor, sizes: dict[str, int], device: torch.device, may_be_complex: bool
) -> None:
    """Check B or C: (b, n, l), or (b, g, n, l) with d divisible by g."""
    check_numbers(name, value, may_be_complex)
    if value.dim() not in (3, 4):
        shape = tuple(sizes[axis] for axis in "bnl")
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected (b, n, l) = {shape} or, in g groups, (b, g, n, l)"
        )
    if value.dim() == 3:
        return check_tensor(name, value, "bnl", sizes, device, may_be_complex)
    g = value.shape[1]
    if g == 0 or sizes["d"] % g:
        raise ValueError(f"{name} has {g} groups: expected (b, g, n, l) where g divides d = {sizes['d']}")
    check_tensor(name, value, "bgnl", {**sizes, "g": g}, device, may_be_complex)


def check_seq_idx(seq_idx: Tensor | None, sizes: dict[str, int], device: torch.device) -> None:
    """Check the numbers of packed sequences, (b, l)."""
    if seq_idx is None:
        return
    if not isinstance(seq_idx, Tensor):
        raise ValueError(f"seq_idx is a {type(seq_idx).__name__}: expected a tensor")
    expected = (sizes["b"], sizes["l"])
    if seq_idx.dtype not in (torch.int32, torch.int64) or (tuple(seq_idx.shape), seq_idx.device) != (expected, device):
        came = f"{seq_idx.dtype} of shape {tuple(seq_idx.shape)} on {seq_idx.device}"
        raise ValueError(f"seq_idx is {came}: expected int32 or int64, (b, l) = {expected}, on {device}")


def check_cu_seqlens(cu_seqlens: Tensor, l: int, device: torch.device) -> None:
    """Check where packed sequences begin, (k + 1,); the numbers not on a GPU, which would wait, nor while compiling."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: expected a tensor")
    form = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 1
    if not form or cu_seqlens.device != device:
        came = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {came}: expected int32 or int64, (k + 1,), on {device}")
    readable = device.type == "cpu" and not torch.compiler.is_compiling()
    bounds = cu_seqlens.tolist() if readable else [0, l]
    if bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, l):
        raise ValueError(f"cu_seqlens is {bounds}: expected rising numbers, the first 0 and the last l = {l}")


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, state: Tensor | None, activation: str | None
) -> Tensor:
    """Check the arguments of `causal_conv1d` and return the weight as (d, k)."""
    sizes = check_sequence("x", x)
    check_numbers("weight", weight)
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.dim() != 2 or weight.shape[0] != sizes["d"] or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (d, k) or (d, 1, k) with d = {sizes['d']}")
    check_tensor("weight", weight, "dk", {**sizes, "k": weight.shape[1]}, x.device)
    if bias is not None:
        check_tensor("bias", bias, "d", sizes, x.device)
    if state is not None:
        check_tensor("initial_state", state, "bdk", {**sizes, "k": weight.shape[1] - 1}, x.device)
    check_seq_idx(seq_idx, sizes, x.device)
    if activation not in ("silu", "swish", None):
        raise ValueError(f'activation is {activation!r}: expected "silu", which "swish" is too, or None')
    return weight


def choose_backend(
    backend: str, name: str, tensor: Tensor, dtype: torch.dtype, on_cpu: tuple[str, ...], is_complex: bool = False
) -> str:
    """Resolve "auto", and raise a ValueError for what cannot run here.

    Args:
        backend: what the caller asked for.
        name, tensor: the first argument, whose device decides.
        dtype: that of the sums.
        on_cpu: the backends that run on a CPU, the best last.
        is_complex: whether the state is, which only PyTorch has numbers for.
    """
    available = (*on_cpu, "triton")
    if backend == "auto":
        numba_can = HAS_NUMBA and tensor.device.type == "cpu" and not is_complex and not exporting()
        best = [one for one in on_cpu if one != "numba" or numba_can][-1]
        if not tensor.is_cuda or dtype == torch.float64 or is_complex:
            return best
        if not HAS_TRITON:
            warnings.warn(f"triton is not installed; using the slower {best} backend on CUDA", stacklevel=4)
            return best
        return "triton"
    if backend not in available:
        raise ValueError(f'backend is {backend!r}: expected "auto", ' + ", ".join(f'"{one}"' for one in available))
    if backend not in ("numba", "triton"):
        return backend
    if not (HAS_NUMBA if backend == "numba" else HAS_TRITON):
        raise ValueError(
            f'backend is "{backend}", which is not installed: pip install {backend}, or choose backend="chunked"'
        )
    if is_complex:
        raise ValueError(f'A is complex: expected real values for backend="{backend}"; use backend="auto" or "chunked"')
    if backend == "numba":
        if tensor.device.type != "cpu":
            raise ValueError(f'{name} is on {tensor.device}: expected a CPU tensor for backend="numba"; use "auto"')
        return backend
    if dtype == torch.float64:
        raise ValueError('an argument is float64: expected 16-bit or float32 for backend="triton"; use "auto"')
    from .triton_launch import INTERPRETED  # here, because triton is optional and slow to import

    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f'{name} is on {tensor.device}: expected a CUDA tensor for backend="triton" '
            '(or TRITON_INTERPRET=1 in the environment); use backend="auto"'
        )
    return backend
