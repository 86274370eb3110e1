"""Triton kernel of the backward scan: all gradients of a chunk.

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

from .triton_math import (
    LOG2_E,
    combine,
    flip_time,
    load_gate,
    load_gated,
    load_steps,
    load_steps_after,
    program_place,
    sigmoid,
    softplus_slope,
    steps_of,
    tile_of,
)


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
    dt_after = load_steps_after(delta, bias, channel, row_mask, t, tile, offset, mask, l, REVERSE, SOFTPLUS, T)
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
def backward_kernel(
    dout, ungated, z, z_batch, z_channel, dz, scale, starts, starts_b, exits, exits_b,
    u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b,
    du, ddelta, dA, dB, dC, dD, ddelta_bias, du_b, ddelta_b, dA_b, dB_b, dC_b, dD_b, ddelta_bias_b,
    d, l, padded, n, g, chunks, blocks, slabs, walk, slab_size,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr,
    T: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for `walk` blocks of BD channels; grid: (b chunks g slabs,).

    If HALVES, the later half of the chunk in scan order first, then the other: half tiles keep the registers of a
    thread under the limit. The gradient goes from one to the other through `exits`.
    """
    TILES: tl.constexpr = 2 if HALVES else 1
    slab, group, chunk, batch = program_place(slabs, g, chunks)
    slab_start = slab.to(tl.int64) * slab_size
    for block in range(slab * walk, tl.minimum((slab + 1) * walk, blocks)):
        if z is not None:
            channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, False, BD, T)
            gate = load_gate(z, z_batch, z_channel, batch, channel, t, mask)
            slope = sigmoid(gate)
            slope *= 1.0 + gate * (1.0 - slope)  # of silu
            slope *= tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
            slope *= tl.load(ungated + offset, mask=mask, other=0.0)
            tl.store(dz + offset, slope.to(dz.dtype.element_ty), mask=mask)
        for i in range(TILES):
            tile = TILES * chunk + (i if REVERSE else TILES - 1 - i)
            gradients_of_tile(
                dout, z, z_batch, z_channel, scale, u, delta, A, B, C, D, delta_bias, starts, exits,
                du, ddelta, dA, dB + slab_start, dC + slab_start, dD, ddelta_bias,
                block, slab * walk, group, batch, tile, i == 0, d, l, padded, n, g, TILES * chunks,
                REVERSE, SOFTPLUS, BD, T // TILES, HALVES,
            )  # fmt: skip
            tl.debug_barrier()  # the other half reads the exits, and the next block the slab, that this one wrote
        if TWO:
            for i in range(TILES):
                tile = TILES * chunk + (TILES - 1 - i if REVERSE else i)
                gradients_of_tile(
                    dout, z, z_batch, z_channel, scale,
                    u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, starts_b, exits_b,
                    du_b, ddelta_b, dA_b, dB_b + slab_start, dC_b + slab_start, dD_b, ddelta_bias_b,
                    block, slab * walk, group, batch, tile, i == 0, d, l, padded, n, g, TILES * chunks,
                    not REVERSE, SOFTPLUS, BD, T // TILES, HALVES,
                )  # fmt: skip
                tl.debug_barrier()
