"""Triton kernels of the forward scan: both directions of a chunk of time, and the states between chunks.

A sequence whose channels alone do not fill the GPU is cut into chunks of time, in three launches: what each chunk alone
adds to the state (`chunk_ends_kernel`), the states between chunks (`carry_kernel`), and the scan of each chunk from the
state before it (`forward_kernel`). Otherwise the last is all there is. Grid of the first and the last: one program for
every chunk of every block of channels, (b chunks g blocks,).
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
    load_channels,
    load_dy,
    load_gate,
    load_states,
    load_step,
    place,
    saved_at,
    step_of,
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
    for i0 in range(0, steps, K):
        before = h
        y = ()  # stored after K steps: a store holds back the loads after it
        out = ()
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt, u = load_step(s, bias, batch, first, t, channel, mask, SOFTPLUS)
            B = load_states(s.B, s.B_batch, s.B_group, s.B_step, batch, group, first, t, N, V)
            C = load_states(s.C, s.C_batch, s.C_group, s.C_step, batch, group, first, t, N, V)
            h = decay_of(c, dt, exponent, batch, first, t, mask, REVERSE) * h + for_states(dt * u) * B
            y_t = sum_states(C * h) + D * u
            if ADD:
                y_t += tl.load(dense(c.total, c, batch, first, t, channel), mask=mask, other=0.0)
            y = y + (y_t,)
            if GATE:
                y_t *= c.scale
                if c.z is not None:
                    z, sigmoid = load_gate(c, batch, first, t, channel, mask)
                    y_t *= z * sigmoid
                out = out + (y_t.to(c.out.dtype.element_ty),)
        if s.saved is not None:
            tl.store(s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD) + tile, before)
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            if c.total is not None and (s.saved is not None or not GATE):
                tl.store(dense(c.total, c, batch, first, t, channel), y[i], mask=mask)
            if GATE:
                tl.store(dense(c.out, c, batch, first, t, channel), out[i], mask=mask)
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
    for i0 in range(0, steps, K):
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE != BACKWARD, EVEN)
            dt, u = load_step(s, bias, batch, first, t, channel, mask, SOFTPLUS)
            decay = decay_of(c, dt, exponent, batch, first, t, mask, REVERSE)
            if BACKWARD:
                dy = load_dy(c, batch, first, t, channel, mask)
                C = load_states(s.C, s.C_batch, s.C_group, s.C_step, batch, group, first, t, N, V)
                h = decay * (h + for_states(dy) * C)
            else:
                B = load_states(s.B, s.B_batch, s.B_group, s.B_step, batch, group, first, t, N, V)
                h = decay * h + for_states(dt * u) * B
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
    """What every chunk alone adds to the state (to its gradient, if BACKWARD), and its decay."""
    ends_of_direction(c, s, REVERSE, SOFTPLUS, BACKWARD, EVEN, K, N, V, BD)
    if TWO:
        ends_of_direction(c, s_b, not REVERSE, SOFTPLUS, BACKWARD, EVEN, K, N, V, BD)


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
