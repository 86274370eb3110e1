"""What the Triton kernels are given, how they are launched, and how what they read and write lies in memory."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import softplus

INTERPRETED = not isinstance(softplus, triton.JITFunction)  # decided by TRITON_INTERPRET when triton is imported


class Common(NamedTuple):
    """What both directions share: (b, l, d) tensors, None if absent, and sizes. `total` is y before scale and gate."""

    out: Any
    total: Any
    dout: Any
    dz: Any
    z: Any
    seq_idx: Any  # (b, l) contiguous int32: where the number changes, another sequence begins
    z_batch: Any
    z_step: Any
    scale: Any
    b: Any
    d: Any
    l: Any
    g: Any
    blocks: Any  # of BD channels in a group
    chunks: Any
    length: Any  # steps of a chunk


class Scan(NamedTuple):
    """One direction: operands, strides in elements, states and gradients; None if absent.

    States lie in whole tiles: tiles = (g blocks, BD, N). Chunks are in order of time.
    """

    u: Any
    delta: Any
    A: Any  # tiles
    B: Any
    C: Any
    D: Any
    delta_bias: Any
    u_batch: Any
    u_step: Any
    delta_batch: Any
    delta_step: Any
    B_batch: Any
    B_group: Any
    B_step: Any
    C_batch: Any
    C_group: Any
    C_step: Any
    entry: Any = None  # the state, or its gradient, that enters the first chunk, (b, tiles)
    last: Any = None  # the state after the last chunk, (b, tiles)
    saved: Any = None  # the state before every K steps, (b, chunks, length / K, g blocks, BD, N)
    ends: Any = None  # what a chunk alone adds to the state, or to its gradient, (b, chunks, tiles)
    decays: Any = None  # what it leaves of the state that enters it
    leaving: Any = None  # the gradient of the initial state, (b, tiles)
    du: Any = None  # (b, l, d), as ddelta
    ddelta: Any = None
    dA: Any = None  # per chunk, (b, chunks, tiles)
    dB: Any = None  # per block of channels, (blocks, b, g, l, N), as dC
    dC: Any = None
    dD: Any = None  # per chunk, (b, chunks, d), as dbias
    dbias: Any = None


def known(value: int) -> Any:
    """A number that is known when a kernel is compiled: another one is another compilation."""
    return value if INTERPRETED else tl.constexpr(value)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    warps: int,
    arguments: dict[str, Any],
    registers: int | None = None,
) -> None:
    """Launch a kernel with those of `arguments` that its signature names; fused multiply-adds are asked for.

    registers: of a thread, at most.
    """
    named = {name: arguments[name] for name in kernel.arg_names}
    options = {"num_warps": warps, "enable_fp_fusion": True} | ({"maxnreg": registers} if registers else {})
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**named, **options)


def rows_of(sequence: Tensor) -> Tensor:
    """(b, d, l) -> (b, l, d) with channels side by side: a view where they lie so, a copy otherwise."""
    rows = sequence.mT
    return rows if rows.stride(2) == 1 else rows.contiguous()


def empty_like(sequence: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (b, d, l) tensor that lies in memory as (b, l, d)."""
    b, d, l = sequence.shape
    return sequence.new_empty_strided((b, d, l), (l * d, 1, d), dtype=dtype)  # no view: autograd lets it be changed
