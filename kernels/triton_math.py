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
import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Common(NamedTuple):
    """What both directions share: (b, l, d) tensors, None if absent, and sizes. `total` is y before scale and gate."""

    out: Any
    total: Any
    dout: Any
    dz: Any
    z: Any
    seq_idx: Any  # (b, l) contiguous int32: where the number changes, another sequence begins
    z_batch: Any
    z_step: Any
    scale: Any
    b: Any
    d: Any
    l: Any
    g: Any
    blocks: Any  # of BD channels in a group
    chunks: Any
    length: Any  # steps of a chunk


class Scan(NamedTuple):
    """One direction: operands, strides in elements, states and gradients; None if absent.

    States lie in whole tiles: tiles = (g blocks, BD, N). Chunks are in order of time.
    """

    u: Any
    delta: Any
    A: Any  # tiles
    B: Any
    C: Any
    D: Any
    delta_bias: Any
    u_batch: Any
    u_step: Any
    delta_batch: Any
    delta_step: Any
    B_batch: Any
    B_group: Any
    B_step: Any
    C_batch: Any
    C_group: Any
    C_step: Any
    starts: Any = None  # the state before a chunk, (b, chunks, tiles)
    last: Any = None  # the state after the last chunk, (b, tiles)
    saved: Any = None  # the state before every K steps, (b, chunks, length / K, g blocks, BD, N)
    ends: Any = None  # what a chunk alone adds to the state, or to its gradient, (b, chunks, tiles)
    decays: Any = None  # what it leaves of the state that enters it
    exits: Any = None  # the gradient that enters a chunk from the steps after it, (b, chunks, tiles)
    leaving: Any = None  # the gradient of the initial state, (b, tiles)
    du: Any = None  # (b, l, d), as ddelta
    ddelta: Any = None
    dA: Any = None  # per chunk, (b, chunks, tiles)
    dB: Any = None  # per block of channels, (blocks, b, g, l, N), as dC
    dC: Any = None
    dD: Any = None  # per chunk, (b, chunks, d), as dbias
    dbias: Any = None


