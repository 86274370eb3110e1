"""Triton kernel of the backward scan: all gradients of a chunk of time.

With dy the gradient of C . h + D u (gate and scale taken off) and dh the gradient of h,

    dh_t = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}
    dB_t = sum_channels dh_t dt_t u_t,   dC_t = sum_channels h_t dy_t,   dx_t = dh_t . B_t  for x = dt u
    d(dt_t A) = dh_t exp(dt_t A) h_{t-1}

The states of K steps are computed again from the state `saved` before them and stay in registers, then dh runs down
through the same steps. What a channel has for itself (dt, the gate, their slopes) is computed for the K steps at once,
in a tile that fills the lanes: in the scan several lanes share a channel, and each would do it. No atomics: sums over
channels go to one entry per block of channels, sums over time to one per chunk; both are added up in a fixed order
afterwards, so two runs agree bit by bit.
Source: own; the recurrence is Gu & Dao 2023, Algorithm 2.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: RUF005  (Triton does not compile an unpacked tuple)
import triton
import triton.language as tl

from .triton_math import (
    LN_2,
    LOG2_E,
    decay_of,
    for_states,
    is_first_direction,
    load_channels,
    load_tile,
    place,
    row_of,
    rows_from,
    rows_of,
    saved_at,
    sigmoid,
    softplus_slope,
    state_before,
    states_of,
    step_of,
    step_size,
    store_tile,
    sum_states,
    take_row,
    tile_at,
    time_of,
)


@triton.jit
def gradients_of_direction(
    c, s, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a chunk, and dz if GATE.

    du and ddelta are added to what stands there if ADD.
    """
    chunk, number, block, where = place(c, EVEN, BD)
    batch, group, first, steps, channel, exists = where
    at, states = tile_at(c, batch, chunk, number, N, BD), states_of(N, V)
    exponent = load_tile(s.A + number * N * BD, True, 0.0, N, V, BD) * LOG2_E
    D, bias = load_channels(s.D, where, BD), load_channels(s.delta_bias, where, BD)
    carried = state_before(c, s, batch, chunk, number, not REVERSE, K, N, V, BD)  # exp(dt A) dh of the step after
    dA = tl.zeros([V, BD, N // V], tl.float32)
    dD, dbias = tl.zeros([K, BD], tl.float32), tl.zeros([K, BD], tl.float32)
    saves = tl.cdiv(steps, K)
    k = tl.arange(0, K)
    for save in range(0, saves):
        i0 = (saves - 1 - save) * K
        rows, mask = rows_from(where, i0, REVERSE, EVEN, K, BD)
        u_row, delta_row = rows_of(s.u, s.u_batch, s.u_step, rows), rows_of(s.delta, s.delta_batch, s.delta_step, rows)
        u = tl.load(u_row, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        delta = tl.load(delta_row, mask=mask, other=0.0, eviction_policy="evict_first")
        dy = tl.load(rows_of(c.dout, c.l * c.d, c.d, rows), mask=mask, other=0.0).to(tl.float32) * c.scale
        if c.z is not None:
            z_row = rows_of(c.z, c.z_batch, c.z_step, rows)
            gate = tl.load(z_row, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if GATE:
            total = tl.load(rows_of(c.total, c.l * c.d, c.d, rows), mask=mask, other=0.0)
        B, C = (), ()
        for i in tl.static_range(K):
            B_row = row_of(s.B + group * s.B_group, states, s.B_batch, s.B_step, where, i0, i, REVERSE, EVEN)
            C_row = row_of(s.C + group * s.C_group, states, s.C_batch, s.C_step, where, i0, i, REVERSE, EVEN)
            B, C = B + (tl.load(B_row),), C + (tl.load(C_row),)
        saved = s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD)
        h = (load_tile(saved, True, 0.0, N, V, BD),)
        if c.z is not None:
            open = sigmoid(gate)
            if GATE:
                slope = open * (1.0 + gate * (1.0 - open))  # of silu
                dz = (slope * dy * total).to(c.dz.dtype.element_ty)
                tl.store(rows_of(c.dz, c.l * c.d, c.d, rows), dz, mask=mask)
            dy *= gate * open
        dt = step_size(delta, bias[None, :], mask, SOFTPLUS)
        x = dt * u
        dts, xs, dys = (), (), ()
        dB, dC = tl.zeros([V, K, N // V], tl.float32), tl.zeros([V, K, N // V], tl.float32)
        for i in tl.static_range(K):
            dts, xs, dys = dts + (take_row(dt, i),), xs + (take_row(x, i),), dys + (take_row(dy, i),)
            t, exists_now = step_of(where, i0 + i, REVERSE, EVEN)
            decay = decay_of(c, dts[i], exponent, where, t, exists_now, REVERSE)
            h = h + (decay * h[i] + for_states(xs[i]) * B[i].to(tl.float32),)
            dC_now = tl.sum(h[i + 1] * for_states(dys[i]), axis=1, keep_dims=True)
            dC = tl.where(k[None, :, None] == i, dC_now, dC)
        dx, ddelta = tl.zeros([K, BD], tl.float32), tl.zeros([K, BD], tl.float32)
        for i in tl.static_range(K - 1, -1, -1):
            t, exists_now = step_of(where, i0 + i, REVERSE, EVEN)
            dh = carried + for_states(dys[i]) * C[i].to(tl.float32)
            dB_now = tl.sum(dh * for_states(xs[i]), axis=1, keep_dims=True)
            dB = tl.where(k[None, :, None] == i, dB_now, dB)
            dx = tl.where(k[:, None] == i, sum_states(dh * B[i].to(tl.float32))[None, :], dx)
            carried = decay_of(c, dts[i], exponent, where, t, exists_now, REVERSE) * dh
            dtA = carried * h[i]  # the gradient of dt A
            dA += dtA * for_states(dts[i])
            ddelta = tl.where(k[:, None] == i, sum_states(dtA * exponent)[None, :], ddelta)
        ddelta = ddelta * LN_2 + dx * u
        if SOFTPLUS:
            ddelta *= softplus_slope(dt)
        du = dx * dt + dy * D[None, :]
        dD += dy * u
        dbias += tl.where(mask, ddelta, 0.0)
        du_row, ddelta_row = rows_of(s.du, c.l * c.d, c.d, rows), rows_of(s.ddelta, c.l * c.d, c.d, rows)
        if ADD:
            du += tl.load(du_row, mask=mask, other=0.0)
            ddelta += tl.load(ddelta_row, mask=mask, other=0.0)
        tl.store(du_row, du.to(s.du.dtype.element_ty), mask=mask)
        tl.store(ddelta_row, ddelta.to(s.ddelta.dtype.element_ty), mask=mask)
        t = time_of(tl.minimum(i0 + k[None, :, None], steps - 1), steps, REVERSE)
        dB_row = (((block * c.b + batch) * c.g + group) * c.l + first) * N + t * N + states
        tl.store(s.dB + dB_row, dB, mask=(i0 + k[None, :, None] < steps) | EVEN)
        tl.store(s.dC + dB_row, dC, mask=(i0 + k[None, :, None] < steps) | EVEN)
    dD, dbias = tl.sum(dD, axis=0), tl.sum(dbias, axis=0)
    store_tile(s.dA + at, dA, True, N, V, BD)
    if s.dD is not None:
        tl.store(s.dD + (batch * c.chunks + chunk) * c.d + channel, dD, mask=exists)
    if s.dbias is not None:
        tl.store(s.dbias + (batch * c.chunks + chunk) * c.d + channel, dbias, mask=exists)
    if s.leaving is not None:
        is_first = chunk == (c.chunks - 1 if REVERSE else 0)
        store_tile(s.leaving + (batch * c.g * c.blocks + number) * N * BD, carried, is_first, N, V, BD)


@triton.jit
def backward_kernel(
    c, s, s_b, TWO: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk in one direction; grid: (directions b chunks g blocks,)."""
    if TWO:
        if is_first_direction(c):
            gradients_of_direction(c, s, REVERSE, SOFTPLUS, ADD, c.dz is not None, EVEN, K, N, V, BD)
        else:
            gradients_of_direction(c, s_b, not REVERSE, SOFTPLUS, ADD, False, EVEN, K, N, V, BD)
    else:
        gradients_of_direction(c, s, REVERSE, SOFTPLUS, ADD, c.dz is not None, EVEN, K, N, V, BD)
