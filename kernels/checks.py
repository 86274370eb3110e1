"""Argument checks of the scans and of the convolution, shared by all backends.

Every fault is one ValueError that names the argument, what came and what was expected, raised before any work is done.
"""

import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STATES = 256  # the limit of mamba_ssm's kernel, kept so that code can move between the two


class Direction(NamedTuple):
    """What one direction of a scan owns: the arguments of `selective_scan` but for the gate and the state."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def exporting() -> bool:
    """Whether torch.export is tracing: then only operators that other programs know may be used."""
    return torch.compiler.is_exporting()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of the state and of all sums: float64 if any argument is float64, float32 otherwise (16-bit included)."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tensor(name: str, value: object, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """Raise unless `value` is a real floating tensor of exactly this shape on this device.

    Args:
        name: the argument's name, for the message.
        value: what came.
        shape, axes: the expected shape, as numbers and as letters such as "(b, d, l)".
        device: where it must be (that of the first argument).
    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    tensor = require_real(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {axes} = {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: expected {device}, where the first argument is; move it there")


def require_real(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor of a real floating dtype; raise a ValueError that names it otherwise."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor")
    if value.is_complex():
        raise ValueError(
            f"{name} is {value.dtype}: expected real values; complex states are not supported, "
            "use a real-valued parametrisation (Mamba-1's default)"
        )
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"{name} is {value.dtype}: expected float16, bfloat16, float32 or float64")
    return value


def check_scan(direction: Direction, z: Tensor | None, initial_state: Tensor | None, suffix: str = "") -> None:
    """Check one direction of a scan against the contract of `selective_scan`; `suffix` is added to every name."""
    u, delta, A, B, C, D, delta_bias = direction
    require_real(f"u{suffix}", u)
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u{suffix} has shape {tuple(u.shape)}: expected (b, d, l) with every size at least 1")
    b, d, l = u.shape
    require_real(f"A{suffix}", A)
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] == 0:
        raise ValueError(f"A{suffix} has shape {tuple(A.shape)}: expected (d, n) = ({d}, n) with n at least 1")
    n = A.shape[1]
    if n > MAX_STATES:
        raise ValueError(f"A{suffix} has shape {tuple(A.shape)}: expected a state size n of at most {MAX_STATES}")
    check_tensor(f"A{suffix}", A, (d, n), "(d, n)", u.device)
    check_tensor(f"delta{suffix}", delta, (b, d, l), "(b, d, l)", u.device)
    for name, value in ((f"B{suffix}", B), (f"C{suffix}", C)):
        _check_projection(name, value, (b, d, n, l), u.device)
    if D is not None:
        check_tensor(f"D{suffix}", D, (d,), "(d,)", u.device)
    if z is not None:
        check_tensor("z", z, (b, d, l), "(b, d, l)", u.device)
    if delta_bias is not None:
        check_tensor(f"delta_bias{suffix}", delta_bias, (d,), "(d,)", u.device)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (b, d, n), "(b, d, n)", u.device)


def _check_projection(name: str, value: Tensor, sizes: tuple[int, int, int, int], device: torch.device) -> None:
    """Check B or C: (b, n, l), or (b, g, n, l) with d divisible by g."""
    b, d, n, l = sizes
    require_real(name, value)
    if value.dim() == 4:
        g = value.shape[1]
        if g == 0 or d % g:
            raise ValueError(f"{name} has {g} groups: expected (b, g, n, l) where g divides d = {d}")
        check_tensor(name, value, (b, g, n, l), "(b, g, n, l)", device)
    elif value.dim() == 3:
        check_tensor(name, value, (b, n, l), "(b, n, l)", device)
    else:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected (b, n, l) = {(b, n, l)} or, in g groups, (b, g, n, l)"
        )


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Check the arguments of `causal_conv1d` and return the weight as (d, k)."""
    require_real("x", x)
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (b, d, l) with every size at least 1")
    d = x.shape[1]
    require_real("weight", weight)
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (d, k) or (d, 1, k) with d = {d}")
    check_tensor("weight", weight, (d, weight.shape[1]), "(d, k)", x.device)
    if bias is not None:
        check_tensor("bias", bias, (d,), "(d,)", x.device)
    if activation not in ("silu", None):
        raise ValueError(f'activation is {activation!r}: expected "silu" or None')
    return weight


def choose_backend(
    backend: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    known: tuple[str, ...] = ("reference", "chunked", "triton"),
) -> str:
    """Resolve "auto" and refuse what cannot run; `known` names the backends, the last CPU one being the default."""
    if backend != "auto" and backend not in known:
        raise ValueError(f'backend is {backend!r}: expected "auto", ' + ", ".join(f'"{one}"' for one in known))
    cpu_default = known[-2]
    if backend == "auto":
        if not tensor.is_cuda or dtype == torch.float64:
            return cpu_default
        if importlib.util.find_spec("triton") is None:
            warnings.warn(f"triton is not installed; using the slower {cpu_default} backend on CUDA", stacklevel=3)
            return cpu_default
        return "triton"
    if backend == "triton":
        _check_triton(name, tensor, dtype)
    return backend


def _check_triton(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise unless Triton can take these tensors: installed, not float64, on CUDA or in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError('backend is "triton", which is not installed: pip install triton, or choose backend="chunked"')
    if dtype == torch.float64:
        raise ValueError('an argument is float64: expected 16-bit or float32 for backend="triton"; use "chunked"')
    from .triton_scan import INTERPRETED

    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f'{name} is on {tensor.device}: expected a CUDA tensor for backend="triton" '
            '(or TRITON_INTERPRET=1 in the environment); use backend="auto"'
        )
