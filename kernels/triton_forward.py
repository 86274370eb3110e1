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

from .triton_math import LOG2_E, combine, load_steps, sigmoid, tile_of


@triton.jit
def scan_direction(
    y, u, delta, A, B, C, D, bias, starts, block, group, batch, chunk, d, l, n, g, chunks, slots,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add C . h + D u of one direction to the tile y."""
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
    dt, _ = load_steps(delta, bias, channel, offset, mask, SOFTPLUS)
    x = tl.load(u + offset, mask=mask, other=0.0).to(tl.float32)
    if D is not None:
        y += tl.load(D + channel, mask=row_mask, other=0.0).to(tl.float32) * x
    x *= dt
    projection = (batch.to(tl.int64) * g + group) * n * l
    slot = (chunks - 1 - chunk) if REVERSE else chunk
    state = (batch.to(tl.int64) * slots + slot) * d * n
    for k in range(n):
        A_k = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32)
        B_k = tl.load(B + projection + t, mask=mask, other=0.0).to(tl.float32)
        C_k = tl.load(C + projection + t, mask=mask, other=0.0).to(tl.float32)
        product, h = tl.associative_scan((tl.exp2(dt * (A_k * LOG2_E)), x * B_k), 1, combine, reverse=REVERSE)
        if starts is not None:
            h += product * tl.load(starts + state + channel * n + k, mask=row_mask, other=0.0)
        y += C_k * h
        projection += l
    return y


@triton.jit
def forward_kernel(
    out, z, z_batch, z_channel, starts, starts_b, scale,
    u, delta, A, B, C, D, bias, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b,
    d, l, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out = scale (C . h + D u, of one direction or of two) silu(z), for one tile; grid: (b chunks g blocks,)."""
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    y = tl.zeros([BD, T], tl.float32)
    y = scan_direction(
        y, u, delta, A, B, C, D, bias, starts, block, group, batch, chunk, d, l, n, g, chunks, slots,
        REVERSE, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        y = scan_direction(
            y, u_b, delta_b, A_b, B_b, C_b, D_b, bias_b, starts_b, block, group, batch, chunk, d, l, n, g, chunks,
            slots, not REVERSE, SOFTPLUS, BD, T,
        )  # fmt: skip
    channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
    y *= scale
    if z is not None:
        z_offset = batch.to(tl.int64) * z_batch + channel.to(tl.int64) * z_channel + t
        gate = tl.load(z + z_offset, mask=mask, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def ends_of_direction(
    values, delta, A, projections, bias, ends, decays, block, group, batch, chunk, d, l, n, g, chunks, slots,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write what one chunk adds to the state that crosses it, and the decay over the chunk.

    Forward: sum_t exp(A (dt after t)) dt_t u_t B_t, the state at the chunk's end. Backward: sum_t exp(A (dt up to t))
    dy_t C_t, the gradient that leaves the chunk at its beginning; `values` is then the tile dy itself. The sums of dt
    are never differences of large sums: the forward one shifts dt by one step instead.
    """
    channel, row_mask, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, BD, T)
    dt, _ = load_steps(delta, bias, channel, offset, mask, SOFTPLUS)
    total = tl.sum(dt, axis=1, keep_dims=True)
    if BACKWARD:
        weighted = values
        span = tl.cumsum(dt, axis=1, reverse=REVERSE)
        slot = chunk if REVERSE else chunks - 1 - chunk
    else:
        weighted = dt * tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        dt_next = shifted_steps(delta, bias, channel, t, chunk, offset, mask, l, REVERSE, SOFTPLUS, T)
        span = tl.cumsum(dt_next, axis=1, reverse=not REVERSE)
        slot = (chunks - 1 - chunk) if REVERSE else chunk
    projection = (batch.to(tl.int64) * g + group) * n * l
    end = (batch.to(tl.int64) * slots + slot + 1) * d * n
    decay = (batch.to(tl.int64) * chunks + slot) * d * n
    for k in range(n):
        exponent = tl.load(A + channel * n + k, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
        P_k = tl.load(projections + projection + t, mask=mask, other=0.0).to(tl.float32)
        added = tl.sum(tl.exp2(span * exponent) * weighted * P_k, axis=1, keep_dims=True)
        tl.store(ends + end + channel * n + k, added, mask=row_mask)
        tl.store(decays + decay + channel * n + k, tl.exp2(total * exponent), mask=row_mask)
        projection += l


@triton.jit
def shifted_steps(
    delta, bias, channel, t, chunk, offset, mask, l, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, T: tl.constexpr
):
    """dt of the step that follows in scan order, 0 where that step lies outside the chunk or the sequence."""
    if REVERSE:
        inside = mask & (t > chunk * T)
        dt_next, _ = load_steps(delta, bias, channel, offset - 1, inside, SOFTPLUS)
    else:
        inside = mask & (t + 1 < l) & (t + 1 < (chunk + 1) * T)
        dt_next, _ = load_steps(delta, bias, channel, offset + 1, inside, SOFTPLUS)
    return dt_next


@triton.jit
def chunk_ends_kernel(
    ends, ends_b, decays, decays_b, u, delta, A, B, bias, u_b, delta_b, A_b, B_b, bias_b,
    d, l, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The end state of every chunk from a zero start, and its decay; grid: (b chunks g blocks,)."""
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks % g
    chunk, batch = pid // (blocks * g) % chunks, pid // (blocks * g * chunks)
    ends_of_direction(
        u, delta, A, B, bias, ends, decays, block, group, batch, chunk, d, l, n, g, chunks, slots,
        REVERSE, False, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        ends_of_direction(
            u_b, delta_b, A_b, B_b, bias_b, ends_b, decays_b, block, group, batch, chunk, d, l, n, g, chunks, slots,
            not REVERSE, False, SOFTPLUS, BD, T,
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
