"""Triton kernel of the backward scan: all gradients of a chunk of time.

With dy the gradient of C . h + D u (gate and scale taken off) and dh the gradient of h,

    dh_t = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}
    dB_t = sum_channels dh_t dt_t u_t,   dC_t = sum_channels h_t dy_t,   dx_t = dh_t . B_t  for x = dt u
    d(dt_t A) = dh_t exp(dt_t A) h_{t-1}

The states of K steps are computed again from the state `saved` before them and stay in registers, then dh runs down
through the same steps. No atomics: sums over channels go to one entry per block of channels, sums over time to one per
chunk; both are added up in a fixed order afterwards, so two runs agree bit by bit.
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
    dense,
    for_states,
    is_first_direction,
    load_channels,
    load_steps,
    place,
    saved_at,
    sigmoid,
    softplus_slope,
    state_before,
    states_of,
    step_of,
    step_size,
    sum_states,
    tile_at,
    tile_of,
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
    at, tile = tile_at(c, batch, chunk, number, N, BD), tile_of(N, V, BD)
    exponent = tl.load(s.A + number * N * BD + tile) * LOG2_E
    D, bias = load_channels(s.D, where, BD), load_channels(s.delta_bias, where, BD)
    carried = state_before(c, s, batch, chunk, number, not REVERSE, K, N, V, BD)  # exp(dt A) dh of the step after
    dA = tl.zeros([V, BD, N // V], tl.float32)
    dD, dbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    saves = tl.cdiv(steps, K)
    k = tl.arange(0, K)[None, :, None]
    GATED: tl.constexpr = c.z is not None
    for save in range(0, saves):
        i0 = (saves - 1 - save) * K
        loaded = load_steps(c, s, where, i0, GATE, GATED, True, REVERSE, EVEN, K, N, V)
        h = (tl.load(s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD) + tile),)
        dt = ()
        for i in tl.static_range(K):
            u, delta, B, C, total, z, dout = loaded[i]
            t, mask = step_of(where, i0 + i, REVERSE, EVEN)
            dt = dt + (step_size(delta, bias, mask, SOFTPLUS),)
            decay = decay_of(c, dt[i], exponent, where, t, mask, REVERSE)
            h = h + (decay * h[i] + for_states(dt[i] * u.to(tl.float32)) * B.to(tl.float32),)
        dB, dC = tl.zeros([V, K, N // V], tl.float32), tl.zeros([V, K, N // V], tl.float32)
        for i in tl.static_range(K - 1, -1, -1):
            u, delta, B, C, total, z, dout = loaded[i]
            t, mask = step_of(where, i0 + i, REVERSE, EVEN)
            x, dy = u.to(tl.float32), dout.to(tl.float32) * c.scale
            if GATED:
                gate = z.to(tl.float32)
                open = sigmoid(gate)
                if GATE:
                    slope = open * (1.0 + gate * (1.0 - open))  # of silu
                    dz = (slope * dy * total).to(c.dz.dtype.element_ty)
                    tl.store(dense(c.dz, c, where, i0, i, REVERSE, EVEN), dz, mask=mask)
                dy *= gate * open
            dh = carried + for_states(dy) * C.to(tl.float32)
            dB = tl.where(k == i, tl.sum(dh * for_states(dt[i] * x), axis=1, keep_dims=True), dB)
            dC = tl.where(k == i, tl.sum(h[i + 1] * for_states(dy), axis=1, keep_dims=True), dC)
            dx = sum_states(dh * B.to(tl.float32))
            carried = decay_of(c, dt[i], exponent, where, t, mask, REVERSE) * dh
            dtA = carried * h[i]  # the gradient of dt A
            dA += dtA * for_states(dt[i])
            ddelta = sum_states(dtA * exponent) * LN_2 + dx * x
            if SOFTPLUS:
                ddelta *= softplus_slope(dt[i])
            du = dx * dt[i] + dy * D
            dD += dy * x
            dbias += tl.where(mask, ddelta, 0.0)
            du_row, ddelta_row = (
                dense(s.du, c, where, i0, i, REVERSE, EVEN), dense(s.ddelta, c, where, i0, i, REVERSE, EVEN)
            )  # fmt: skip
            if ADD:
                du += tl.load(du_row, mask=mask, other=0.0)
                ddelta += tl.load(ddelta_row, mask=mask, other=0.0)
            tl.store(du_row, du.to(s.du.dtype.element_ty), mask=mask)
            tl.store(ddelta_row, ddelta.to(s.ddelta.dtype.element_ty), mask=mask)
        t = time_of(tl.minimum(i0 + k, steps - 1), steps, REVERSE)
        row = (((block * c.b + batch) * c.g + group) * c.l + first) * N + t * N + states_of(N, V)
        tl.store(s.dB + row, dB, mask=(i0 + k < steps) | EVEN)
        tl.store(s.dC + row, dC, mask=(i0 + k < steps) | EVEN)
    tl.store(s.dA + at + tile, dA)
    if s.dD is not None:
        tl.store(s.dD + (batch * c.chunks + chunk) * c.d + channel, dD, mask=exists)
    if s.dbias is not None:
        tl.store(s.dbias + (batch * c.chunks + chunk) * c.d + channel, dbias, mask=exists)
    if s.leaving is not None:
        is_first = chunk == (c.chunks - 1 if REVERSE else 0)
        tl.store(s.leaving + (batch * c.g * c.blocks + number) * N * BD + tile, carried, mask=is_first)


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
