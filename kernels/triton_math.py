"""What the Triton kernels of the scan share: the recurrence as an associative operator, activations, tile addresses.

Tiles are (BD channels, T time steps), time contiguous, one warp per channel. No libdevice and no inline assembly, so
that everything also runs in Triton's interpreter. Addresses are 64-bit from the batch index down.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(decay_left, h_left, decay_right, h_right):  # type: ignore[no-untyped-def]
    """Join two stretches of h = decay * h + input, the left one being earlier in scan order."""
    return decay_left * decay_right, decay_right * h_left + h_right


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x), to a few units in the last place everywhere: max(x, 0) + log1p(y), y = e^-|x|.

    log1p(y) = 2 atanh(s), s = y / (2 + y) <= 1/3, by its series: the GPU's fast logarithm loses all digits near 1.
    """
    y = tl.exp2(-tl.abs(x) * LOG2_E)
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 + q * (
        1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15))))))
    )
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) without overflow."""
    y = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def load_steps(delta, bias, channel, offset, mask, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load delta and return dt (0 where masked, so that padding neither decays nor adds) and the raw step before it."""
    raw = tl.load(delta + offset, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(raw)
    else:
        dt = raw
    return tl.where(mask, dt, 0.0), raw


@triton.jit
def tile_of(block, group, batch, chunk, d, l, g, BD: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Address a tile: channel (BD, 1), its mask, t (BD, T), the mask of both, and the offset in a (b, d, l) tensor."""
    in_group = block * BD + tl.arange(0, BD)[:, None]
    row_mask = in_group < d // g
    channel = group * (d // g) + in_group
    t = tl.broadcast_to(chunk * T + tl.arange(0, T)[None, :], BD, T)
    offset = (batch.to(tl.int64) * d + channel) * l + t
    return channel, row_mask, t, row_mask & (t < l), offset
