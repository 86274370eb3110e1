"""The Triton scan as two PyTorch operators, forward and backward, with autograd between them.

Registered through `torch.library`, so that `torch.compile` takes each as one opaque call. An operator takes the tensors
of its directions as one flat list, in the order of `Direction`, with an empty tensor for each absent one: autograd does
not follow lists that hold None.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .operands import Direction, Operands, common_groups, grouped
from .triton_backward import backward_kernel
from .triton_forward import forward_kernel
from .triton_launch import (
    BACKWARD_REGISTERS,
    FORWARD_REGISTERS,
    PROGRAMS,
    Geometry,
    geometry,
    in_order_of_time,
    launch,
    launch_arguments,
    named,
    pair,
    states_between_chunks,
)


def scan_triton(operands: Operands, want_last: bool) -> tuple[Tensor, Tensor]:
    """Run one direction, or two opposite ones, in one launch: -> y (b, d, l), last state (b, d, n).

    Results are those of `scan_chunked`; the last state is empty unless `want_last`.
    """
    directions, reverse, z, initial_state, delta_softplus, scale = operands
    g = common_groups(directions)
    tensors: list[Tensor] = []
    for u, delta, A, B, C, D, delta_bias in directions:
        one = (u, delta, A, grouped(B, g), grouped(C, g), D, delta_bias)
        tensors += [u.new_empty(0) if t is None else t.contiguous() for t in one]
    if z is not None and z.stride(2) != 1:
        z = z.contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, z, initial_state))
    y, last, _, _ = _forward(tensors, z, initial_state, reverse, delta_softplus, scale, want_last, keep)
    return y, last


def _unpack(tensors: Sequence[Tensor]) -> list[Direction]:
    """Cut the flat list into directions, with None for absent operands."""
    operands: list[Any] = [t if t.numel() else None for t in tensors]
    count = len(Direction._fields)
    return [Direction(*operands[i : i + count]) for i in range(0, len(operands), count)]


def _states_shape(size: Geometry, count: int) -> tuple[int, ...]:
    """(directions, b, tiles of the backward pass, d, n)."""
    return (count, size.b, size.chunks * (1 + size.halves), size.d, size.n)


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
    """Return y, the last state and, if `keep`, the states before the tiles of the backward pass and y before its gate.

    Each but y is empty where nothing needs it.
    """
    directions = _unpack(tensors)
    size, count = geometry(directions[0]), len(directions)
    results = out, last, saved, ungated = _allocate_forward(tensors, z, initial_state, want_last, keep)
    arguments = launch_arguments(directions, size, z, reverse, delta_softplus, scale)
    starts: Tensor | None = None
    if size.chunks > 1 or want_last:
        states = states_between_chunks(arguments, size, count, initial_state, backward=False)
        starts = states if size.chunks > 1 or initial_state is not None else None
        if want_last:
            last.copy_(states[0, :, -1])
    elif initial_state is not None:
        starts = initial_state.float().contiguous()[None, :, None]
    halves = saved.zero_() if size.halves else None  # zero starts are not written
    places = {
        "out": out,
        "ungated": ungated if ungated.numel() else None,
        "slots": 0 if starts is None else starts.shape[2],
    }
    arguments |= places | pair("starts", starts) | pair("halves", halves)
    launch(forward_kernel, size.programs, arguments, FORWARD_REGISTERS)
    if saved.numel() and not size.halves and starts is not None:
        in_order_of_time(starts[:, :, : size.chunks], reverse, out=saved)
    return results


def _allocate_forward(
    tensors: Sequence[Tensor], z: Tensor | None, initial_state: Tensor | None, *flags: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of `_forward` from its arguments; the last two are `want_last` and `keep`."""
    directions, (want_last, keep) = _unpack(tensors), flags[-2:]
    u, size = tensors[0], geometry(directions[0])
    saves = keep and (size.halves or size.chunks > 1 or initial_state is not None)
    last = u.new_empty((size.b, size.d, size.n) if want_last else 0, dtype=torch.float32)
    saved = u.new_empty(_states_shape(size, len(directions)) if saves else 0, dtype=torch.float32)
    ungated = u.new_empty(u.shape if keep and z is not None else 0, dtype=torch.float32)
    return torch.empty_like(u), last, saved, ungated


_forward.register_fake(_allocate_forward)


