"""The Triton kernels in Triton's interpreter on the CPU, against the float64 oracle, every gradient included.

pytest does not collect this file by its name: the interpreter is chosen when triton is imported, for the whole process.
`test_triton_kernels.py` runs it in a process of its own; by hand: TRITON_INTERPRET=1 pytest tests/interpreter_triton.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from almrr_ref.kernels import causal_conv1d, selective_scan, triton_conv, triton_launch, triton_math
from scan_cases import (
    Case,
    assert_agrees,
    bidirectional_and_gradients,
    gradients,
    make_arguments,
    oracle,
    relative_error,
    scan_and_gradients,
    to_double,
    two_directions,
)

FORWARD, BACKWARD = 5e-6, 2e-5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 steps in halves of 8, so that short sequences cross chunk edges."""
    monkeypatch.setattr(triton_launch, "TILE_STEPS", 16)
    monkeypatch.setattr(triton_launch, "BACKWARD_STEPS", 16)
    monkeypatch.setattr(triton_launch, "CARRY_TILE", (4, 2))
    monkeypatch.setattr(triton_conv, "TILE_STEPS", 16)


# 46 combinations: lengths 1, primes and chunk edges, with every flag on and off.
LENGTHS = [
    replace(Case(1, 3, l, 2), reverse=reverse, initial_state=state)
    for l in (1, 2, 13, 15, 16, 17, 31, 32, 33)
    for reverse, state in ((False, False), (True, True))
]
FLAGS = [
    Case(2, 2, 7, 1, D=False),
    Case(2, 2, 7, 1, z=False),
    Case(2, 2, 7, 1, delta_bias=False),
    Case(2, 2, 7, 1, delta_softplus=False),
    Case(1, 2, 7, 3, D=False, z=False, delta_bias=False, delta_softplus=False, reverse=True),
    Case(1, 2, 19, 1, D=False, z=False, delta_bias=False, delta_softplus=False, initial_state=True),
    Case(1, 5, 9, 2),
    Case(1, 6, 9, 2, g=1, strided=True),
    Case(1, 6, 9, 2, g=2, reverse=True),
    Case(1, 6, 17, 1, g=3, strided=True, initial_state=True),
    Case(2, 1, 53, 1, reverse=True),
    Case(1, 1, 67, 2, initial_state=True),
    Case(1, 1, 4, 17),
    Case(3, 1, 5, 2, strided=True),
]
HALVED = [Case(1, 3, l, 2, reverse=reverse, initial_state=True) for l in (16, 32) for reverse in (False, True)]
SIXTEEN_BIT = [
    Case(1, 3, l, 2, dtype=dtype, reverse=reverse)
    for dtype in (torch.bfloat16, torch.float16)
    for l, reverse in ((5, True), (17, False))
]
BOTH_WAYS = [
    Case(1, 3, 1, 2),
    Case(1, 3, 16, 2),
    Case(1, 5, 23, 1),
    Case(2, 2, 9, 2, D=False, delta_bias=False),
    Case(1, 4, 9, 1, g=2, z=False),
    Case(1, 2, 17, 2, strided=True),
]


@pytest.mark.parametrize("case", LENGTHS + FLAGS, ids=str)
def test_float32_agrees_with_the_oracle(case: Case) -> None:
    arguments = make_arguments(case)
    assert_agrees(scan_and_gradients(case, arguments, "triton"), oracle(case, arguments), FORWARD, BACKWARD)


@pytest.mark.parametrize("case", HALVED, ids=str)
def test_a_chunk_taken_backward_in_two_halves_agrees_with_the_oracle(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "BACKWARD_STEPS", 8)
    arguments = make_arguments(case)
    assert_agrees(scan_and_gradients(case, arguments, "triton"), oracle(case, arguments), FORWARD, BACKWARD)


@pytest.mark.parametrize("case", SIXTEEN_BIT, ids=str)
def test_16_bit_inputs_keep_a_float32_state(case: Case) -> None:
    arguments = make_arguments(case)
    found, expected = scan_and_gradients(case, arguments, "triton"), oracle(case, arguments)
    assert found["y"].dtype == case.dtype
    assert relative_error(found["last"], expected["last"]) < FORWARD
    half = torch.finfo(case.dtype).eps
    assert_agrees({**found, "last": expected["last"]}, expected, half, 4 * half)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
