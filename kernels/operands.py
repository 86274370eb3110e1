"""What a scan takes, named once for all backends, and in a row for operators.

Letters: b batch, d channels, l steps, n states of a channel, g groups of channels that share B and C.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Direction(NamedTuple):
    """The arguments of `selective_scan` that each direction of time has for itself."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


class Operands(NamedTuple):
    """One direction, or two opposite ones that share a gate: y = scale (sum of C . h + D u) silu(z)."""

    directions: tuple[Direction, ...]
    reverse: bool  # whether the first direction runs backwards in time; the second runs the other way
    z: Tensor | None
    initial_state: Tensor | None  # None if there are two directions
    seq_idx: Tensor | None  # (b, l): where the number changes, another sequence begins
    delta_softplus: bool
    scale: float


def restarts(seq_idx: Tensor, reverse: bool = False) -> Tensor:
    """Where a sequence of a packed row begins, but for the first: (b, l) integers -> (b, l) booleans."""
    change = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(change, (0, 1) if reverse else (1, 0))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of the state and of all sums: float64 if any argument is float64, float32 otherwise (16-bit included)."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(t is not None and t.dtype in wide for t in tensors) else torch.float32


def state_dtype(A: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state: `dtype`, or the complex one of its precision if A is complex."""
    return dtype.to_complex() if A.is_complex() else dtype


def operands_dtype(operands: Operands) -> torch.dtype:
    """`compute_dtype` of every tensor in `operands`."""
    return compute_dtype(operands.z, operands.initial_state, *(t for one in operands.directions for t in one))


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least: 16-bit tensors become float32, all others stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), also to float64's last digits: PyTorch's default is x from 20 on, 1e-10 less."""
    return F.softplus(x, threshold=40)


def grouped(projection: Tensor, groups: int = 1) -> Tensor:
    """Return B or C as (b, g, n, l) with at least `groups` groups, a multiple of those it has.

    Groups are repeated in float32 at least, in which their gradients are summed then.
    """
    by_group = projection if projection.dim() == 4 else projection[:, None]
    repeats = max(1, groups // by_group.shape[1])
    return by_group if repeats == 1 else widened(by_group).repeat_interleave(repeats, dim=1)


def common_groups(directions: Sequence[Direction]) -> int:
    """The smallest number of groups that every B and C can be cut into."""
    groups = 1
    for projection in (t for direction in directions for t in (direction.B, direction.C)):
        step = groups
        while groups % grouped(projection).shape[1]:  # math.lcm, but torch.compile follows it for sizes not known
            groups += step
    return groups


_NAMES = [*Direction._fields, *(f"{name}_b" for name in Direction._fields), "z", "initial_state", "seq_idx"]
_TENSORS = ", ".join(f"Tensor{'?' * (i >= 5)} {name}" for i, name in enumerate(_NAMES))
ARGUMENTS = f"{_TENSORS}, bool reverse, bool delta_softplus, float scale, bool want_last, bool keep"


def flatten(operands: Operands) -> tuple[Tensor | None, ...]:
    """The tensors of ARGUMENTS; B and C come in groups, D and delta_bias contiguous."""
    g = common_groups(operands.directions)
    tensors: list[Tensor | None] = []
    for u, delta, A, B, C, *optional in operands.directions:  # torch.compile of PyTorch 2.8 knows no slice of them
        tensors += [u, delta, A, grouped(B, g), grouped(C, g)]
        tensors += [None if t is None else t.contiguous() for t in optional]
    tensors += [None] * (2 * len(Direction._fields) - len(tensors))
    seq_idx = operands.seq_idx
    numbers = None if seq_idx is None else restarts(seq_idx).cumsum(dim=1, dtype=torch.int32)  # int64 might not fit
    return *tensors, operands.z, operands.initial_state, numbers


def unflatten(arguments: Sequence[Any]) -> Operands:
    """Read the values of ARGUMENTS."""
    directions = tuple(Direction(*arguments[i : i + 7]) for i in (0, 7) if arguments[i] is not None)
    z, initial_state, seq_idx, reverse, delta_softplus, scale = arguments[14:20]
    return Operands(directions, reverse, z, initial_state, seq_idx, delta_softplus, scale)
