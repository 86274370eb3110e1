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
    load_channels,
    load_dy,
    load_gate,
    load_states,
    load_step,
    place,
    row_of,
    softplus_slope,
    step_of,
)


@triton.jit
def gradients_of_direction(
    c, s, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a chunk, and dz if GATE.

    du and ddelta are added to what stands there if ADD.
    """
    batch, group, block, chunk, number, channel, exists, tile = place(c, EVEN, N, BD)
    slot = (batch * c.chunks + chunk) * c.g * c.blocks + number
    exponent = tl.load(s.A + number * N * BD + tile) * LOG2_E
    D = load_channels(s.D, channel, exists, BD)
    bias = load_channels(s.delta_bias, channel, exists, BD)
    carried = tl.zeros([N, BD], tl.float32)  # exp(dt A) dh of the step after
    if s.exits is not None:
        carried = tl.load(s.exits + slot * N * BD + tile)
    dA = tl.zeros([N, BD], tl.float32)
    dD = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)
    first = chunk * c.length
    steps = tl.minimum(c.length, c.l - first)
    saves = tl.cdiv(steps, K)
    for save in range(0, saves):
        i0 = (saves - 1 - save) * K
        h = (tl.load(s.saved + (slot * (c.length // K) + i0 // K) * N * BD + tile),)
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt, u = load_step(s, bias, batch, first, t, channel, mask, SOFTPLUS)
            B = load_states(s.B, s.B_batch, s.B_group, s.B_step, batch, group, first, t, N)
            h = h + (decay_of(c, dt, exponent, batch, first, t, mask, REVERSE) * h[i] + (dt * u)[None, :] * B,)
        for i in tl.static_range(K - 1, -1, -1):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt, u = load_step(s, bias, batch, first, t, channel, mask, SOFTPLUS)  # again: registers are scarce
            dy = load_dy(c, batch, first, t, channel, mask)
            B = load_states(s.B, s.B_batch, s.B_group, s.B_step, batch, group, first, t, N)
            C = load_states(s.C, s.C_batch, s.C_group, s.C_step, batch, group, first, t, N)
            dh = carried + dy[None, :] * C
            row = row_of(0, ((block * c.b + batch) * c.g + group) * c.l, N, first, t, N) + tl.arange(0, N)
            inside = (i0 + i < steps) | EVEN
            tl.store(s.dB + row, tl.sum(dh * (dt * u)[None, :], axis=1), mask=inside)
            tl.store(s.dC + row, tl.sum(h[i + 1] * dy[None, :], axis=1), mask=inside)
            dx = tl.sum(dh * B, axis=0)
            carried = decay_of(c, dt, exponent, batch, first, t, mask, REVERSE) * dh
            slope = carried * h[i]  # the gradient of dt A
            dA += slope * dt[None, :]
            ddelta = tl.sum(slope * exponent, axis=0) * LN_2 + dx * u
            if SOFTPLUS:
                ddelta *= softplus_slope(dt)
            du = dx * dt + dy * D
            dD += dy * u
            dbias += tl.where(mask, ddelta, 0.0)
            if ADD:
                du += tl.load(dense(s.du, c, batch, first, t, channel), mask=mask, other=0.0)
                ddelta += tl.load(dense(s.ddelta, c, batch, first, t, channel), mask=mask, other=0.0)
            tl.store(dense(s.du, c, batch, first, t, channel), du.to(s.du.dtype.element_ty), mask=mask)
            tl.store(dense(s.ddelta, c, batch, first, t, channel), ddelta.to(s.ddelta.dtype.element_ty), mask=mask)
            if GATE:
                z, sigmoid = load_gate(c, batch, first, t, channel, mask)
                dz = sigmoid * (1.0 + z * (1.0 - sigmoid)) * c.scale  # the slope of silu
                dz *= tl.load(dense(c.dout, c, batch, first, t, channel), mask=mask, other=0.0).to(tl.float32)
                dz *= tl.load(dense(c.total, c, batch, first, t, channel), mask=mask, other=0.0)
                tl.store(dense(c.dz, c, batch, first, t, channel), dz.to(c.dz.dtype.element_ty), mask=mask)
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
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, of one direction or of two; grid: (b chunks g blocks,)."""
    gradients_of_direction(c, s, REVERSE, SOFTPLUS, ADD, c.dz is not None, EVEN, K, N, BD)
    if TWO:
        gradients_of_direction(c, s_b, not REVERSE, SOFTPLUS, ADD, False, EVEN, K, N, BD)
