"""What the Triton kernels share: the recurrence as an associative operator, activations, addresses of tiles.

Tiles are (BD channels, T time steps). A scan always runs along ascending columns: where time runs backwards, tiles are
loaded in descending order instead, because `associative_scan(reverse=True)` spends fifteen shuffles per element on its
flips (and Triton issue #4362 reports wrong results from it). No libdevice and no inline assembly, so that everything
also runs in Triton's interpreter. Addresses are 64-bit from the batch index down.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(decay_left, h_left, decay_right, h_right):
    """Join two stretches of h = decay * h + input, the left one being earlier in scan order."""
    return decay_left * decay_right, decay_right * h_left + h_right


INTERPRETED = not isinstance(combine, triton.JITFunction)  # decided by TRITON_INTERPRET when triton is imported


@triton.jit
def softplus(x):
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
def softplus_slope(y):
    """The derivative of softplus where its value is y: 1 - e^-y, by its series where the difference would cancel."""
    series = y * (1.0 - y * (1.0 / 2 - y * (1.0 / 6 - y * (1.0 / 24 - y * (1.0 / 120 - y * (1.0 / 720))))))
    return tl.where(y < 0.25, series, 1.0 - tl.exp2(-y * LOG2_E))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without overflow."""
    y = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def program_place(blocks, g, chunks):
    """This program's block of channels in its group, its group, its chunk of time and its batch index."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % g, pid // (blocks * g) % chunks, pid // (blocks * g * chunks)


@triton.jit
def tile_of(block, group, batch, chunk, d, l, g, DESCENDING: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    """Address a tile: channel (BD, 1), its mask, t (BD, T), the mask of both, and the offset in a (b, d, l) tensor."""
    in_group = block * BD + tl.arange(0, BD)[:, None]
    row_mask = in_group < d // g
    channel = group * (d // g) + in_group
    t = tl.broadcast_to(steps_of(chunk, DESCENDING, T)[None, :], BD, T)
    offset = (batch.to(tl.int64) * d + channel) * l + t
    return channel, row_mask, t, row_mask & (t < l), offset


@triton.jit
def steps_of(chunk, DESCENDING: tl.constexpr, T: tl.constexpr):
    """The T steps of a chunk, from the last to the first if DESCENDING."""
    if DESCENDING:
        steps = chunk * T + (T - 1) - tl.arange(0, T)
    else:
        steps = chunk * T + tl.arange(0, T)
    return steps


@triton.jit
def flip_time(tile, BD: tl.constexpr, T: tl.constexpr):
    """Reverse a tile along time; `tl.gather` costs one shuffle a value where `tl.flip` takes five."""
    return tl.gather(tile, tl.broadcast_to(T - 1 - tl.arange(0, T)[None, :], BD, T), 1)


@triton.jit
def load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS: tl.constexpr):
    """Load delta and return dt, 0 where masked: padding then neither decays nor adds."""
    dt = tl.load(delta + offset, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        dt += tl.load(bias + channel, mask=row_mask, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(mask, dt, 0.0)


@triton.jit
def load_steps_after(
    delta, bias, channel, row_mask, t, chunk, offset, mask, l,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """dt of the step that follows in scan order, 0 where that step lies outside the chunk or the sequence."""
    if REVERSE:
        dt = load_steps(delta, bias, channel, row_mask, offset - 1, mask & (t > chunk * T), SOFTPLUS)
    else:
        inside = mask & (t + 1 < l) & (t + 1 < (chunk + 1) * T)
        dt = load_steps(delta, bias, channel, row_mask, offset + 1, inside, SOFTPLUS)
    return dt


@triton.jit
def load_gate(z, z_batch, z_channel, batch, channel, t, mask):
    """Load z, which has strides of its own: it is often half of a projection."""
    z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
    return tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gated(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask):
    """dy = scale dout silu(z), the gradient of the sum over the directions."""
    dy = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
    if z is not None:
        gate = load_gate(z, z_batch, z_channel, batch, channel, t, mask)
        dy *= gate * sigmoid(gate)
    return dy
