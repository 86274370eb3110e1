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
    row_of,
    saved_at,
    sigmoid,
    softplus_slope,
    states_of,
    step_of,
    step_size,
    sum_states,
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
    batch, group, block, chunk, number, channel, exists = place(c, EVEN, N, BD)
    slot, tile = (batch * c.chunks + chunk) * c.g * c.blocks + number, tile_of(N, V, BD)
    exponent = tl.load(s.A + number * N * BD + tile) * LOG2_E
    D = load_channels(s.D, channel, exists, BD)
    bias = load_channels(s.delta_bias, channel, exists, BD)
    carried = tl.zeros([V, BD, N // V], tl.float32)  # exp(dt A) dh of the step after
    if s.exits is not None:
        carried = tl.load(s.exits + slot * N * BD + tile)
    dA = tl.zeros([V, BD, N // V], tl.float32)
    dD = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)
    first = chunk * c.length
    steps = tl.minimum(c.length, c.l - first)
    saves = tl.cdiv(steps, K)
    k = tl.arange(0, K)[None, :, None]
    GATED: tl.constexpr = c.z is not None
    for save in range(0, saves):
        i0 = (saves - 1 - save) * K
        u, delta, B, C, total, z, dout = load_steps(
            c, s, batch, group, first, i0, steps, channel, exists, GATE, GATED, True, REVERSE, EVEN, K, N, V
        )
        h = (tl.load(s.saved + saved_at(c, batch, chunk, number, i0 // K, K, N, BD) + tile),)
        dt = ()
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt = dt + (step_size(delta[i], bias, mask, SOFTPLUS),)
            decay = decay_of(c, dt[i], exponent, batch, first, t, mask, REVERSE)
            h = h + (decay * h[i] + for_states(dt[i] * u[i].to(tl.float32)) * B[i].to(tl.float32),)
        dB = tl.zeros([V, K, N // V], tl.float32)
        dC = tl.zeros([V, K, N // V], tl.float32)
        for i in tl.static_range(K - 1, -1, -1):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            x, dy = u[i].to(tl.float32), dout[i].to(tl.float32) * c.scale
            if GATED:
                gate = z[i].to(tl.float32)
                open = sigmoid(gate)
                if GATE:
                    slope = open * (1.0 + gate * (1.0 - open))  # of silu
                    dz = (slope * dy * total[i]).to(c.dz.dtype.element_ty)
                    tl.store(dense(c.dz, c, batch, first, t, channel), dz, mask=mask)
                dy *= gate * open
            dh = carried + for_states(dy) * C[i].to(tl.float32)
            dB = tl.where(k == i, tl.sum(dh * for_states(dt[i] * x), axis=1, keep_dims=True), dB)
            dC = tl.where(k == i, tl.sum(h[i + 1] * for_states(dy), axis=1, keep_dims=True), dC)
            dx = sum_states(dh * B[i].to(tl.float32))
            carried = decay_of(c, dt[i], exponent, batch, first, t, mask, REVERSE) * dh
            dtA = carried * h[i]  # the gradient of dt A
            dA += dtA * for_states(dt[i])
            ddelta = sum_states(dtA * exponent) * LN_2 + dx * x
            if SOFTPLUS:
                ddelta *= softplus_slope(dt[i])
            du = dx * dt[i] + dy * D
            dD += dy * x
            dbias += tl.where(mask, ddelta, 0.0)
            if ADD:
                du += tl.load(dense(s.du, c, batch, first, t, channel), mask=mask, other=0.0)
                ddelta += tl.load(dense(s.ddelta, c, batch, first, t, channel), mask=mask, other=0.0)
            tl.store(dense(s.du, c, batch, first, t, channel), du.to(s.du.dtype.element_ty), mask=mask)
            tl.store(dense(s.ddelta, c, batch, first, t, channel), ddelta.to(s.ddelta.dtype.element_ty), mask=mask)
        t = time_of(tl.minimum(i0 + k, steps - 1), steps, REVERSE)
        row = row_of(0, ((block * c.b + batch) * c.g + group) * c.l, N, first, t, N) + states_of(N, V)
        tl.store(s.dB + row, dB, mask=(i0 + k < steps) | EVEN)
        tl.store(s.dC + row, dC, mask=(i0 + k < steps) | EVEN)
    tl.store(s.dA + slot * N * BD + tile, dA)
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
