"""How the Triton kernels are launched, and how what they read and write lies in memory."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import softplus

INTERPRETED = not isinstance(softplus, triton.JITFunction)  # decided by TRITON_INTERPRET when triton is imported


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
    return sequence.new_empty(sequence.mT.shape, dtype=dtype).mT
