"""The boundary of the kernels: drop-in calls, the choice of the backend, and bad input named in one ValueError."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from almrr_ref.kernels import bidirectional_scan, causal_conv1d, checks, selective_scan
from scan_cases import Case, make_arguments, two_directions

from almrr_ref import kernels


def test_a_positional_call_in_the_order_of_mamba_ssm_works_unchanged() -> None:
    u, delta, A, B, C, D, z, delta_bias = make_arguments(Case(2, 4, 5, 3)).values()
    y, last = selective_scan(u, delta, A, B, C, D, z, delta_bias, True, True)
    named, named_last = selective_scan(
        u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True, return_last_state=True
    )
    assert torch.equal(y, named)
    assert torch.equal(last, named_last)
    assert (y.shape, last.shape) == ((2, 4, 5), (2, 4, 3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.zeros(2, 4), r"u has shape \(2, 4\): expected \(b, d, l\)"),
        ("u", torch.zeros(2, 4, 0), r"u has shape \(2, 4, 0\): .*at least 1"),
        ("u", torch.zeros(2, 4, 5, dtype=torch.int64), "u is torch.int64: expected float16"),
        ("u", [1.0], "u is a list: expected a tensor"),
        ("delta", torch.zeros(2, 4, 6), r"delta has shape \(2, 4, 6\): expected \(b, d, l\) = \(2, 4, 5\)"),
        ("B", torch.zeros(2, 3, 5, dtype=torch.complex64), "B is torch.complex64: expected real values"),
        ("u", torch.zeros(0, 4, 5), r"u has shape \(0, 4, 5\): .*at least 1"),
        ("A", torch.zeros(5, 3), r"A has shape \(5, 3\): expected \(d, n\) = \(4, n\)"),
        ("A", torch.zeros(4, 257), "A has shape .*at most 256"),
        ("B", torch.zeros(2, 3, 6), r"B has shape \(2, 3, 6\): expected \(b, n, l\) = \(2, 3, 5\)"),
        ("B", torch.zeros(4, 3), r"B has shape \(4, 3\): expected \(b, n, l\)"),
        ("C", torch.zeros(2, 3, 3, 5), "C has 3 groups: .*divides d = 4"),
        ("D", torch.zeros(5), r"D has shape \(5,\): expected \(d,\) = \(4,\)"),
        ("z", torch.zeros(2, 5, 4), r"z has shape \(2, 5, 4\)"),
        ("delta_bias", torch.zeros(4, 1), r"delta_bias has shape \(4, 1\)"),
        ("initial_state", torch.zeros(2, 3, 4), r"initial_state has shape \(2, 3, 4\): expected \(b, d, n\)"),
        ("B", torch.zeros(2, 3, 5, device="meta"), "B is on meta: expected cpu"),
        ("seq_idx", [[0] * 5] * 2, "seq_idx is a list: expected a tensor"),
        ("seq_idx", torch.zeros(2, 5), r"seq_idx is torch.float32 of shape \(2, 5\) on cpu: expected int32 or int64"),
        ("seq_idx", torch.zeros(2, 5, dtype=torch.int32, device="meta"), "on meta: expected .*on cpu"),
        ("backend", "cuda", "backend is 'cuda': expected \"auto\""),
    ],
)
def test_bad_input_is_named_with_what_came_and_what_was_expected(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make_arguments(Case(2, 4, 5, 3, initial_state=True)), name: value})


LONGER, WIDER = (
    {name: value for name, value in two_directions(case).items() if name.endswith("_b")}
    for case in (Case(2, 4, 6, 3), Case(2, 4, 5, 2))
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_b": torch.zeros(2, 4, 6)}, "delta_b has shape"),
        ({"D_b": torch.zeros(3)}, r"D_b has shape \(3,\)"),
        ({"z": torch.zeros(2, 4, 6)}, "z has shape"),
        (LONGER, "u_b has shape"),
        ({"u_b": torch.zeros(2, 4, 5, device="meta")}, "u_b is on meta"),
        (WIDER, "A_b has shape"),
        ({"A_b": torch.zeros(4, 3, dtype=torch.complex64)}, "A_b has shape .*complex only if A"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "A_b has shape .*complex only if A"),
    ],
)
def test_bad_input_of_the_backward_direction_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bidirectional_scan(**{**two_directions(Case(2, 4, 5, 3)), **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 4), "x has shape"),
        ("weight", torch.zeros(3, 2), r"weight has shape \(3, 2\): expected \(d, k\)"),
        ("bias", torch.zeros(3), "bias has shape"),
        ("activation", "relu", "activation is 'relu'"),
        ("backend", "chunked", "backend is 'chunked'"),
    ],
)
def test_bad_input_of_the_convolution_is_named(name: str, value: Any, message: str) -> None:
    good = {"x": torch.zeros(1, 4, 5), "weight": torch.zeros(4, 2), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**good, name: value})


def test_a_second_copy_of_the_folder_can_be_imported_as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does, which looks for the package `kernels`, from a checkout's root."""
    if not hasattr(sys.modules.get("kernels"), "selective_scan"):  # else transformers, in another test, has imported it
        for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:  # such as these tests' folder
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    copy = importlib.import_module("kernels")
    assert copy.selective_scan is not kernels.selective_scan
    arguments = make_arguments(Case(1, 2, 3, 2))
    results = (one.selective_scan(**arguments, backend="chunked") for one in (copy, kernels))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("has_numba", "dtype", "is_complex", "device", "chosen"),
    [
        (True, torch.float32, False, "cpu", "numba"),
        (True, torch.float64, False, "cpu", "numba"),
        (True, torch.float32, True, "cpu", "chunked"),
        (True, torch.float32, False, "meta", "chunked"),
        (False, torch.float32, False, "cpu", "chunked"),
    ],
)
def test_auto_takes_the_fastest_backend_that_can(
    has_numba: bool, dtype: torch.dtype, is_complex: bool, device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "HAS_NUMBA", has_numba)
    u = torch.zeros(1, device=device)
    assert checks.choose_backend("auto", "u", u, dtype, checks.ON_CPU, is_complex) == chosen


def test_numba_that_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HAS_NUMBA", True)
    named: tuple[str, str, Any, torch.dtype, tuple[str, ...]] = (
        "numba", "u", torch.zeros(1), torch.float32, checks.ON_CPU
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"A is complex: expected real values for backend=\"numba\""):
        checks.choose_backend(*named, is_complex=True)
    with pytest.raises(ValueError, match='u is on meta: expected a CPU tensor for backend="numba"'):
        checks.choose_backend("numba", "u", torch.zeros(1, device="meta"), torch.float32, checks.ON_CPU)
    monkeypatch.setattr(checks, "HAS_NUMBA", False)
    with pytest.raises(ValueError, match='backend is "numba", which is not installed: pip install numba'):
        checks.choose_backend(*named)


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_auto_without_a_numba_that_can_be_imported_warns_and_takes_chunked(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str, *_: object) -> None:
        if name == "almrr_ref.kernels.numba_scan":
            raise error("libllvmlite.so cannot be loaded")

    monkeypatch.setattr(checks, "HAS_NUMBA", True)
    monkeypatch.delitem(sys.modules, "almrr_ref.kernels.numba_scan", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    arguments = make_arguments(Case(1, 2, 3, 2))
    with pytest.warns(UserWarning, match="numba cannot be imported, using the slower chunked backend"):
        y = selective_scan(**arguments)
    assert torch.equal(y, selective_scan(**arguments, backend="chunked"))
    with pytest.raises(error):
        selective_scan(**arguments, backend="numba")
