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

from .triton_forward import steps_after, write_ends
from .triton_math import (
    LOG2_E,
    combine,
    flip_time,
    load_steps,
    sigmoid,
    softplus_slope,
    steps_of,
    tile_of,
)


@triton.jit
def load_gated(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask):
    """dy = scale dout silu(z), the gradient of the sum over the directions."""
    dy = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
    if z is not None:
        z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
        gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
        dy *= gate * sigmoid(gate)
    return dy


@triton.jit
def backward_ends_of_direction(
    dout, z, z_batch, z_channel, scale, delta, A, C, bias, ends, decays, block, group, batch, chunk,
    d, l, padded, n, g, chunks, slots,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write the gradient that leaves a chunk at its beginning, sum_t exp(A (dt up to t)) dy_t C_t, and its decay."""
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, REVERSE, BD, T)
    dt = load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS)
    dy = load_gated(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask)
    slot = chunk if REVERSE else chunks - 1 - chunk
    write_ends(
        dy, tl.cumsum(dt, axis=1), tl.sum(dt, axis=1, keep_dims=True), A, C, ends, decays,
        (batch.to(tl.int64) * slots + slot + 1) * d * n, (batch.to(tl.int64) * chunks + slot) * d * n,
        (batch.to(tl.int64) * g + group) * n * padded, channel, row_mask, t, padded, n,
    )  # fmt: skip


@triton.jit
def backward_ends_kernel(
    dout, z, z_batch, z_channel, scale, ends, ends_b, decays, decays_b, delta, A, C, bias, delta_b, A_b, C_b, bias_b,
    d, l, padded, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradient that leaves every chunk at its beginning, and its decay; grid: (b chunks g blocks,)."""
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    backward_ends_of_direction(
        dout, z, z_batch, z_channel, scale, delta, A, C, bias, ends, decays, block, group, batch, chunk,
        d, l, padded, n, g, chunks, slots, REVERSE, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        backward_ends_of_direction(
            dout, z, z_batch, z_channel, scale, delta_b, A_b, C_b, bias_b, ends_b, decays_b, block, group, batch, chunk,
            d, l, padded, n, g, chunks, slots, not REVERSE, SOFTPLUS, BD, T,
        )  # fmt: skip


@triton.jit
def gradients_of_tile(
    dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, bias, starts, exits,
    du, ddelta, dA, slab_B, slab_C, dD, dbias,
    block, first_block, group, batch, tile, passes_on, d, l, padded, n, g, tiles,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a tile.

    Tiles are in ascending time; the scan that runs down (of h if REVERSE, else of its gradient) is flipped at both
    ends. `starts` and `exits`, (b, tiles, d, n), hold the state before a tile and the gradient that enters it from
    the tile after it, both in scan order; None stands for 0. With `passes_on`, the gradient that leaves the tile goes
    to the exit of the tile before it.
    """
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, tile, d, l, g, False, BD, T)
    dt = load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS)
    dt_after = steps_after(delta, bias, channel, row_mask, t, tile, offset, mask, l, REVERSE, SOFTPLUS, T)
    dy = load_gated(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask)
    value = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    dt_scan = flip_time(dt, BD, T) if REVERSE else dt
    dt_after = dt_after if REVERSE else flip_time(dt_after, BD, T)
    dx = tl.zeros([BD, T], tl.float32)
    ddt = tl.zeros([BD, T], tl.float32)
    projection = (batch.to(tl.int64) * g + group) * n * padded
    part = (batch.to(tl.int64) * tiles + tile) * d
    before = part + d if REVERSE else part - d
    steps = steps_of(tile, False, T)
    first = tl.broadcast_to(tl.arange(0, T)[None, :] == (T - 1 if REVERSE else 0), BD, T)
    for k in range(n):
        A_k = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32)
        exponent = A_k * LOG2_E
        dh = tl.load(C + projection + t).to(tl.float32) * dy
        if not REVERSE:
            dh = flip_time(dh, BD, T)
        product, dh = tl.associative_scan((tl.exp2(dt_after * exponent), dh), 1, combine)
        if exits is not None:
            dh += product * tl.load(exits + part * n + channel * n + k, mask=row_mask, other=0.0)
        if not REVERSE:
            dh = flip_time(dh, BD, T)
        if HALVES:
            leaving = tl.sum(tl.where(first, tl.exp2(dt * exponent) * dh, 0.0), axis=1, keep_dims=True)
            tl.store(exits + before * n + channel * n + k, leaving, mask=row_mask & passes_on)
        B_k = tl.load(B + projection + t).to(tl.float32)
        dx += dh * B_k
        # dt u stays a product of two: as a tile of its own it would cost four registers
        add_to_slab(slab_B + projection + steps, tl.sum(dh * dt * value, axis=0), block > first_block)
        added = B_k * dt * value
        h = flip_time(added, BD, T) if REVERSE else added
        product, h = tl.associative_scan((tl.exp2(dt_scan * exponent), h), 1, combine)
        if starts is not None:
            h += product * tl.load(starts + part * n + channel * n + k, mask=row_mask, other=0.0)
        if REVERSE:
            h = flip_time(h, BD, T)
        add_to_slab(slab_C + projection + steps, tl.sum(h * dy, axis=0), block > first_block)
        dh *= h - added  # times exp(dt A) h_{t-1}: the gradient of dt A
        ddt += dh * A_k
        tl.store(dA + part * n + channel * n + k, tl.sum(dh * dt, axis=1, keep_dims=True), mask=row_mask)
        projection += padded
    ddt += dx * value
    dx *= dt
    if D is not None:
        dx += dy * tl.load(D + channel, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(dD + part + channel, tl.sum(dy * value, axis=1, keep_dims=True), mask=row_mask)
    tl.store(du + offset, dx.to(du.dtype.element_ty), mask=mask)
    if SOFTPLUS:
        ddt *= softplus_slope(dt)
    tl.store(ddelta + offset, ddt.to(ddelta.dtype.element_ty), mask=mask)
    if bias is not None:
        tl.store(dbias + part + channel, tl.sum(tl.where(mask, ddt, 0.0), axis=1, keep_dims=True), mask=row_mask)


@triton.jit
def add_to_slab(address, value, not_first):
    """Add to the program's own slab; its first block of channels finds nothing there yet."""
    if not_first:
        value += tl.load(address)
    tl.store(address, value)


@triton.jit
def gradients_of_direction(
    dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, bias, starts, exits,
    du, ddelta, dA, slab_B, slab_C, dD, dbias, block, first_block, group, batch, chunk, d, l, padded, n, g, chunks,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a chunk; if HALVES, of its later half in scan order, then of the other.

    Half tiles keep the registers of a thread under the limit; the gradient goes from one to the other through `exits`.
    """
    if HALVES:
        for half in range(2):
            tile = 2 * chunk + (half if REVERSE else 1 - half)
            gradients_of_tile(
                dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, bias, starts, exits,
                du, ddelta, dA, slab_B, slab_C, dD, dbias,
                block, first_block, group, batch, tile, half == 0, d, l, padded, n, g, 2 * chunks,
                REVERSE, SOFTPLUS, BD, T // 2, True,
            )  # fmt: skip
            tl.debug_barrier()  # the earlier half reads the exit that the later one wrote
    else:
        gradients_of_tile(
            dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, bias, starts, exits,
            du, ddelta, dA, slab_B, slab_C, dD, dbias,
            block, first_block, group, batch, chunk, False, d, l, padded, n, g, chunks,
            REVERSE, SOFTPLUS, BD, T, False,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    dout, ungated, z, z_batch, z_channel, dz, scale,
    starts, starts_b, exits, exits_b,
    u, delta, A, B, C, D, bias, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b,
    du, ddelta, dA, slab_B, slab_C, dD, dbias, du_b, ddelta_b, dA_b, slab_B_b, slab_C_b, dD_b, dbias_b,
    d, l, padded, n, g, chunks, blocks, slabs, walk, slab_size,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr,
    T: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for `walk` blocks of BD channels; grid: (b chunks g slabs,)."""
    pid = tl.program_id(0)
    slab, group = pid % slabs, pid // slabs % g
    chunk, batch = pid // (slabs * g) % chunks, pid // (slabs * g * chunks)
    own = slab.to(tl.int64) * slab_size
    for block in range(slab * walk, tl.minimum((slab + 1) * walk, blocks)):
        if z is not None:
            channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, False, BD, T)
            z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
            gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
            slope = sigmoid(gate)
            slope *= 1.0 + gate * (1.0 - slope)  # of silu
            slope *= tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
            slope *= tl.load(ungated + offset, mask=mask, other=0.0)
            tl.store(dz + offset, slope.to(dz.dtype.element_ty), mask=mask)
        gradients_of_direction(
            dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, bias, starts, exits,
            du, ddelta, dA, slab_B + own, slab_C + own, dD, dbias,
            block, slab * walk, group, batch, chunk, d, l, padded, n, g, chunks,
            REVERSE, SOFTPLUS, BD, T, HALVES,
        )  # fmt: skip
        if TWO:
            gradients_of_direction(
                dout, z, z_batch, z_channel, scale, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b,
                starts_b, exits_b,
                du_b, ddelta_b, dA_b, slab_B_b + own, slab_C_b + own, dD_b, dbias_b,
                block, slab * walk, group, batch, chunk, d, l, padded, n, g, chunks,
                not REVERSE, SOFTPLUS, BD, T, HALVES,
            )  # fmt: skip
        tl.debug_barrier()  # the next block reads the slab that this one wrote
