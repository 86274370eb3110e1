"""What the launches of the Triton scan share: tile sizes, the geometry of a launch, chunk states and their order.

Tile sizes are a fixed table, not tuned at run time: tuning would make runs differ.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .triton_forward import carry_kernel

CHANNELS = 4  # rows of a tile, one warp each
TILE_STEPS = 256  # longest tile, and the distance of the states that a long sequence keeps
BACKWARD_STEPS = 128  # longest tile of the backward pass, which takes a longer chunk in two halves
FORWARD_REGISTERS = 128  # a thread: four programs of a multiprocessor
BACKWARD_REGISTERS = 168  # a thread: three programs of a multiprocessor, and enough to keep all values out of memory
CARRY_TILE = (16, 32)  # (state elements, chunks) of a tile of the carry
PROGRAMS = 1024  # enough for any GPU; beyond it a backward program walks over several blocks of channels


class Geometry(NamedTuple):
    """Sizes of a launch, all that the kernels share."""

    b: int
    d: int
    l: int
    n: int
    g: int
    steps: int  # of a tile
    chunks: int
    blocks: int  # of CHANNELS channels in a group

    @property
    def halves(self) -> bool:
        """Whether the backward pass takes a chunk in two halves, and so needs the state in its middle."""
        return self.steps > BACKWARD_STEPS

    @property
    def padded(self) -> int:
        """Length of a row of B, C and their gradients: whole chunks, so that the loop over states needs no masks."""
        return self.chunks * self.steps

    @property
    def tiles(self) -> int:
        return self.b * self.chunks * self.g * self.blocks

    def options(self, reverse: bool, two: bool, delta_softplus: bool) -> dict[str, Any]:
        """The compile-time arguments of a launch; fused multiply-adds are asked for, not left to Triton's default."""
        return {
            "REVERSE": reverse,
            "TWO": two,
            "SOFTPLUS": delta_softplus,
            "BD": CHANNELS,
            "T": self.steps,
            "num_warps": CHANNELS,
            "enable_fp_fusion": True,
        }


def geometry(arguments: Sequence[Tensor]) -> Geometry:
    """Derive the sizes of a launch from the flat arguments of its directions."""
    u, _, A, B = arguments[:4]
    b, d, l = u.shape
    g = B.shape[1]
    longest = TILE_STEPS if l % 16 == 0 else BACKWARD_STEPS  # unaligned rows take more registers for addresses
    steps = min(longest, max(16, triton.next_power_of_2(l)))
    return Geometry(b, d, l, A.shape[1], g, steps, triton.cdiv(l, steps), triton.cdiv(d // g, CHANNELS))


def split(tensors: Sequence[Tensor], size: Geometry) -> tuple[list[Any], list[Any]]:
    """Split a flat list into the part of the first direction and that of the second, None for what is absent.

    B and C come with their rows padded; they are small beside the rest.
    """
    present: list[Tensor | None] = [t if t.numel() else None for t in tensors] + [None] * 7
    if size.padded != size.l:
        for i in (3, 4, 10, 11)[: 2 * (len(tensors) // 7)]:
            present[i] = F.pad(tensors[i], (0, size.padded - size.l))
    return present[:7], present[7:14]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def carry(states: Tensor, decays: Tensor) -> None:
    """Run `carry_kernel` over states (directions, b, chunks + 1, d, n) in place."""
    sequences, chunks = states.shape[0] * states.shape[1], states.shape[2] - 1
    elements = states.shape[3] * states.shape[4]
    tiles = triton.cdiv(elements, CARRY_TILE[0])
    carry_kernel[(sequences * tiles,)](states, decays, elements, chunks, tiles, *CARRY_TILE, num_warps=4)


def pair(tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The parts of the first and of the second direction; that of the first twice if there is one only."""
    return (tensor[0], tensor[-1]) if tensor.numel() else (None, None)


def in_order_of_time(states: Tensor, reverse: bool) -> Tensor:
    """Reorder slots from the scan order of their direction to time, or back: (directions, b, chunks, d, n), a copy."""
    return torch.stack([part.flip(1) if (i == 1) != reverse else part for i, part in enumerate(states)])


def starts_shape(size: Geometry, count: int, needed: bool) -> tuple[int, ...]:
    """(directions, b, tiles of the backward pass, d, n), or nothing where they are not needed."""
    return (count, size.b, size.chunks * (1 + size.halves), size.d, size.n) if needed else (0,)
