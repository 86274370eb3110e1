"""How the Triton kernels are launched: tile sizes, the geometry of a launch, chunk states and their order.

Tile sizes are a fixed table, not tuned at run time: tuning would make runs differ.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .operands import Direction
from .triton_carry import carry_kernel, chunk_ends_kernel

CHANNELS = 4  # rows of a tile, one warp each
TILE_STEPS = 256  # longest tile, and the distance of the states that a long sequence keeps
BACKWARD_STEPS = 128  # longest tile of the backward pass, which takes a longer chunk in two halves
FORWARD_REGISTERS = 128  # a thread: four programs of a multiprocessor
BACKWARD_REGISTERS = 168  # a thread: three programs of a multiprocessor, and enough to keep all values out of memory
CARRY_TILE = (16, 32)  # (state elements, chunks) of a tile of the carry
PROGRAMS = 1024  # enough for any GPU; beyond it a backward program walks over several blocks of channels


class Geometry(NamedTuple):
    """Sizes of a launch, under the names that the kernels give them."""

    b: int
    d: int
    l: int
    n: int
    g: int
    steps: int  # of a tile
    chunks: int
    blocks: int  # of CHANNELS channels in a group
    padded: int  # length of a row of B, C and their gradients: whole chunks, so the loop over states needs no masks

    @property
    def halves(self) -> bool:
        """Whether the backward pass takes a chunk in two halves, and so needs the state in its middle."""
        return self.steps > BACKWARD_STEPS

    @property
    def programs(self) -> int:
        """Programs of a launch: one for every tile."""
        return self.b * self.chunks * self.g * self.blocks


def tile_steps(l: int, longest: int) -> int:
    """Time steps of a tile: a power of two, at least 16."""
    return min(longest, max(16, triton.next_power_of_2(l)))


def geometry(direction: Direction) -> Geometry:
    """Derive the sizes of a launch; B and C come in groups."""
    (b, d, l), n, g = direction.u.shape, direction.A.shape[1], direction.B.shape[1]
    steps = tile_steps(l, TILE_STEPS if l % 16 == 0 else BACKWARD_STEPS)  # unaligned rows need registers for addresses
    chunks = triton.cdiv(l, steps)
    return Geometry(b, d, l, n, g, steps, chunks, triton.cdiv(d // g, CHANNELS), chunks * steps)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], registers: int | None = None) -> None:
    """Launch a kernel with those of `arguments` that its signature names, on the GPU that holds the first of them.

    Fused multiply-adds are asked for, not left to Triton's default.
    """
    named = {name: arguments[name] for name in kernel.arg_names}
    device = named[kernel.arg_names[0]].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**named, num_warps=CHANNELS, enable_fp_fusion=True, maxnreg=registers)


def launch_arguments(
    directions: Sequence[Direction], size: Geometry, z: Tensor | None, reverse: bool, delta_softplus: bool, scale: float
) -> dict[str, Any]:
    """What all launches of a scan can ask for: operands, gate, sizes, flags.

    B and C come with their rows padded; they are small beside the rest.
    """
    margin = (0, size.padded - size.l)
    padded = [one._replace(B=F.pad(one.B, margin), C=F.pad(one.C, margin)) if margin[1] else one for one in directions]
    z_batch, z_channel, _ = (0, 0, 0) if z is None else z.stride()
    flags = {"REVERSE": reverse, "TWO": len(directions) == 2, "SOFTPLUS": delta_softplus, "HALVES": size.halves}
    gate = {"z": z, "z_batch": z_batch, "z_channel": z_channel, "scale": scale}
    return named(padded) | gate | flags | size._asdict() | {"BD": CHANNELS, "T": size.steps}


def named(directions: Sequence[Direction], prefix: str = "") -> dict[str, Any]:
    """Operands, or their gradients, as the kernels name them: the second direction ends in _b; None if absent."""
    absent = dict.fromkeys(Direction._fields)
    both = ([one._asdict() for one in directions] + [absent])[:2]
    return {f"{prefix}{name}{suffix}": one[name] for one, suffix in zip(both, ("", "_b")) for name in one}


def pair(name: str, tensor: Tensor | None) -> dict[str, Any]:
    """The first direction's part of a tensor, and the last one's under the name that ends in _b; None if empty."""
    if tensor is None or not tensor.numel():
        return {name: None, f"{name}_b": None}
    return {name: tensor[0], f"{name}_b": tensor[-1]}


def states_between_chunks(
    arguments: dict[str, Any], size: Geometry, count: int, entry: Tensor | None, backward: bool
) -> Tensor:
    """Carry a state, or its gradient if `backward`, over the chunks: -> (directions, b, chunks + 1, d, n), float32.

    Args:
        arguments: those of the launch; `backward` also needs "dout".
        count: directions.
        entry: what enters the first chunk of the first direction, (b, d, n); 0 if None.
    """
    shape = (count, size.b, size.chunks, size.d, size.n)
    states = arguments["delta"].new_zeros(count, size.b, size.chunks + 1, size.d, size.n, dtype=torch.float32)
    decays = states.new_empty(shape)
    if entry is not None:
        states[0, :, 0] = entry
    places = pair("ends", states) | pair("decays", decays) | {"slots": size.chunks + 1, "BACKWARD": backward}
    launch(chunk_ends_kernel, size.programs, {"dout": None} | arguments | places)
    elements, (E, chunks_of_tile) = size.d * size.n, CARRY_TILE
    tiles = triton.cdiv(elements, E)
    carry = {"states": states, "decays": decays, "elements": elements, "chunks": size.chunks, "tiles": tiles}
    launch(carry_kernel, count * size.b * tiles, carry | {"E": E, "CHUNKS": chunks_of_tile})
    return states


def in_order_of_time(states: Tensor, reverse: bool, out: Tensor | None = None) -> Tensor:
    """Copy slots from the scan order of their direction to time order, or back: (directions, b, chunks, d, n)."""
    return torch.stack([one.flip(1) if (i == 1) != reverse else one for i, one in enumerate(states)], out=out)
