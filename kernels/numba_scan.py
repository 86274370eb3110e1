"""The scan compiled by numba as two PyTorch operators, forward and backward: an extra that is never needed.

The kernels read u, delta and z as (b, l, d) by their strides where channels lie side by side, and copies of them
otherwise. Where the channels of a group are no multiple of WIDTH, copies have channels of zeros added. Threads are as
many as PyTorch has (threads.py): numba's can neither be called from several threads nor be used after a fork.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import RULES, Rule, operator, without_base
from .numba_kernels import STEPS, Scan, Shared, Sizes, backward, forward
from .numba_math import LOG2_E, WIDTH
from .operands import ARGUMENTS, Direction, compute_dtype, restarts, unflatten
from .reference import scan_reference_of
from .threads import run_together

PARTS = 8  # of a batch entry at most: units of work for threads, and of the sums for dB and dC that memory holds
GRAIN = 2**18  # steps of single states, below which a second thread costs as much as it brings
SECONDS = 1.0  # a compilation that takes longer is logged
LOGGER = logging.getLogger("almrr_ref")


class Layout(NamedTuple):
    """Sizes of a call, and how tensors are laid out for the kernels: channels last, `padded` of them."""

    b: int
    d: int
    l: int
    n: int
    g: int
    padded: int
    dtype: torch.dtype

    def channels(self, t: Tensor) -> Tensor:
        """(..., d) -> (..., padded) of the dtype of the sums, side by side."""
        t = t.to(self.dtype)
        if self.padded != self.d:
            t = F.pad(t.unflatten(-1, (self.g, -1)), (0, (self.padded - self.d) // self.g)).flatten(-2)
        return t if t.stride(-1) == 1 else t.contiguous()

    def unpad(self, t: Tensor) -> Tensor:
        """Undo `channels`: (..., padded) -> (..., d)."""
        if self.padded == self.d:
            return t
        return t.unflatten(-1, (self.g, -1))[..., : self.d // self.g].flatten(-2).contiguous()

    def empty(self, *shape: int) -> Tensor:
        """Memory that the kernels write to."""
        return torch.empty(*shape, dtype=self.dtype)

    @property
    def parts(self) -> int:
        """Parts of a batch entry."""
        return min(PARTS, self.padded // WIDTH)


def layout(arguments: Sequence[Any]) -> Layout:
    """The layout of a call of the operators."""
    (b, d, l), n, g = arguments[0].shape, arguments[2].shape[1], arguments[3].shape[1]
    return Layout(b, d, l, n, g, g * (-(-d // g // WIDTH) * WIDTH), compute_dtype(*arguments[:16]))


class _Call:
    """The addresses of a call's tensors, which it keeps alive."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.operands, self.layout = unflatten(arguments), layout(arguments)
        directions, reverse, z, _, seq_idx, softplus, scale = self.operands
        b, _, l, n, g, padded, _ = self.layout
        self.alive: list[Tensor] = []
        self.sizes = Sizes(b, padded, l, n, g, self.layout.parts, softplus, reverse, len(directions), scale)
        self.gate = self.sequence(z)
        self.scans = [self._describe(one, seq_idx, reverse != bool(i)) for i, one in enumerate(directions)]

    def address(self, t: Tensor | None) -> int:
        """Where a tensor lies; 0 for None."""
        if t is None:
            return 0
        self.alive.append(t)
        return t.data_ptr()

    def sequence(self, t: Tensor | None) -> tuple[int, int, int]:
        """Address and strides of u, delta or z, (b, d, l)."""
        if t is None:
            return 0, 0, 0
        rows = self.layout.channels(t.mT)
        return self.address(rows), rows.stride(0), rows.stride(1)

    def states(self, t: Tensor | None) -> int:
        """Address of states (..., d, n), which become (..., n, d), or of what each channel has one of, (1, d)."""
        return 0 if t is None else self.address(self.layout.channels(t).contiguous())

    def _describe(self, direction: Direction, seq_idx: Tensor | None, reverse: bool) -> Scan:
        """One direction; forward and backward fill in what they write."""
        u, delta, A, B, C, D, bias = direction
        dtype = self.layout.dtype
        b_address, c_address = (self.address(t.to(dtype).permute(0, 3, 1, 2).contiguous()) for t in (B, C))
        exponent = self.states(A.to(dtype).mT * LOG2_E)
        restart = self.address(None if seq_idx is None else restarts(seq_idx, reverse).contiguous())
        sequences = *self.sequence(u), *self.sequence(delta)
        return Scan(*sequences, exponent, b_address, c_address, self.states(D), self.states(bias), restart, 0, 0, 0)

    def run(self, kernel: Any, scans: Sequence[Scan], shared: Shared, work: int) -> None:
        """Run a kernel over all parts; each thread has a workspace of `work` vectors.

        There are as many as PyTorch has, which would begin and end some if it were fewer, or one for little work.
        """
        b, _, l, n, _, padded, _ = self.layout
        pays = b * self.layout.parts > 1 and len(scans) * b * padded * l * n >= GRAIN
        threads = torch.get_num_threads() if pays else 1
        workspaces, counters = self.layout.empty(threads, work * WIDTH), torch.zeros(2, dtype=torch.int64)
        self.alive += [workspaces, counters]
        zero = np.float64(0) if self.layout.dtype == torch.float64 else np.float32(0)
        bytes_each = workspaces[0].nbytes
        task = zero, scans[0], scans[-1], shared, self.sizes, workspaces.data_ptr(), bytes_each, counters.data_ptr()
        run_together(functools.partial(_compile(kernel, self.layout.dtype, task), *task), threads, alive=self)


