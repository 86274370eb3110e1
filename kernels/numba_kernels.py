"""The scan's kernels for CPUs, compiled by numba: both directions, step by step, channels side by side in `Lanes`.

A block is WIDTH channels of one batch entry. Its states lie in the nearest cache, and each step is the recurrence as it
stands in README.md, all lanes at once; nothing is summed over lanes but the gradients of B and C. Backward keeps the
state before every STEPS-th step and computes those between again. A part is a run of blocks: parts share nothing, so
that any thread can take any, and what is summed over blocks is summed in one order however many threads there are.
Source: Gu & Dao 2023, Algorithm 2.
"""

from typing import Any, NamedTuple

import numpy as np

from .numba_math import (
    LN_2,
    WIDTH,
    claim,
    copy,
    entry,
    exp2,
    inlined,
    load,
    number,
    sigmoid,
    softplus,
    spread,
    store,
    total,
)

STEPS = 16  # between the states that backward starts from


class Sizes(NamedTuple):
    """Sizes of a call, all at least 1; d / g is a multiple of WIDTH."""

    b: int
    d: int
    l: int
    n: int
    g: int
    parts: int  # of a batch entry
    softplus: bool
    reverse: bool  # whether the first direction runs backwards in time
    directions: int
    scale: float


class Scan(NamedTuple):
    """Addresses of one direction's tensors, 0 where absent; strides are of elements."""

    u: int  # (b, l, d), as delta
    u_batch: int
    u_step: int
    delta: int
    delta_batch: int
    delta_step: int
    exponent: int  # A log2(e), (n, d)
    B: int  # (b, l, g, n), as C
    C: int
    D: int  # (d,), as bias
    bias: int
    restart: int  # (b, l) of bytes: whether the state restarts before a step
    starts: int  # the state before every STEPS-th step, (b, chunks, n, d)
    first: int  # the state before the first step, or its gradient, (b, n, d)
    last: int  # the state after the last step, or its gradient
    du: int = 0  # (b, l, d), as ddelta
    ddelta: int = 0
    dA: int = 0  # (b, n, d)
    dB: int = 0  # (parts, b, l, g, n), as dC, 0 at first
    dC: int = 0
    dD: int = 0  # (b, d), as dbias
    dbias: int = 0


class Shared(NamedTuple):
    """Addresses of what both directions share, as in `Scan`."""

    z: int  # (b, l, d)
    z_batch: int
    z_step: int
    out: int  # (b, l, d), or its gradient, as those below
    ungated: int
    dz: int = 0


class Chunk(NamedTuple):
    """Up to STEPS steps of a block, in the order that a direction takes them in: step k is at time first + k way."""

    batch: int
    c: int  # the block's first channel
    place: int  # among the chunks
    steps: int
    first: int
    way: int  # 1 or -1


@inlined
def chunk_of(sizes: Sizes, batch: int, c: int, index: int, backwards: bool) -> Chunk:
    first, way = (sizes.l - 1 - index * STEPS, -1) if backwards else (index * STEPS, 1)
    return Chunk(batch, c, index, min(STEPS, sizes.l - index * STEPS), first, way)


@inlined
def prepare(zero: Any, scan: Scan, sizes: Sizes, chunk: Chunk, work: int, rows: int, slope: bool) -> None:
    """Write u, step size and, if asked, the slope of its softplus for each step to the workspace.

    All before the first state: a state waits for the one before it, and none of these does.
    """
    for k in range(chunk.steps):
        t, row = chunk.first + k * chunk.way, rows + 3 * k * WIDTH
        raw = load(zero, scan.delta, chunk.batch * scan.delta_batch + t * scan.delta_step + chunk.c)
        if scan.bias:
            raw = raw + load(zero, scan.bias, chunk.c)
        store(load(zero, scan.u, chunk.batch * scan.u_batch + t * scan.u_step + chunk.c), work, row)
        store(softplus(raw) if sizes.softplus else raw, work, row + WIDTH)
        if slope:
            store(sigmoid(raw) if sizes.softplus else spread(1.0, zero), work, row + 2 * WIDTH)


@inlined
def begins(scan: Scan, sizes: Sizes, batch: int, t: int) -> bool:
    """Whether the state restarts before a step."""
    return scan.restart != 0 and number(np.uint8(0), scan.restart, batch * sizes.l + t) != 0


@inlined
def finish(zero: Any, shared: Shared, sizes: Sizes, chunk: Chunk, work: int, rows: int, second: bool) -> None:
    """Write y of each step; the second direction adds to what the first has written, and the last one gates."""
    for k in range(chunk.steps):
        t = chunk.first + k * chunk.way
        y, o = load(zero, work, rows + 3 * k * WIDTH), (chunk.batch * sizes.l + t) * sizes.d + chunk.c
        if second:
            y = y + load(zero, shared.out, o)
        if second or sizes.directions == 1:
            y = y * sizes.scale
            if shared.ungated:
                store(y, shared.ungated, o)
            if shared.z:
                gate = load(zero, shared.z, chunk.batch * shared.z_batch + t * shared.z_step + chunk.c)
                y = y * (gate * sigmoid(gate))
        store(y, shared.out, o)


