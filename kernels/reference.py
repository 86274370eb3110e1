"""The oracle: the selective scan one time step at a time, and the causal convolution as a sum of shifted inputs.

Written to be checked by eye, not to be fast. Gradients come from autograd.
Source: Gu & Dao 2023 (Mamba), Algorithm 2; layouts of mamba_ssm's `selective_scan_fn`.
Deviations: B and C always vary with time (mamba_ssm also takes constant ones).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import (
    Direction,
    Operands,
    compute_dtype,
    grouped,
    operands_dtype,
    restarts,
    softplus,
    state_dtype,
    unflatten,
)


def scan_reference(operands: Operands) -> tuple[Tensor, Tensor]:
    """Scan every direction, add them up, scale and gate: -> y (b, d, l), last state of the first direction (b, d, n).

    y is in u's dtype; the state is float32, or float64 if any argument is float64.
    """
    directions, reverse, z, initial_state, seq_idx, delta_softplus, scale = operands
    dtype = operands_dtype(operands)
    total, last = scan_direction(directions[0], reverse, initial_state, seq_idx, delta_softplus, dtype)
    for direction in directions[1:]:
        total = total + scan_direction(direction, not reverse, None, seq_idx, delta_softplus, dtype)[0]
    total = total * scale
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(directions[0].u.dtype), last


def scan_reference_of(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`scan_reference` of the values of ARGUMENTS: what whole scans as operators are differentiated as."""
    return scan_reference(unflatten(arguments))


def scan_direction(
    direction: Direction, reverse: bool, initial_state: Tensor | None, seq_idx: Tensor | None, delta_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run one direction of time: -> C . h + D u (b, d, l), and the last state (b, d, n), in `dtype`.

    dt_t = softplus(delta_t + delta_bias) if `delta_softplus`, else delta_t + delta_bias
    """
    u, dt = direction.u.to(dtype), direction.delta.to(dtype)
    A, B, C = (t.to(state_dtype(direction.A, dtype)) for t in (direction.A, grouped(direction.B), grouped(direction.C)))
    if direction.delta_bias is not None:
        dt = dt + direction.delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = softplus(dt)
    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(A.dtype)
    restart = None if seq_idx is None else restarts(seq_idx, reverse)
    y, last = recurrence(dt * u, dt, A, B, C, h, restart, reverse)
    return y if direction.D is None else y + direction.D.to(dtype)[:, None] * u, last


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None, reverse: bool, *_: object
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one step at a time: -> y (b, d, l), and the last state (b, d, n).

        h_t = exp(dt_t A) h_{t-1} + x_t B_t,    y_t = C_t . h_t, or 2 Re(C_t . h_t) if A is complex

    Args:
        x, dt: (b, d, l).
        A: (d, n).
        B, C: in groups, (b, g, n, l).
        h: the state before the first step, (b, d, n).
        restart: (b, l): the steps before which h is 0.
        reverse: let time run backwards.
    """
    d, l = x.shape[1:]
    y: list[Tensor] = [x] * l
    for t in reversed(range(l)) if reverse else range(l):
        B_t = B[..., t].repeat_interleave(d // B.shape[1], dim=1)  # (b, d, n)
        C_t = C[..., t].repeat_interleave(d // C.shape[1], dim=1)  # (b, d, n)
        if restart is not None:
            h = h.masked_fill(restart[:, t, None, None], 0)
        h = torch.exp(dt[:, :, t, None] * A) * h + x[:, :, t, None] * B_t
        y[t] = (C_t * h).sum(dim=2)
    out = torch.stack(y, dim=2)  # (b, d, l)
    return 2 * out.real if A.is_complex() else out, h


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool, activation: str | None
) -> Tensor:
    """Convolve every channel with its own causal kernel: (b, d, l), (d, k), (d,) -> (b, d, l), ordered as x in memory.

    y_t = act(bias + sum_j weight_j x_{t - (k - 1) + j}),    x = 0 outside the sequence

    The last tap meets the present step. With `reverse`, tap j meets x_{t + (k - 1) - j}. Where `seq_idx` (b, l) is
    another number than at t, another sequence lies.
    """
    dtype, l, k = compute_dtype(x, weight, bias), x.shape[2], weight.shape[1]
    taps = weight.to(dtype).flip(1) if reverse else weight.to(dtype)
    margin = (0, k - 1) if reverse else (k - 1, 0)
    if x.stride(1) < x.stride(2):  # channels side by side stay so: turning a long sequence over is slow
        padded = F.pad(x.to(dtype).transpose(1, 2), (0, 0, *margin)).transpose(1, 2)
    else:
        padded = F.pad(x.to(dtype), margin)
    met = [padded[:, :, j : j + l] for j in range(k)]  # what every tap meets
    if seq_idx is not None:
        numbers = F.pad(seq_idx, margin)
        met = [x_j.masked_fill((numbers[:, j : j + l] != seq_idx)[:, None], 0) for j, x_j in enumerate(met)]
    out = taps[:, :1] * met[0]
    for j in range(1, k):
        out = torch.addcmul(out, taps[:, j : j + 1], met[j])
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    if activation is not None:
        out = F.silu(out)
    return out.to(x.dtype)
