"""The selective scan in PyTorch operators, arranged to be fast on a CPU, forward and backward.

A step-by-step loop spends its time in many small operator calls. Here the time axis is cut into blocks of a few dozen
steps; per block, all exponentials, all inputs dt B u and all contractions with C are one operator call each, and one
fused multiply-add per step is all that stays serial. The work buffers of a block fit the caches and serve the next
block again, so no (b, d, l, n) tensor exists. Backward keeps the state at the start of each block and computes the rest
of the block again.

Layout inside: time first, channels last, (l, r, d), where the rows r are the batch times the groups of B and C. Inputs
that lie in memory as (b, l, d), as a linear layer leaves them, are the cheapest. A single direction that runs backwards
takes its blocks, and walks through them, from the end; of two, one is flipped and both are one scan. The decays are
taken as exp2(dt A log2(e)): PyTorch's exp2 is more than twice as fast as its exp on a CPU. All is written for complex A
too; for a real one, conjugates are free.
Source: own arrangement; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import RULES, Rule, needs_gradient, operator, run, without_base
from .checks import exporting
from .exported import scan_rows_exported
from .operands import Direction, Operands, common_groups, grouped, operands_dtype, restarts, softplus, state_dtype
from .reference import recurrence

WORKSPACE_ELEMENTS = 1 << 19  # of one buffer: 2 MiB of float32
MIN_STEPS = 8  # in a block; the rows are split over several passes before it gets shorter
MAX_STEPS = 64
LOG2_E = math.log2(math.e)


def scan_chunked(operands: Operands) -> tuple[Tensor, Tensor]:
    """Scan all directions, add, scale and gate: -> y (b, d, l), last state of the first direction (b, d, n).

    y is in u's dtype; the state is float32, or float64 if any argument is float64.
    """
    directions, reverse, z, initial_state, seq_idx, delta_softplus, scale = operands
    dtype, g = operands_dtype(operands), common_groups(directions)
    joined = len(directions) == 2 and seq_idx is None
    scans = [_join(directions[0], directions[1], g)] if joined else directions
    ys, lasts = [], []
    for one, h, back in zip(scans, (initial_state, None), (reverse, not reverse)):
        y, last = _scan_one(_arrange(one, delta_softplus, 2 * g if joined else g, dtype), h, seq_idx, back)
        ys.append(y if one.D is None else torch.addcmul(y, one.D.to(dtype)[:, None], one.u.to(dtype)))
        lasts.append(last)
    if joined:
        forward, backward = ys[0].mT.chunk(2, dim=2)  # so that their gradients, joined, have channels side by side
        ys = [forward.mT, backward.flip(1).mT]
    total = ys[0] if len(ys) == 1 else ys[0] + ys[1]
    if scale != 1:
        total = total * scale
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(directions[0].u.dtype), lasts[0]


def _join(forward: Direction, backward: Direction, g: int) -> Direction:
    """Two directions as one of twice the channels, the second flipped in time, which halves the serial steps."""
    pairs: list[tuple[Any, Any]] = list(zip(forward, backward))
    u, delta = (torch.cat([one.mT, two.mT.flip(1)], dim=2).mT for one, two in pairs[:2])
    B, C = (torch.cat([grouped(one, g), grouped(two, g).flip(3)], dim=1) for one, two in pairs[3:5])
    D, bias = (_cat_or_none(one, two) for one, two in pairs[5:])
    return Direction(u, delta, torch.cat([forward.A, backward.A]), B, C, D, bias)


def _cat_or_none(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """Join what each direction has one of, (d,); zeros stand for one that is absent, None for both."""
    if one is None:
        return None if two is None else torch.cat([torch.zeros_like(two), two])
    return torch.cat([one, torch.zeros_like(one) if two is None else two])


def _arrange(direction: Direction, delta_softplus: bool, g: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x = dt u and dt (b, d, l), A (d, n), B and C (b, g, n, l)."""
    u, dt = direction.u.to(dtype), direction.delta.to(dtype)
    if direction.delta_bias is not None:
        dt = dt + direction.delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = softplus(dt)
    wide = state_dtype(direction.A, dtype)
    A, B, C = (t.to(wide) for t in (direction.A, grouped(direction.B, g), grouped(direction.C, g)))
    return dt * u, dt, A, B, C


