"""Triton kernels that carry a state, or its gradient, over the chunks of a long sequence.

First the effect of every chunk alone (`chunk_ends_kernel`), then a scan over chunks (`carry_kernel`). States lie in
(directions, b, slots, d, n) float32, slots in scan order: time order for h, the opposite for its gradient.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from .triton_math import LOG2_E, combine, load_gated, load_steps, load_steps_after, program_place, tile_of


@triton.jit
def ends_of_direction(
    ends, decays, dout, z, z_batch, z_channel, scale, u, delta, A, B, C, bias,
    block, group, batch, chunk, d, l, padded, n, g, chunks, slots,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write what a chunk adds to the state, sum_t exp(A (dt after t)) dt_t u_t B_t, and its decay, exp(A sum_t dt_t).

    If BACKWARD, the gradient that leaves it at its beginning: sum_t exp(A (dt up to t)) dy_t C_t.
    The sums of the dt that follow a step start at the chunk's end and leave the step itself out by a shift, not by a
    difference: after one huge dt a difference would have no digits left.
    """
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, REVERSE == BACKWARD, BD, T)
    dt = load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS)
    if BACKWARD:
        weight = load_gated(dout, z, z_batch, z_channel, scale, batch, channel, t, offset, mask)
        span = tl.cumsum(dt, axis=1)
        projections = C
    else:
        dt_after = load_steps_after(delta, bias, channel, row_mask, t, chunk, offset, mask, l, REVERSE, SOFTPLUS, T)
        weight = dt * tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
        span = tl.cumsum(dt_after, axis=1)
        projections = B
    total = tl.sum(dt, axis=1, keep_dims=True)
    slot = (chunks - 1 - chunk) if REVERSE != BACKWARD else chunk
    end = (batch.to(tl.int64) * slots + slot + 1) * d * n
    decay = (batch.to(tl.int64) * chunks + slot) * d * n
    projection = (batch.to(tl.int64) * g + group) * n * padded
    for k in range(n):
        exponent = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
        projection_k = tl.load(projections + projection + t).to(tl.float32)
        added = tl.sum(tl.exp2(span * exponent) * weight * projection_k, axis=1, keep_dims=True)
        tl.store(ends + end + channel * n + k, added, mask=row_mask)
        tl.store(decays + decay + channel * n + k, tl.exp2(total * exponent), mask=row_mask)
        projection += padded


@triton.jit
def chunk_ends_kernel(
    ends, ends_b, decays, decays_b, dout, z, z_batch, z_channel, scale,
    u, delta, A, B, C, delta_bias, u_b, delta_b, A_b, B_b, C_b, delta_bias_b,
    d, l, padded, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to the state (to its gradient, if BACKWARD), and its decay; grid: (b chunks g blocks,)."""
    block, group, chunk, batch = program_place(blocks, g, chunks)
    ends_of_direction(
        ends, decays, dout, z, z_batch, z_channel, scale, u, delta, A, B, C, delta_bias,
        block, group, batch, chunk, d, l, padded, n, g, chunks, slots, REVERSE, BACKWARD, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        ends_of_direction(
            ends_b, decays_b, dout, z, z_batch, z_channel, scale, u_b, delta_b, A_b, B_b, C_b, delta_bias_b,
            block, group, batch, chunk, d, l, padded, n, g, chunks, slots, not REVERSE, BACKWARD, SOFTPLUS, BD, T,
        )  # fmt: skip


@triton.jit
def carry_kernel(states, decays, elements, chunks, tiles, E: tl.constexpr, CHUNKS: tl.constexpr):
    """Turn chunk ends into states, in place: state[c + 1] = decay[c] state[c] + end[c + 1]; slot 0 is given.

    Args:
        states: (sequences, chunks + 1, elements); decays: (sequences, chunks, elements).
        tiles: blocks of E elements per sequence; grid: (sequences tiles,).
    """
    pid = tl.program_id(0)
    sequence = (pid // tiles).to(tl.int64)
    element = (pid % tiles) * E + tl.arange(0, E)[:, None]
    state = states + sequence * (chunks + 1) * elements + element
    decay = decays + sequence * chunks * elements + element
    carry = tl.load(state, mask=element < elements, other=0.0)
    for first in range(0, chunks, CHUNKS):
        c = first + tl.arange(0, CHUNKS)[None, :]
        mask = (element < elements) & (c < chunks)
        offset = c.to(tl.int64) * elements
        factors = tl.load(decay + offset, mask=mask, other=1.0)
        added = tl.load(state + offset + elements, mask=mask, other=0.0)
        product, h = tl.associative_scan((factors, added), 1, combine)
        h += product * carry
        tl.store(state + offset + elements, h, mask=mask)
        carry = tl.sum(tl.where(c == first + CHUNKS - 1, h, 0.0), axis=1, keep_dims=True)
