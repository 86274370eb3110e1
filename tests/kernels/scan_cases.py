"""Inputs for the scan tests, and what every backend is held to: the float64 oracle, every gradient included."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from almrr_ref.kernels import bidirectional_scan, causal_conv1d, selective_scan
from torch import Tensor

Arguments = dict[str, Tensor]
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
NUMBA = pytest.param("numba", marks=needs_numba)


@dataclass(frozen=True)
class Case:
    """One combination of sizes and flags; `g` groups, 0 for B and C without a group axis."""

    b: int
    d: int
    l: int
    n: int
    g: int = 0
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    delta_softplus: bool = True
    initial_state: bool = False
    reverse: bool = False
    dtype: torch.dtype = torch.float32
    strided: bool = False


def make_arguments(case: Case, seed: int = 0, device: str = "cpu") -> Arguments:
    """Draw the arguments of `selective_scan` for a case: leaves with gradients; 16-bit ones are u, delta, B, C, z."""
    generator = torch.Generator().manual_seed(seed)
    b, d, l, n = case.b, case.d, case.l, case.n
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def sequence(*shape: int) -> Tensor:
        if not case.strided:
            return normal(*shape, dtype=case.dtype)
        return normal(*shape[:-2], shape[-1], 2 * shape[-2], dtype=case.dtype).transpose(-1, -2)[..., : shape[-2], :]

    def channels() -> Tensor:
        return normal(d, 2)[:, 0] if case.strided else normal(d)

    projection = (b, case.g, n, l) if case.g else (b, n, l)
    made = {
        "u": sequence(b, d, l),
        "delta": sequence(b, d, l) if case.delta_softplus else 0.1 * sequence(b, d, l).abs(),
        "A": -0.1 - normal(d, n).abs(),
        "B": sequence(*projection),
        "C": sequence(*projection),
    }
    if case.D:
        made["D"] = channels()
    if case.z:
        made["z"] = sequence(b, d, l)
    if case.delta_bias:
        made["delta_bias"] = channels() if case.delta_softplus else 0.1 * normal(d).abs()
    if case.initial_state:
        made["initial_state"] = normal(b, d, n)
    return {name: tensor.detach().requires_grad_() for name, tensor in made.items()}


def scan_and_gradients(case: Case, arguments: Arguments, backend: str) -> Arguments:
    """Run `selective_scan` and return y, last state, and the gradient of a random projection of both per argument."""
    y, last = selective_scan(
        **arguments, delta_softplus=case.delta_softplus, return_last_state=True, reverse=case.reverse, backend=backend
    )
    return {"y": y, "last": last} | gradients([y, last], arguments)


def bidirectional_and_gradients(case: Case, arguments: Arguments, backend: str) -> Arguments:
    """As `scan_and_gradients` for `bidirectional_scan`; the backward direction's names end in _b."""
    y = bidirectional_scan(
        **{"D": None, "z": None, "delta_bias": None, "D_b": None, "delta_bias_b": None, **arguments},
        delta_softplus=case.delta_softplus,
        backend=backend,
    )
    return {"y": y} | gradients([y], arguments)


def two_directions(case: Case, device: str = "cpu") -> Arguments:
    """Arguments of `bidirectional_scan` for a case."""
    forward, backward = (make_arguments(case, seed, device) for seed in (0, 1))
    return forward | {f"{name}_b": tensor for name, tensor in backward.items() if name != "z"}


def gradients(outputs: list[Tensor], arguments: Arguments) -> Arguments:
    """Gradient of the sum of fixed random projections of the outputs, per argument, under the name d<argument>."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)).sum()
        for out in outputs
    )
    assert isinstance(total, Tensor)
    by_argument = torch.autograd.grad(total, list(arguments.values()))
    return {f"d{name}": gradient for name, gradient in zip(arguments, by_argument, strict=True)}


def to_double(arguments: Arguments) -> Arguments:
    """The same values as float64 leaves on the CPU, for the oracle."""
    return {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in arguments.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite if anything found is not finite."""
    if expected.is_complex():
        found, expected = (torch.view_as_real(t.detach().resolve_conj()) for t in (found, expected))
    difference = (found.detach().cpu().double() - expected.detach().double()).abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / max(expected.detach().abs().max().item(), 1e-30)


def assert_agrees(found: Arguments, expected: Arguments, forward: float, backward: float) -> None:
    """Assert the relative error of every result (`forward`) and of every gradient (`backward`)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = forward if name in ("y", "last") else backward
        error = relative_error(found[name], value)
        assert error <= limit, f"{name}: relative error {error:.2e}, expected at most {limit:.0e}"


def assert_scan_agrees(case: Case, backend: str, forward: float, backward: float, device: str = "cpu") -> None:
    """Hold a backend's scan and gradients against the oracle."""
    arguments = make_arguments(case, device=device)
    assert_agrees(scan_and_gradients(case, arguments, backend), oracle(case, arguments), forward, backward)


def assert_both_directions_agree(
    case: Case, backend: str, forward: float, backward: float, device: str = "cpu"
) -> None:
    """Hold a backend's bidirectional scan and gradients against the oracle."""
    arguments = two_directions(case, device)
    found = bidirectional_and_gradients(case, arguments, backend)
    assert_agrees(found, bidirectional_and_gradients(case, to_double(arguments), "reference"), forward, backward)