_ENTRIES: dict[tuple[str, torch.dtype], Callable[..., None]] = {}


def _compile(kernel: Any, dtype: torch.dtype, arguments: tuple[Any, ...]) -> Callable[..., None]:
    """Compile a kernel, with a line in the log if that takes long, or read what another process has compiled."""
    key = kernel.__name__, dtype
    if key not in _ENTRIES:
        start, hits = time.perf_counter(), sum(kernel.stats.cache_hits.values())
        _ENTRIES[key] = kernel.compile(tuple(numba.typeof(value) for value in arguments))
        seconds = time.perf_counter() - start
        if seconds > SECONDS and hits == sum(kernel.stats.cache_hits.values()):
            folder = kernel.stats.cache_path or "memory: no folder for it can be written"
            LOGGER.info("numba compiled the scan (%s, %s) in %.0f s; kept in %s", *key, seconds, folder)
    return _ENTRIES[key]


def _allocate_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of `_numba_scan`."""
    u, z, size, (want_last, keep) = arguments[0], arguments[14], layout(arguments), arguments[-2:]
    directions = 1 if arguments[7] is None else 2
    last = u.new_empty((size.b, size.d, size.n) if want_last else 0, dtype=size.dtype)
    saves = (directions, size.b, -(-size.l // STEPS), size.n, size.padded)
    starts = u.new_empty(saves if keep else 0, dtype=size.dtype)
    ungated = u.new_empty((size.b, size.l, size.padded) if keep and z is not None else 0, dtype=size.dtype)
    return u.new_empty(size.b, size.l, size.d).mT, last, starts, ungated


@operator(_allocate_forward, f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _numba_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state and, if `keep`, what the backward pass needs: saved states, y before the gate.

    Each but y is empty where nothing needs it.
    """
    call, (want_last, keep) = _Call(arguments), arguments[-2:]
    size, h = call.layout, call.operands.initial_state
    _, _, starts, ungated = _allocate_forward(*arguments)
    out = size.empty(size.b, size.l, size.padded)
    last = size.empty(size.b, size.n, size.padded) if want_last else None
    scans = [scan._replace(starts=call.address(starts[i]) if keep else 0) for i, scan in enumerate(call.scans)]
    scans[0] = scans[0]._replace(first=call.states(None if h is None else h.mT), last=call.address(last))
    shared = Shared(*call.gate, call.address(out), call.address(ungated))
    call.run(forward, scans, shared, 2 * size.n + 3 * STEPS)
    y = without_base(size.unpad(out).to(arguments[0].dtype).mT)
    return y, out.new_empty(0) if last is None else size.unpad(last).mT.contiguous(), starts, ungated


