"""Triton kernels of the forward scan: a tile from its start state, the sums that carry a state over chunks, the carry.

One program owns BD channels and one chunk of T steps, loops over the n states and runs an associative scan along time
per state; bias, softplus, exponentials, contraction with C, skip, sum of both directions and gate stay in registers.
A sequence longer than T takes three launches: the effect of every chunk on the state (`chunk_ends_kernel`), the states
between chunks (`carry_kernel`), and the scan of every chunk from its start state (`forward_kernel`).

Chunk states lie in (directions, b, slots, d, n) float32, the slots in scan order of their direction.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from .triton_math import LOG2_E, combine, flip_time, load_steps, sigmoid, tile_of


@triton.jit
def scan_direction(
    u, delta, A, B, C, D, bias, starts, halves, block, group, batch, chunk, d, l, padded, n, g, chunks, slots,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """C . h + D u of one direction for a tile, in ascending order of time."""
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, REVERSE, BD, T)
    dt = load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS)
    x = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    if D is not None:
        y = tl.load(D + channel, mask=row_mask, other=0.0).to(tl.float32) * x
    else:
        y = tl.zeros([BD, T], tl.float32)
    x *= dt
    projection = (batch.to(tl.int64) * g + group) * n * padded
    slot = (chunks - 1 - chunk) if REVERSE else chunk
    state = (batch.to(tl.int64) * slots + slot) * d * n
    early = ((batch.to(tl.int64) * chunks + chunk) * 2 + (1 if REVERSE else 0)) * d * n
    late = ((batch.to(tl.int64) * chunks + chunk) * 2 + (0 if REVERSE else 1)) * d * n
    half = tl.broadcast_to(tl.arange(0, T)[None, :] == T // 2 - 1, BD, T)
    for k in range(n):
        A_k = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32)
        B_k = tl.load(B + projection + t).to(tl.float32)
        C_k = tl.load(C + projection + t).to(tl.float32)
        product, h = tl.associative_scan((tl.exp2(dt * (A_k * LOG2_E)), x * B_k), 1, combine)
        if starts is not None:
            start = tl.load(starts + state + channel * n + k, mask=row_mask, other=0.0)
            h += product * start
            if halves is not None:
                tl.store(halves + early + channel * n + k, start, mask=row_mask)
        if halves is not None:
            middle = tl.sum(tl.where(half, h, 0.0), axis=1, keep_dims=True)
            tl.store(halves + late + channel * n + k, middle, mask=row_mask)
        y += C_k * h
        projection += padded
    if REVERSE:
        y = flip_time(y, BD, T)
    return y


@triton.jit
def forward_kernel(
    out, ungated, z, z_batch, z_channel, starts, starts_b, halves, halves_b, scale,
    u, delta, A, B, C, D, bias, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b,
    d, l, padded, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out = scale (C . h + D u, of one direction or of two) silu(z), for one tile; grid: (b chunks g blocks,).

    The backward pass needs the sum before gate and scale, `ungated`, and the state before every half chunk, `halves`
    (b, 2 chunks, d, n) in order of time; they are written where they are not None (zero starts are not written).
    """
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    y = scan_direction(
        u, delta, A, B, C, D, bias, starts, halves, block, group, batch, chunk, d, l, padded, n, g, chunks, slots,
        REVERSE, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        y += scan_direction(
            u_b, delta_b, A_b, B_b, C_b, D_b, bias_b, starts_b, halves_b, block, group, batch, chunk,
            d, l, padded, n, g, chunks, slots, not REVERSE, SOFTPLUS, BD, T,
        )  # fmt: skip
    channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, False, BD, T)
    if ungated is not None:
        tl.store(ungated + offset, y, mask=mask)
    y *= scale
    if z is not None:
        z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
        gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def steps_after(
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
def write_ends(
    weight, span, total, A, projections, ends, decays, end, decay, projection, channel, row_mask, t, padded, n,

):  # fmt: skip
    """For every state: ends = sum_t exp(A span_t) weight_t projections_t, decays = exp(A total)."""
    for k in range(n):
        exponent = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
        P_k = tl.load(projections + projection + t).to(tl.float32)
        added = tl.sum(tl.exp2(span * exponent) * weight * P_k, axis=1, keep_dims=True)
        tl.store(ends + end + channel * n + k, added, mask=row_mask)
        tl.store(decays + decay + channel * n + k, tl.exp2(total * exponent), mask=row_mask)
        projection += padded


@triton.jit
def ends_of_direction(
    u, delta, A, B, bias, ends, decays, block, group, batch, chunk, d, l, padded, n, g, chunks, slots,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write the state that a chunk ends in from a zero start, sum_t exp(A (dt after t)) dt_t u_t B_t, and its decay.

    The sums of the dt that follow a step start at the chunk's end and leave the step itself out by a shift, not by a
    difference: after one huge dt a difference would have no digits left.
    """
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, not REVERSE, BD, T)
    dt = load_steps(delta, bias, channel, row_mask, offset, mask, SOFTPLUS)
    dt_after = steps_after(delta, bias, channel, row_mask, t, chunk, offset, mask, l, REVERSE, SOFTPLUS, T)
    weight = dt * tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    slot = (chunks - 1 - chunk) if REVERSE else chunk
    write_ends(
        weight, tl.cumsum(dt_after, axis=1), tl.sum(dt, axis=1, keep_dims=True), A, B, ends, decays,
        (batch.to(tl.int64) * slots + slot + 1) * d * n, (batch.to(tl.int64) * chunks + slot) * d * n,
        (batch.to(tl.int64) * g + group) * n * padded, channel, row_mask, t, padded, n,
    )  # fmt: skip


@triton.jit
def chunk_ends_kernel(
    ends, ends_b, decays, decays_b, u, delta, A, B, bias, u_b, delta_b, A_b, B_b, bias_b,
    d, l, padded, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The end state of every chunk from a zero start, and its decay; grid: (b chunks g blocks,)."""
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    ends_of_direction(
        u, delta, A, B, bias, ends, decays, block, group, batch, chunk, d, l, padded, n, g, chunks, slots,
        REVERSE, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        ends_of_direction(
            u_b, delta_b, A_b, B_b, bias_b, ends_b, decays_b, block, group, batch, chunk,
            d, l, padded, n, g, chunks, slots, not REVERSE, SOFTPLUS, BD, T,
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
