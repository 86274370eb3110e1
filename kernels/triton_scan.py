"""The Triton scan as two PyTorch operators, forward and backward, with autograd between them.

Registered through `torch.library`, so that `torch.compile` takes each as one opaque call. An operator takes the tensors
of its directions as one flat list, in the order of `Direction`, with an empty tensor for each absent one: autograd does
not follow lists that hold None.

u, delta and z are read as (b, l, d) wherever their channels lie side by side, and copied otherwise; results lie so too.
States do not meet one another, so that more of them than a program holds run as several launches (passes).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import math
import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Direction, Operands, common_groups, grouped
from .triton_backward import Gradients, backward_kernel
from .triton_forward import carry_kernel, chunk_ends_kernel, forward_kernel
from .triton_math import Scan, launch

CHANNELS = 32  # of a program, which is one warp
STATES = 16  # of a program
SAVE_STEPS = 4  # steps between the states that training keeps; the backward pass holds so many in registers
MIN_PROGRAMS = 256  # fewer leave most of a GPU idle: then time is cut into chunks,
PROGRAMS = 1024  # until there are so many programs,
MIN_STEPS = 32  # or the chunks are as short as this
MAX_OFFSET = 1 << 30  # elements between the ends of a chunk, in any tensor


class Geometry(NamedTuple):
    """Sizes of a launch, under the names that the kernels give them."""

    b: int
    d: int
    l: int
    n: int
    g: int
    blocks: int  # of CHANNELS channels in a group
    passes: int  # of N states
    length: int  # steps of a chunk
    chunks: int
    N: int
    BD: int
    K: int
    EVEN: bool  # neither steps nor channels need masks

    @property
    def tiles(self) -> tuple[int, ...]:
        """Shape of the state of one pass: (g, blocks, N, BD)."""
        return self.g, self.blocks, self.N, self.BD

    @property
    def saves(self) -> tuple[int, ...]:
        """Shape of the states that one pass saves."""
        return self.b, self.chunks, self.g, self.blocks, self.length // self.K, self.N, self.BD


def geometry(direction: Direction) -> Geometry:
    """Derive the sizes of a launch; B and C come in groups."""
    (b, d, l), n, g = direction.u.shape, direction.A.shape[1], direction.B.shape[1]
    N = min(STATES, 1 << (n - 1).bit_length())
    blocks = _ceil(d // g, CHANNELS)
    programs = b * g * blocks
    length = l if programs >= MIN_PROGRAMS else max(MIN_STEPS, _ceil(l * programs, PROGRAMS))
    length = min(length, MAX_OFFSET // max(d, direction.u.stride(2), direction.delta.stride(2)))
    length = _ceil(length, SAVE_STEPS) * SAVE_STEPS
    even = l % SAVE_STEPS == 0 and d // g % CHANNELS == 0
    return Geometry(b, d, l, n, g, blocks, _ceil(n, N), length, _ceil(l, length), N, CHANNELS, SAVE_STEPS, even)


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _rows(sequence: Tensor) -> Tensor:
    """(b, d, l) -> (b, l, d) with channels side by side: a view where they lie so, a copy otherwise."""
    rows = sequence.mT
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _projection(projection: Tensor, size: Geometry) -> tuple[Tensor, ...]:
    """B or C (b, g, n, l) -> (b, g, l, N) per pass, states side by side; padded with zeros, which add nothing."""
    rows, padded = projection.mT, size.passes * size.N
    if padded != size.n:
        rows = F.pad(rows, (0, padded - size.n))
    return (rows if rows.stride(3) == 1 else rows.contiguous()).split(size.N, dim=3)


def _pack(states: Tensor, size: Geometry) -> Tensor:
    """(..., d, n) -> float32 tiles (passes, ..., g, blocks, N, BD); what is padded is 0."""
    g, blocks, N, BD = size.tiles
    by_group = states.float().unflatten(-2, (g, size.d // g))
    padded = F.pad(by_group, (0, size.passes * N - size.n, 0, blocks * BD - size.d // g))
    split = padded.unflatten(-1, (size.passes, N)).unflatten(-3, (blocks, BD))  # (..., g, blocks, BD, passes, N)
    return split.movedim(-2, 0).mT.contiguous()


def _unpack(tiles: Tensor, size: Geometry) -> Tensor:
    """Undo `_pack`: (passes, ..., g, blocks, N, BD) -> (..., d, n)."""
    rows = tiles.mT.movedim(0, -2).flatten(-2).flatten(-3, -2)  # (..., g, blocks BD, passes N)
    return rows[..., : size.d // size.g, : size.n].flatten(-3, -2).contiguous()


def _scans(directions: Sequence[Direction], size: Geometry) -> list[list[Scan]]:
    """Describe every pass of every direction as the kernels take it: [pass][direction]; D is added in the first."""
    described = []
    for u, delta, A, B, C, D, delta_bias in directions:
        u, delta, exponents = _rows(u), _rows(delta), _pack(A.float() * math.log2(math.e), size)
        parts = zip(exponents, _projection(B, size), _projection(C, size))
        described.append(
            [
                Scan(
                    u,
                    delta,
                    exponent,
                    B,
                    C,
                    D if p == 0 else None,
                    delta_bias,
                    *u.stride()[:2],
                    *delta.stride()[:2],
                    *B.stride()[:3],
                    *C.stride()[:3],
                )  # fmt: skip
                for p, (exponent, B, C) in enumerate(parts)
            ]
        )
    return [list(scans) for scans in zip(*described)]


def _operand_flags(
    directions: Sequence[Direction], size: Geometry, z: Tensor | None, reverse: bool, delta_softplus: bool, scale: float
) -> dict[str, Any]:
    """What all launches of a scan can ask for beside its `Scan`s."""
    rows = None if z is None else _rows(z)
    gate = {
        "z": rows,
        "z_batch": 0 if rows is None else rows.stride(0),
        "z_step": 0 if rows is None else rows.stride(1),
    }
    return size._asdict() | gate | {"scale": scale, "REVERSE": reverse, "SOFTPLUS": delta_softplus}


def _launch(kernel: Any, scans: Sequence[Scan], size: Geometry, arguments: dict[str, Any]) -> None:
    """Launch a kernel over all chunks with one direction or two."""
    both = {"s": scans[0], "s_b": scans[1] if len(scans) > 1 else None}
    programs = size.b * size.chunks * size.g * size.blocks
    launch(kernel, programs, scans[0].u.device, 1, arguments | both)


def _between_chunks(
    scans: Sequence[Scan], size: Geometry, entry: Tensor | None, arguments: dict[str, Any], backward: bool
) -> list[Tensor | None]:
    """The state before every chunk, or if `backward` the gradient that enters it: (b, chunks, g, blocks, N, BD) each.

    `entry` enters the first chunk of the first direction, (b, g, blocks, N, BD); None stands for 0.
    """
    if size.chunks == 1:
        return [entry, None][: len(scans)]
    shape = (len(scans), 2, size.b, size.chunks, *size.tiles)
    states = scans[0].u.new_empty(shape, dtype=torch.float32)
    targets = [scan._replace(ends=ends, decays=decays) for scan, (ends, decays) in zip(scans, states)]
    _launch(chunk_ends_kernel, targets, size, arguments | {"BACKWARD": backward})
    elements, width = math.prod(size.tiles), min(32, size.N * size.BD)
    for i, (ends, decays) in enumerate(states):
        carry = {"ends": ends, "decays": decays, "entry": None if i else entry, "chunks": size.chunks}
        carry |= {"elements": elements, "REVERSE": ((i == 1) != arguments["REVERSE"]) != backward, "U": 8, "E": width}
        launch(carry_kernel, size.b * elements // width, ends.device, 1, carry)
    return [ends for ends, _ in states]


def scan_triton(operands: Operands, want_last: bool) -> tuple[Tensor, Tensor]:
    """Run one direction, or two opposite ones, in one launch: -> y (b, d, l), last state (b, d, n).

    Results are those of `scan_chunked`; the last state is empty unless `want_last`.
    """
    directions, reverse, z, initial_state, delta_softplus, scale = operands
    g = common_groups(directions)
    tensors: list[Tensor] = []
    for u, delta, A, B, C, D, delta_bias in directions:
        one = (u, delta, A, grouped(B, g), grouped(C, g), D, delta_bias)
        tensors += [u.new_empty(0) if t is None else t for t in one]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, z, initial_state))
    y, last, _, _ = _forward(tensors, z, initial_state, reverse, delta_softplus, scale, want_last, keep)
    return y, last


def _directions(tensors: Sequence[Tensor]) -> list[Direction]:
    """Cut the flat list into directions, with None for absent operands."""
    operands: list[Any] = [t if t.numel() else None for t in tensors]
    count = len(Direction._fields)
    return [Direction(*operands[i : i + count]) for i in range(0, len(operands), count)]


def _sequence(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (b, d, l) tensor that lies in memory as (b, l, d)."""
    b, d, l = like.shape
    return like.new_empty((b, l, d), dtype=dtype).mT