@torch.library.custom_op("almrr_ref::selective_scan_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlast: Tensor | None,
    tensors: Sequence[Tensor],
    z: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    from_state: bool,
) -> list[Tensor]:
    """Return the gradients of `tensors`, of z and of the initial state; empty tensors for those that are absent."""
    directions, dout = _unpack(tensors), dout.contiguous()
    size, count = geometry(directions[0]), len(directions)
    arguments = launch_arguments(directions, size, z, reverse, delta_softplus, scale) | {"dout": dout}
    dz, dinitial = _allocate_gate_and_state(dout, z, size, from_state)
    exits = dout.new_zeros(_states_shape(size, count), dtype=torch.float32) if size.halves else None
    if size.chunks > 1 or dlast is not None or from_state:
        leaving = states_between_chunks(arguments, size, count, dlast, backward=True)
        entering = in_order_of_time(leaving[:, :, : size.chunks], not reverse)
        if exits is None:
            exits = entering
        else:  # the chunk's gradient enters its later half in scan order
            for i, entering_one in enumerate(entering):
                exits[i, :, int((i == 1) == reverse) :: 2] = entering_one
        if from_state:
            dinitial.copy_(leaving[0, :, -1])
    walk = max(1, size.programs // PROGRAMS)
    slabs = triton.cdiv(size.blocks, walk)
    partial = [_allocate_partial(one, size, slabs) for one in directions]
    sizes = {"slabs": slabs, "walk": walk, "slab_size": size.b * size.g * size.n * size.padded}
    arguments |= {"ungated": ungated, "dz": dz} | pair("starts", starts) | pair("exits", exits) | named(partial, "d")
    launch(backward_kernel, size.b * size.chunks * size.g * slabs, arguments | sizes, BACKWARD_REGISTERS)
    gradients = []
    for operands, (du, ddelta, *others) in zip(directions, partial):
        gradients += [du, ddelta]
        for operand, parts in zip(operands[2:], others):
            if operand is None or parts is None:
                gradients.append(dout.new_empty(0))
            else:
                total = parts.sum(dim=0)[..., : operand.shape[-1]]
                gradients.append(total.to(operand.dtype, memory_format=torch.contiguous_format))
    return [*gradients, dz, dinitial]


def _allocate_partial(operands: Direction, size: Geometry, slabs: int) -> Direction:
    """Allocate du, ddelta, and what is summed later: dA, dD, ddelta_bias per batch and tile, dB, dC per slab."""
    tiles = size.b * size.chunks * (1 + size.halves)
    slab = (slabs, size.b, size.g, size.n, size.padded)
    shapes = ((tiles, size.d, size.n), slab, slab, (tiles, size.d), (tiles, size.d))
    u, delta, *others = operands
    parts = [None if t is None else u.new_empty(shape, dtype=torch.float32) for t, shape in zip(others, shapes)]
    return Direction(torch.empty_like(u), torch.empty_like(delta), *parts)  # type: ignore[arg-type]


def _allocate_gate_and_state(dout: Tensor, z: Tensor | None, size: Geometry, from_state: bool) -> tuple[Tensor, Tensor]:
    """Allocate the gradients of z and of the initial state."""
    dz = dout.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    return dz, dout.new_empty((size.b, size.d, size.n) if from_state else 0, dtype=torch.float32)


@_backward.register_fake
def _(dout: Tensor, dlast: Tensor | None, tensors: Sequence[Tensor], z: Tensor | None, *others: Any) -> list[Tensor]:
    size = geometry(_unpack(tensors)[0])
    return [*(torch.empty_like(t) for t in tensors), *_allocate_gate_and_state(dout, z, size, others[-1])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors, the states before tiles and y before its gate; everything else is computed again."""
    tensors, z, initial_state, ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.want_last, _ = inputs
    ctx.from_state = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or autograd would fill zeros as large as the last outputs
    ctx.save_for_backward(z, *output[2:], *tensors)


def _differentiate(ctx: Any, dout: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    z, starts, ungated, *tensors = ctx.saved_tensors
    if dout is None:  # only the last state was used
        dout = torch.zeros_like(tensors[0])
    *gradients, dz, dinitial = torch.ops.almrr_ref.selective_scan_backward(
        dout, dlast if ctx.want_last else None, tensors, z, starts, ungated,
        ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.from_state is not None,
    )  # fmt: skip
    dstate = None if ctx.from_state is None else dinitial.to(ctx.from_state)
    return gradients, None if z is None else dz, dstate, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