@triton.jit
def place(c, EVEN: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """This program's batch index, group, block, chunk, tile number; channels (BD,), and which of them exist."""
    pid = tl.program_id(0)
    block, group, chunk = pid % c.blocks, pid // c.blocks % c.g, pid // (c.blocks * c.g) % c.chunks
    batch = (pid // (c.blocks * c.g * c.chunks) % c.b).to(tl.int64)
    channel = block * BD + tl.arange(0, BD)
    exists = tl.full([BD], True, tl.int1) if EVEN else channel < c.d // c.g
    return batch, group, block, chunk, group * c.blocks + block, group * (c.d // c.g) + channel, exists


@triton.jit
def is_first_direction(c):
    """Whether this program works on the first direction, where each has programs of its own."""
    return tl.program_id(0) < c.b * c.chunks * c.g * c.blocks


@triton.jit
def states_of(N: tl.constexpr, V: tl.constexpr):
    """The numbers of the states, (V, 1, N / V)."""
    return tl.arange(0, V)[:, None, None] + tl.arange(0, N // V)[None, None, :] * V


@triton.jit
def tile_of(N: tl.constexpr, V: tl.constexpr, BD: tl.constexpr):
    """Offsets in a tile (V, BD, N / V), whose states lie side by side."""
    return states_of(N, V) + tl.arange(0, BD)[None, :, None] * N


@triton.jit
def saved_at(c, batch, chunk, number, save, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """Where the state of this program's channels before K steps, the tile of that number, begins in `saved`."""
    return (((batch * c.chunks + chunk) * (c.length // K) + save) * c.g * c.blocks + number) * N * BD


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
def step_of(i, steps, exists, REVERSE: tl.constexpr, EVEN: tl.constexpr):
    """Step i of the scan as a step in time, both counted from the chunk's beginning, and the mask of its channels.

    A step past the chunk's end is masked, and its place is that of the last one. If EVEN there is none.
    """
    mask = exists
    if not EVEN:
        mask = exists & (i < steps)
        i = tl.minimum(i, steps - 1)
    return time_of(i, steps, REVERSE), mask


@triton.jit
def row_of(tensor, batch, batch_stride, first, i, stride):
    """Address of step i of the chunk that begins at `first`; i stride stays 32-bit, the rest is the same for all i."""
    return tensor + (batch * batch_stride + first.to(tl.int64) * stride) + i * stride


@triton.jit
def load_channels(vector, channel, exists, BD: tl.constexpr):
    """D or delta_bias of a block (BD,), 0 where it is absent."""
    if vector is not None:
        value = tl.load(vector + channel, mask=exists, other=0.0).to(tl.float32)
    else:
        value = tl.zeros([BD], tl.float32)
    return value


@triton.jit
def load_steps(
    c, s, batch, group, first, i0, steps, channel, exists, SUM: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr,
    REVERSE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """K steps from i0 on as they lie in memory: u, delta, total if SUM, z if GATE, dout if OUT, (BD,) each, B and C.

    All are asked for at once, and forward a pass of the loop ahead: memory takes longer to answer than K steps to
    compute. After the last step come the last K again.
    """
    i0 = tl.minimum(i0, (steps - 1) // K * K)
    u = ()
    delta = ()
    B = ()
    C = ()
    total = ()
    z = ()
    dout = ()
    for i in tl.static_range(K):
        t, mask = step_of(i0 + i, steps, exists, REVERSE, EVEN)
        u_row = row_of(s.u, batch, s.u_batch, first, t, s.u_step) + channel
        delta_row = row_of(s.delta, batch, s.delta_batch, first, t, s.delta_step) + channel
        u = u + (tl.load(u_row, mask=mask, other=0.0),)
        delta = delta + (tl.load(delta_row, mask=mask, other=0.0),)
        states = states_of(N, V)
        B = B + (tl.load(row_of(s.B + group * s.B_group, batch, s.B_batch, first, t, s.B_step) + states),)
        C = C + (tl.load(row_of(s.C + group * s.C_group, batch, s.C_batch, first, t, s.C_step) + states),)
        if SUM:
            total = total + (tl.load(dense(c.total, c, batch, first, t, channel), mask=mask, other=0.0),)
        if GATE:
            z_row = row_of(c.z, batch, c.z_batch, first, t, c.z_step) + channel
            z = z + (tl.load(z_row, mask=mask, other=0.0),)
        if OUT:
            dout = dout + (tl.load(dense(c.dout, c, batch, first, t, channel), mask=mask, other=0.0),)
    return u, delta, B, C, total, z, dout


@triton.jit
def step_size(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """dt of a step (BD,), 0 where masked: such a step neither decays nor adds."""
    dt = delta.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(mask, dt, 0.0)


@triton.jit
def goes_on(c, batch, first, i, mask, REVERSE: tl.constexpr):
    """Whether a step belongs to the sequence of the step before it in the scan (BD,); masked steps do."""
    t = first + i
    before = tl.minimum(t + 1, c.l - 1) if REVERSE else tl.maximum(t - 1, 0)  # the first of all goes on
    row = c.seq_idx + batch * c.l
    return (tl.load(row + t) == tl.load(row + before)) | (mask == 0)


@triton.jit
def decay_of(c, dt, exponent, batch, first, i, mask, REVERSE: tl.constexpr):
    """exp(dt A) of one step, a tile, 0 where a sequence begins."""
    decay = tl.exp2(for_states(dt) * exponent)
    if c.seq_idx is not None:
        decay = tl.where(for_states(goes_on(c, batch, first, i, mask, REVERSE)), decay, 0.0)
    return decay


@triton.jit
def dense(tensor, c, batch, first, i, channel):
    """Address of one step of a contiguous (b, l, d) tensor, (BD,)."""
    return row_of(tensor, batch * c.l, c.d, first, i, c.d) + channel


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


INTERPRETED = not isinstance(softplus, triton.JITFunction)  # decided by TRITON_INTERPRET when triton is imported


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    warps: int,
    arguments: dict[str, Any],
    registers: int | None = None,
) -> None:
    """Launch a kernel with those of `arguments` that its signature names; fused multiply-adds are asked for.

    registers: of a thread, at most.
    """
    named = {name: arguments[name] for name in kernel.arg_names}
    options = {"num_warps": warps, "enable_fp_fusion": True} | ({"maxnreg": registers} if registers else {})
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**named, **options)


def rows_of(sequence: Tensor) -> Tensor:
    """(b, d, l) -> (b, l, d) with channels side by side: a view where they lie so, a copy otherwise."""
    rows = sequence.mT
    return rows if rows.stride(2) == 1 else rows.contiguous()


def empty_like(sequence: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (b, d, l) tensor that lies in memory as (b, l, d)."""
    return sequence.new_empty(sequence.mT.shape, dtype=dtype).mT
