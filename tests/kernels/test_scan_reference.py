"""The oracle itself: against scipy's recursive filter, against finite differences, and against its own definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from almrr_ref.kernels import bidirectional_scan, causal_conv1d, selective_scan
from scan_cases import NUMBA, Case, make_arguments
from scipy.signal import lfilter

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def test_a_time_invariant_scan_is_scipys_recursive_filter() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 2, 31, generator=generator, dtype=torch.float64)
    A = -torch.rand(2, 3, generator=generator, dtype=torch.float64)
    B, C = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    step = 0.3
    y = selective_scan(
        u, torch.full_like(u, step), A, B.expand(1, 31, 3).mT, C.expand(1, 31, 3).mT, backend="reference"
    )
    for channel in range(2):
        expected = sum(
            lfilter([step * float(B[k]) * float(C[k])], [1.0, -np.exp(step * float(A[channel, k]))], u[0, channel])
            for k in range(3)
        )
        np.testing.assert_allclose(y[0, channel], expected, rtol=1e-12)


@both_backends
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(backend: str, reverse: bool) -> None:
    arguments = make_arguments(Case(2, 4, 5, 3, g=2, initial_state=True, dtype=torch.float64))

    def scan(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(arguments, values, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()))


def test_bias_softplus_skip_and_gate_follow_the_definition() -> None:
    arguments = make_arguments(Case(2, 3, 7, 2, dtype=torch.float64))
    u, delta, A, B, C, D, z, bias = arguments.values()
    plain = selective_scan(u, F.softplus(delta + bias[:, None]), A, B, C, backend="reference")
    full = selective_scan(**arguments, delta_softplus=True, backend="reference")
    torch.testing.assert_close(full, (plain + D[:, None] * u) * z * torch.sigmoid(z), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "chunked", NUMBA])
def test_steps_and_their_slopes_have_all_digits_of_float64(backend: str) -> None:
    """One step with A = 0 and ones elsewhere: y is softplus(delta), which PyTorch's is not by 1e-10 above 20."""
    raw = torch.tensor([-50.0, -9, -1, 0, 1, 19.9, 20.1, 25, 36, 39, 41, 1e4], dtype=torch.float64)
    delta, ones = raw.view(-1, 1, 1).clone().requires_grad_(), torch.ones(len(raw), 1, 1, dtype=torch.float64)
    y = selective_scan(ones, delta, torch.zeros(1, 1).double(), ones, ones, delta_softplus=True, backend=backend)
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    exact = raw.clamp(min=0) + torch.log1p(torch.exp(-raw.abs()))
    torch.testing.assert_close(y.flatten(), exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(delta.grad.flatten(), torch.sigmoid(raw), rtol=1e-14, atol=0)


@both_backends
def test_reverse_is_flip_scan_flip(backend: str) -> None:
    arguments = make_arguments(Case(1, 3, 9, 2, dtype=torch.float64, initial_state=True))
    flipped = {name: t.flip(-1) if name in ("u", "delta", "B", "C", "z") else t for name, t in arguments.items()}
    y, last = selective_scan(**arguments, reverse=True, return_last_state=True, backend=backend)
    y_flipped, last_flipped = selective_scan(**flipped, return_last_state=True, backend=backend)
    torch.testing.assert_close(y, y_flipped.flip(-1), **CLOSE)
    torch.testing.assert_close(last, last_flipped, **CLOSE)


@both_backends
def test_two_halves_joined_by_the_state_are_the_whole(backend: str) -> None:
    arguments = make_arguments(Case(2, 3, 11, 4, dtype=torch.float64))
    halves = [
        {name: t[..., part] if name in ("u", "delta", "B", "C", "z") else t for name, t in arguments.items()}
        for part in (slice(0, 4), slice(4, 11))
    ]
    whole, last = selective_scan(**arguments, return_last_state=True, backend=backend)
    first, middle = selective_scan(**halves[0], return_last_state=True, backend=backend)
    second, end = selective_scan(**halves[1], return_last_state=True, initial_state=middle, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole, **CLOSE)
    torch.testing.assert_close(end, last, **CLOSE)


@both_backends
def test_groups_are_separate_scans_of_their_channels(backend: str) -> None:
    arguments = make_arguments(Case(2, 6, 5, 3, g=2, z=False, delta_bias=False, dtype=torch.float64))
    u, delta, A, B, C, D = arguments.values()
    both = selective_scan(u, delta, A, B, C, D, backend=backend)
    for group, part in enumerate((slice(0, 3), slice(3, 6))):
        one = selective_scan(
            u[:, part], delta[:, part], A[part], B[:, group], C[:, group], D[part], backend="reference"
        )
        torch.testing.assert_close(both[:, part], one, **CLOSE)


def test_the_bidirectional_oracle_is_two_scans_one_sum_and_one_gate() -> None:
    forward, backward = (make_arguments(Case(2, 3, 6, 2, dtype=torch.float64), seed) for seed in (0, 1))
    z = forward.pop("z")
    backward.pop("z")
    total = selective_scan(**forward, delta_softplus=True, backend="reference")
    total = total + selective_scan(**backward, delta_softplus=True, reverse=True, backend="reference")
    named = {f"{name}_b": tensor for name, tensor in backward.items()}
    for backend in ("reference", "chunked"):
        found = bidirectional_scan(**forward, z=z, **named, scale=0.25, backend=backend)
        torch.testing.assert_close(found, 0.25 * total * F.silu(z), **CLOSE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("l", [1, 7])
def test_the_causal_convolution_is_a_cut_conv1d(reverse: bool, activation: str | None, l: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator).double() for shape in ((2, 3, l), (3, 1, 4), (3,)))
    expected = F.conv1d(x.flip(2) if reverse else x, weight, bias, padding=3, groups=3)[:, :, :l]
    expected = expected.flip(2) if reverse else expected
    y = causal_conv1d(x, weight, bias, reverse=reverse, activation=activation)
    torch.testing.assert_close(y, F.silu(expected) if activation else expected, **CLOSE)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_causal_convolution_keeps_the_order_in_memory(reverse: bool) -> None:
    """A sequence that is turned over costs more than twice the time for twice the length."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 7, 5, generator=generator), torch.randn(5, 4, generator=generator)  # x: (b, l, d)
    channels_last = causal_conv1d(x.transpose(1, 2), weight, reverse=reverse, backend="reference")
    time_last = causal_conv1d(x.transpose(1, 2).contiguous(), weight, reverse=reverse, backend="reference")
    assert (channels_last.stride(1), time_last.stride(2)) == (1, 1)
    torch.testing.assert_close(channels_last, time_last, rtol=1e-5, atol=1e-6)
