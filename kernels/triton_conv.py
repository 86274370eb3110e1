"""The depthwise causal convolution with bias and SiLU as one Triton pass, forward-time or backward-time, with gradient.

Backward takes two passes: the gradient before the activation (and what it gives for weight and bias), then the same
convolution of that gradient in the other direction of time, which is the gradient of x. Sums go to one entry per tile
and are added up in a fixed order, so two runs agree bit by bit. Sequences lie in memory as (b, l, d), as in the scan.
Source: own; the operation is the one of Mamba's block (Gu & Dao 2023, Fig. 3). Deviations: no state is carried in.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import RULES, Rule, operator, run
from .reference import causal_conv1d_reference
from .triton_launch import empty_like, launch, rows_of
from .triton_math import LOG2_E

TILE = 16, 64  # (steps, channels)
WARPS = 4


@triton.jit
def tile_of(x_batch, d, l, T: tl.constexpr, BD: tl.constexpr):
    """A tile (T steps, BD channels): batch and chunk as one, channel, t, offsets of t and of (t, channel) in x, out."""
    blocks, chunks = tl.cdiv(d, BD), tl.cdiv(l, T)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    batch = entry // chunks
    channel = tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, :]
    t = entry % chunks * T + tl.arange(0, T)[:, None]
    return entry, channel, t, batch * l, batch * x_batch + channel, (batch * l + t) * d + channel


@triton.jit
def met(row, x_step, seq_idx, first, channel, t, d, l, j: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr):
    """What tap j meets at t, 0 outside of t's sequence: x_{t - (K - 1) + j}, or x_{t + (K - 1) - j} if REVERSE."""
    s = t + (K - 1 - j) if REVERSE else t - (K - 1 - j)
    inside = (s >= 0) & (s < l) & (t < l)
    if seq_idx is not None:
        number = tl.load(seq_idx + first + t, mask=t < l, other=0)
        inside &= tl.load(seq_idx + first + s, mask=inside, other=0) == number
    return tl.load(row + s * x_step, mask=(channel < d) & inside, other=0.0).to(tl.float32)


@triton.jit
def convolve_tile(
    row, x_step, seq_idx, first, weight, bias, channel, t, d, l,
    REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight_j x_{t - (K - 1) + j}, or with t + (K - 1) - j if REVERSE."""
    y = tl.zeros([T, BD], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, mask=channel < d, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        value = met(row, x_step, seq_idx, first, channel, t, d, l, j, REVERSE, K)
        y += tl.load(weight + channel * K + j, mask=channel < d, other=0.0).to(tl.float32) * value
    return y


@triton.jit
def conv_kernel(
    out, x, x_batch, x_step, seq_idx, weight, bias, d, l,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = act(convolution) for one tile, out (b, l, d) contiguous; grid: (b tiles,)."""
    _, channel, t, first, source, offset = tile_of(x_batch, d, l, T, BD)
    y = convolve_tile(x + source, x_step, seq_idx, first, weight, bias, channel, t, d, l, REVERSE, K, T, BD)
    if SILU:
        y /= 1.0 + tl.exp2(y * -LOG2_E)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=(channel < d) & (t < l))


