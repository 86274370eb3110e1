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

# mypy: disable-error-code="no-untyped-def"
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import (
    LN_2,
    channels_of,
    load_B,
    load_C,
    load_channels,
    load_gate,
    load_gated,
    load_step,
    program_place,
    row_of,
    sigmoid,
    softplus_slope,
    step_of,
)


class Gradients(NamedTuple):
    """Where a direction's gradients go: du, ddelta (b, l, d), and partial sums.

    dA (b, chunks, g blocks, N, BD), dB, dC (blocks, b, g, l, N), dD, ddelta_bias (b, chunks, d) or None.
    """

    du: Any
    ddelta: Any
    dA: Any
    dB: Any
    dC: Any
    dD: Any
    ddelta_bias: Any


@triton.jit
def gradients_of_direction(
    s, p, dout, total, z, z_batch, z_step, dz, scale, d, l, g, chunks, length, blocks, b,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one direction for a chunk; du and ddelta are added to what stands there if ADD."""
    block, group, chunk, batch = program_place(blocks, g, chunks)
    channel, exists, number, tile = channels_of(block, group, blocks, d, g, EVEN, N, BD)
    slot = (batch * chunks + chunk) * g * blocks + number
    exponent = tl.load(s.exponent + number * N * BD + tile)
    D = load_channels(s.D, channel, exists, BD)
    bias = load_channels(s.delta_bias, channel, exists, BD)
    carried = tl.zeros([N, BD], tl.float32)  # exp(dt A) dh of the step after
    if s.exits is not None:
        carried = tl.load(s.exits + slot * N * BD + tile)
    dA = tl.zeros([N, BD], tl.float32)
    dD = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)
    first = chunk * length
    steps = tl.minimum(length, l - first)
    saves = tl.cdiv(steps, K)
    for save in range(0, saves):
        i0 = (saves - 1 - save) * K
        h = (tl.load(s.saved + (slot * (length // K) + i0 // K) * N * BD + tile),)
        dts = ()
        us = ()
        for i in tl.static_range(K):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt, u = load_step(s, bias, batch, first, t, channel, mask, SOFTPLUS)
            added = (dt * u)[None, :] * load_B(s, batch, group, first, t, N)
            h = h + (tl.exp2(dt[None, :] * exponent) * h[i] + added,)
            dts = dts + (dt,)
            us = us + (u,)
        for i in tl.static_range(K - 1, -1, -1):
            t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
            dt = dts[i]
            u = us[i]
            dy = load_gated(dout, z, z_batch, z_step, scale, batch, first, t, channel, mask, d, l)
            dh = carried + dy[None, :] * load_C(s, batch, group, first, t, N)
            row = row_of(0, (block * b + batch) * g + group, l.to(tl.int64) * N, first, t, N) + tl.arange(0, N)
            inside = (i0 + i < steps) | EVEN
            tl.store(p.dB + row, tl.sum(dh * (dt * u)[None, :], axis=1), mask=inside)
            tl.store(p.dC + row, tl.sum(h[i + 1] * dy[None, :], axis=1), mask=inside)
            dx = tl.sum(dh * load_B(s, batch, group, first, t, N), axis=0)
            carried = tl.exp2(dt[None, :] * exponent) * dh
            slope = carried * h[i]  # the gradient of dt A
            dA += slope * dt[None, :]
            ddelta = tl.sum(slope * exponent, axis=0) * LN_2 + dx * u
            if SOFTPLUS:
                ddelta *= softplus_slope(dt)
            du = dx * dt + dy * D
            dD += dy * u
            dbias += tl.where(mask, ddelta, 0.0)
            offset = row_of(0, batch, l.to(tl.int64) * d, first, t, d) + channel
            if ADD:
                du += tl.load(p.du + offset, mask=mask, other=0.0)
                ddelta += tl.load(p.ddelta + offset, mask=mask, other=0.0)
            tl.store(p.du + offset, du.to(p.du.dtype.element_ty), mask=mask)
            tl.store(p.ddelta + offset, ddelta.to(p.ddelta.dtype.element_ty), mask=mask)
            if dz is not None:
                gate = load_gate(z, z_batch, z_step, batch, first, t, channel, mask)
                share = sigmoid(gate)
                share *= 1.0 + gate * (1.0 - share)  # the slope of silu
                share *= tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32) * scale
                share *= tl.load(total + offset, mask=mask, other=0.0)
                tl.store(dz + offset, share.to(dz.dtype.element_ty), mask=mask)
    tl.store(p.dA + slot * N * BD + tile, dA)
    if p.dD is not None:
        tl.store(p.dD + (batch * chunks + chunk) * d + channel, dD, mask=exists)
    if p.ddelta_bias is not None:
        tl.store(p.ddelta_bias + (batch * chunks + chunk) * d + channel, dbias, mask=exists)
    if s.leaving is not None:
        if chunk == (chunks - 1 if REVERSE else 0):
            tl.store(s.leaving + (batch * g * blocks + number) * N * BD + tile, carried)


@triton.jit
def backward_kernel(
    dout, total, z, z_batch, z_step, dz, scale, s, p, s_b, p_b, d, l, g, chunks, length, blocks, b,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, of one direction or of two; grid: (b chunks g blocks,)."""
    gradients_of_direction(
        s, p, dout, total, z, z_batch, z_step, dz, scale, d, l, g, chunks, length, blocks, b,
        REVERSE, SOFTPLUS, ADD, EVEN, K, N, BD,
    )  # fmt: skip
    if s_b is not None:
        gradients_of_direction(
            s_b, p_b, dout, total, z, z_batch, z_step, None, scale, d, l, g, chunks, length, blocks, b,
            not REVERSE, SOFTPLUS, ADD, EVEN, K, N, BD,
        )  # fmt: skip