def _scan_one(
    arranged: tuple[Tensor, ...], h: Tensor | None, seq_idx: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Scan one direction: -> C . h (b, d, l), last state (b, d, n)."""
    x, A = arranged[0], arranged[2]
    h = A.new_zeros(x.shape[0], *A.shape) if h is None else h.to(A.dtype)
    tensors = *arranged, h, None if seq_idx is None else restarts(seq_idx, reverse)
    if exporting():
        return _scan_exported(*tensors, reverse)
    y, last = run("scan", tensors, (reverse, needs_gradient(tensors)))
    return y, last


def _scan_exported(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run `recurrence` as an operator that ONNX knows."""
    x, A, reverse = arguments[0], arguments[2], arguments[-1]
    rows = _to_rows(*arguments[:-1])
    goes_on = [] if rows.restart is None else [rows.restart.logical_not().to(x.dtype)]
    x_rows, dt, B, C, *goes_on = (t.flip(0) if reverse else t for t in (rows.x, rows.dt, rows.B, rows.C, *goes_on))
    first = rows.h.clone(memory_format=torch.contiguous_format)
    y, last = scan_rows_exported(x_rows, dt, rows.A, B, C, first, *goes_on)
    y = 2 * y.real if y.is_complex() else y
    y = (y.flip(0) if reverse else y).reshape(-1, *x.shape[:2]).permute(1, 2, 0)
    return y, last.transpose(1, 2).reshape(-1, *A.shape)


class _Rows(NamedTuple):
    """The arguments of `recurrence` as the blocks take them: time first, channels last."""

    x: Tensor  # (l, r, d), as dt
    dt: Tensor
    A: Tensor  # (r, n, d), as h
    B: Tensor  # (l, r, n), as C
    C: Tensor
    h: Tensor
    restart: Tensor | None  # (l, r)

    def lots(self) -> tuple[list[slice], list[slice]]:
        """Lots of rows, and blocks of steps, such that a block of a lot fits the workspace."""
        (l, r, d), n = self.x.shape, self.A.shape[1]
        rows, steps = _block_size(l, r, n, d)
        blocks = [slice(i, min(i + steps, l)) for i in range(0, l, steps)]
        return [slice(i, i + rows) for i in range(0, r, rows)], blocks

    def lot(self, lot: slice) -> "_Rows":
        """The rows of a lot."""
        x, dt, A, B, C, h, restart = self
        x, dt, B, C = (t[:, lot] for t in (x, dt, B, C))
        return _Rows(x, dt, A[lot], B, C, h[lot], None if restart is None else restart[:, lot])


def _to_rows(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None) -> _Rows:
    """Arrange the arguments of `recurrence`. Contiguous: the blocks read every value several times."""
    (b, d, l), (g, n) = x.shape, B.shape[1:3]
    x, dt = (t.permute(2, 0, 1).reshape(l, b * g, d // g).contiguous() for t in (x, dt))
    A = A.reshape(g, d // g, n).transpose(1, 2).expand(b, g, n, d // g).reshape(b * g, n, d // g).contiguous()
    B, C = (t.permute(3, 0, 1, 2).reshape(l, b * g, n).contiguous() for t in (B, C))
    h = h.reshape(b * g, d // g, n).transpose(1, 2)
    return _Rows(x, dt, A, B, C, h, None if restart is None else restart.mT.repeat_interleave(g, dim=1))


def _block_size(l: int, r: int, n: int, d: int) -> tuple[int, int]:
    """Rows and steps of a block: as many rows as leave MIN_STEPS steps."""
    rows = max(1, min(r, WORKSPACE_ELEMENTS // (MIN_STEPS * n * d)))
    return rows, max(1, min(l, MAX_STEPS, WORKSPACE_ELEMENTS // (rows * n * d)))


class _Workspace:
    """Buffers of a block, (steps, r, n, d), and a view of every step, made once: it takes as long as half a step."""

    def __init__(self, rows: _Rows, steps: int, reverse: bool) -> None:
        self.reverse, self.exponent = reverse, rows.A * LOG2_E
        self.decay, self.state = rows.A.new_empty(2, steps, *rows.A.shape).unbind()
        self.views = list(zip(self.decay.unbind(), self.state.unbind(), strict=True))

    def fill(self, rows: _Rows, block: slice, h: Tensor) -> Tensor:
        """Fill decay[t] = exp2(dt_t exponent) and state[t] = h_t for a block after h; return the last h, a view."""
        k = block.stop - block.start
        decay, state, dt, x, B = self.decay[:k], self.state[:k], rows.dt[block], rows.x[block], rows.B[block]
        torch.mul(dt[:, :, None, :], self.exponent, out=decay)
        torch.exp2(decay, out=decay)
        torch.mul(x[:, :, None, :], B[:, :, :, None], out=state)
        if rows.restart is not None:
            decay.masked_fill_(rows.restart[block][:, :, None, None], 0)
        for decay_t, state_t in reversed(self.views[:k]) if self.reverse else self.views[:k]:
            h = state_t.addcmul_(decay_t, h)
        return h


def _empty_starts(x: Tensor, B: Tensor, keep: bool) -> Tensor:
    """Where `_scan` keeps states."""
    (b, d, l), (g, n) = x.shape, B.shape[1:3]
    blocks = -(-l // _block_size(l, b * g, n, d // g)[1])
    return B.new_empty((blocks if keep else 0, b * g, n, d // g))


def _contract(row: Tensor, matrix: Tensor) -> Tensor:
    """Multiply a row (k, r, i) by a matrix (k, r, i, j) -> (k, r, j). With `out`, autocast leaves the product alone."""
    product = row.new_empty(row.shape[0] * row.shape[1], 1, matrix.shape[3])
    torch.bmm(row.flatten(0, 1)[:, None], matrix.flatten(0, 1), out=product)
    return product.view(*row.shape[:2], -1)


def _fake_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Allocate the results of `_scan`."""
    b, d, l = x.shape
    return x.new_empty(l, b, d).permute(1, 2, 0), h.new_empty(h.shape), _empty_starts(x, B, others[-1])


@operator(_fake_scan)
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `recurrence`; also return, if `keep`, the states before the blocks, (blocks, r, n, d)."""
    everything = _to_rows(x, dt, A, B, C, h, restart)
    y = torch.empty_like(everything.x, memory_format=torch.contiguous_format)
    last, starts = torch.empty_like(everything.A), _empty_starts(x, B, keep)
    lots, blocks = everything.lots()
    for lot in lots:
        rows = everything.lot(lot)
        work, now = _Workspace(rows, blocks[0].stop, reverse), rows.h
        for i in reversed(range(len(blocks))) if reverse else range(len(blocks)):
            block = blocks[i]
            if keep:
                starts[i, lot] = now
            now = work.fill(rows, block, now).clone()
            y_block = _contract(rows.C[block], work.state[: block.stop - block.start])
            y[block, lot] = 2 * y_block.real if y_block.is_complex() else y_block
        last[lot] = now
    y = without_base(y.view(len(y), *x.shape[:2]).permute(1, 2, 0))
    return y, last.transpose(1, 2).reshape(h.shape).contiguous(), starts


def _fake_scan_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Allocate the results of `_scan_backward`."""
    x, dt, A, B, C, h = arguments[3:9]
    (b, _, l), (g, n) = x.shape, B.shape[1:3]
    dB, dC = (t.new_empty(l, b, g, n).permute(1, 2, 3, 0) for t in (B, C))
    return torch.empty_like(x), torch.empty_like(dt), A.new_empty(A.shape), dB, dC, h.new_empty(h.shape)


@operator(_fake_scan_backward)
def _scan_backward(
    dy: Tensor, dlast: Tensor | None, starts: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
    restart: Tensor | None, reverse: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C and h."""
    if not keep:  # a gradient was not expected
        starts = _scan(x, dt, A, B, C, h, restart, reverse, True)[2]
    everything = _to_rows(x, dt, A, B, C, h, restart)
    (b, d, l), g = x.shape, B.shape[1]
    dy = dy.permute(2, 0, 1).reshape(everything.x.shape)
    carry = torch.zeros_like(everything.A)
    if dlast is not None:
        carry.copy_(dlast.reshape(b * g, d // g, -1).transpose(1, 2))
    dx, ddt, dA, dB, dC = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in everything[:5])
    lots, blocks = everything.lots()
    for lot in lots:
        rows = everything.lot(lot)
        results = _Rows(dx[:, lot], ddt[:, lot], dA[lot], dB[:, lot], dC[:, lot], carry[lot], None)
        _scan_lot_backward(rows, dy[:, lot], starts[:, lot], results, blocks, reverse)
    # as x and dt lie in memory: PyTorch's compiler takes it for granted where softplus is differentiated
    dx, ddt = (torch.empty_like(t).copy_(rows.view(l, b, d).permute(1, 2, 0)) for t, rows in ((x, dx), (dt, ddt)))
    dA = dA.view(b, g, -1, d // g).sum(dim=0).transpose(1, 2).reshape(A.shape).contiguous()
    dB, dC = (t.view(l, b, g, -1).permute(1, 2, 3, 0) for t in (dB, dC))
    return dx, ddt, dA, dB, dC, carry.transpose(1, 2).reshape(h.shape).contiguous()


def _scan_lot_backward(
    rows: _Rows, dy: Tensor, starts: Tensor, results: _Rows, blocks: list[slice], reverse: bool
) -> None:
    """Write the gradients of a lot of rows to `results`, whose h is the gradient of the last state at first."""
    work = _Workspace(rows, blocks[0].stop, reverse)
    grad, A, carry = torch.empty_like(work.state), rows.A.conj(), results.h
    for i in range(len(blocks)) if reverse else reversed(range(len(blocks))):
        block = blocks[i]
        k = block.stop - block.start
        work.fill(rows, block, starts[i])
        x, dt, B, C, dy_block = (t[block] for t in (rows.x, rows.dt, rows.B.conj(), rows.C.conj(), dy))
        if A.is_complex():
            x, dy_block = x.to(A.dtype), 2 * dy_block.to(A.dtype)
        decay, state, dh = work.decay[:k].conj_physical_(), work.state[:k].conj_physical_(), grad[:k]
        torch.mul(dy_block[:, :, None, :], C[:, :, :, None], out=dh)
        order = list(range(k))[:: -1 if reverse else 1]
        first, decays, dhs = order[0], decay.unbind(), dh.unbind()
        dhs[order[-1]].add_(carry)  # exp(dt A) dh of the step after the block
        for now, after in zip(order[-2::-1], order[:0:-1]):
            dhs[now].addcmul_(decays[after], dhs[after])
        torch.mul(decays[first], dhs[first], out=carry)
        results.x[block] = _contract(B, dh).real
        # a row times a matrix, not a matrix times a column, which takes PyTorch six times as long on a CPU
        results.B[block] = _contract(x, dh.mT)
        results.C[block] = _contract(dy_block, state.mT)
        decays[first].mul_(starts[i].conj())
        before, others = (state[1:], decay[:-1]) if reverse else (state[:-1], decay[1:])
        others.mul_(before)
        dlog = decay.mul_(dh)  # gradient of dt A
        results.A.add_(torch.mul(dlog, dt[:, :, None, :], out=dh).sum(dim=0))
        results.dt[block] = dlog.mul_(A).sum(dim=2).real


RULES["scan"] = Rule(_scan, _scan_backward, recurrence, outputs=2)
