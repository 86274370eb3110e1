"""The Triton kernels in Triton's interpreter on the CPU, against the float64 oracle, every gradient included.

pytest does not collect this file by its name: the interpreter is chosen when triton is imported, for the whole process.
`test_triton_kernels.py` runs it in a process of its own; by hand:
TRITON_INTERPRET=1 pytest tests/kernels/interpreter_triton.py
"""

import dataclasses
from typing import Any

import corners
import numpy as np
import pytest
import scan_cases
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from almrr_ref.kernels import selective_scan, triton_conv, triton_math, triton_scan
from scan_cases import Case, make_arguments, relative_error, to_double
from triton.runtime import interpreter

from almrr_ref.deploy import triton_decoder
from almrr_ref.deploy.mfrm import interleave

LIMITS = FORWARD, BACKWARD = 5e-6, 2e-5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 4 or 2 channels, 4 states and chunks of 4 steps, so that tiny problems cross every edge."""
    small = {"BLOCK": 4, "STATES": 4, "SAVE_STEPS": 2, "MIN_STEPS": 4}
    small |= {"FORWARD": {"BD": 4, "V": 2}, "BACKWARD": {"BD": 2, "V": 4}}
    for name, value in small.items():
        monkeypatch.setattr(triton_scan, name, value)
    monkeypatch.setattr(triton_conv, "TILE", (4, 4))
    monkeypatch.setattr(triton_decoder, "TILE", (4, 4))


@pytest.fixture(autouse=True)
def _no_needless_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the interpreter's time, for nothing here.

    It patches triton.language again at every call of a function, and tries every sum and product of 32-bit integers in
    64 bits, too: the sizes below are too small to overflow.
    """
    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder

    def patch_once(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return patch(fn) if any(tl.core.is_builtin(language.load) for language in languages) else None

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


# Lengths 1, odd, chunk edges, with and without masks; then every flag on and off; groups; passes over states.
CASES = [
    Case(1, 5, 1, 2, reverse=True, initial_state=True),
    Case(1, 4, 2, 2, initial_state=True),
    Case(1, 4, 8, 2, reverse=True, initial_state=True),
    Case(1, 5, 4, 2, reverse=True),
    Case(1, 5, 5, 2, initial_state=True),
    Case(1, 3, 7, 1, reverse=True, initial_state=True),
    Case(1, 3, 13, 1, reverse=True),
    Case(2, 2, 3, 1, D=False),
    Case(1, 2, 3, 1, z=False),
    Case(1, 2, 3, 1, delta_bias=False),
    Case(1, 2, 3, 1, delta_softplus=False),
    Case(1, 2, 3, 3, D=False, z=False, delta_bias=False, delta_softplus=False, reverse=True),
    Case(1, 2, 9, 1, D=False, z=False, delta_bias=False, delta_softplus=False, initial_state=True),
    Case(2, 3, 5, 2, g=1, strided=True),
    Case(1, 6, 3, 2, g=2, reverse=True),
    Case(1, 6, 5, 1, g=3, strided=True, initial_state=True),
    Case(3, 1, 3, 2, strided=True),
    Case(1, 2, 3, 9, initial_state=True),
    Case(1, 3, 5, 5, reverse=True, D=False, initial_state=True),
]
BOTH_WAYS = [
    Case(1, 3, 1, 2),
    Case(1, 4, 8, 2),
    Case(1, 5, 5, 1),
    Case(2, 2, 3, 2, D=False, delta_bias=False),
    Case(1, 4, 5, 1, g=2, z=False),
    Case(1, 2, 3, 5, strided=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_agrees_with_the_oracle(case: Case) -> None:
    scan_cases.assert_scan_agrees(case, "triton", *LIMITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("l", "reverse"), [(5, True), (4, False)])
def test_16_bit_inputs_keep_a_float32_state(dtype: torch.dtype, l: int, reverse: bool) -> None:
    case = Case(1, 3, l, 2, dtype=dtype, reverse=reverse)
    scan_cases.assert_16_bit_from_a_float32_state(case, "triton", FORWARD)


@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
def test_both_directions_in_one_launch_agree_with_the_oracle(case: Case) -> None:
    scan_cases.assert_both_directions_agree(case, "triton", *LIMITS)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate_scans(reverse: bool) -> None:
    case = Case(1, 3, 9, 2, initial_state=True, reverse=reverse)
    scan_cases.assert_packed_sequences_are_separate(case, "triton", *LIMITS)


def test_a_call_without_gradients_gives_the_same_result() -> None:
    arguments = make_arguments(Case(1, 2, 5, 2))
    with torch.no_grad():
        alone = selective_scan(**arguments, delta_softplus=True, backend="triton")
    assert torch.equal(alone, selective_scan(**arguments, delta_softplus=True, backend="triton"))


def test_results_may_be_changed_in_place() -> None:
    scan_cases.assert_results_may_be_changed_in_place("triton")


def test_extreme_steps_stay_finite_and_right() -> None:
    scan_cases.assert_extreme_steps_agree(Case(1, 4, 9, 2, initial_state=True), "triton", *LIMITS)


@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_own_row_and_future(name: str) -> None:
    scan_cases.assert_nan_stays_in_its_row_and_future(Case(2, 3, 9, 1), "triton", name)


def test_the_softplus_series_is_exact_where_the_plain_logarithm_is_not() -> None:
    @triton.jit
    def kernel(x, y, slope, N: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, N)
        value = triton_math.softplus(tl.load(x + i))
        tl.store(y + i, value)
        tl.store(slope + i, triton_math.softplus_slope(value))

    x = torch.linspace(-80, 40, 1024)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    kernel[(1,)](x, y, slope, 1024)
    exact = np.logaddexp(0, x.double().numpy())
    np.testing.assert_allclose(y.numpy(), exact, rtol=8e-6)  # 80 log2(e) rounded costs that much in e^-80
    np.testing.assert_allclose(slope.numpy(), -np.expm1(-exact), rtol=8e-6)


@pytest.mark.parametrize("l", [1, 4, 5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_agrees_with_its_oracle(l: int, reverse: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (torch.randn(shape, generator=generator) for shape in ((2, 10, l), (5, 4), (5, 2)))
    flags = {"reverse": reverse, "activation": "silu" if bias else None}
    if not bias:
        flags["seq_idx"] = torch.arange(l).div(3, rounding_mode="floor").expand(2, l)
    scan_cases.assert_convolution_agrees(x[:, 3:8], weight, offset[:, 0] if bias else None, LIMITS, **flags)


@pytest.mark.filterwarnings("ignore")  # dynamo's own notes on Python versions
@pytest.mark.parametrize("name", corners.CORNERS)
def test_the_table_of_corners_is_true(name: str) -> None:
    corners.assert_corner(name, "triton")


def test_the_operators_pass_pytorchs_own_check() -> None:
    case = Case(1, 1, 3, 2, g=1, initial_state=True)  # 3 steps: every state that is kept is written, and compared here
    arguments = [t.detach() for t in make_arguments(case).values()]
    u, delta, A, B, C, D, z, bias, h = arguments
    numbers = torch.tensor([[1, 1, 2]], dtype=torch.int32)
    scan = (u, delta, A, B, C, D, bias, *[None] * 7, z, h, numbers, False, True, 1.0, True, True)
    y, last, saved, ungated = torch.ops.almrr_ref.selective_scan(*scan)
    weight, flags = torch.randn(1, 4), (numbers, False, True)
    for name, values in {
        "selective_scan": scan,
        "selective_scan_backward": (y, last, saved, ungated, *scan),
        "causal_conv1d": (u, weight, D, *flags),
        "causal_conv1d_backward": (y, u, weight, D, *flags),
    }.items():
        torch.library.opcheck(getattr(torch.ops.almrr_ref, name).default, values)


def test_a_gradient_through_the_last_state_alone_is_right() -> None:
    arguments = make_arguments(Case(1, 2, 5, 2, D=False, z=False))
    names = ("u", "delta", "A", "B", "delta_bias")
    gradients = []
    for backend, values in (("triton", arguments), ("reference", to_double(arguments))):
        _, last = selective_scan(**values, delta_softplus=True, return_last_state=True, backend=backend)
        gradients.append(torch.autograd.grad(last.square().sum(), [values[name] for name in names]))
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < BACKWARD


def decoder_arguments(h: int, w: int, size: tuple[int, int], c: int) -> tuple[Any, ...]:
    """Draw the arguments of `decoder_mean`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, c, h - i, w - j) for i in (0, 1) for j in (0, 1)] + [(c,), (1, c, 1, 1), (1,)]
    *phases, bias, weight, offset = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    return phases, bias, weight, offset, size


# Channels that fill blocks and do not; sizes larger than y's, smaller, the same, and of one row.
DECODERS = [(2, 3, (4, 5), 5), (3, 3, (6, 7), 4), (3, 2, (5, 3), 3), (3, 5, (3, 4), 9), (2, 2, (1, 9), 1)]


@pytest.mark.parametrize(("h", "w", "size", "c"), DECODERS)
def test_the_decoders_mean_agrees_with_pytorchs_resize(h: int, w: int, size: tuple[int, int], c: int) -> None:
    phases, bias, weight, offset, _ = arguments = decoder_arguments(h, w, size, c)
    y = interleave(phases).double() + bias.double()[:, None, None]
    y = F.interpolate(y, size, mode="bilinear", align_corners=False).sigmoid()
    expected = F.conv2d(y, weight.double(), offset.double())
    assert relative_error(triton_decoder.decoder_mean(*arguments), expected) < FORWARD


def test_the_decoders_operator_passes_pytorchs_own_check() -> None:
    torch.library.opcheck(torch.ops.almrr_ref.decoder_mean.default, decoder_arguments(2, 2, (1, 3), 2))
