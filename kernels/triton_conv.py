"""The depthwise causal convolution with bias and SiLU as one Triton pass, forward-time or backward-time, with gradient.

Backward takes two passes: the gradient before the activation (and what it gives for weight and bias), then the same
convolution of that gradient in the other direction of time, which is the gradient of x. Sums go to one entry per tile
and are added up in a fixed order, so two runs agree bit by bit.
Source: own; the operation is the one of Mamba's block (Gu & Dao 2023, Fig. 3). Deviations: no state is carried in.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import CHANNELS, launch, tile_steps
from .triton_math import program_place, sigmoid, tile_of

TILE_STEPS = 256


@triton.jit
def convolve_tile(
    x, x_batch, x_channel, weight, bias, batch, channel, row_mask, t, l,
    REVERSE: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight_j x_{t - (K - 1) + j}, or with t + (K - 1) - j if REVERSE."""
    if bias is not None:
        y = tl.zeros([BD, T], tl.float32) + tl.load(bias + channel, mask=row_mask, other=0.0).to(tl.float32)
    else:
        y = tl.zeros([BD, T], tl.float32)
    row = x + batch.to(tl.int64) * x_batch + channel.to(tl.int64) * x_channel
    for j in tl.static_range(K):
        s = t + (K - 1 - j) if REVERSE else t - (K - 1 - j)
        value = tl.load(row + s, mask=row_mask & (s >= 0) & (s < l), other=0.0).to(tl.float32)
        y += tl.load(weight + channel * K + j, mask=row_mask, other=0.0).to(tl.float32) * value
    return y


@triton.jit
def conv_kernel(
    out, x, x_batch, x_channel, weight, bias, d, l, chunks, blocks,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out = act(convolution) for one tile, out (b, d, l) contiguous; grid: (b chunks blocks,)."""
    block, group, chunk, batch = program_place(blocks, 1, chunks)
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, 1, False, BD, T)
    y = convolve_tile(x, x_batch, x_channel, weight, bias, batch, channel, row_mask, t, l, REVERSE, K, BD, T)
    if SILU:
        y *= sigmoid(y)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv_slope_kernel(
    dout, dsum, dweight, dbias, x, x_batch, x_channel, weight, bias, d, l, chunks, blocks,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """dsum = dout act'(convolution), (b, d, l); dweight (b chunks, d, K) and dbias (b chunks, d): sums over a tile."""
    block, group, chunk, batch = program_place(blocks, 1, chunks)
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, 1, False, BD, T)
    gradient = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = convolve_tile(x, x_batch, x_channel, weight, bias, batch, channel, row_mask, t, l, REVERSE, K, BD, T)
        slope = sigmoid(y)
        gradient *= slope * (1.0 + y * (1.0 - slope))
        gradient = tl.where(mask, gradient, 0.0)
    tl.store(dsum + offset, gradient, mask=mask)
    part = (batch.to(tl.int64) * chunks + chunk) * d + channel
    if bias is not None:
        tl.store(dbias + part, tl.sum(gradient, axis=1, keep_dims=True), mask=row_mask)
    row = x + batch.to(tl.int64) * x_batch + channel.to(tl.int64) * x_channel
    for j in tl.static_range(K):
        s = t + (K - 1 - j) if REVERSE else t - (K - 1 - j)
        value = tl.load(row + s, mask=mask & (s >= 0) & (s < l), other=0.0).to(tl.float32)
        tl.store(dweight + part * K + j, tl.sum(gradient * value, axis=1, keep_dims=True), mask=row_mask)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, activation: str | None
) -> Tensor:
    """Run `causal_conv1d_reference`'s mapping in one pass: (b, d, l) -> (b, d, l)."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return _convolve(x, weight.contiguous(), bias, reverse, activation is not None)


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> dict[str, Any]:
    """What both kernels take, by name."""
    _, d, l = x.shape
    steps = tile_steps(l, TILE_STEPS)
    sizes = {"d": d, "l": l, "chunks": triton.cdiv(l, steps), "blocks": triton.cdiv(d, CHANNELS)}
    flags = {"REVERSE": reverse, "SILU": silu, "K": weight.shape[1], "BD": CHANNELS, "T": steps}
    operands = {"x": x, "x_batch": x.stride(0), "x_channel": x.stride(1), "weight": weight, "bias": bias}
    return operands | sizes | flags


@torch.library.custom_op("almrr_ref::causal_conv1d", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> Tensor:
    """The forward operator."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = _arguments(x, weight, bias, reverse, silu)
    launch(conv_kernel, x.shape[0] * arguments["chunks"] * arguments["blocks"], arguments | {"out": out})
    return out


@_convolve.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("almrr_ref::causal_conv1d_backward", mutates_args=())
def _convolve_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (empty if there is none)."""
    arguments = _arguments(x, weight, bias, reverse, silu)
    tiles, programs = x.shape[0] * arguments["chunks"], x.shape[0] * arguments["chunks"] * arguments["blocks"]
    dsum = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    dweight = dsum.new_empty(tiles, *weight.shape)
    dbias = dsum.new_empty((tiles, x.shape[1]) if bias is not None else 0)
    results = {"dout": dout.contiguous(), "dsum": dsum, "dweight": dweight, "dbias": dbias}
    launch(conv_slope_kernel, programs, arguments | results)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(conv_kernel, programs, _arguments(dsum, weight, None, not reverse, False) | {"out": dx})
    return dx, dweight.sum(dim=0).to(weight.dtype), dbias if bias is None else dbias.sum(dim=0).to(bias.dtype)


@_convolve_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), dx.new_empty(0).float() if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.almrr_ref.causal_conv1d_backward(dout, x, weight, bias, ctx.reverse, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None


_convolve.register_autograd(_differentiate, setup_context=_save)
