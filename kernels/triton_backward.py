"""Triton kernels of the backward scan: the gradient that crosses chunks, and all gradients of a chunk.

With dy the gradient of C . h + D u (gate and scale taken off) and g the gradient of h,

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}
    dB_t = sum_channels g_t dt_t u_t,   dC_t = sum_channels h_t dy_t,   dx_t = g_t . B_t  for x = dt u
    d(dt_t A) = g_t (h_t - dt_t u_t B_t),  which holds exp(dt A) h_{t-1} without a division

h is recomputed from the chunk's start state. No atomics: sums over channels go to slabs of which every program owns one
(it walks over several blocks of channels and adds to its slab), sums over time to one entry per chunk; both are added
up in a fixed order afterwards, so two runs agree bit by bit.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from .triton_forward import ends_of_direction, shifted_steps
from .triton_math import LOG2_E, combine, load_steps, sigmoid, tile_of


@triton.jit
def gated_gradient(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask):
    """dy = scale dout silu(z), the gradient of the sum over the directions."""
    dy = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
    if z is not None:
        z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
        gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
        dy *= gate * sigmoid(gate)
    return dy


@triton.jit
def backward_ends_kernel(
    dout, z, z_batch, z_channel, scale, ends, ends_b, decays, decays_b, delta, A, C, bias, delta_b, A_b, C_b, bias_b,
    d, l, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradient that leaves every chunk at its beginning, and its decay; grid: (b chunks g blocks,)."""
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
    dy = gated_gradient(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask)
    ends_of_direction(
        dy, delta, A, C, bias, ends, decays, block, group, batch, chunk, d, l, n, g, chunks, slots,
        REVERSE, True, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        ends_of_direction(
            dy, delta_b, A_b, C_b, bias_b, ends_b, decays_b, block, group, batch, chunk, d, l, n, g, chunks, slots,
            not REVERSE, True, SOFTPLUS, BD, T,
        )  # fmt: skip


@triton.jit
def gradients_of_direction(
    y, dy, u, delta, A, B, C, D, bias, starts, exits, du, ddelta, dA, slab_B, slab_C, dD, dbias,
    block, first_block, group, batch, chunk, d, l, n, g, chunks, slots, exit_slots,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, NEED_Y: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a tile; return y plus C . h + D u if NEED_Y."""
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
    dt, raw = load_steps(delta, bias, channel, offset, mask, SOFTPLUS)
    dt_next = shifted_steps(delta, bias, channel, t, chunk, offset, mask, l, REVERSE, SOFTPLUS, T)
    x = dt * tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    dx = tl.zeros([BD, T], tl.float32)
    ddt = tl.zeros([BD, T], tl.float32)
    projection = (batch.to(tl.int64) * g + group) * n * l
    part = (batch.to(tl.int64) * chunks + chunk) * d
    forward_slot = (chunks - 1 - chunk) if REVERSE else chunk
    start = (batch.to(tl.int64) * slots + forward_slot) * d * n
    exit_ = (batch.to(tl.int64) * exit_slots + chunks - 1 - forward_slot) * d * n
    step = chunk * T + tl.arange(0, T)
    for k in range(n):
        A_k = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32)
        B_k = tl.load(B + projection + t, mask=mask, other=0.0).to(tl.float32)
        C_k = tl.load(C + projection + t, mask=mask, other=0.0).to(tl.float32)
        product, h = tl.associative_scan((tl.exp2(dt * (A_k * LOG2_E)), x * B_k), 1, combine, reverse=REVERSE)
        if starts is not None:
            h += product * tl.load(starts + start + channel * n + k, mask=row_mask, other=0.0)
        if NEED_Y:
            y += C_k * h
        add_to_slab(slab_C + projection + step, tl.sum(h * dy, axis=0), step < l, block > first_block)
        held = h - x * B_k  # exp(dt A) h_{t-1}
        product, dh = tl.associative_scan(
            (tl.exp2(dt_next * (A_k * LOG2_E)), C_k * dy), 1, combine, reverse=not REVERSE
        )
        if exits is not None:
            dh += product * tl.load(exits + exit_ + channel * n + k, mask=row_mask, other=0.0)
        add_to_slab(slab_B + projection + step, tl.sum(dh * x, axis=0), step < l, block > first_block)
        dx += dh * B_k
        held *= dh
        ddt += held * A_k
        tl.store(dA + part * n + channel * n + k, tl.sum(held * dt, axis=1, keep_dims=True), mask=row_mask)
        projection += l
    value = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    ddt += dx * value
    dvalue = dx * dt
    if D is not None:
        skip = tl.load(D + channel, mask=row_mask, other=0.0).to(tl.float32)
        dvalue += dy * skip
        tl.store(dD + part + channel, tl.sum(dy * value, axis=1, keep_dims=True), mask=row_mask)
        if NEED_Y:
            y += skip * value
    tl.store(du + offset, dvalue.to(du.dtype.element_ty), mask=mask)
    if SOFTPLUS:
        ddt *= sigmoid(raw)
    tl.store(ddelta + offset, ddt.to(ddelta.dtype.element_ty), mask=mask)
    if bias is not None:
        tl.store(dbias + part + channel, tl.sum(tl.where(mask, ddt, 0.0), axis=1, keep_dims=True), mask=row_mask)
    return y


@triton.jit
def add_to_slab(address, value, mask, not_first):
    """Add to the program's own slab; its first block of channels finds nothing there yet."""
    tl.store(address, value + tl.load(address, mask=mask & not_first, other=0.0), mask=mask)


@triton.jit
def backward_kernel(
    dout, z, z_batch, z_channel, dz, scale, starts, starts_b, exits, exits_b,
    u, delta, A, B, C, D, bias, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b,
    du, ddelta, dA, slab_B, slab_C, dD, dbias, du_b, ddelta_b, dA_b, slab_B_b, slab_C_b, dD_b, dbias_b,
    d, l, n, g, chunks, slots, exit_slots, blocks, slabs, walk, slab_size,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for `walk` blocks of BD channels; grid: (b chunks g slabs,)."""
    pid = tl.program_id(0)
    slab, group = pid % slabs, pid // slabs % g
    chunk, batch = pid // (slabs * g) % chunks, pid // (slabs * g * chunks)
    own = slab.to(tl.int64) * slab_size
    for block in range(slab * walk, tl.minimum((slab + 1) * walk, blocks)):
        channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
        dy = gated_gradient(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask)
        y = tl.zeros([BD, T], tl.float32)
        y = gradients_of_direction(
            y, dy, u, delta, A, B, C, D, bias, starts, exits, du, ddelta, dA, slab_B + own, slab_C + own, dD, dbias,
            block, slab * walk, group, batch, chunk, d, l, n, g, chunks, slots, exit_slots,
            REVERSE, SOFTPLUS, z is not None, BD, T,
        )  # fmt: skip
        if TWO:
            y = gradients_of_direction(
                y, dy, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b, starts_b, exits_b,
                du_b, ddelta_b, dA_b, slab_B_b + own, slab_C_b + own, dD_b, dbias_b,
                block, slab * walk, group, batch, chunk, d, l, n, g, chunks, slots, exit_slots,
                not REVERSE, SOFTPLUS, z is not None, BD, T,
            )  # fmt: skip
        if z is not None:
            z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
            gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
            slope = sigmoid(gate)
            slope *= 1.0 + gate * (1.0 - slope)  # of silu
            dgate = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale * y * slope
            tl.store(dz + offset, dgate.to(dz.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next block reads the slab that this one wrote
