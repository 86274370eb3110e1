"""What the Triton kernels share: where a program stands, what a step loads, and the activations.

Time runs step by step. A program is one warp; it owns BD channels and a chunk of time. The state is a tile in
registers, written (V, BD, N / V): a lane holds four states or V, whichever is less, that lie side by side, then the
lanes take the channels, then what is left of the states. So V says how many lanes share a channel: few make a sum over
states cheap, many a sum over channels. With half as many channels as lanes nothing is handed from lane to lane but such
sums; then nothing holds back the loads, which take longer than all the rest of a step.

Sequences are addressed as (b, l, d), channels side by side, with 64-bit offsets. No libdevice and no inline assembly,
so that everything also runs in Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: RUF005  (Triton does not compile an unpacked tuple)
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(c, EVEN: tl.constexpr, BD: tl.constexpr):
    """What this program works on: its chunk, tile number and block; and where its steps are, as `load_steps` wants it.

    The latter: batch index, group, first step and number of steps of the chunk, channels (BD,), which of them exist.
    """
    pid = tl.program_id(0)
    block, group, chunk = pid % c.blocks, pid // c.blocks % c.g, pid // (c.blocks * c.g) % c.chunks
    batch = (pid // (c.blocks * c.g * c.chunks) % c.b).to(tl.int64)
    channel = block * BD + tl.arange(0, BD)
    exists = tl.full([BD], True, tl.int1) if EVEN else channel < c.d // c.g
    first = chunk * c.length
    where = (batch, group, first, tl.minimum(c.length, c.l - first), group * (c.d // c.g) + channel, exists)
    return chunk, group * c.blocks + block, block, where


@triton.jit
def is_first_direction(c):
    """Whether this program works on the first direction, where each has programs of its own."""
    return tl.program_id(0) < c.b * c.chunks * c.g * c.blocks


@triton.jit
def states_of(N: tl.constexpr, V: tl.constexpr):
    """The numbers of the states, (V, 1, N / V)."""
    return tl.arange(0, V)[:, None, None] + tl.arange(0, N // V)[None, None, :] * V


@triton.jit
def matrix_of(N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr):
    """Offsets of a tile, whose states lie side by side, as a matrix (N / V BD, V).

    Tiles are read and written so because the compiler hands the axes of a tensor to the lanes by how much lies side by
    side along them; of a tile it does so along one alone, and versions differ in which of the others comes next.
    """
    row = tl.arange(0, N // V * BD)[:, None]
    return row % BD * N + row // BD * V + tl.arange(0, V)[None, :]


@triton.jit
def load_tile(base, exists, other, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr):
    """The tile that begins there, (V, BD, N / V), or `other` in its place."""
    matrix = tl.load(base + matrix_of(N, V, BD), mask=exists, other=other)
    return tl.permute(tl.reshape(matrix, [N // V, BD, V]), (2, 1, 0))


@triton.jit
def store_tile(base, tile, wanted, N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr):
    """Write a tile (V, BD, N / V) there, if wanted."""
    matrix = tl.reshape(tl.permute(tile, (2, 1, 0)), [N // V * BD, V])
    tl.store(base + matrix_of(N, V, BD), matrix, mask=wanted)


@triton.jit
def tile_at(c, batch, chunk, number, N: tl.constexpr, BD: tl.constexpr):
    """Where the tile of that number begins in a (b, chunks, tiles) tensor."""
    return ((batch * c.chunks + chunk) * c.g * c.blocks + number) * N * BD


@triton.jit
def saved_at(c, batch, chunk, number, save, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """Where the state of this program's channels before K steps, the tile of that number, begins in `saved`."""
    return (((batch * c.chunks + chunk) * (c.length // K) + save) * c.g * c.blocks + number) * N * BD


@triton.jit
def state_before(
    c, s, batch, chunk, number, REVERSE: tl.constexpr, U: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The state that enters a chunk, a tile: h = entry or 0, then h = decay h + end over the chunks that come before.

    U of them are loaded at a time.
    """
    h = tl.zeros([V, BD, N // V], tl.float32)
    if s.entry is not None:
        h = load_tile(s.entry + (batch * c.g * c.blocks + number) * N * BD, True, 0.0, N, V, BD)
    if s.ends is not None:
        before = c.chunks - 1 - chunk if REVERSE else chunk
        for j0 in range(0, before, U):
            for j in tl.static_range(U):
                other = c.chunks - 1 - j0 - j if REVERSE else j0 + j
                at = tile_at(c, batch, other, number, N, BD)
                decay = load_tile(s.decays + at, j0 + j < before, 1.0, N, V, BD)
                h = decay * h + load_tile(s.ends + at, j0 + j < before, 0.0, N, V, BD)
    return h


@triton.jit
def for_states(x):
    """A value of every channel for all its states, (BD,) -> (1, BD, 1): the other way round than `sum_states`."""
    return x[:, None][None, :, :]


@triton.jit
def sum_states(tile):
    """Sum over the states, (V, BD, N / V) -> (BD,)."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def time_of(i, steps, REVERSE: tl.constexpr):
    """Step i of the scan as a step in time, both counted from the chunk's beginning."""
    if REVERSE:
        i = steps - 1 - i
    return i


@triton.jit
def step_of(where, i, REVERSE: tl.constexpr, EVEN: tl.constexpr):
    """Step i of the scan as a step in time, both counted from the chunk's beginning, and the mask of its channels.

    A step past the chunk's end is masked, and its place is that of the last one. If EVEN there is none.
    """
    steps, mask = where[3], where[5]
    if not EVEN:
        mask = mask & (i < steps)
        i = tl.minimum(i, steps - 1)
    return time_of(i, steps, REVERSE), mask


@triton.jit
def row_of(
    tensor, column, batch_stride, stride, where, i0, i: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Addresses of a column, of channels or states, at step i0 + i of the scan; past the chunk's end at the last one.

    The stride is known when compiled. If EVEN, the K steps from i0 on share one address and i is a constant beside it:
    otherwise addresses take a quarter of all instructions. The column is added last, so that no tensor keeps an address
    of its own for every lane: those are registers.
    """
    batch, _group, first, steps, _channel, _exists = where
    row = tensor + (batch * batch_stride + first.to(tl.int64) * stride)
    if EVEN:
        row = (row + time_of(i0, steps, REVERSE) * stride) + column + (-i * stride if REVERSE else i * stride)
    else:
        row = row + time_of(tl.minimum(i0 + i, steps - 1), steps, REVERSE) * stride + column
    return row


@triton.jit
def dense(tensor, c, where, i0, i: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr):
    """Address of step i0 + i of a contiguous (b, l, d) tensor, (BD,)."""
    return row_of(tensor, where[4], c.l * c.d, c.d, where, i0, i, REVERSE, EVEN)


@triton.jit
def load_channels(vector, where, BD: tl.constexpr):
    """D or delta_bias of a block (BD,), 0 where it is absent."""
    if vector is not None:
        value = tl.load(vector + where[4], mask=where[5], other=0.0).to(tl.float32)
    else:
        value = tl.zeros([BD], tl.float32)
    return value


@triton.jit
def load_steps(
    c, s, where, i0, SUM: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr,
    REVERSE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """K steps from i0 on as they lie in memory, all asked for at once; after the last K come the same again.

    Of each: u, delta (BD,), B, C (V, 1, N / V), total if SUM, z if GATE, dout if OUT (BD,).
    """
    _batch, group, _first, steps, channel, _exists = where
    i0 = tl.minimum(i0, (steps - 1) // K * K)
    states = states_of(N, V)
    loaded = ()
    for i in tl.static_range(K):
        _t, mask = step_of(where, i0 + i, REVERSE, EVEN)
        row = row_of(s.u, channel, s.u_batch, s.u_step, where, i0, i, REVERSE, EVEN)
        u = tl.load(row, mask=mask, other=0.0)
        row = row_of(s.delta, channel, s.delta_batch, s.delta_step, where, i0, i, REVERSE, EVEN)
        delta = tl.load(row, mask=mask, other=0.0)
        B = tl.load(row_of(s.B + group * s.B_group, states, s.B_batch, s.B_step, where, i0, i, REVERSE, EVEN))
        C = tl.load(row_of(s.C + group * s.C_group, states, s.C_batch, s.C_step, where, i0, i, REVERSE, EVEN))
        total = ()
        z = ()
        dout = ()
        if SUM:
            total = tl.load(dense(c.total, c, where, i0, i, REVERSE, EVEN), mask=mask, other=0.0)
        if GATE:
            row = row_of(c.z, channel, c.z_batch, c.z_step, where, i0, i, REVERSE, EVEN)
            z = tl.load(row, mask=mask, other=0.0)
        if OUT:
            dout = tl.load(dense(c.dout, c, where, i0, i, REVERSE, EVEN), mask=mask, other=0.0)
        loaded = loaded + ((u, delta, B, C, total, z, dout),)
    return loaded


@triton.jit
def rows_from(where, i0, REVERSE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr, BD: tl.constexpr):
    """K steps from i0 on as rows of a tile: where they stand for `rows_of`, and which channels exist, (K, BD)."""
    first, steps, channel = where[2], where[3], where[4][None, :]
    k = tl.arange(0, K)[:, None]
    exists = tl.broadcast_to(where[5][None, :], [K, BD])
    if not EVEN:
        exists = exists & (i0 + k < steps)
        k = tl.minimum(k, steps - 1 - i0)
    if REVERSE:
        k = -k
    return (where[0], (first + time_of(i0, steps, REVERSE)).to(tl.int64), k, channel), exists


@triton.jit
def rows_of(tensor, batch_stride, stride, rows):
    """Addresses of those rows of a (b, l, d) tensor, (K, BD)."""
    batch, t0, k, channel = rows
    return tensor + (batch * batch_stride + t0 * stride) + (k * stride + channel)


@triton.jit
def take_row(tile, i: tl.constexpr):
    """Row i of a (K, BD) tile."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[0])[:, None] == i, tile, 0.0), axis=0)


@triton.jit
def step_size(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """dt of a step (BD,), or of steps (K, BD), 0 where masked: such a step neither decays nor adds."""
    dt = delta.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(mask, dt, 0.0)


@triton.jit
def goes_on(c, where, t, mask, REVERSE: tl.constexpr):
    """Whether step t of a chunk belongs to the sequence of the step before it in the scan (BD,); masked steps do."""
    batch, t = where[0], where[2] + t
    before = tl.minimum(t + 1, c.l - 1) if REVERSE else tl.maximum(t - 1, 0)  # the first of all goes on
    row = c.seq_idx + batch * c.l
    return (tl.load(row + t) == tl.load(row + before)) | (mask == 0)


@triton.jit
def decay_of(c, dt, exponent, where, t, mask, REVERSE: tl.constexpr):
    """exp(dt A) of step t of a chunk, a tile, 0 where a sequence begins."""
    decay = tl.exp2(for_states(dt) * exponent)
    if c.seq_idx is not None:
        decay = tl.where(for_states(goes_on(c, where, t, mask, REVERSE)), decay, 0.0)
    return decay


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z)."""
    return 1.0 / (1.0 + tl.exp2(z * -LOG2_E))


@triton.jit
def softplus(x):
    """log(1 + e^x), to a few units in the last place everywhere: max(x, 0) + log1p(y), y = e^-|x|.

    log1p(y) / y on [0, 1] is a polynomial fitted for the least relative error, 3e-8: the GPU's fast logarithm loses all
    digits near 1.
    """
    y = tl.exp2(tl.abs(x) * -LOG2_E)
    p = ((y * 0.0053645886 - 0.030064851) * y + 0.07920301) * y - 0.13753673
    p = (((p * y + 0.19153595) * y - 0.24857149) * y + 0.33321321) * y - 0.49999648
    return tl.maximum(x, 0.0) + y * (p * y + 1.0)


@triton.jit
def softplus_slope(y):
    """The derivative of softplus where its value is y: 1 - e^-y, by its series where the difference would cancel."""
    series = y * (1.0 - y * (1.0 / 2 - y * (1.0 / 6 - y * (1.0 / 24 - y * (1.0 / 120 - y * (1.0 / 720))))))
    return tl.where(y < 0.25, series, 1.0 - tl.exp2(-y * LOG2_E))