def test_both_directions_in_one_launch_agree_with_the_oracle(
    case: Case, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if halves:
        if case.l % 16:
            return  # such lengths are never halved
        monkeypatch.setattr(triton_launch, "BACKWARD_STEPS", 8)
    arguments = two_directions(case)
    found = bidirectional_and_gradients(case, arguments, "triton")
    expected = bidirectional_and_gradients(case, to_double(arguments), "reference")
    assert_agrees(found, expected, FORWARD, BACKWARD)


def test_a_program_that_walks_over_channels_adds_up_its_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 11, 5, 2)
    arguments = make_arguments(case)
    for programs in (1, 2):
        monkeypatch.setattr("almrr_ref.kernels.triton_scan.PROGRAMS", programs)
        found = scan_and_gradients(case, arguments, "triton")
        assert_agrees(found, oracle(case, arguments), FORWARD, BACKWARD)


def test_no_gradient_leaves_nothing_for_backward_and_changes_nothing() -> None:
    arguments = make_arguments(Case(1, 2, 17, 2))
    with torch.no_grad():
        alone = selective_scan(**arguments, delta_softplus=True, backend="triton")
    assert torch.equal(alone, selective_scan(**arguments, delta_softplus=True, backend="triton"))


def test_extreme_steps_stay_finite_and_right() -> None:
    case = Case(1, 4, 19, 2, initial_state=True)
    arguments = make_arguments(case)
    with torch.no_grad():
        arguments["delta_bias"].zero_()
        arguments["delta"][0, 0] = -80.0  # softplus underflows towards 0
        arguments["delta"][0, 1, ::2] = 1e4  # forgets everything, between steps that do not
        arguments["delta"][0, 2] = -17.0  # log(1 + exp(x)) is 0 here
    assert_agrees(scan_and_gradients(case, arguments, "triton"), oracle(case, arguments), FORWARD, BACKWARD)


@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_own_row_and_future(name: str) -> None:
    arguments = {key: value.detach() for key, value in make_arguments(Case(2, 3, 18, 1)).items()}
    clean = selective_scan(**arguments, delta_softplus=True, backend="triton")
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2, 5] = float("nan")
    y = selective_scan(**arguments, delta_softplus=True, backend="triton")
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 2, 5 : 6 if name == "z" else None] = True
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], clean[~touched])


def test_the_softplus_series_is_exact_where_the_plain_logarithm_is_not() -> None:
    import triton
    import triton.language as tl

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


@pytest.mark.parametrize("l", [1, 16, 33])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_agrees_with_its_oracle(l: int, reverse: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "x": torch.randn(2, 10, l, generator=generator)[:, 3:8],
        "weight": torch.randn(5, 4, generator=generator),
    }
    if bias:
        arguments["bias"] = torch.randn(5, generator=generator)
    arguments = {name: value.requires_grad_() for name, value in arguments.items()}
    doubled = to_double(arguments)
    activation = "silu" if bias else None
    y = causal_conv1d(**arguments, reverse=reverse, activation=activation, backend="triton")
    expected = causal_conv1d(**doubled, reverse=reverse, activation=activation, backend="reference")
    found = {"y": y} | gradients([y], arguments)
    assert_agrees(found, {"y": expected} | gradients([expected], doubled), FORWARD, BACKWARD)


@pytest.mark.filterwarnings("ignore")  # dynamo's own notes on Python versions
def test_torch_compile_takes_scan_and_convolution_without_a_break() -> None:
    case = Case(1, 2, 9, 2)
    arguments = make_arguments(case)

    def block(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        u = causal_conv1d(u, weight, backend="triton")
        rest = {name: value for name, value in arguments.items() if name != "u"}
        return selective_scan(u, **rest, delta_softplus=True, backend="triton")

    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    inputs = {"u": arguments["u"], "weight": weight}
    eager, compiled = (f(*inputs.values()) for f in (block, torch.compile(block, backend="aot_eager", fullgraph=True)))
    torch.testing.assert_close(compiled, eager)
    expected = gradients([eager], inputs)
    for name, gradient in gradients([compiled], inputs).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_gradient_through_the_last_state_alone_is_right() -> None:
    arguments = make_arguments(Case(1, 2, 17, 2, D=False, z=False))
    found = {}
    for backend, values in (("triton", arguments), ("reference", to_double(arguments))):
        _, last = selective_scan(**values, delta_softplus=True, return_last_state=True, backend=backend)
        names = ("u", "delta", "A", "B", "delta_bias")
        found[backend] = torch.autograd.grad(last.square().sum(), [values[name] for name in names])
    for one, other in zip(found["triton"], found["reference"], strict=True):
        assert relative_error(one, other) < BACKWARD


def test_a_cpu_tensor_is_accepted_in_the_interpreter_and_float64_is_not() -> None:
    arguments = make_arguments(Case(1, 1, 2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64: expected 16-bit or float32"):
        selective_scan(**arguments, backend="triton")