def assert_16_bit_from_a_float32_state(case: Case, backend: str, forward: float, device: str = "cpu") -> None:
    """16-bit results are the oracle's to their own precision; the state is held to `forward` all the same."""
    arguments = make_arguments(case, device=device)
    found, expected = scan_and_gradients(case, arguments, backend), oracle(case, arguments)
    assert (found["y"].dtype, found["last"].dtype) == (case.dtype, torch.float32)
    assert relative_error(found["last"], expected["last"]) < forward
    precision = torch.finfo(case.dtype).eps
    assert_agrees({**found, "last": expected["last"]}, expected, precision, 4 * precision)


def assert_extreme_steps_agree(case: Case, backend: str, forward: float, backward: float, device: str = "cpu") -> None:
    """Steps that underflow, that forget everything, and that a plain log(1 + e^x) would lose."""
    arguments = make_arguments(case, device=device)
    with torch.no_grad():
        arguments["delta_bias"].zero_()
        arguments["delta"][0, 0] = -80.0  # softplus underflows towards 0
        arguments["delta"][0, 1, ::2] = 1e4  # forgets everything, between steps that do not
        arguments["delta"][0, 2] = -17.0  # log(1 + exp(x)) is 0 here
    assert_agrees(scan_and_gradients(case, arguments, backend), oracle(case, arguments), forward, backward)


def assert_nan_stays_in_its_row_and_future(case: Case, backend: str, name: str, device: str = "cpu") -> None:
    """One NaN of u, delta or z changes only its own row (b, d), from its step on (z: that step alone)."""
    arguments = {key: value.detach() for key, value in make_arguments(case, device=device).items()}
    clean = selective_scan(**arguments, delta_softplus=True, backend=backend)
    arguments[name][1, 2, 5] = float("nan")
    y = selective_scan(**arguments, delta_softplus=True, backend=backend)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 2, 5 : 6 if name == "z" else None] = True
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], clean[~touched])


def assert_packed_sequences_are_separate(
    case: Case, backend: str, forward: float, backward: float, device: str = "cpu"
) -> None:
    """Hold a packed scan, its gradients included, against the oracle's scans of each sequence."""
    arguments = make_arguments(case, device=device)
    lengths = [case.l // 3, 1, case.l - case.l // 3 - 1]
    seq_idx = torch.tensor([3, 4, 3], dtype=torch.int32, device=device).repeat_interleave(
        torch.tensor(lengths).to(device)
    )
    numbers = seq_idx.expand(case.b, -1)
    flags: dict[str, Any] = {"delta_softplus": case.delta_softplus, "reverse": case.reverse, "return_last_state": True}
    y, last = selective_scan(**arguments, **flags, seq_idx=numbers, backend=backend)
    found = {"y": y, "last": last} | gradients([y, last], arguments)
    exact = to_double(arguments)
    ys: list[Tensor] = []
    state = exact.get("initial_state")
    pieces = {name: t.split(lengths, dim=-1) for name, t in exact.items() if name in ("u", "delta", "B", "C", "z")}
    for i in (2, 1, 0) if case.reverse else (0, 1, 2):
        piece = {**exact, **{name: t[i] for name, t in pieces.items()}, "initial_state": state}
        y, last = selective_scan(**piece, **flags, backend="reference")
        ys, state = ([y, *ys] if case.reverse else [*ys, y]), None
    y = torch.cat(ys, dim=2)
    assert_agrees(found, {"y": y, "last": last} | gradients([y, last], exact), forward, backward)


def assert_convolution_agrees(
    x: Tensor, weight: Tensor, bias: Tensor | None, limits: tuple[float, float], **flags: Any
) -> None:
    """Hold the Triton convolution and its gradients against the float64 oracle on the CPU."""
    arguments = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    arguments = {name: value.requires_grad_() for name, value in arguments.items()}
    results = []
    for values, backend in ((arguments, "triton"), (to_double(arguments), "reference")):
        y = causal_conv1d(**values, **flags, backend=backend)
        results.append({"y": y} | gradients([y], values))
    assert_agrees(*results, *limits)


def assert_compiles_without_a_break(case: Case, compiler: str, device: str = "cpu") -> None:
    """torch.compile takes convolution and scan as whole operators and changes neither results nor gradients."""
    arguments = make_arguments(case, device=device)

    def block(u: Tensor, weight: Tensor) -> Tensor:
        convolved = causal_conv1d(u, weight, backend="triton")
        return selective_scan(**{**arguments, "u": convolved}, delta_softplus=True, backend="triton")

    weight = torch.randn(case.d, 4, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    inputs = {"u": arguments["u"], "weight": weight}
    eager, compiled = (f(*inputs.values()) for f in (block, torch.compile(block, backend=compiler, fullgraph=True)))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients([compiled], inputs), gradients([eager], inputs))


def oracle(case: Case, arguments: Arguments) -> Arguments:
    """Results and gradients of the float64 reference."""
    return scan_and_gradients(case, to_double(arguments), "reference")


def assert_results_may_be_changed_in_place(backend: str) -> None:
    """As mamba_ssm's may: no result is a view."""
    for case in (Case(1, 3, 5, 2), Case(1, 3, 5, 2, D=False, z=False)):
        arguments, plain = make_arguments(case), make_arguments(case)
        changed = selective_scan(**arguments, backend=backend)
        assert isinstance(changed, Tensor)
        changed *= 2
        expected = gradients([2 * selective_scan(**plain, backend=backend)], plain)
        for name, gradient in gradients([changed], arguments).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)
    x = torch.randn(1, 3, 5, requires_grad=True)
    y = causal_conv1d(x, torch.ones(3, 2), backend="triton" if backend == "triton" else "reference")
    y *= 2