@inlined
def scan_on(zero: Any, scan: Scan, shared: Shared, sizes: Sizes, work: int, batch: int, c: int, second: bool) -> None:
    """Walk through time with a block."""
    n, d, l, chunks = sizes.n, sizes.d, sizes.l, -(-sizes.l // STEPS)
    h, rate, rows = 0, n * WIDTH, 2 * n * WIDTH  # in the workspace
    copy(zero, scan.exponent, c, d, work, rate, WIDTH, n)
    copy(zero, scan.first, batch * n * d + c, d, work, h, WIDTH, n)
    for index in range(chunks):
        chunk = chunk_of(sizes, batch, c, index, sizes.reverse != second)
        prepare(zero, scan, sizes, chunk, work, rows, False)
        if scan.starts:
            copy(zero, work, h, WIDTH, scan.starts, (batch * chunks + index) * n * d + c, d, n)
        for k in range(chunk.steps):
            t, row = chunk.first + k * chunk.way, rows + 3 * k * WIDTH
            if begins(scan, sizes, batch, t):
                copy(zero, 0, 0, 0, work, h, WIDTH, n)
            u, dt, y = load(zero, work, row), load(zero, work, row + WIDTH), spread(0.0, zero)
            x, p = dt * u, ((batch * l + t) * sizes.g + c * sizes.g // d) * n
            for i in range(n):
                w = i * WIDTH
                now = exp2(dt * load(zero, work, rate + w)) * load(zero, work, h + w) + x * number(zero, scan.B, p + i)
                store(now, work, h + w)
                y = y + now * number(zero, scan.C, p + i)
            if scan.D:
                y = y + u * load(zero, scan.D, c)
            store(y, work, row)
        finish(zero, shared, sizes, chunk, work, rows, second)
    if scan.last:
        copy(zero, work, h, WIDTH, scan.last, batch * n * d + c, d, n)


@entry
def forward(
    zero: Any, scan: Scan, other: Scan, shared: Shared, sizes: Sizes, workspaces: int, size: int, counters: int
) -> None:
    """Scan the parts that no other thread has claimed, in a workspace of so many bytes that none has claimed."""
    blocks, part, work = sizes.d // WIDTH, claim(counters, 0), workspaces + size * claim(counters, 1)
    while part < sizes.b * sizes.parts:
        batch, run = part // sizes.parts, part % sizes.parts
        for block in range(run * blocks // sizes.parts, (run + 1) * blocks // sizes.parts):
            for second in range(sizes.directions):  # one call: it is copied in
                scan_on(zero, other if second else scan, shared, sizes, work, batch, block * WIDTH, second == 1)
        part = claim(counters, 0)


@inlined
def gate_gradients(zero: Any, shared: Shared, sizes: Sizes, work: int, grad: int, batch: int, block: int) -> None:
    """Write the gradient of C . h + D u to the workspace, and that of z."""
    l, d, c = sizes.l, sizes.d, block * WIDTH
    for t in range(l):
        o = (batch * l + t) * d + c
        dy = load(zero, shared.out, o)
        if shared.z:
            gate = load(zero, shared.z, batch * shared.z_batch + t * shared.z_step + c)
            slope = sigmoid(gate)
            change = slope + gate * slope * (spread(1.0, zero) - slope)
            store(dy * load(zero, shared.ungated, o) * change, shared.dz, o)
            dy = dy * (gate * slope)
        store(dy * sizes.scale, work, grad + t * WIDTH)


@inlined
def recompute(zero: Any, scan: Scan, sizes: Sizes, chunk: Chunk, work: int) -> None:
    """Fill the workspace with what `prepare` writes, decays, and the states before each step of a chunk."""
    n, d, l, c, states = sizes.n, sizes.d, sizes.l, chunk.c, sizes.n * WIDTH
    exponent, h, before, decay, rows = 0, states, 4 * states, (4 + STEPS) * states, (4 + 2 * STEPS) * states
    prepare(zero, scan, sizes, chunk, work, rows, True)
    copy(zero, scan.starts, (chunk.batch * -(-l // STEPS) + chunk.place) * n * d + c, d, work, h, WIDTH, n)
    for k in range(chunk.steps):
        t, row = chunk.first + k * chunk.way, rows + 3 * k * WIDTH
        if begins(scan, sizes, chunk.batch, t):
            copy(zero, 0, 0, 0, work, h, WIDTH, n)
        u, dt = load(zero, work, row), load(zero, work, row + WIDTH)
        x, p = dt * u, ((chunk.batch * l + t) * sizes.g + c * sizes.g // d) * n
        for i in range(n):
            w, slot = i * WIDTH, k * states + i * WIDTH
            a, past = exp2(dt * load(zero, work, exponent + w)), load(zero, work, h + w)
            store(a, work, decay + slot)
            store(past, work, before + slot)
            store(a * past + x * number(zero, scan.B, p + i), work, h + w)


@inlined
def step_back(zero: Any, scan: Scan, n: int, work: int, k: int, p: int, q: int, dy: Any, dt: Any, x: Any) -> Any:
    """Go one step back in all states of a block: -> gradients of x and, times log(2), of dt through the decays.

    p is where the step's B and C begin, q where its dB and dC do.
    """
    states = n * WIDTH
    exponent, carry, dA, before, decay = 0, 2 * states, 3 * states, 4 * states, (4 + STEPS) * states
    dx, dlog2 = spread(0.0, zero), spread(0.0, zero)
    for i in range(n):
        w, slot = i * WIDTH, k * states + i * WIDTH
        B, a = number(zero, scan.B, p + i), load(zero, work, decay + slot)
        past = a * load(zero, work, before + slot)
        dh = load(zero, work, carry + w) + dy * number(zero, scan.C, p + i)
        dx = dx + dh * B
        store(number(zero, scan.dB, q + i) + total(dh * x), scan.dB, q + i)
        store(number(zero, scan.dC, q + i) + total(dy * (past + x * B)), scan.dC, q + i)
        slope = dh * past
        dlog2 = dlog2 + slope * load(zero, work, exponent + w)
        store(load(zero, work, dA + w) + slope * dt, work, dA + w)
        store(a * dh, work, carry + w)
    return dx, dlog2


@inlined
def scan_back(zero: Any, scan: Scan, sizes: Sizes, work: int, run: int, batch: int, c: int, backwards: bool) -> None:
    """Walk back through time with a block, whose gradient of y lies in the workspace."""
    n, d, l, states = sizes.n, sizes.d, sizes.l, sizes.n * WIDTH
    carry, dA, rows = 2 * states, 3 * states, (4 + 2 * STEPS) * states
    grad, dD, dbias = rows + 3 * STEPS * WIDTH, spread(0.0, zero), spread(0.0, zero)
    copy(zero, scan.exponent, c, d, work, 0, WIDTH, n)
    copy(zero, scan.last, batch * n * d + c, d, work, carry, WIDTH, n)
    copy(zero, 0, 0, 0, work, dA, WIDTH, n)
    for index in range(-(-l // STEPS) - 1, -1, -1):
        chunk = chunk_of(sizes, batch, c, index, backwards)
        recompute(zero, scan, sizes, chunk, work)
        for k in range(chunk.steps - 1, -1, -1):
            t = chunk.first + k * chunk.way
            u, dt = load(zero, work, rows + 3 * k * WIDTH), load(zero, work, rows + (3 * k + 1) * WIDTH)
            dy, p = load(zero, work, grad + t * WIDTH), ((batch * l + t) * sizes.g + c * sizes.g // d) * n
            q = run * sizes.b * l * sizes.g * n + p
            dx, dlog2 = step_back(zero, scan, n, work, k, p, q, dy, dt, dt * u)
            if begins(scan, sizes, batch, t):
                copy(zero, 0, 0, 0, work, carry, WIDTH, n)
            du = dx * dt
            if scan.D:
                du = du + dy * load(zero, scan.D, c)
                dD = dD + dy * u
            ddelta = (dx * u + dlog2 * LN_2) * load(zero, work, rows + (3 * k + 2) * WIDTH)
            dbias = dbias + ddelta
            store(du, scan.du, (batch * l + t) * d + c)
            store(ddelta, scan.ddelta, (batch * l + t) * d + c)
    copy(zero, work, dA, WIDTH, scan.dA, batch * n * d + c, d, n)
    if scan.first:
        copy(zero, work, carry, WIDTH, scan.first, batch * n * d + c, d, n)
    store(dD, scan.dD, batch * d + c)
    store(dbias, scan.dbias, batch * d + c)


@entry
def backward(
    zero: Any, scan: Scan, other: Scan, shared: Shared, sizes: Sizes, workspaces: int, size: int, counters: int
) -> None:
    """Gradients of parts, as `forward`."""
    blocks, grad = sizes.d // WIDTH, ((4 + 2 * STEPS) * sizes.n + 3 * STEPS) * WIDTH
    part, work = claim(counters, 0), workspaces + size * claim(counters, 1)
    while part < sizes.b * sizes.parts:
        batch, run = part // sizes.parts, part % sizes.parts
        for block in range(run * blocks // sizes.parts, (run + 1) * blocks // sizes.parts):
            gate_gradients(zero, shared, sizes, work, grad, batch, block)
            for second in range(sizes.directions):
                one = other if second else scan
                scan_back(zero, one, sizes, work, run, batch, block * WIDTH, sizes.reverse != (second == 1))
        part = claim(counters, 0)
