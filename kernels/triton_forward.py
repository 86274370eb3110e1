"""Triton kernels of the forward scan: both directions of a chunk of time, and what every chunk adds to the state.

A sequence whose channels alone do not fill the GPU is cut into chunks of time, in two launches: what each chunk alone
adds to the state (`chunk_ends_kernel`), and the scan of each chunk from the state before it, which is the sum of what
the chunks before it add (`forward_kernel`). Otherwise the last is all there is. Grid of the last: one program for every
chunk of every block of channels, (b chunks g blocks,); of the first: twice as many for two directions.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"

import triton
import triton.language as tl

from .triton_math import (
    LOG2_E,
    decay_of,
    dense,
    for_states,
    goes_on,
    is_first_direction,
    load_channels,
    load_steps,
    load_tile,
    place,
    saved_at,
    sigmoid,
    state_before,
    step_of,
    step_size,
    store_tile,
    sum_states,
    tile_at,
)


@triton.jit
def scan_steps(
    c, s, h, loaded, where, i0, exponent, D, bias, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    GATE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t . h_t + D u_t, for the K loaded steps: -> h after them."""
    for i in tl.static_range(K):
        u, delta, B, C, total, z, _dout = loaded[i]
        t, mask = step_of(where, i0 + i, REVERSE, EVEN)
        dt, x = step_size(delta, bias, mask, SOFTPLUS), u.to(tl.float32)
        h = decay_of(c, dt, exponent, where, t, mask, REVERSE) * h + for_states(dt * x) * B.to(tl.float32)
        y = sum_states(C.to(tl.float32) * h) + D * x
        if ADD:
            y += total
        if c.total is not None and (s.saved is not None or not GATE):
            tl.store(dense(c.total, c, where, i0, i, REVERSE, EVEN), y, mask=mask)
        if GATE:
            y *= c.scale
            if c.z is not None:
                gate = z.to(tl.float32)
                y *= gate * sigmoid(gate)
            tl.store(dense(c.out, c, where, i0, i, REVERSE, EVEN), y.to(c.out.dtype.element_ty), mask=mask)
    return h


@triton.jit
def scan_direction(
    c, s, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The scan of one direction for one chunk.

    y goes to `total`, added to what stands there if ADD; if GATE also to `out`, scaled and gated. K steps are loaded
    ahead, because memory takes longer to answer than they to compute; two lots of K take turns, because one that is
    handed on by the loop would be copied, and copying waits for it.
    """
    chunk, number, _block, where = place(c, EVEN, BD)
    batch, steps = where[0], where[3]
    exponent = load_tile(s.A + number * N * BD, True, 0.0, N, V, BD) * LOG2_E
    h = state_before(c, s, batch, chunk, number, REVERSE, K, N, V, BD)
    D, bias = load_channels(s.D, where, BD), load_channels(s.delta_bias, where, BD)
    GATED: tl.constexpr = GATE and c.z is not None
    one = load_steps(c, s, where, 0, ADD, GATED, False, REVERSE, EVEN, K, N, V)
    for i0 in range(0, steps, 2 * K):
        other = load_steps(c, s, where, i0 + K, ADD, GATED, False, REVERSE, EVEN, K, N, V)
        if s.saved is not None:
            store_tile(s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD), h, True, N, V, BD)
        h = scan_steps(c, s, h, one, where, i0, exponent, D, bias, REVERSE, SOFTPLUS, ADD, GATE, EVEN, K)
        one = load_steps(c, s, where, i0 + 2 * K, ADD, GATED, False, REVERSE, EVEN, K, N, V)
        if s.saved is not None:
            store_tile(s.saved + saved_at(c, batch, chunk, number, i0 // K + 1, K, N, BD), h, True, N, V, BD)
        h = scan_steps(c, s, h, other, where, i0 + K, exponent, D, bias, REVERSE, SOFTPLUS, ADD, GATE, EVEN, K)
    if s.last is not None:
        is_last = chunk == (0 if REVERSE else c.chunks - 1)
        store_tile(s.last + (batch * c.g * c.blocks + number) * N * BD, h, is_last, N, V, BD)


@triton.jit
def forward_kernel(
    c, s, s_b, TWO: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = scale (C . h + D u, of one direction or of two) silu(z), for a chunk.

    A launch for later states adds to `total` (not FIRST), and only the LAST writes `out`.
    """
    scan_direction(c, s, REVERSE, SOFTPLUS, not FIRST, LAST and not TWO, EVEN, K, N, V, BD)
    if TWO:
        tl.debug_barrier()  # the second direction reads what other lanes may have written
        scan_direction(c, s_b, not REVERSE, SOFTPLUS, True, LAST, EVEN, K, N, V, BD)


@triton.jit
def ends_of_direction(
    c, s, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state that a chunk reaches from 0, and its decay exp(A sum_t dt_t).

    If BACKWARD, the gradient that leaves it at its beginning, dh_{t-1} = exp(dt_t A) (dh_t + C_t dy_t) from 0.
    """
    chunk, number, _block, where = place(c, EVEN, BD)
    batch, steps = where[0], where[3]
    exponent = load_tile(s.A + number * N * BD, True, 0.0, N, V, BD) * LOG2_E
    bias = load_channels(s.delta_bias, where, BD)
    h = tl.zeros([V, BD, N // V], tl.float32)
    span, through = tl.zeros([BD], tl.float32), tl.full([BD], 1.0, tl.float32)
    GATED: tl.constexpr = BACKWARD and c.z is not None
    TURNED: tl.constexpr = REVERSE != BACKWARD
    ahead = load_steps(c, s, where, 0, False, GATED, BACKWARD, TURNED, EVEN, K, N, V)
    for i0 in range(0, steps, K):
        after = load_steps(c, s, where, i0 + K, False, GATED, BACKWARD, TURNED, EVEN, K, N, V)
        for i in tl.static_range(K):
            u, delta, B, C, _total, z, dout = ahead[i]
            t, mask = step_of(where, i0 + i, TURNED, EVEN)
            dt = step_size(delta, bias, mask, SOFTPLUS)
            decay = decay_of(c, dt, exponent, where, t, mask, REVERSE)
            if BACKWARD:
                dy = dout.to(tl.float32) * c.scale
                if GATED:
                    gate = z.to(tl.float32)
                    dy *= gate * sigmoid(gate)
                h = decay * (h + for_states(dy) * C.to(tl.float32))
            else:
                h = decay * h + for_states(dt * u.to(tl.float32)) * B.to(tl.float32)
            span += dt
            if c.seq_idx is not None:
                through = tl.where(goes_on(c, where, t, mask, REVERSE), through, 0.0)
        ahead = after
    at = tile_at(c, batch, chunk, number, N, BD)
    store_tile(s.ends + at, h, True, N, V, BD)
    through_all = tl.exp2(for_states(span) * exponent)
    if c.seq_idx is not None:
        through_all = tl.where(for_states(through) > 0, through_all, 0.0)
    store_tile(s.decays + at, through_all, True, N, V, BD)


@triton.jit
def chunk_ends_kernel(
    c, s, s_b, TWO: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What every chunk alone adds to the state (to its gradient, if BACKWARD), and its decay, in one direction."""
    if TWO:
        if is_first_direction(c):
            ends_of_direction(c, s, REVERSE, SOFTPLUS, BACKWARD, EVEN, K, N, V, BD)
        else:
            ends_of_direction(c, s_b, not REVERSE, SOFTPLUS, BACKWARD, EVEN, K, N, V, BD)
    else:
        ends_of_direction(c, s, REVERSE, SOFTPLUS, BACKWARD, EVEN, K, N, V, BD)
