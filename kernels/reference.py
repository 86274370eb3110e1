"""The oracle: the selective scan one time step at a time, and the causal convolution as a sum of shifted inputs.

Written to be checked by eye, not to be fast. Gradients come from autograd.
Source: Gu & Dao 2023 (Mamba), Algorithm 2; layouts and argument order of mamba_ssm's `selective_scan_fn`.
Deviations: B and C always vary with time (mamba_ssm also takes constant ones) and A is real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Direction, compute_dtype


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one step at a time: (b, d, l) -> (b, d, l), and the last state (b, d, n).

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
        u, delta, z: (b, d, l); dt = delta + delta_bias, through softplus if `delta_softplus`.
        A: (d, n).
        B, C: (b, n, l), or (b, g, n, l) for g groups of d / g channels each.
        D, delta_bias: (d,).
        initial_state: h_{-1}, (b, d, n); 0 if None.
        reverse: let time run from the last step to the first.
    Returns:
        y in u's dtype; the state after the last step taken, in float32 (float64 if any argument is float64).
    Source: Gu & Dao 2023, Algorithm 2.
    """
    dtype, dtype_out = compute_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state), u.dtype
    b, d, l = u.shape
    u, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B, C = per_group(B).to(dtype), per_group(C).to(dtype)
    dt = delta if delta_bias is None else delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(b, d, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    y: list[Tensor] = [u] * l
    for t in reversed(range(l)) if reverse else range(l):
        B_t = B[..., t].repeat_interleave(d // B.shape[1], dim=1)  # (b, d, n)
        C_t = C[..., t].repeat_interleave(d // C.shape[1], dim=1)  # (b, d, n)
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[:, :, None] * B_t
        y[t] = (C_t * h).sum(dim=2)
    out = torch.stack(y, dim=2)  # (b, d, l)
    if D is not None:
        out = out + D.to(dtype)[:, None] * u
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(dtype_out), h


def bidirectional_scan_reference(
    forward: Direction, backward: Direction, z: Tensor | None, delta_softplus: bool, scale: float
) -> Tensor:
    """The oracle of `bidirectional_scan`: two reference scans, their sum, one gate, in the dtype of the state."""
    dtype = compute_dtype(z, *forward, *backward)
    total = torch.zeros((), dtype=dtype, device=forward.u.device)
    for direction, reverse in ((forward, False), (backward, True)):
        u, delta, A, B, C, D, delta_bias = direction
        y, _ = selective_scan_reference(u.to(dtype), delta, A, B, C, D, None, delta_bias, delta_softplus, None, reverse)
        total = total + y
    total = total * scale
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(forward.u.dtype)


def per_group(projection: Tensor) -> Tensor:
    """View B or C as (b, g, n, l), with one group where it has no group axis."""
    return projection if projection.dim() == 4 else projection[:, None]


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False, activation: str | None = "silu"
) -> Tensor:
    """Convolve every channel with its own causal kernel, then SiLU: (b, d, l) -> (b, d, l).

        y_t = act(bias + sum_j weight_j x_{t - (k - 1) + j}),    x = 0 before the first step

    Args:
        x: (b, d, l).
        weight: (d, k); the last tap meets the present step.
        bias: (d,) or None.
        reverse: causal in reversed time: tap j meets x_{t + (k - 1) - j}, x = 0 after the last step.
        activation: "silu" or None.
    Returns:
        y in x's dtype and order in memory; sums in float32 (float64 if any argument is float64).
    """
    dtype, dtype_out = compute_dtype(x, weight, bias), x.dtype
    l, k = x.shape[2], weight.shape[1]
    taps = weight.to(dtype).flip(1) if reverse else weight.to(dtype)
    margin = (0, k - 1) if reverse else (k - 1, 0)
    if x.stride(1) < x.stride(2):  # channels side by side stay so: turning a long sequence over is slow
        padded = F.pad(x.to(dtype).transpose(1, 2), (0, 0, *margin)).transpose(1, 2)
    else:
        padded = F.pad(x.to(dtype), margin)
    out = taps[:, :1] * padded[:, :, :l]
    for j in range(1, k):
        out = torch.addcmul(out, taps[:, j : j + 1], padded[:, :, j : j + l])
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    if activation is not None:
        out = F.silu(out)
    return out.to(dtype_out)
