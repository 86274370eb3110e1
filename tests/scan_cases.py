"""Inputs for the scan tests, and the comparison of a backend with the float64 oracle, every gradient included."""

from dataclasses import dataclass

import torch
from almrr_ref.kernels import bidirectional_scan, selective_scan
from torch import Tensor

Arguments = dict[str, Tensor]


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

    projection = (b, case.g, n, l) if case.g else (b, n, l)
    made = {
        "u": sequence(b, d, l),
        "delta": sequence(b, d, l) if case.delta_softplus else 0.1 * sequence(b, d, l).abs(),
        "A": -0.1 - normal(d, n).abs(),
        "B": sequence(*projection),
        "C": sequence(*projection),
    }
    if case.D:
        made["D"] = normal(d)
    if case.z:
        made["z"] = sequence(b, d, l)
    if case.delta_bias:
        made["delta_bias"] = normal(d) if case.delta_softplus else 0.1 * normal(d).abs()
    if case.initial_state:
        made["initial_state"] = normal(b, d, n)
    return {name: tensor.detach().requires_grad_() for name, tensor in made.items()}


def scan_and_gradients(case: Case, arguments: Arguments, backend: str, weigh_state: bool = True) -> Arguments:
    """Run `selective_scan` and return y, last state, and the gradient of a random projection of both per argument."""
    y, last = selective_scan(
        **arguments, delta_softplus=case.delta_softplus, return_last_state=True, reverse=case.reverse, backend=backend
    )
    return {"y": y, "last": last} | gradients([y, last] if weigh_state else [y], arguments)


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
    found = torch.autograd.grad(total, list(arguments.values()))
    return {f"d{name}": gradient for name, gradient in zip(arguments, found, strict=True)}


def to_double(arguments: Arguments) -> Arguments:
    """The same values as float64 leaves on the CPU, for the oracle."""
    return {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in arguments.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite if anything found is not finite."""
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


def oracle(case: Case, arguments: Arguments) -> Arguments:
    """Results and gradients of the float64 reference."""
    return scan_and_gradients(case, to_double(arguments), "reference")
