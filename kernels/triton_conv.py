"""The depthwise causal convolution with bias and SiLU as one Triton pass, forward-time or backward-time, with gradient.

Backward takes two passes: the gradient before the activation (and what it gives for weight and bias), then the same
convolution of that gradient in the other direction of time, which is the gradient of x. Sums go to one entry per tile
and are added up in a fixed order, so two runs agree bit by bit. x may have any strides, and results lie in memory as x
does: with channels side by side as a linear layer leaves them, loads are as wide as with time contiguous.
Source: own; the operation is the one of Mamba's block (Gu & Dao 2023, Fig. 3). Deviations: no state is carried in.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import LOG2_E, launch

TILE = 16, 64  # (steps, channels)
WARPS = 4


@triton.jit
def tile_of(batch_stride, step, channel_stride, d, l, chunks, blocks, T: tl.constexpr, BD: tl.constexpr):
    """Address a tile (T steps, BD channels): entry, channel and its mask, t, offset of channel and batch."""
    pid = tl.program_id(0)
    entry = (pid // blocks).to(tl.int64)  # batch and chunk
    channel = pid % blocks * BD + tl.arange(0, BD)[None, :]
    t = (entry % chunks * T + tl.arange(0, T)[:, None]).to(tl.int64)
    return entry, channel, channel < d, t, entry // chunks * batch_stride + channel.to(tl.int64) * channel_stride


@triton.jit
def convolve_tile(
    row, step, weight, bias, channel, exists, t, l,
    REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight_j x_{t - (K - 1) + j}, or with t + (K - 1) - j if REVERSE."""
    y = tl.zeros([T, BD], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        s = t + (K - 1 - j) if REVERSE else t - (K - 1 - j)
        value = tl.load(row + s * step, mask=exists & (s >= 0) & (s < l), other=0.0).to(tl.float32)
        y += tl.load(weight + channel * K + j, mask=exists, other=0.0).to(tl.float32) * value
    return y


@triton.jit
def conv_kernel(
    out, x, batch_stride, channel_stride, step, out_batch, out_channel, out_step, weight, bias, d, l, chunks, blocks,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = act(convolution) for one tile; grid: (b chunks blocks,)."""
    _, channel, exists, t, offset = tile_of(batch_stride, step, channel_stride, d, l, chunks, blocks, T, BD)
    y = convolve_tile(x + offset, step, weight, bias, channel, exists, t, l, REVERSE, K, T, BD)
    if SILU:
        y /= 1.0 + tl.exp2(y * -LOG2_E)
    _, _, _, _, target = tile_of(out_batch, out_step, out_channel, d, l, chunks, blocks, T, BD)
    tl.store(out + target + t * out_step, y.to(out.dtype.element_ty), mask=exists & (t < l))


@triton.jit
def conv_slope_kernel(
    dout, dsum, dweight, dbias, x, batch_stride, channel_stride, step, out_batch, out_channel, out_step, weight, bias,
    d, l, chunks, blocks,
    REVERSE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dsum = dout act'(convolution), both laid out alike; dweight (b chunks, K, d), dbias (b chunks, d): tile sums."""
    entry, channel, exists, t, offset = tile_of(batch_stride, step, channel_stride, d, l, chunks, blocks, T, BD)
    _, _, _, _, target = tile_of(out_batch, out_step, out_channel, d, l, chunks, blocks, T, BD)
    mask = exists & (t < l)
    gradient = tl.load(dout + target + t * out_step, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = convolve_tile(x + offset, step, weight, bias, channel, exists, t, l, REVERSE, K, T, BD)
        slope = 1.0 / (1.0 + tl.exp2(y * -LOG2_E))
        gradient = tl.where(mask, gradient * slope * (1.0 + y * (1.0 - slope)), 0.0)
    tl.store(dsum + target + t * out_step, gradient, mask=mask)
    if bias is not None:
        tl.store(dbias + entry * d + channel, tl.sum(gradient, axis=0, keep_dims=True), mask=exists)
    for j in tl.static_range(K):
        s = t + (K - 1 - j) if REVERSE else t - (K - 1 - j)
        value = tl.load(x + offset + s * step, mask=mask & (s >= 0) & (s < l), other=0.0).to(tl.float32)
        tl.store(dweight + (entry * K + j) * d + channel, tl.sum(gradient * value, axis=0, keep_dims=True), mask=exists)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, activation: str | None
) -> Tensor:
    """Run `causal_conv1d_reference`'s mapping in one pass: (b, d, l) -> (b, d, l)."""
    return _convolve(x, weight.contiguous(), bias, reverse, activation is not None)


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape and order in memory: channels or time side by side."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.mT.shape, dtype=dtype).mT
    return x.new_empty(x.shape, dtype=dtype)


def _launch(
    kernel: Any, x: Tensor, like: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool, **targets: Any
) -> None:
    """Launch a kernel that reads x and writes tensors laid out as `like`."""
    b, d, l = x.shape
    chunks, blocks = triton.cdiv(l, TILE[0]), triton.cdiv(d, TILE[1])
    sizes = {"d": d, "l": l, "chunks": chunks, "blocks": blocks, "T": TILE[0], "BD": TILE[1], "K": weight.shape[1]}
    strides = dict(zip(("batch_stride", "channel_stride", "step"), x.stride()))
    strides |= dict(zip(("out_batch", "out_channel", "out_step"), like.stride()))
    operands = {"x": x, "weight": weight, "bias": bias, "REVERSE": reverse, "SILU": silu}
    launch(kernel, b * chunks * blocks, x.device, WARPS, operands | sizes | strides | targets)


@torch.library.custom_op("almrr_ref::causal_conv1d", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> Tensor:
    """The forward operator."""
    out = _empty(x)
    _launch(conv_kernel, x, out, weight, bias, reverse, silu, out=out)
    return out


@_convolve.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return _empty(x)


@torch.library.custom_op("almrr_ref::causal_conv1d_backward", mutates_args=())
def _convolve_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (empty if there is none)."""
    entries, (d, k) = x.shape[0] * triton.cdiv(x.shape[2], TILE[0]), weight.shape
    dsum, dx = _empty(x, torch.float32), _empty(x)
    dout = dout if dout.stride() == dx.stride() else _empty(x, dout.dtype).copy_(dout)
    dweight, dbias = dsum.new_empty(entries, k, d), dsum.new_empty((entries, d) if bias is not None else 0)
    _launch(conv_slope_kernel, x, dsum, weight, bias, reverse, silu, dout=dout, dsum=dsum, dweight=dweight, dbias=dbias)
    _launch(conv_kernel, dsum, dx, weight, None, not reverse, False, out=dx)
    dweight = dweight.sum(dim=0).T.contiguous().to(weight.dtype)
    return dx, dweight, dbias if bias is None else dbias.sum(dim=0).to(bias.dtype)


@_convolve_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), torch.empty_like(weight), x.new_empty(0).float() if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.almrr_ref.causal_conv1d_backward(dout, x, weight, bias, ctx.reverse, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None


_convolve.register_autograd(_differentiate, setup_context=_save)
