"""The decoder's last steps as one Triton pass: bias, interleaving, resize, sigmoid, weighted sum over the channels.

PyTorch writes all channels at the full size several times, only to sum them to one number a pixel. Here a program takes
P pixels of the result and loops over the channels, which are adjacent in memory. Two neighbouring rows of y are an even
and an odd one, so the four pixels that a bilinear resize mixes are in one phase each. The weights of a resize sum to 1,
so the bias may come after it. Source: ours; the operation is that of mfrm.py.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from almrr_ref.kernels.autograd import operator
from almrr_ref.kernels.triton_launch import launch
from almrr_ref.kernels.triton_math import sigmoid

TILE = 8, 128  # (pixels, channels)
WARPS = 4


@triton.jit
def neighbours(i, scale, n):
    """Resize of 2 n - 1 pixels, n of them even: pixel i -> its even and its odd neighbour, and the odd one's weight."""
    place = tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = place.to(tl.int32)
    above = tl.where(low < 2 * n - 2, place - low.to(tl.float32), 0.0)  # nothing lies behind the last pixel
    share = tl.where(low % 2 == 0, above, 1.0 - above)
    return (low + 1) // 2, tl.minimum(low // 2, n - 2), share


@triton.jit
def pixels_of(phase, batch, row, column, h, w, c):
    """Addresses of pixels of a phase (b, h, w, c), (P, 1)."""
    return phase + (((batch * h + row) * w + column) * c)[:, None]


@triton.jit
def sigmoid_mean_kernel(
    out, even_even, even_odd, odd_even, odd_odd, bias, weight, offset, row_scale, column_scale,
    h, w, height, width, c, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """P pixels of out (b, height, width); grid: (b blocks of pixels,)."""
    blocks = tl.cdiv(height * width, P)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * P + tl.arange(0, P)
    exists = pixel < height * width
    even_row, odd_row, down = neighbours(pixel // width, row_scale, h)
    even_column, odd_column, right = neighbours(pixel % width, column_scale, w)
    even_even = pixels_of(even_even, batch, even_row, even_column, h, w, c)
    even_odd = pixels_of(even_odd, batch, even_row, odd_column, h, w - 1, c)
    odd_even = pixels_of(odd_even, batch, odd_row, even_column, h - 1, w, c)
    odd_odd = pixels_of(odd_odd, batch, odd_row, odd_column, h - 1, w - 1, c)
    down, right = down[:, None], right[:, None]
    total = tl.zeros([P, BC], tl.float32)
    for first in range(0, c, BC):
        channel = first + tl.arange(0, BC)[None, :]
        mask = exists[:, None] & (channel < c)
        a = tl.load(even_even + channel, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(even_odd + channel, mask=mask, other=0.0).to(tl.float32)
        upper = a + right * (b - a)
        a = tl.load(odd_even + channel, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(odd_odd + channel, mask=mask, other=0.0).to(tl.float32)
        value = upper + down * (a + right * (b - a) - upper)
        value += tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        total += tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32) * sigmoid(value)
    mean = tl.sum(total, axis=1) + tl.load(offset).to(tl.float32)
    tl.store(out + batch * height * width + pixel, mean.to(out.dtype.element_ty), mask=exists)


def _fake(phases: list[Tensor], bias: Tensor, weight: Tensor, offset: Tensor, size: list[int]) -> Tensor:
    """Allocate the result of `decoder_mean`."""
    return weight.new_empty(phases[0].shape[0], 1, *size)


@operator(_fake)
def decoder_mean(phases: list[Tensor], bias: Tensor, weight: Tensor, offset: Tensor, size: list[int]) -> Tensor:
    """Compute sum_c weight_c sigmoid(resize(y_c + bias_c)) + offset: -> (b, 1, *size) in the weight's dtype.

    Args:
        phases: y[2 i, 2 j] (b, c, h, w), y[2 i, 2 j + 1] (b, c, h, w - 1), y[2 i + 1, 2 j] (b, c, h - 1, w) and
            y[2 i + 1, 2 j + 1] (b, c, h - 1, w - 1), where h and w are at least 2; channels-last, or they are copied.
        bias: (c,).
        weight: (1, c, 1, 1).
        offset: (1,).
    """
    (b, c, h, w), (height, width), (P, BC) = phases[0].shape, size, TILE
    assert min(h, w) > 1
    out = _fake(phases, bias, weight, offset, size)
    rows = [phase.permute(0, 2, 3, 1).contiguous() for phase in phases]
    arguments: dict[str, Any] = dict(zip(("even_even", "even_odd", "odd_even", "odd_odd"), rows))
    arguments |= {"out": out, "bias": bias, "weight": weight, "offset": offset, "P": P, "BC": BC}
    arguments |= {"h": h, "w": w, "c": c, "height": height, "width": width}
    scales = {"row_scale": (2 * h - 1) / height, "column_scale": (2 * w - 1) / width}
    launch(sigmoid_mean_kernel, b * triton.cdiv(height * width, P), out.device, WARPS, arguments | scales)
    return out
