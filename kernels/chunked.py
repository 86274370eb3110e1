"""The selective scan in PyTorch operators, arranged to be fast on a CPU, forward and backward.

A step-by-step loop spends its time in many small operator calls. Here the time axis is cut into blocks of a few dozen
steps; per block, all exponentials, all inputs dt B u and all contractions with C are one operator call each, and one
fused multiply-add per step is all that stays serial. The work buffers of a block fit the caches and serve the next
block again, so no (b, d, l, n) tensor exists. Backward keeps the state at the start of each block and computes the rest
of the block again.

Layout inside: time first, channels last, (l, r, d), where the rows r are the batch, times the groups of B and C, times
the directions of a bidirectional scan. Inputs that lie in memory as (b, l, d), as a linear layer leaves them, are the
cheapest. The decays are taken as exp2(dt A log2(e)): PyTorch's exp2 is more than twice as fast as its exp on a CPU.
Source: own arrangement; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import exporting
from .exported import scan_rows_exported
from .operands import Direction, Operands, common_groups, grouped, operands_dtype

WORKSPACE_ELEMENTS = 1 << 19  # of one buffer: 2 MiB of float32
MIN_STEPS = 8  # in a block; the rows are split over several passes before it gets shorter
MAX_STEPS = 64
LOG2_E = math.log2(math.e)


def scan_chunked(operands: Operands) -> tuple[Tensor, Tensor]:
    """Scan all directions as one batch, add, scale and gate: -> y (b, d, l), last state of the first (b, d, n).

    y is in u's dtype; the state is float32, or float64 if any argument is float64.
    """
    directions, reverse, z, initial_state, delta_softplus, scale = operands
    u, dtype, g = directions[0].u, operands_dtype(operands), common_groups(directions)
    (b, d, _), n = u.shape, directions[0].A.shape[1]
    backwards = (reverse, not reverse)[: len(directions)]
    rows = [_to_rows(one, delta_softplus, back, g, dtype) for one, back in zip(directions, backwards)]
    x, dt, A, B, C = rows[0]
    if len(rows) > 1:
        x, dt, A, B, C = (torch.cat(both, dim=0 if i == 2 else 1) for i, both in enumerate(zip(*rows)))
    if initial_state is None:
        h0 = u.new_zeros(A.shape, dtype=dtype)
    else:
        h0 = initial_state.to(dtype).reshape(b * g, d // g, n).transpose(1, 2)
    y, last = (scan_rows_exported if exporting() else _scan_rows)(x, dt, A, B, C, h0)
    total: Tensor | None = None
    for one, back, y_rows in zip(directions, backwards, y.unflatten(1, (len(directions), -1)).unbind(1)):
        y_time_first = y_rows.reshape(-1, b, d)
        y_one = (y_time_first.flip(0) if back else y_time_first).permute(1, 2, 0)  # (b, d, l)
        total = y_one if total is None else total + y_one
        if one.D is not None:
            total = torch.addcmul(total, one.D.to(dtype)[:, None], one.u.to(dtype))
    assert total is not None
    if scale != 1:
        total = total * scale
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(u.dtype), last[: b * g].transpose(1, 2).reshape(b, d, n)


def _to_rows(
    direction: Direction, delta_softplus: bool, reverse: bool, g: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arrange one direction for `_Scan`: x = dt u and dt (l, b g, d / g), A (b g, n, d / g), B and C (l, b g, n)."""
    b, d, l = direction.u.shape
    n = direction.A.shape[1]
    u, dt = (t.to(dtype).permute(2, 0, 1) for t in (direction.u, direction.delta))  # (l, b, d)
    if direction.delta_bias is not None:
        dt = dt + direction.delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    x, dt = (t.reshape(l, b * g, d // g) for t in (dt * u, dt))
    A = direction.A.to(dtype).reshape(g, d // g, n).transpose(1, 2).expand(b, g, n, d // g).reshape(b * g, n, d // g)
    B, C = (grouped(t, g).to(dtype).permute(3, 0, 1, 2).reshape(l, b * g, n) for t in (direction.B, direction.C))
    if reverse:
        x, dt, B, C = (t.flip(0) for t in (x, dt, B, C))
    return x, dt, A, B, C


def _scan_rows(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rows so that a block of MIN_STEPS steps fits the workspace, and scan each lot of rows."""
    l, r, d = x.shape
    n = A.shape[1]
    rows = max(1, min(r, WORKSPACE_ELEMENTS // (MIN_STEPS * n * d)))
    steps = max(1, min(l, MAX_STEPS, WORKSPACE_ELEMENTS // (rows * n * d)))
    lots = zip(*(t.split(rows, dim=0 if t is A or t is h0 else 1) for t in (x, dt, A, B, C, h0)))
    y, last = zip(*(_Scan.apply(*lot, steps) for lot in lots))
    return (y[0], last[0]) if len(y) == 1 else (torch.cat(y, dim=1), torch.cat(last))


class _Scan(torch.autograd.Function):
    """h_t = exp(dt_t A) h_{t-1} + x_t B_t,  y_t = C_t . h_t, for x, dt (l, r, d), A, h0 (r, n, d), B, C (l, r, n)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))  # dt A takes four times as long if A is strided
        (l, r, d), n = x.shape, A.shape[1]
        y, exponent = torch.empty_like(x), A * LOG2_E
        decay, state = x.new_empty(2, steps, r, n, d).unbind()
        step_views = list(zip(decay.unbind(), state.unbind(), strict=True))
        h, starts = h0, []
        for first in range(0, l, steps):
            block = slice(first, min(first + steps, l))
            starts.append(h)
            h = _run_block(x[block], dt[block], exponent, B[block], h, decay, state, step_views).clone()
            k = block.stop - first
            torch.bmm(C[block].view(k * r, 1, n), state[:k].view(k * r, n, d), out=y[block].view(k * r, 1, d))
        if any(ctx.needs_input_grad):
            ctx.steps = steps
            ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, *starts = ctx.saved_tensors
        (l, r, d), n, steps = x.shape, A.shape[1], ctx.steps
        dy, exponent = dy.contiguous(), A * LOG2_E
        dx, ddt, dA, dB, dC = (torch.zeros_like(t) for t in (x, dt, A, B, C))
        decay, state, grad = x.new_empty(3, steps, r, n, d).unbind()
        step_views = list(zip(decay.unbind(), state.unbind(), strict=True))
        carry = dlast  # exp(dt A) dh of the step after the block
        for i in reversed(range(len(starts))):
            block = slice(i * steps, min((i + 1) * steps, l))
            k = block.stop - block.start
            _run_block(x[block], dt[block], exponent, B[block], starts[i], decay, state, step_views)
            dh = grad[:k]
            torch.mul(dy[block, :, None, :], C[block, :, :, None], out=dh)
            dh[-1] += carry
            decays, dhs = decay.unbind(), dh.unbind()
            for t in range(k - 2, -1, -1):
                dhs[t].addcmul_(decays[t + 1], dhs[t + 1])
            carry = decays[0] * dhs[0]
            short, long, tall = (k * r, 1, n), (k * r, 1, d), (k * r, n, d)
            torch.bmm(B[block].view(short), dh.view(tall), out=dx[block].view(long))
            # a row times a matrix, not a matrix times a column, which takes PyTorch six times as long on a CPU
            torch.bmm(x[block].view(long), dh.view(tall).mT, out=dB[block].view(short))
            torch.bmm(dy[block].view(long), state[:k].view(tall).mT, out=dC[block].view(short))
            decay[0] *= starts[i]
            decay[1:k] *= state[: k - 1]
            dlog = decay[:k].mul_(dh)  # gradient of dt A
            dA += torch.mul(dlog, dt[block, :, None, :], out=dh).sum(dim=0)
            torch.sum(dlog.mul_(A), dim=2, out=ddt[block])
        return dx, ddt, dA, dB, dC, carry, None


def _run_block(
    x: Tensor, dt: Tensor, exponent: Tensor, B: Tensor, h: Tensor, decay: Tensor, state: Tensor, step_views: list[Any]
) -> Tensor:
    """Fill decay[t] = exp2(dt_t exponent) and state[t] = h_t for the k steps of a block; return the last h, a view.

    Args:
        x, dt: (k, r, d).
        exponent: A log2(e), (r, n, d).
        B: (k, r, n).
        h: the state before the block, (r, n, d).
        decay, state: at least (k, r, n, d), overwritten.
        step_views: decay[t] and state[t] of every t, made once for all blocks: a view takes as long as half a step.
    """
    k = x.shape[0]
    torch.mul(dt[:, :, None, :], exponent, out=decay[:k])
    torch.exp2(decay[:k], out=decay[:k])
    torch.mul(x[:, :, None, :], B[:, :, :, None], out=state[:k])
    for decay_t, state_t in step_views[:k]:
        h = state_t.addcmul_(decay_t, h)
    return h