def _allocate_gradients(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Allocate the results of `_numba_scan_backward`."""
    b, _, l, n, g, *_ = layout(arguments[3:])
    gradients = []
    for name, t in zip([*Direction._fields * 2, "z", "initial_state"], arguments[3:19]):
        if t is None:
            gradients.append(dout.new_empty(0))
        elif name in ("B", "C"):
            gradients.append(t.new_empty(b, l, g, n).permute(0, 2, 3, 1))
        else:
            gradients.append(t.new_empty(t.mT.shape).mT if name in ("u", "delta", "z") else t.new_empty(t.shape))
    return tuple(gradients)


@operator(
    _allocate_gradients,
    f"(Tensor dout, Tensor? dlast, Tensor starts, Tensor ungated, {ARGUMENTS}) -> ({', '.join(['Tensor'] * 16)})",
)
def _numba_scan_backward(
    dout: Tensor, dlast: Tensor | None, starts: Tensor, ungated: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Return the gradient of every tensor, empty for one that is absent."""
    call, (want_last, keep) = _Call(arguments), arguments[-2:]
    if not keep:  # a gradient was not expected
        _, _, starts, ungated = _numba_scan(*arguments[:-1], True)
    size, z, h = call.layout, call.operands.z, call.operands.initial_state
    b, l, n = size.b, size.l, size.n
    dz = None if z is None else size.empty(b, l, size.padded)
    dh = None if h is None else size.empty(b, n, size.padded)
    targets = [_Target.allocate(size) for _ in call.scans]
    scans = [
        scan._replace(starts=call.address(starts[i]), **{name: call.address(t) for name, t in target._asdict().items()})
        for i, (scan, target) in enumerate(zip(call.scans, targets))
    ]
    entry = call.states(dlast.mT) if want_last and dlast is not None else 0
    scans[0] = scans[0]._replace(first=call.address(dh), last=entry)
    shared = Shared(*call.gate, call.states(dout.mT), call.address(ungated), call.address(dz))
    call.run(backward, scans, shared, (4 + 2 * STEPS) * n + 3 * STEPS + l)
    gradients: list[Tensor | None] = [gradient for target in targets for gradient in target.gradients(size)]
    gradients += [None] * (14 - len(gradients))
    gradients += [None if dz is None else size.unpad(dz).mT, None if dh is None else size.unpad(dh).mT.contiguous()]
    empty = (dout.new_empty(0) for _ in gradients)
    return tuple(e if t is None or g is None else g.to(t.dtype) for g, t, e in zip(gradients, arguments, empty))


class _Target(NamedTuple):
    """Where the backward kernel writes, as in `Scan`."""

    du: Tensor
    ddelta: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    dbias: Tensor

    @classmethod
    def allocate(cls, size: Layout) -> "_Target":
        b, _, l, n, g, d, _ = size
        dB, dC = (torch.zeros(size.parts, b, l, g, n, dtype=size.dtype) for _ in range(2))
        du, ddelta = size.empty(b, l, d), size.empty(b, l, d)
        return cls(du, ddelta, size.empty(b, n, d), dB, dC, size.empty(b, d), size.empty(b, d))

    def gradients(self, size: Layout) -> list[Tensor]:
        """In the order of `Direction`, summed over parts and batch."""
        du, ddelta = (size.unpad(t).mT for t in self[:2])
        dA, dD, dbias = (size.unpad(t.sum(dim=0)) for t in (self.dA, self.dD, self.dbias))
        dB, dC = (t.sum(dim=0).permute(0, 2, 3, 1) for t in (self.dB, self.dC))
        return [du, ddelta, dA.mT.contiguous(), dB, dC, dD, dbias]


def _gradients(*arguments: Any) -> list[Tensor]:
    """`_numba_scan_backward` without what is absent."""
    return [g for g, t in zip(_numba_scan_backward(*arguments), arguments[4:20]) if t is not None]


OPERATOR = "numba_scan"
RULES[OPERATOR] = Rule(_numba_scan, _gradients, scan_reference_of, outputs=2)