@triton.jit
def conv_slope_kernel(
    dout, dsum, dweight, dbias, x, x_batch, x_step, seq_idx, weight, bias, d, l,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dsum = dout act'(convolution), (b, l, d); dweight (b chunks, K, d) and dbias (b chunks, d): sums over a tile."""
    entry, channel, t, first, source, offset = tile_of(x_batch, d, l, T, BD)
    mask = (channel < d) & (t < l)
    gradient = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = convolve_tile(x + source, x_step, seq_idx, first, weight, bias, channel, t, d, l, REVERSE, K, T, BD)
        slope = 1.0 / (1.0 + tl.exp2(y * -LOG2_E))
        gradient = tl.where(mask, gradient * slope * (1.0 + y * (1.0 - slope)), 0.0)
    tl.store(dsum + offset, gradient, mask=mask)
    if bias is not None:
        tl.store(dbias + entry * d + channel, tl.sum(gradient, axis=0, keep_dims=True), mask=channel < d)
    for j in tl.static_range(K):
        value = met(x + source, x_step, seq_idx, first, channel, t, d, l, j, REVERSE, K)
        part = tl.sum(gradient * value, axis=0, keep_dims=True)
        tl.store(dweight + (entry * K + j) * d + channel, part, mask=channel < d)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool, activation: str | None
) -> Tensor:
    """Run `causal_conv1d_reference`'s mapping in one pass: (b, d, l) -> (b, d, l)."""
    numbers = None if seq_idx is None else seq_idx.int().contiguous()
    bias = None if bias is None else bias.contiguous()
    return run("causal_conv1d", (x, weight.contiguous(), bias, numbers), (reverse, activation is not None))[0]


def _launch(
    kernel: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool, silu: bool,
    **targets: Any,
) -> None:  # fmt: skip
    """Launch a kernel that reads rows (b, l, d)."""
    (b, l, d), (T, BD) = rows.shape, TILE
    flags = {"REVERSE": reverse, "SILU": silu, "K": weight.shape[1], "T": T, "BD": BD}
    operands = {"x": rows, "x_batch": rows.stride(0), "x_step": rows.stride(1), "weight": weight, "bias": bias}
    operands["seq_idx"] = seq_idx
    programs = b * triton.cdiv(l, T) * triton.cdiv(d, BD)
    launch(kernel, programs, rows.device, WARPS, operands | flags | {"d": d, "l": l} | targets)


def _fake_convolution(x: Tensor, *others: Any) -> Tensor:
    """Allocate the result of `_causal_conv1d`."""
    return empty_like(x)


@operator(_fake_convolution)
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool, silu: bool
) -> Tensor:
    """Run the convolution."""
    out = empty_like(x)
    _launch(conv_kernel, rows_of(x), weight, bias, seq_idx, reverse, silu, out=out)
    return out


def _fake_gradients(dout: Tensor, *arguments: Any) -> list[Tensor]:
    """Allocate the results of `_causal_conv1d_backward`."""
    x, weight, bias = arguments[:3]
    gradients = [empty_like(x), torch.empty_like(weight)]
    return gradients if bias is None else [*gradients, torch.empty_like(bias)]


@operator(_fake_gradients)
def _causal_conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool, silu: bool
) -> list[Tensor]:
    """Return the gradients of x, weight and, if there is one, bias."""
    dsum, dx, entries = empty_like(x, torch.float32), empty_like(x), x.shape[0] * triton.cdiv(x.shape[2], TILE[0])
    dweight = dsum.new_empty(entries, *weight.mT.shape)
    dbias = dsum.new_empty(0 if bias is None else (entries, x.shape[1]))
    targets = {"dout": dout.mT.contiguous(), "dsum": dsum, "dweight": dweight, "dbias": dbias}
    _launch(conv_slope_kernel, rows_of(x), weight, bias, seq_idx, reverse, silu, **targets)
    _launch(conv_kernel, dsum.mT, weight, None, seq_idx, not reverse, False, out=dx)
    gradients = [dx, dweight.sum(dim=0).mT.contiguous().to(weight.dtype)]
    return gradients if bias is None else [*gradients, dbias.sum(dim=0).to(bias.dtype)]


def _forward(*arguments: Any) -> tuple[Tensor]:
    return (_causal_conv1d(*arguments),)


def _oracle(x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, reverse: bool, silu: bool) -> tuple[Tensor]:
    return (causal_conv1d_reference(x, weight, bias, seq_idx, reverse, "silu" if silu else None),)


RULES["causal_conv1d"] = Rule(_forward, _causal_conv1d_backward, _oracle, outputs=1)
