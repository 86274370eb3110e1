"""A Mamba block run causally, as a whole sequence or token by token from a state: for language models and streams.

Works on every module with Mamba's parameter names and its SiLU: in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj.
Of a VimMixer these are the forward direction; the other one would have to know the future.
Source: Gu & Dao 2023, Fig. 3.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import causal_conv1d, selective_scan
from .operands import widened

APPLIED = {"in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj"}
NOT_NEEDED = {"conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b", "parametrizations"}  # the backward direction


class State(NamedTuple):
    """All that a block remembers of the tokens before."""

    convolution: Tensor  # x of the last k - 1 tokens, (b, d_inner, k - 1)
    scan: Tensor  # h, (b, d_inner, n)


def first_state(mixer: nn.Module, batch: int) -> State:
    """The state before any token."""
    weight, A_log = _parameter(mixer, "conv1d.weight"), _parameter(mixer, "A_log")  # (d_inner, 1, k), (d_inner, n)
    margin = weight.new_zeros(batch, weight.shape[0], weight.shape[2] - 1)
    return State(margin, A_log.new_zeros(batch, *A_log.shape))


def run_causally(mixer: nn.Module, tokens: Tensor, state: State, backend: str = "auto") -> tuple[Tensor, State]:
    """Mix tokens with those before: (b, l, d_model) -> (b, l, d_model), and the state after them.

    One token at a time (l = 1), or any cut of a sequence, gives what the whole sequence gives.

    Args:
        mixer: the block.
        tokens: (b, l, d_model).
        state: `first_state`, or what an earlier call returned; it is not changed.
        backend: of scan and convolution, "auto" or as for `selective_scan`.
    Raises:
        ValueError: if the block has parameters that are not applied, such as Jamba's norms of B and C.
    """
    if others := sorted({name.partition(".")[0] for name, _ in mixer.named_parameters()} - APPLIED - NOT_NEEDED):
        raise ValueError(f"the block also has {', '.join(others)}, which run_causally does not apply")
    parameter = partial(_parameter, mixer)
    projected = F.linear(tokens, parameter("in_proj.weight"), _bias(mixer, "in_proj"))
    x, z = projected.transpose(1, 2).chunk(2, dim=1)  # (b, d_inner, l)
    u, margin = causal_conv1d(
        x,
        parameter("conv1d.weight"),
        _bias(mixer, "conv1d"),
        initial_state=state.convolution,
        return_final_state=True,
        backend="reference" if backend in ("chunked", "numba") else backend,
    )
    A = -torch.exp(widened(parameter("A_log")))
    dt_weight, n = parameter("dt_proj.weight"), A.shape[1]
    rows = F.linear(u.transpose(1, 2), parameter("x_proj.weight"))
    low_rank, B, C = (t.transpose(1, 2) for t in rows.split([dt_weight.shape[1], n, n], dim=2))
    delta = F.linear(low_rank.transpose(1, 2), dt_weight).transpose(1, 2)
    bias, D = widened(parameter("dt_proj.bias")), widened(parameter("D"))
    operands = u, delta, A, B, C, D, z, bias, True, True
    y, h = selective_scan(*operands, initial_state=state.scan, backend=backend)
    return F.linear(y.transpose(1, 2), parameter("out_proj.weight"), _bias(mixer, "out_proj")), State(margin, h)


def _parameter(mixer: nn.Module, name: str) -> Any:
    """A parameter by its path, or what stands in its place: under torch.func or a parametrization any tensor may."""
    return reduce(getattr, name.split("."), mixer)


def _bias(mixer: nn.Module, name: str) -> Any:
    """The bias of a layer, or None."""
    return getattr(mixer.get_submodule(name), "bias", None)
