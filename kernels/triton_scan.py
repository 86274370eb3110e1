"""The Triton scan as two PyTorch operators, forward and backward.

u, delta and z are read as (b, l, d) where their channels lie side by side, and copied otherwise; results lie so too.
States do not meet one another: more of them than a program holds run as several launches (passes).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import RULES, Rule, operator
from .operands import ARGUMENTS, Direction, Operands, unflatten
from .reference import scan_reference_of
from .triton_backward import backward_kernel
from .triton_forward import chunk_ends_kernel, forward_kernel
from .triton_launch import Common, Scan, empty_like, known, launch, rows_of

STATES = 16  # of a program
BLOCK = 32  # channels are padded to a multiple of it
FORWARD = {"BD": 16, "V": 4}  # channels of a program, which is one warp; V of triton_math.py
BACKWARD = {"BD": 16, "V": 16}
MAX_REGISTERS = 168  # of a thread: 12 programs fit on a multiprocessor at a time, of 64 images' 11.6
SAVE_STEPS = 4  # steps between the states that training keeps; the backward pass holds so many in registers
MIN_PROGRAMS = 256  # fewer leave most of a GPU idle: then time is cut into chunks,
PROGRAMS = 1024  # until there are so many programs,
MIN_STEPS = 16  # or the chunks are as short as this
MAX_OFFSET = 1 << 28  # elements between the ends of a chunk, in any tensor


class Geometry(NamedTuple):
    """Sizes of a launch."""

    b: int
    d: int
    l: int
    n: int
    g: int
    blocks: int  # of BLOCK channels in a group
    chunks: int
    length: int  # steps of a chunk
    passes: int
    N: int  # states of a pass

    @property
    def even(self) -> bool:
        """Whether every block is whole, and so are the steps that a turn of the forward loop takes."""
        return self.l % (2 * SAVE_STEPS) == 0 and self.d // self.g % BLOCK == 0

    def blocks_of(self, tile: dict[str, int]) -> int:
        """How many programs' channels, FORWARD or BACKWARD, are in a group."""
        return self.blocks * (BLOCK // tile["BD"])

    @property
    def tiles(self) -> tuple[int, ...]:
        """Shape of the state of all channels in one pass."""
        return self.g, self.blocks, BLOCK, self.N


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def geometry(direction: Direction) -> Geometry:
    """Derive the sizes of a launch; B and C come in groups."""
    (b, d, l), n, g = direction.u.shape, direction.A.shape[1], direction.B.shape[1]
    blocks, N = _ceil(d // g, BLOCK), min(STATES, 1 << (n - 1).bit_length())
    programs = b * g * blocks
    length = l if programs >= MIN_PROGRAMS else min(l, max(MIN_STEPS, _ceil(l * programs, PROGRAMS)))
    length = min(length, MAX_OFFSET // max(d, direction.u.stride(2), direction.delta.stride(2)))
    length = _ceil(length, 2 * SAVE_STEPS) * 2 * SAVE_STEPS  # whole turns of the forward loop
    return Geometry(b, d, l, n, g, blocks, _ceil(l, length), length, _ceil(n, N), N)


def _projection(projection: Tensor, size: Geometry) -> tuple[Tensor, ...]:
    """B or C (b, g, n, l) -> (b, g, l, N) per pass, states side by side; padded with zeros, which add nothing."""
    rows = F.pad(projection.mT, (0, size.passes * size.N - size.n)) if size.n % size.N else projection.mT
    return (rows if rows.stride(3) == 1 else rows.contiguous()).split(size.N, dim=3)


def _pack(states: Tensor, size: Geometry) -> Tensor:
    """(..., d, n) -> float32 (passes, ..., *tiles); what is padded is 0."""
    rows, channels = states.float().unflatten(-2, (size.g, size.d // size.g)), size.blocks * BLOCK
    missing = (0, size.passes * size.N - size.n, 0, channels - size.d // size.g)
    padded = F.pad(rows, missing) if any(missing) else rows  # a pad of nothing copies
    split = padded.unflatten(-1, (size.passes, size.N)).unflatten(-3, (size.blocks, BLOCK))
    return split.movedim(-2, 0).contiguous()


def _unpack(tiles: Tensor, size: Geometry) -> Tensor:
    """Undo `_pack`: (passes, ..., *tiles) -> (..., d, n)."""
    rows = tiles.movedim(0, -2).flatten(-2).flatten(-3, -2)  # (..., g, channels of blocks, states of passes)
    return rows[..., : size.d // size.g, : size.n].flatten(-3, -2).contiguous()


class _Launches:
    """Both directions of a call as the kernels take them, pass by pass, and how they are launched."""

    def __init__(self, operands: Operands) -> None:
        self.directions, reverse, z, _, seq_idx, softplus, scale = operands
        self.size = size = geometry(self.directions[0])
        gate = None if z is None else rows_of(z)
        z_batch, z_step = (0, 0) if gate is None else gate.stride()[:2]
        sizes = (size.b, known(size.d), size.l, size.g, None, size.chunks, size.length)
        self.common = Common(None, None, None, None, gate, seq_idx, z_batch, known(z_step), scale, *sizes)
        flags = {"REVERSE": reverse, "SOFTPLUS": softplus, "EVEN": size.even}
        self.flags = flags | {"N": size.N, "K": SAVE_STEPS}
        self.passes = list(zip(*map(self._describe, self.directions)))

    def _describe(self, direction: Direction) -> list[Scan]:
        """One direction in every pass; D is added in the first."""
        u, delta = rows_of(direction.u), rows_of(direction.delta)
        decays = _pack(direction.A, self.size)
        scans: list[Scan] = []
        for A, B, C in zip(decays, *(_projection(t, self.size) for t in (direction.B, direction.C))):
            strides = [a for t in (u, delta, B, C) for a in (*t.stride()[:-2], known(t.stride(-2)))]
            D = None if scans else direction.D
            scans.append(Scan(u, delta, A, B, C, D, direction.delta_bias, *strides))
        return scans

    def run(self, kernel: Any, tile: dict[str, int], scans: Sequence[Scan], common: Common, **flags: bool) -> None:
        """Launch a kernel over all chunks, with one direction or two; tile: BD and V."""
        blocks = self.size.blocks_of(tile)
        both = {"c": common._replace(blocks=blocks), "s": scans[0], "s_b": (*scans, None)[1], "TWO": len(scans) == 2}
        programs = self.size.b * self.size.chunks * self.size.g * blocks
        programs *= 1 if kernel is forward_kernel else len(scans)
        split = {"BD": tile["BD"], "V": min(tile["V"], self.size.N)}
        launch(kernel, programs, scans[0].u.device, 1, self.flags | both | split | flags, MAX_REGISTERS)

    def enter(self, scans: Sequence[Scan], common: Common, entry: Tensor | None, backward: bool) -> tuple[Scan, ...]:
        """The directions with what enters each chunk: what the chunks alone add to the state, or to its gradient.

        `entry` enters the first chunk of the first direction, (b, *tiles); None stands for 0.
        """
        scans = (scans[0]._replace(entry=entry), *scans[1:])
        if self.size.chunks > 1:
            shape = 2, len(scans), self.size.b, self.size.chunks, *self.size.tiles
            states = scans[0].A.new_empty(shape)
            scans = tuple(scan._replace(ends=ends, decays=decays) for scan, ends, decays in zip(scans, *states))
            self.run(chunk_ends_kernel, FORWARD, scans, common, BACKWARD=backward)
        return scans


def _allocate_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of `_selective_scan`."""
    operands, (want_last, keep) = unflatten(arguments), arguments[-2:]
    u, size = arguments[0], geometry(operands.directions[0])
    saves = (size.b, size.chunks, size.length // SAVE_STEPS, *size.tiles)
    last = u.new_empty((size.b, size.d, size.n) if want_last else 0, dtype=torch.float32)
    saved = u.new_empty((len(operands.directions), size.passes, *saves) if keep else 0, dtype=torch.float32)
    gated = keep and operands.z is not None
    ungated = empty_like(u, torch.float32) if gated else u.new_empty(0, dtype=torch.float32)
    return empty_like(u), last, saved, ungated


@operator(_allocate_forward, f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state and, if `keep`, what the backward pass needs: saved states, y before scale and gate.

    Each but y is empty where nothing needs it.
    """
    operands, (want_last, keep) = unflatten(arguments), arguments[-2:]
    launches = _Launches(operands)
    size = launches.size
    out, last, saved, ungated = _allocate_forward(*arguments)
    total = ungated if ungated.numel() else None
    if total is None and (len(launches.directions) > 1 or size.passes > 1):
        total = empty_like(out, torch.float32)
    common = launches.common._replace(out=out, total=total)
    entries = None if operands.initial_state is None else _pack(operands.initial_state, size)
    lasts = last.new_empty(size.passes, size.b, *size.tiles) if want_last else None
    for p, scans in enumerate(launches.passes):
        scans = [
            scan._replace(saved=saved[i, p] if keep else None, last=None if i or lasts is None else lasts[p])
            for i, scan in enumerate(launches.enter(scans, common, None if entries is None else entries[p], False))
        ]
        launches.run(forward_kernel, FORWARD, scans, common, FIRST=p == 0, LAST=p == size.passes - 1)
    return out, last if lasts is None else _unpack(lasts, size), saved, ungated


def _allocate_gradients(dout: Tensor, *arguments: Any) -> list[Tensor]:
    """Allocate the results of `_selective_scan_backward`."""
    operands = unflatten(arguments[3:])
    gradients: list[Tensor] = []
    for u, delta, A, B, C, *rest in operands.directions:
        gradients += [empty_like(u), empty_like(delta), A.new_empty(A.shape)]
        gradients += [t.new_empty(t.mT.shape).mT for t in (B, C)]
        gradients += [t.new_empty(t.shape) for t in rest if t is not None]
    gradients += [] if operands.z is None else [empty_like(operands.z)]
    h = operands.initial_state
    return gradients if h is None else [*gradients, h.new_empty(h.shape)]


@operator(_allocate_gradients, f"(Tensor dout, Tensor? dlast, Tensor saved, Tensor ungated, {ARGUMENTS}) -> Tensor[]")
def _selective_scan_backward(
    dout: Tensor, dlast: Tensor | None, saved: Tensor, ungated: Tensor, *arguments: Any
) -> list[Tensor]:
    """Return the gradient of every tensor that is present."""
    operands, (want_last, keep) = unflatten(arguments), arguments[-2:]
    if not keep:  # a gradient was not expected
        _, _, saved, ungated = _selective_scan(*arguments[:-1], True)
    launches, z, h = _Launches(operands), operands.z, operands.initial_state
    size = launches.size
    dz = None if z is None else empty_like(z)
    common = launches.common._replace(dout=dout.mT.contiguous(), total=ungated)
    entries = _pack(dlast, size) if want_last and dlast is not None else None
    leaving = None if h is None else saved.new_empty(size.passes, size.b, *size.tiles)
    targets = [_allocate_partial(one, size) for one in launches.directions]
    sums: list[list[list[Any]]] = []  # by pass and direction: dA, dB, dC, dD, dbias
    for p, scans in enumerate(launches.passes):
        scans = launches.enter(scans, common, None if entries is None else entries[p], backward=True)
        scans = [
            scan._replace(saved=saved[i, p], leaving=None if i or leaving is None else leaving[p], **target)
            for i, (scan, target) in enumerate(zip(scans, targets))
        ]
        launches.run(backward_kernel, BACKWARD, scans, common._replace(dz=dz if p == 0 else None), ADD=p > 0)
        partial = [[one[name] for name in ("dA", "dB", "dC", "dD", "dbias")] for one in targets]
        sums.append([[None if t is None else t.sum(dim=0) for t in one] for one in partial])
    gradients = []
    for i, (direction, target) in enumerate(zip(launches.directions, targets)):
        dA, dB, dC, dD, dbias = zip(*(one[i] for one in sums))
        states = dA[0][None] if size.passes == 1 else torch.stack(dA)
        projections = [parts[0] if size.passes == 1 else torch.cat(parts, dim=3) for parts in (dB, dC)]
        projections = [t[..., : size.n].contiguous().mT for t in projections]
        summed = [target["du"], target["ddelta"], _unpack(states, size), *projections, dD[0]]
        summed.append(None if direction.delta_bias is None else sum(dbias))
        gradients += [t.to(operand.dtype) for t, operand in zip(summed, direction) if operand is not None]
    gradients += [] if dz is None else [dz]
    return gradients if leaving is None or h is None else [*gradients, _unpack(leaving, size).to(h.dtype)]


def _allocate_partial(operands: Direction, size: Geometry) -> dict[str, Tensor | None]:
    """Where the backward kernel writes; dA, dD, dbias per chunk and dB, dC per block of channels, to be summed."""
    dtypes = [t.dtype if size.passes == 1 else torch.float32 for t in operands[:2]]  # passes add to du and ddelta
    chunks, projection = size.b * size.chunks, (size.blocks_of(BACKWARD), size.b, size.g, size.l, size.N)
    shapes = {"dA": (chunks, *size.tiles), "dB": projection, "dC": projection}
    optional = {"dD": operands.D, "dbias": operands.delta_bias}
    shapes |= {name: (chunks, size.d) for name, t in optional.items() if t is not None}
    partial = {name: operands.u.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    du, ddelta = (empty_like(t, dtype) for t, dtype in zip(operands[:2], dtypes))
    return {"dD": None, "dbias": None, "du": du, "ddelta": ddelta, **partial}


OPERATOR = "selective_scan"
RULES[OPERATOR] = Rule(_selective_scan, _selective_scan_backward, scan_reference_of, outputs=2)
