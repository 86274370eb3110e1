"""Triton kernels of the forward scan: both directions of a chunk of time, and the states between chunks.

A sequence whose channels alone do not fill the GPU is cut into chunks of time, in three launches: what each chunk alone
adds to the state (`chunk_ends_kernel`), the states between chunks (`carry_kernel`), and the scan of each chunk from the
state before it (`forward_kernel`). Otherwise the last is all there is. Grid of the last: one program for every chunk of
every block of channels, (b chunks g blocks,); of the first: twice as many for two directions.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: RUF005  (Triton does not compile an unpacked tuple)
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
    place,
    saved_at,
    sigmoid,
    step_of,
    step_size,
    sum_states,
    tile_of,
)


@triton.jit
def scan_direction(
    c, s, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t . h_t + D u_t, of one direction for one chunk.

    y goes to `total`, added to what stands there if ADD; if GATE also to `out`, scaled and gated.
    """
    batch, group, _, chunk, number, channel, exists = place(c, EVEN, N, BD)
    slot, tile = (batch * c.chunks + chunk) * c.g * c.blocks + number, tile_of(N, V, BD)
    exponent = tl.load(s.A + number * N * BD + tile) * LOG2_E
    h = tl.zeros([V, BD, N // V], tl.float32)
    if s.starts is not None:
        h = tl.load(s.starts + slot * N * BD + tile)
    D = load_channels(s.D, channel, exists, BD)
    bias = load_channels(s.delta_bias, channel, exists, BD)
    first = chunk * c.length
    steps = tl.minimum(c.length, c.l - first)
    GATED: tl.constexpr = GATE and c.z is not None
    ahead = load_steps(c, s, batch, group, first, 0, steps, channel, exists, ADD, GATED, False, REVERSE, EVEN, K, N, V)
    for i0 in range(0, steps, K):
        u, delta, B, C, total, z, dout = ahead  # noqa: RUF059
        ahead = load_steps(
            c, s, batch, group, first, i0 + K, steps, channel, exists, ADD, GATED, False, REVERSE, EVEN, K, N, V
        )
        if s.saved is not None:
            tl.store(s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD) + tile, h)
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt, x = step_size(delta[i], bias, mask, SOFTPLUS), u[i].to(tl.float32)
            decay = decay_of(c, dt, exponent, batch, first, t, mask, REVERSE)
            h = decay * h + for_states(dt * x) * B[i].to(tl.float32)
            y = sum_states(C[i].to(tl.float32) * h) + D * x
            if ADD:
                y += total[i]
            if c.total is not None and (s.saved is not None or not GATE):
                tl.store(dense(c.total, c, batch, first, t, channel), y, mask=mask)
            if GATE:
                y *= c.scale
                if GATED:
                    gate = z[i].to(tl.float32)
                    y *= gate * sigmoid(gate)
                tl.store(dense(c.out, c, batch, first, t, channel), y.to(c.out.dtype.element_ty), mask=mask)
    if s.last is not None:
        is_last = chunk == (0 if REVERSE else c.chunks - 1)
        tl.store(s.last + (batch * c.g * c.blocks + number) * N * BD + tile, h, mask=is_last)


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
    batch, group, _, chunk, number, channel, exists = place(c, EVEN, N, BD)
    tile = tile_of(N, V, BD)
    exponent = tl.load(s.A + number * N * BD + tile) * LOG2_E
    bias = load_channels(s.delta_bias, channel, exists, BD)
    first = chunk * c.length
    steps = tl.minimum(c.length, c.l - first)
    h = tl.zeros([V, BD, N // V], tl.float32)
    span = tl.zeros([BD], tl.float32)
    through = tl.full([BD], 1.0, tl.float32)
    GATED: tl.constexpr = BACKWARD and c.z is not None
    TURNED: tl.constexpr = REVERSE != BACKWARD
    ahead = load_steps(
        c, s, batch, group, first, 0, steps, channel, exists, False, GATED, BACKWARD, TURNED, EVEN, K, N, V
    )
    for i0 in range(0, steps, K):
        u, delta, B, C, total, z, dout = ahead  # noqa: RUF059
        ahead = load_steps(
            c, s, batch, group, first, i0 + K, steps, channel, exists, False, GATED, BACKWARD, TURNED, EVEN, K, N, V
        )
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, TURNED, EVEN)
            dt = step_size(delta[i], bias, mask, SOFTPLUS)
            decay = decay_of(c, dt, exponent, batch, first, t, mask, REVERSE)
            if BACKWARD:
                dy = dout[i].to(tl.float32) * c.scale
                if GATED:
                    gate = z[i].to(tl.float32)
                    dy *= gate * sigmoid(gate)
                h = decay * (h + for_states(dy) * C[i].to(tl.float32))
            else:
                h = decay * h + for_states(dt * u[i].to(tl.float32)) * B[i].to(tl.float32)
            span += dt
            if c.seq_idx is not None:
                through = tl.where(goes_on(c, batch, first, t, mask, REVERSE), through, 0.0)
    slot = ((batch * c.chunks + chunk) * c.g * c.blocks + number) * N * BD
    tl.store(s.ends + slot + tile, h)
    through_all = tl.exp2(for_states(span) * exponent)
    if c.seq_idx is not None:
        through_all = tl.where(for_states(through) > 0, through_all, 0.0)
    tl.store(s.decays + slot + tile, through_all)


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


@triton.jit
def carry_kernel(ends, decays, entry, b, chunks, elements, REVERSE: tl.constexpr, U: tl.constexpr, E: tl.constexpr):
    """Turn chunk ends into the states before the chunks, in place: h_0 = entry or 0, h_{c+1} = decay_c h_c + end_c.

    ends, decays: (directions, b, chunks, elements); entry: (b, elements) for the first direction, or None. The last
    chunk of the first direction and the first of the second come first if REVERSE, the others otherwise. U chunks are
    loaded at a time. Grid: (directions b elements / E,).
    """
    pid = tl.program_id(0)
    batch = (pid // (elements // E)).to(tl.int64)
    element = pid % (elements // E) * E + tl.arange(0, E)
    descending = (batch >= b) != REVERSE
    h = tl.zeros([E], tl.float32)
    if entry is not None:
        h = tl.load(entry + batch * elements + element, mask=batch < b, other=0.0)
    for c0 in range(0, chunks, U):
        decay = ()
        end = ()
        for i in tl.static_range(U):
            place = (batch * chunks + tl.where(descending, chunks - 1 - c0 - i, c0 + i)) * elements + element
            decay = decay + (tl.load(decays + place, mask=c0 + i < chunks, other=1.0),)
            end = end + (tl.load(ends + place, mask=c0 + i < chunks, other=0.0),)
        for i in tl.static_range(U):
            place = (batch * chunks + tl.where(descending, chunks - 1 - c0 - i, c0 + i)) * elements + element
            tl.store(ends + place, h, mask=c0 + i < chunks)
            h = decay[i] * h + end[i]
