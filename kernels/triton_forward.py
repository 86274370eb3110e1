"""Triton kernel of the forward scan: both directions of a tile of (BD channels, T steps), from their start states.

A program loops over the n states and runs an associative scan along time per state; bias, softplus, exponentials,
contraction with C, skip, sum of both directions and gate stay in registers. A sequence longer than T needs the states
between its chunks first: `triton_carry`.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from .triton_math import LOG2_E, combine, flip_time, load_gate, load_steps, program_place, sigmoid, tile_of


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
    u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b,
    d, l, padded, n, g, chunks, slots, blocks,
    REVERSE: tl.constexpr, TWO: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out = scale (C . h + D u, of one direction or of two) silu(z), for one tile; grid: (b chunks g blocks,).

    The backward pass needs the sum before gate and scale, `ungated`, and the state before every half chunk, `halves`
    (b, 2 chunks, d, n) in order of time; they are written where they are not None (zero starts are not written).
    """
    block, group, chunk, batch = program_place(blocks, g, chunks)
    y = scan_direction(
        u, delta, A, B, C, D, delta_bias, starts, halves,
        block, group, batch, chunk, d, l, padded, n, g, chunks, slots, REVERSE, SOFTPLUS, BD, T,
    )  # fmt: skip
    if TWO:
        y += scan_direction(
            u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, starts_b, halves_b,
            block, group, batch, chunk, d, l, padded, n, g, chunks, slots, not REVERSE, SOFTPLUS, BD, T,
        )  # fmt: skip
    channel, _, t, mask, offset = tile_of(block, group, batch, chunk, d, l, g, False, BD, T)
    if ungated is not None:
        tl.store(ungated + offset, y, mask=mask)
    y *= scale
    if z is not None:
        gate = load_gate(z, z_batch, z_channel, batch, channel, t, mask)
        y *= gate * sigmoid(gate)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)
