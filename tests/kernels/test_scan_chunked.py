"""The fast backends for a CPU: equal to the oracle with every gradient; chunked never holds a (b, d, l, n) tensor."""

from dataclasses import replace
from typing import Any

import pytest
import scan_cases
import torch
import torch.nn.functional as F
from almrr_ref.kernels import bidirectional_scan, chunked, selective_scan
from scan_cases import NUMBA, Case, make_arguments, needs_numba, relative_error, scan_and_gradients, to_double
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 1, 4, initial_state=True),
    Case(2, 5, 7, 3, D=False, z=False, delta_bias=False, delta_softplus=False),
    Case(3, 4, 31, 5, initial_state=True, reverse=True),
    Case(1, 6, 64, 16, g=2, strided=True),
    Case(2, 6, 65, 2, g=3, reverse=True, initial_state=True),
    Case(2, 4, 101, 7, g=1, z=False, strided=True, reverse=True),
    Case(1, 2, 9, 256, D=False),
    Case(2, 96, 37, 3, g=2, initial_state=True, strided=True),
]
fast = pytest.mark.parametrize("backend", ["chunked", NUMBA])
every = pytest.mark.parametrize("backend", ["reference", "chunked", NUMBA])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("backend", "small_workspace"),
    [("chunked", False), ("chunked", True), pytest.param("numba", False, marks=needs_numba)],
)
def test_float64_agrees_with_the_oracle_to_its_precision(
    case: Case, backend: str, small_workspace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_workspace:  # several parts of rows, several blocks of steps, a short last block
        monkeypatch.setattr(chunked, "WORKSPACE_ELEMENTS", 3 * case.d * case.n)
        monkeypatch.setattr(chunked, "MIN_STEPS", 2)
    arguments = to_double(make_arguments(case))
    found = scan_and_gradients(case, arguments, backend)
    scan_cases.assert_agrees(found, scan_cases.oracle(case, arguments), 1e-12, 1e-11)


@fast
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_as_good_as_float32_can_be(case: Case, backend: str) -> None:
    scan_cases.assert_scan_agrees(case, backend, 2e-6, 5e-6)


@fast
@pytest.mark.parametrize(
    "case", [Case(2, 3, 17, 4), Case(1, 6, 70, 5, g=2, D=False), Case(2, 3, 5, 2, z=False)], ids=str
)
def test_both_directions_at_once_agree_with_the_oracle(case: Case, backend: str) -> None:
    scan_cases.assert_both_directions_agree(replace(case, dtype=torch.float64), backend, 1e-12, 1e-11)


@fast
def test_one_direction_may_have_what_the_other_lacks(backend: str) -> None:
    case = Case(1, 4, 9, 2, dtype=torch.float64)
    arguments = scan_cases.two_directions(case)
    del arguments["D"], arguments["delta_bias_b"]
    found = scan_cases.bidirectional_and_gradients(case, arguments, backend)
    expected = scan_cases.bidirectional_and_gradients(case, arguments, "reference")
    scan_cases.assert_agrees(found, expected, 1e-12, 1e-11)


@every
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate_scans(backend: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_STEPS", 4)  # a sequence begins within a block, and at its edge
    l = 51 if backend == "numba" else 12  # which numbers its blocks of 16 steps from the end it begins at
    case = Case(2, 6, l, 3, g=2, initial_state=True, reverse=reverse, dtype=torch.float64)
    scan_cases.assert_packed_sequences_are_separate(case, backend, 1e-12, 1e-11)


@every
def test_packed_sequences_restart_in_both_directions(backend: str) -> None:
    arguments, lengths = scan_cases.two_directions(Case(1, 3, 7, 2, dtype=torch.float64)), [4, 3]
    numbers = torch.tensor([[1] * 4 + [2] * 3], dtype=torch.int32)
    moving = [name for name in arguments if name.rstrip("_b") in ("u", "delta", "z") or name[0] in "BC"]
    apart = []
    for i in range(2):
        piece = arguments | {name: arguments[name].split(lengths, dim=-1)[i] for name in moving}
        apart.append(bidirectional_scan(**piece, backend="reference"))
    packed = bidirectional_scan(**arguments, seq_idx=numbers, backend=backend)
    torch.testing.assert_close(packed, torch.cat(apart, dim=2), rtol=1e-12, atol=1e-12)


@every
def test_numbers_of_packed_sequences_may_be_any_64_bits(backend: str) -> None:
    arguments = make_arguments(Case(1, 3, 7, 2))
    numbers = torch.tensor([[0] * 4 + [2**32] * 3])
    y = selective_scan(**arguments, seq_idx=numbers, backend=backend)
    expected = selective_scan(**arguments, seq_idx=(numbers > 0).int(), backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("turn", [None, 0.7])
def test_an_exported_scan_restarts_and_takes_a_complex_A(reverse: bool, turn: float | None) -> None:
    arguments = {name: t.detach() for name, t in make_arguments(Case(1, 3, 7, 2, dtype=torch.float64)).items()}
    if turn is not None:
        arguments["A"] = torch.complex(arguments["A"], torch.full_like(arguments["A"], turn))
    flags = {"seq_idx": torch.tensor([[1] * 4 + [2] * 3]), "reverse": reverse}

    class Scan(torch.nn.Module):
        def forward(self, values: dict[str, Tensor]) -> Tensor:
            y = selective_scan(**values, **flags, backend="chunked")
            assert isinstance(y, Tensor)
            return y

    y = torch.export.export(Scan(), (arguments,)).module()(arguments)
    torch.testing.assert_close(y, selective_scan(**arguments, **flags, backend="reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_complex_state_is_the_sum_of_past_inputs(
    backend: str, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against cumulative sums of exponentials: h_t = sum_s exp(A (T_t - T_s)) x_s B_s, with T the sum of steps."""
    monkeypatch.setattr(chunked, "MAX_STEPS", 3)
    arguments = make_arguments(Case(2, 3, 7, 2, dtype=torch.float64, D=False, z=False, delta_bias=False))
    turn = torch.linspace(0.3, 2.0, 6).double().view(3, 2)
    arguments["A"] = torch.complex(arguments["A"].detach(), turn).requires_grad_()
    arguments["B"] = torch.complex(arguments["B"].detach(), arguments["C"].detach().flip(2)).requires_grad_()

    def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        dt = F.softplus(delta)
        total = dt.flip(2).cumsum(2).flip(2) if reverse else dt.cumsum(2)
        span = total[:, :, :, None] - total[:, :, None, :]  # (b, d, t, s)
        past = (torch.ones(7, 7).triu() if reverse else torch.ones(7, 7).tril())[..., None]
        weight = past * torch.exp(past * span[..., None] * A[:, None, None])
        h = torch.einsum("bdtsn,bds,bns->bdtn", weight, (dt * u).to(A.dtype), B)
        return 2 * torch.einsum("bdtn,bnt->bdt", h, C.to(A.dtype)).real

    expected = plain(*arguments.values())
    y = selective_scan(**arguments, delta_softplus=True, reverse=reverse, backend=backend)
    assert isinstance(y, Tensor)
    results = [{"y": one} | scan_cases.gradients([one], arguments) for one in (y, expected)]
    scan_cases.assert_agrees(*results, 1e-12, 1e-11)


@fast
def test_groups_may_differ_between_B_and_C(backend: str) -> None:
    arguments = to_double(make_arguments(Case(2, 6, 5, 3, g=2)))
    arguments["C"] = torch.randn(2, 3, 3, 5, dtype=torch.float64).requires_grad_()
    y = selective_scan(**arguments, backend=backend)
    torch.testing.assert_close(y, selective_scan(**arguments, backend="reference"), rtol=1e-12, atol=1e-12)


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_16_bit_results_from_a_float32_state(dtype: torch.dtype, backend: str) -> None:
    scan_cases.assert_16_bit_from_a_float32_state(Case(2, 3, 33, 4, dtype=dtype), backend, 2e-6)


@fast
def test_autocast_leaves_the_state_in_float32(backend: str) -> None:
    case = Case(1, 3, 20, 4)
    arguments = make_arguments(case)
    plain = scan_and_gradients(case, arguments, backend)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = scan_and_gradients(case, arguments, backend)
    assert all(torch.equal(plain[name], under_autocast[name]) for name in plain)


@every
def test_extreme_steps_stay_finite_and_right(backend: str) -> None:
    scan_cases.assert_extreme_steps_agree(Case(1, 4, 12, 3), backend, 2e-6, 5e-6)
    tiny = {name: t.detach() for name, t in make_arguments(Case(1, 4, 12, 3, D=False, z=False)).items()}
    tiny["delta"].fill_(-17.0)
    tiny["delta_bias"].zero_()
    found = selective_scan(**tiny, delta_softplus=True, backend=backend)
    assert relative_error(found, selective_scan(**to_double(tiny), delta_softplus=True, backend="reference")) < 1e-5


@every
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_own_row_and_future(backend: str, name: str) -> None:
    scan_cases.assert_nan_stays_in_its_row_and_future(Case(2, 3, 9, 4), backend, name)


class _LargestTensor(TorchDispatchMode):
    """Note the largest storage, in elements, that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_no_tensor_grows_with_length_times_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "WORKSPACE_ELEMENTS", 1 << 13)
    case = Case(2, 8, 512, 16)
    arguments = make_arguments(case)
    with _LargestTensor() as largest:
        scan_and_gradients(case, arguments, "chunked")
    assert largest.elements <= 4 * (1 << 13)  # the four work buffers of backward at most
    assert largest.elements < case.b * case.d * case.l * case.n / 2


@fast
def test_two_runs_are_bit_identical(backend: str) -> None:
    case = Case(2, 5, 40, 4)
    arguments = make_arguments(case)
    first, second = (scan_and_gradients(case, arguments, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["chunked", NUMBA])
def test_16_bit_gradients_of_groups_that_are_repeated_are_summed_in_float32(backend: str) -> None:
    """B for each of 48 channels, one C for all; the sum cancels."""
    generator = torch.Generator().manual_seed(194)
    shapes = (1, 48, 1), (1, 48, 1), (48, 1), (1, 48, 1, 1), (1, 1, 1), (1, 48, 1)
    u, delta, A, B, C, weight = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    arguments = u, delta.abs(), -A.abs().float(), B

    def gradient(backend: str, dtype: torch.dtype) -> float:
        leaf = C.to(dtype).requires_grad_()
        y = selective_scan(*(t.to(dtype) for t in arguments), leaf, backend=backend)
        return float(torch.autograd.grad(y, leaf, weight.to(dtype))[0])

    expected = gradient("reference", torch.float64)
    assert gradient(backend, torch.bfloat16) == pytest.approx(expected, rel=2**-7)


@pytest.mark.parametrize("backend", ["reference", "chunked", NUMBA])
def test_results_may_be_changed_in_place(backend: str) -> None:
    scan_cases.assert_results_may_be_changed_in_place(backend)


@every
def test_an_infinite_step_is_infinite(backend: str) -> None:
    """As softplus(inf) is: it forgets all that was before, and what it forgets has no gradient."""
    case = Case(1, 3, 9, 2, z=False, initial_state=True)
    arguments = make_arguments(case)
    with torch.no_grad():
        arguments["delta"][0, 1, 5] = float("inf")
    found, expected = (scan_and_gradients(case, arguments, one) for one in (backend, "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
