"""The Triton scan as two PyTorch operators (forward, backward) with autograd between them.

Registered through `torch.library`, so that `torch.compile` takes each as one opaque call. Kernels:
`triton_forward`, `triton_backward`; sizes: `triton_launch`.
The operators get the arguments of all directions as one flat list, in the order of `Direction`, with an empty tensor
for each absent one: autograd does not follow lists that hold None.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .checks import Direction
from .reference import per_group
from .triton_backward import backward_ends_kernel, backward_kernel
from .triton_forward import chunk_ends_kernel, forward_kernel
from .triton_launch import (
    BACKWARD_REGISTERS,
    FORWARD_REGISTERS,
    PROGRAMS,
    Geometry,
    carry,
    geometry,
    in_order_of_time,
    on_device,
    pair,
    split,
    starts_shape,
)

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def scan_triton(
    directions: Sequence[Direction],
    reverse: Sequence[bool],
    z: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    scale: float,
    want_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run one direction, or two opposite ones, in one launch: -> y (b, d, l), last state (b, d, n).

    Arguments and results are those of `scan_chunked`; the last state is empty unless `want_last`.
    """
    assert len(directions) == 1 or (len(directions) == 2 and reverse[0] != reverse[1] and initial_state is None)
    g = math.lcm(*(per_group(t).shape[1] for direction in directions for t in (direction.B, direction.C)))
    arguments: list[Tensor] = []
    for direction in directions:
        B, C = (per_group(t) for t in (direction.B, direction.C))
        B, C = (t.repeat_interleave(g // t.shape[1], dim=1) if t.shape[1] != g else t for t in (B, C))
        u, delta, A, _, _, D, bias = direction  # not _replace: torch.compile cannot trace it in torch 2.8
        arguments += [u.new_empty(0) if t is None else t.contiguous() for t in (u, delta, A, B, C, D, bias)]
    if z is not None and z.stride(2) != 1:
        z = z.contiguous()
    differentiated = [t for t in (*arguments, z, initial_state) if t is not None and t.requires_grad]
    keep = torch.is_grad_enabled() and len(differentiated) > 0
    y, last, _, _ = _forward(arguments, z, initial_state, reverse[0], delta_softplus, scale, want_last, keep)
    return y, last


@torch.library.custom_op("almrr_ref::selective_scan", mutates_args=())
def _forward(
    arguments: Sequence[Tensor],
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
    size = geometry(arguments)
    first, second = split(arguments, size)
    u, delta, A, B, _, _, bias = first
    count, carried = len(arguments) // 7, size.chunks > 1 or want_last
    options = size.options(reverse, count == 2, delta_softplus)
    sizes = (size.d, size.l, size.padded, size.n, size.g, size.chunks)
    slots = size.chunks + 1 if carried else int(initial_state is not None)
    states = u.new_zeros((count, size.b, slots, size.d, size.n), dtype=torch.float32)
    if initial_state is not None:
        states[0, :, 0] = initial_state
    out, ungated = torch.empty_like(u), u.new_empty(u.shape if keep and z is not None else (0,), dtype=torch.float32)
    halves = u.new_zeros(starts_shape(size, count, keep and size.halves), dtype=torch.float32)
    starts: list[Tensor | None] = [None, None]
    with on_device(u):
        if carried:
            decays = states.new_empty(count, size.b, size.chunks, size.d, size.n)
            chunk_ends_kernel[(size.tiles,)](
                states[0], states[-1], decays[0], decays[-1], u, delta, A, B, bias,
                *second[:4], second[6], *sizes, size.chunks + 1, size.blocks, **options,
            )  # fmt: skip
            carry(states, decays)
        if size.chunks > 1 or initial_state is not None:
            starts = [states[0], states[-1]]
        z_strides = (0, 0) if z is None else z.stride()[:2]
        forward_kernel[(size.tiles,)](
            out, ungated if ungated.numel() else None, z, *z_strides, *starts, *pair(halves), scale, *first, *second,
            *sizes, slots, size.blocks, **options, maxnreg=FORWARD_REGISTERS,
        )  # fmt: skip
    last = states[0, :, -1].clone() if want_last else u.new_empty(0, dtype=torch.float32)
    if keep and not size.halves and starts[0] is not None:
        halves = in_order_of_time(states[:, :, : size.chunks], reverse)
    return out, last, halves, ungated


@_forward.register_fake
def _(
    arguments: Sequence[Tensor],
    z: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    want_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = geometry(arguments)
    u = arguments[0]
    starts = keep and (size.halves or size.chunks > 1 or initial_state is not None)
    shapes = (
        (size.b, size.d, size.n) if want_last else (0,),
        starts_shape(size, len(arguments) // 7, starts),
        u.shape if keep and z is not None else (0,),
    )
    last, halves, ungated = (u.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return torch.empty_like(u), last, halves, ungated


@torch.library.custom_op("almrr_ref::selective_scan_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlast: Tensor | None,
    arguments: Sequence[Tensor],
    z: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    from_state: bool,
) -> list[Tensor]:
    """Return the gradients of `arguments`, of z and of the initial state; empty tensors for those that are absent."""
    size = geometry(arguments)
    first, second = split(arguments, size)
    count, dout = len(arguments) // 7, dout.contiguous()
    options = size.options(reverse, count == 2, delta_softplus)
    sizes = (size.d, size.l, size.padded, size.n, size.g, size.chunks)
    z_strides = (0, 0) if z is None else z.stride()[:2]
    exits = dout.new_zeros(starts_shape(size, count, size.halves), dtype=torch.float32)
    dinitial = dout.new_empty(0)
    walk = max(1, size.tiles // PROGRAMS)
    slabs = triton.cdiv(size.blocks, walk)
    partial = [_partial_gradients(part, size, slabs) for part in (first, second) if part[0] is not None]
    dz = dout.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    with on_device(dout):
        if size.chunks > 1 or dlast is not None or from_state:
            leaving = dout.new_zeros(count, size.b, size.chunks + 1, size.d, size.n, dtype=torch.float32)
            if dlast is not None:
                leaving[0, :, 0] = dlast
            decays = leaving.new_empty(count, size.b, size.chunks, size.d, size.n)
            delta, A, C, bias = first[1], first[2], first[4], first[6]
            backward_ends_kernel[(size.tiles,)](
                dout, z, *z_strides, scale, leaving[0], leaving[-1], decays[0], decays[-1], delta, A, C, bias,
                second[1], second[2], second[4], second[6], *sizes, size.chunks + 1, size.blocks, **options,
            )  # fmt: skip
            carry(leaving, decays)
            entering = in_order_of_time(leaving[:, :, : size.chunks], not reverse)
            if size.halves:  # the chunk's gradient enters its later half in scan order
                for i, part in enumerate(entering):
                    exits[i, :, int((i == 1) == reverse) :: 2] = part
            else:
                exits = entering
            dinitial = leaving[0, :, -1].clone() if from_state else dinitial
        other = partial[1] if count == 2 else [None] * 7
        slab_size = size.b * size.g * size.n * size.padded
        backward_kernel[(size.b * size.chunks * size.g * slabs,)](
            dout, ungated, z, *z_strides, dz, scale, *pair(starts), *pair(exits),
            *first, *second, *partial[0], *other, *sizes, size.blocks, slabs, walk, slab_size,
            **options, HALVES=size.halves, maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    gradients = []
    for part, given in zip(partial, (arguments[:7], arguments[7:]), strict=False):
        gradients += part[:2]
        for gradient, argument in zip(part[2:], given[2:], strict=True):
            total = gradient.sum(dim=0) if argument.numel() else gradient
            gradients.append(total[..., : argument.shape[-1]].to(argument.dtype, memory_format=torch.contiguous_format))
    return [*gradients, dz, dinitial]


def _partial_gradients(part: Sequence[Any], size: Geometry, slabs: int) -> list[Tensor]:
    """Allocate du, ddelta, and what is summed later: dA, dD, dbias per batch and chunk, dB, dC per slab."""
    u, delta, _, _, _, D, bias = part
    parts = size.b * size.chunks * (1 + size.halves)
    slab = (slabs, size.b, size.g, size.n, size.padded)
    shapes = [(parts, size.d, size.n), slab, slab, (parts, size.d) if D is not None else (0,)]
    shapes.append((parts, size.d) if bias is not None else (0,))
    return [torch.empty_like(u), torch.empty_like(delta)] + [u.new_empty(s, dtype=torch.float32) for s in shapes]


@_backward.register_fake
def _(
    dout: Tensor,
    dlast: Tensor | None,
    arguments: Sequence[Tensor],
    z: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    reverse: bool,
    delta_softplus: bool,
    scale: float,
    from_state: bool,
) -> list[Tensor]:
    gradients = [torch.empty_like(t) for t in arguments]
    dz = dout.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    size = geometry(arguments)
    state_shape = (size.b, size.d, size.n) if from_state else (0,)
    return [*gradients, dz, dout.new_empty(state_shape, dtype=torch.float32)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the arguments, the states before tiles and y before its gate; everything else is computed again."""
    arguments, z, initial_state, ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.want_last, _ = inputs
    ctx.from_state = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or autograd would fill zeros as large as the last outputs
    ctx.save_for_backward(z, *output[2:], *arguments)


def _differentiate(ctx: Any, dout: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    z, starts, ungated, *arguments = ctx.saved_tensors
    if dout is None:  # only the last state was used
        dout = torch.zeros_like(arguments[0])
    found = torch.ops.almrr_ref.selective_scan_backward(
        dout, dlast if ctx.want_last else None, arguments, z, starts, ungated,
        ctx.reverse, ctx.delta_softplus, ctx.scale, ctx.from_state is not None,
    )  # fmt: skip
    *gradients, dz, dinitial = found
    dstate = None if ctx.from_state is None else dinitial.to(ctx.from_state)
    return gradients, None if z is None else dz, dstate, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