@torch.library.custom_op("almrr_ref::selective_scan", mutates_args=())
def _forward(
    tensors: Sequence[Tensor],
    z: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    want_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state and, if `keep`, what the backward pass needs: saved states, y before scale and gate.

    Each but y is empty where nothing needs it.
    """
    directions = _directions(tensors)
    size = geometry(directions[0])
    out, last, saved, ungated = results = _allocate_forward(tensors, z, initial_state, want_last, keep)
    arguments = _operand_flags(directions, size, z, reverse, delta_softplus, scale)
    total = ungated if ungated.numel() else None
    if total is None and (len(directions) > 1 or size.passes > 1):
        total = _sequence(out, torch.float32)
    entries = None if initial_state is None else _pack(initial_state, size)
    lasts = last.new_empty(size.passes, size.b, *size.tiles) if want_last else None
    for p, scans in enumerate(_scans(directions, size)):
        starts = _between_chunks(
            scans, size, None if entries is None else entries[p], arguments | {"dout": None}, False
        )
        scans = [
            scan._replace(
                starts=start, saved=saved[i, p] if keep else None, last=lasts[p] if want_last and not i else None
            )
            for i, (scan, start) in enumerate(zip(scans, starts))
        ]
        flags = {"out": out, "total": total, "FIRST": p == 0, "LAST": p == size.passes - 1}
        _launch(forward_kernel, scans, size, arguments | flags)
    if lasts is not None:
        last.copy_(_unpack(lasts, size))
    return results


@_forward.register_fake
def _allocate_forward(
    tensors: Sequence[Tensor], z: Tensor | None, initial_state: Tensor | None, *flags: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of `_forward` from its arguments; the last two are `want_last` and `keep`."""
    directions, (want_last, keep) = _directions(tensors), flags[-2:]
    u, size = tensors[0], geometry(directions[0])
    last = u.new_empty((size.b, size.d, size.n) if want_last else 0, dtype=torch.float32)
    saved = u.new_empty((len(directions), size.passes, *size.saves) if keep else 0, dtype=torch.float32)
    ungated = _sequence(u, torch.float32) if keep and z is not None else u.new_empty(0, dtype=torch.float32)
    return _sequence(u), last, saved, ungated


@torch.library.custom_op("almrr_ref::selective_scan_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlast: Tensor | None,
    tensors: Sequence[Tensor],
    z: Tensor | None,
    saved: Tensor,
    ungated: Tensor,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    from_state: bool,
) -> list[Tensor]:
    """Return the gradients of `tensors`, of z and of the initial state; empty tensors for those that are absent."""
    directions = _directions(tensors)
    size = geometry(directions[0])
    arguments = _operand_flags(directions, size, z, reverse, delta_softplus, scale) | {"dout": _rows(dout).contiguous()}
    dz = None if z is None else _sequence(z)
    entries = None if dlast is None else _pack(dlast, size)
    leaving = saved.new_empty(size.passes, size.b, *size.tiles) if from_state else None
    partial = [_allocate_partial(one, size) for one in directions]
    sums: list[list[list[Tensor | None]]] = []
    for p, scans in enumerate(_scans(directions, size)):
        exits = _between_chunks(scans, size, None if entries is None else entries[p], arguments, True)
        scans = [
            scan._replace(exits=exit, saved=saved[i, p], leaving=leaving[p] if leaving is not None and not i else None)
            for i, (scan, exit) in enumerate(zip(scans, exits))
        ]
        targets = {"p": partial[0], "p_b": partial[1] if len(partial) > 1 else None, "dz": dz if p == 0 else None}
        _launch(backward_kernel, scans, size, arguments | targets | {"total": ungated, "ADD": p > 0})
        sums.append([_sum_partial(one) for one in partial])
    gradients = []
    for i, operands in enumerate(directions):
        found = [partial[i].du, partial[i].ddelta, *_join_passes([one[i] for one in sums], size)]
        gradients += [
            dout.new_empty(0) if operand is None else gradient.to(operand.dtype)
            for operand, gradient in zip(operands, found)
        ]
    dinitial = dout.new_empty(0, dtype=torch.float32) if leaving is None else _unpack(leaving, size)
    return [*gradients, dout.new_empty(0) if dz is None else dz, dinitial]


def _allocate_partial(operands: Direction, size: Geometry) -> Gradients:
    """Allocate where the backward kernel writes the gradients of one direction; with passes, du and ddelta add up."""

    def empty(*shape: int) -> Tensor:
        return operands.u.new_empty(shape, dtype=torch.float32)

    du, ddelta = (_sequence(t, t.dtype if size.passes == 1 else torch.float32) for t in (operands.u, operands.delta))
    slab = (size.blocks, size.b, size.g, size.l, size.N)
    channels = (size.b, size.chunks, size.d)
    dD = None if operands.D is None else empty(*channels)
    dbias = None if operands.delta_bias is None else empty(*channels)
    return Gradients(du, ddelta, empty(size.b, size.chunks, *size.tiles), empty(*slab), empty(*slab), dD, dbias)


def _sum_partial(partial: Gradients) -> list[Tensor | None]:
    """Add up the partial sums of one pass: dA (g, blocks, N, BD), dB, dC (b, g, l, N), dD, ddelta_bias (d,)."""
    _, _, dA, dB, dC, *others = partial
    return [dA.sum((0, 1)), dB.sum(0), dC.sum(0), *(None if t is None else t.sum((0, 1)) for t in others)]


def _join_passes(sums: list[list[Tensor | None]], size: Geometry) -> list[Any]:
    """dA (d, n), dB, dC (b, g, n, l), dD, ddelta_bias (d,) from the sums of every pass."""
    dA, dB, dC, dD, dbias = zip(*sums)
    joined = (torch.cat(parts, dim=3)[..., : size.n].contiguous().mT for parts in (dB, dC))
    return [_unpack(torch.stack(dA), size), *joined, dD[0], None if dbias[0] is None else sum(dbias)]


@_backward.register_fake
def _(dout: Tensor, dlast: Tensor | None, tensors: Sequence[Tensor], z: Tensor | None, *others: Any) -> list[Tensor]:
    gradients = []
    for u, delta, A, B, C, *rest in _directions(tensors):
        gradients += [_sequence(u), _sequence(delta), A.new_empty(A.shape)]
        gradients += [t.mT.new_empty(t.mT.shape).mT for t in (B, C)]
        gradients += [dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest]
    size = geometry(_directions(tensors)[0])
    dinitial = dout.new_empty((size.b, size.d, size.n) if others[-1] else 0, dtype=torch.float32)
    return [*gradients, dout.new_empty(0) if z is None else _sequence(z), dinitial]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors, the states before every few steps and y before its gate; the rest is computed again."""
    tensors, z, initial_state, ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.want_last, _ = inputs
    ctx.from_state = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or autograd would fill zeros as large as the last outputs
    ctx.save_for_backward(z, *output[2:], *tensors)


def _differentiate(ctx: Any, dout: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    z, saved, ungated, *tensors = ctx.saved_tensors
    if dout is None:  # only the last state was used
        dout = torch.zeros_like(tensors[0])
    *gradients, dz, dinitial = torch.ops.almrr_ref.selective_scan_backward(
        dout, dlast if ctx.want_last else None, tensors, z, saved, ungated,
        ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.from_state is not None,
    )  # fmt: skip
    dstate = None if ctx.from_state is None else dinitial.to(ctx.from_state)
    return gradients, None if z is None else dz, dstate, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
