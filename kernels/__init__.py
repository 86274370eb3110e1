"""The selective scan of Mamba in four backends, both directions of a Vim block at once, and the causal convolution.

`reference` is the oracle, `chunked` is PyTorch arranged to be fast on a CPU, `numba` is compiled for the CPU where that
package is installed, `triton` is for CUDA GPUs. "auto" takes triton for CUDA tensors (chunked for float64, which triton
does not do), numba for real CPU tensors where it is installed, and chunked otherwise. A backend that is named never
falls back to another. README.md holds the contract and a glossary.
Source: Gu & Dao 2023 (Mamba); Zhu et al. 2024 (Vim) for the two directions.
"""

import warnings

import torch
from torch import Tensor

from . import threads as threads  # now, not with the first scan: it notes the process
from .autograd import needs_gradient, run
from .checks import ON_CPU, check_convolution, check_scan, check_tensor, choose_backend
from .chunked import scan_chunked
from .operands import Direction, Operands, compute_dtype, flatten, operands_dtype, restarts
from .reference import causal_conv1d_reference, scan_reference

__all__ = ["bidirectional_scan", "causal_conv1d", "selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with input-dependent steps: (b, d, l) -> (b, d, l).

        dt_t = softplus(delta_t + delta_bias)  if delta_softplus, else delta_t + delta_bias
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    h_{-1} = initial_state or 0
        y_t  = (C_t . h_t + D u_t) silu(z_t)

    Argument order, names and layouts are those of mamba_ssm's `selective_scan_fn`. Gradients reach every floating
    argument, also through the last state. The state and all sums are float32, or float64 if any argument is float64.

    Args:
        u, delta, z: (b, d, l), any strides, float16, bfloat16, float32 or float64.
        A: (d, n), n at most 256; negative for a stable scan. If A is complex, so are states, B and C may be, and
            y_t = (2 Re(C_t . h_t) + D u_t) silu(z_t).
        B, C: (b, n, l), or (b, g, n, l) for g groups of d / g channels each.
        D, delta_bias: (d,).
        return_last_state: also return h after the last step taken.
        initial_state: (b, d, n).
        seq_idx: (b, l) integers, for rows that hold several sequences: where the number changes, the state restarts at
            0. The initial state is the first sequence's, the last state the last one's.
        reverse: let time run backwards: equal to flip, scan, flip.
        backend: "auto", "reference", "chunked", "numba" or "triton".
    Returns:
        y in u's dtype; with `return_last_state` also the last state (b, d, n) in float32 or float64.
    Raises:
        ValueError: naming the argument that has a wrong shape, dtype or device, or a backend that cannot run here.
    Source: Gu & Dao 2023, Algorithm 2.
    """
    direction = Direction(u, delta, A, B, C, D, delta_bias)
    check_scan(direction, z, initial_state, seq_idx)
    operands = Operands((direction,), reverse, z, initial_state, seq_idx, delta_softplus, scale=1.0)
    y, last = _run(operands, backend, return_last_state)
    return (y, last) if return_last_state else y


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    u_b: Tensor,
    delta_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    *,
    delta_softplus: bool = True,
    seq_idx: Tensor | None = None,
    scale: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Run both directions of a Vim block at once and gate their sum once: (b, d, l) -> (b, d, l).

        y = scale * (scan(u, ..., D) + scan(u_b, ..., D_b, reverse=True)) * silu(z)

    No argument is flipped in time: `u_b` and the other arguments of the backward direction stand in forward order.

    Args:
        u, ..., delta_bias: the forward direction, as for `selective_scan`; z is the gate that both share.
        u_b, ..., delta_bias_b: the backward direction, of the same sizes.
        scale: factor on the sum; 0.5 is Vim's "divide the output".
        delta_softplus, seq_idx, backend: as for `selective_scan`.
    Returns:
        y in u's dtype.
    Raises:
        ValueError: as `selective_scan`; also if the two directions differ in size.
    Source: Zhu et al. 2024, Algorithm 1 (Vim, "bimamba v2"), which flips and launches twice, and gates twice.
    """
    forward = Direction(u, delta, A, B, C, D, delta_bias)
    backward = Direction(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b)
    check_scan(forward, z, None, seq_idx)
    check_tensor("u_b", u_b, "bdl", dict(zip("bdl", u.shape)), u.device)  # first: the others are compared with it
    check_scan(backward, None, None, None, suffix="_b")
    if A_b.shape != A.shape or A_b.is_complex() != A.is_complex():
        came = f"{tuple(A_b.shape)}, {A_b.dtype}"
        raise ValueError(f"A_b has shape {came}: expected A's {tuple(A.shape)}, complex only if A ({A.dtype}) is")
    operands = Operands((forward, backward), False, z, None, seq_idx, delta_softplus, scale)
    return _run(operands, backend, want_last=False)[0]


def _run(operands: Operands, backend: str, want_last: bool) -> tuple[Tensor, Tensor]:
    """Run checked operands in the backend that fits: -> y, last state (which may be empty unless `want_last`)."""
    u = operands.directions[0].u
    is_complex = operands.directions[0].A.is_complex()
    chosen = choose_backend(backend, "u", u, operands_dtype(operands), ON_CPU, is_complex)
    if chosen == "reference":
        return scan_reference(operands)
    if chosen == "chunked":
        return scan_chunked(operands)
    if chosen == "numba":
        try:
            from .numba_scan import OPERATOR  # here, because numba is optional and slow to import
        except (ImportError, OSError) as error:  # OSError: llvmlite, of its library
            if backend != "auto":
                raise
            warnings.warn(f"numba cannot be imported, using the slower chunked backend: {error}", stacklevel=3)
            return scan_chunked(operands)
    else:
        from .triton_scan import OPERATOR  # here, because triton is optional and slow to import
    tensors = flatten(operands)
    flags = operands.reverse, operands.delta_softplus, float(operands.scale), want_last, needs_gradient(tensors)
    y, last = run(OPERATOR, tensors, flags)
    return y, last


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: bool = False,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own causal kernel, then SiLU: (b, d, l) -> (b, d, l).

        y_t = act(bias + sum_j weight_j x_{t - (k - 1) + j}),    x = initial_state or 0 outside the sequence

    Args:
        x: (b, d, l), any strides.
        weight: (d, k), or (d, 1, k) as `torch.nn.Conv1d` keeps it.
        bias: (d,) or None.
        reverse: causal in reversed time (kernel flipped, padding at the end): equal to flip, convolve, flip.
        activation: "silu" or None.
        seq_idx: (b, l) integers, as for `selective_scan`: no step meets one of another sequence.
        initial_state: (b, d, k - 1), the steps before x (after it, if `reverse`).
        return_final_state: also return the initial state of what follows: the last k - 1 steps, (b, d, k - 1), in the
            wider dtype of x and initial_state.
        backend: "auto", "reference" or "triton"; auto takes triton for CUDA tensors, reference otherwise.
    Returns:
        y in x's dtype; sums are float32, or float64 if any argument is float64. With `return_final_state` also that.
    Raises:
        ValueError: naming the argument that has a wrong shape, dtype, device or value.
    """
    weight = check_convolution(x, weight, bias, seq_idx, initial_state, activation)
    chosen = choose_backend(backend, "x", x, compute_dtype(x, weight, bias, initial_state), ("reference",))
    l, width, whole = x.shape[2], weight.shape[1] - 1, x
    if initial_state is not None or return_final_state:
        if seq_idx is not None:
            raise ValueError("seq_idx and a state are given: expected one of them; convolve the sequences one by one")
        margin = x.new_zeros(*x.shape[:2], width) if initial_state is None else initial_state
        whole = torch.cat([x, margin] if reverse else [margin, x], dim=2)
    convolved = x if initial_state is None else whole
    if seq_idx is not None:
        seq_idx = restarts(seq_idx).cumsum(dim=1)  # sequences that are no neighbours may have the same number
    if chosen == "triton":
        from .triton_conv import causal_conv1d_triton

        y = causal_conv1d_triton(convolved, weight, bias, seq_idx, reverse, activation)
    else:
        y = causal_conv1d_reference(convolved, weight, bias, seq_idx, reverse, activation)
    if initial_state is not None:
        y = y[:, :, :l] if reverse else y[:, :, width:]
    y = y.to(x.dtype)
    if not return_final_state:
        return y
    return y, (whole[:, :, :width] if reverse else whole[:, :, l:]).clone()  # a view would keep the sequence alive
