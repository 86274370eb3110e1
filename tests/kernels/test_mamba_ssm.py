"""The names of mamba_ssm and causal_conv1d: steps and whole sequences agree, states are written in place."""

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from almrr_ref.kernels import causal_conv1d, mamba_ssm, selective_scan
from scan_cases import Case, make_arguments
from torch import Tensor

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_one_by_one_are_the_scan() -> None:
    case = Case(2, 3, 6, 4, dtype=torch.float64, initial_state=True)
    arguments = {name: t.detach() for name, t in make_arguments(case).items()}
    whole, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend="reference")
    state = arguments.pop("initial_state").clone()
    u, delta, A, B, C, D, z, bias = arguments.values()
    for t in range(6):
        now = (value[..., t] for value in (u, delta))
        y = mamba_ssm.selective_state_update(
            state, *now, A, B[..., t], C[..., t], D, z[..., t], dt_bias=bias, dt_softplus=True
        )
        torch.testing.assert_close(y, whole[..., t], **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)


def test_heads_share_the_projections_of_their_group() -> None:
    heads, d, n = 4, 3, 5
    state, x, dt = normal(2, heads, d, n), normal(2, heads, d, seed=1), normal(2, heads, d, seed=2).abs()
    A, B, C = -normal(heads, d, n, seed=3).abs(), normal(2, 2, n, seed=4), normal(2, 2, n, seed=5)
    expected = state.clone()
    y = mamba_ssm.selective_state_update(state, x, dt, A, B, C)
    for head in range(heads):
        one = expected[:, head].clone()
        group = (slice(None), head // 2)
        y_one = mamba_ssm.selective_state_update(one, x[:, head], dt[:, head], A[head], B[group], C[group])
        torch.testing.assert_close((y[:, head], state[:, head]), (y_one, one), **CLOSE)


def test_indices_choose_the_rows_of_a_larger_state_and_minus_one_none() -> None:
    pool, x, A = normal(4, 3, 2), normal(3, 3, seed=1), -normal(3, 2, seed=2).abs()
    B, dt, indices = normal(3, 2, seed=3), torch.full((3, 3), 0.5).double(), torch.tensor([2, -1, 0], dtype=torch.int32)
    before = pool.clone()
    y = mamba_ssm.selective_state_update(pool, x, dt, A, B, B, state_batch_indices=indices)
    assert torch.equal(pool[[1, 3]], before[[1, 3]])
    assert not y[1].any()
    alone = before[[2, 0]].clone()
    y_alone = mamba_ssm.selective_state_update(alone, x[[0, 2]], dt[:2], A, B[[0, 2]], B[[0, 2]])
    torch.testing.assert_close((y[[0, 2]], pool[[2, 0]]), (y_alone, alone), **CLOSE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_two_halves_joined_by_the_state_are_the_whole_convolution(reverse: bool, cut: int) -> None:
    x, weight, bias = normal(2, 3, 8), normal(3, 4, seed=1), normal(3, seed=2)
    halves = x.split([8 - cut, cut] if reverse else [cut, 8 - cut], dim=2)
    first, second = halves[::-1] if reverse else halves
    y_first, state = causal_conv1d(first, weight, bias, reverse=reverse, return_final_state=True)
    y_second, end = causal_conv1d(second, weight, bias, reverse=reverse, initial_state=state, return_final_state=True)
    y = torch.cat([y_second, y_first] if reverse else [y_first, y_second], dim=2)
    torch.testing.assert_close(y, causal_conv1d(x, weight, bias, reverse=reverse), **CLOSE)
    assert torch.equal(end, x[:, :, :3] if reverse else x[:, :, -3:])


def test_a_state_of_the_convolution_keeps_the_digits_that_x_has_not() -> None:
    x, weight, state = normal(2, 3, 2).float(), normal(3, 4, seed=1), normal(2, 3, 3, seed=2)
    y, end = causal_conv1d(x, weight, initial_state=state, return_final_state=True)
    expected, exact = causal_conv1d(x.double(), weight, initial_state=state, return_final_state=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected.float())
    assert torch.equal(end, exact)


@pytest.mark.parametrize("activation", ["silu", None])
def test_updates_step_by_step_are_the_convolution(activation: str | None) -> None:
    x, weight, bias = normal(2, 3, 7), normal(3, 4, seed=1), normal(3, seed=2)
    whole, final = mamba_ssm.causal_conv1d_fn(x, weight, bias, return_final_states=True, activation=activation)
    state, ring, pool = torch.zeros(2, 3, 5).double(), torch.zeros(2, 3, 5).double(), torch.zeros(4, 3, 3).double()
    rows = torch.tensor([3, 1])
    for t in range(7):
        now, taken = x[:, :, t], torch.full((2,), t, dtype=torch.int32)
        step = (weight, bias, activation)
        for y in (
            mamba_ssm.causal_conv1d_update(now, state, *step),
            mamba_ssm.causal_conv1d_update(now[..., None], ring, *step, cache_seqlens=taken)[..., 0],
            mamba_ssm.causal_conv1d_update(now, pool, *step, conv_state_indices=rows),
        ):
            torch.testing.assert_close(y, whole[:, :, t], **CLOSE)
    assert torch.equal(state[:, :, 2:], final)
    assert torch.equal(ring, x[:, :, [5, 6, 2, 3, 4]])
    assert torch.equal(pool[[3, 1]], final)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_convolution_is_one_for_each_sequence(reverse: bool) -> None:
    x, weight, bias = normal(2, 3, 9), normal(3, 4, seed=1), normal(3, seed=2)
    seq_idx = torch.tensor([[0] * 2 + [1] * 7, [5] * 3 + [0] * 1 + [5] * 5], dtype=torch.int32)
    y = causal_conv1d(x, weight, bias, reverse=reverse, seq_idx=seq_idx)
    for row, lengths in enumerate(([2, 7], [3, 1, 5])):
        apart = [causal_conv1d(one, weight, bias, reverse=reverse) for one in x[row : row + 1].split(lengths, dim=2)]
        torch.testing.assert_close(y[row : row + 1], torch.cat(apart, dim=2), **CLOSE)


def test_the_inner_block_is_convolution_projections_scan_and_output() -> None:
    d, n, r, l = 4, 3, 2, 5
    xz, conv, out = normal(2, 2 * d, l), normal(d, 1, 4, seed=1), normal(6, d, seed=2)
    x_proj, dt_proj, A = normal(r + 2 * n, d, seed=3), normal(d, r, seed=4), -normal(d, n, seed=5).abs()
    weights = {"b_rms_weight": normal(n, seed=6), "c_rms_weight": normal(n, seed=7), "dt_rms_weight": normal(d, seed=8)}
    B_bias, eps = normal(n, seed=9), 1e-3
    found = mamba_ssm.mamba_inner_fn(
        xz, conv, None, x_proj, dt_proj, out, None, A, B_proj_bias=B_bias, **weights, b_c_dt_rms_eps=eps
    )
    u = F.silu(F.conv1d(xz[:, :d], conv, padding=3, groups=d)[:, :, :l])
    low, B, C = (x_proj @ u).split([r, n, n], dim=1)

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None] * value / (value.square().mean(dim=1, keepdim=True) + eps).sqrt()

    B, C, delta = norm(B + B_bias[:, None], weights["b_rms_weight"]), norm(C, weights["c_rms_weight"]), dt_proj @ low
    delta = norm(delta, weights["dt_rms_weight"])
    y = selective_scan(u, delta, A, B, C, z=xz[:, d:], delta_softplus=True, backend="reference")
    torch.testing.assert_close(found, (out @ y).transpose(1, 2), **CLOSE)


def test_cumulative_lengths_are_separate_scans() -> None:
    arguments = make_arguments(Case(1, 3, 8, 2, dtype=torch.float64))
    cu_seqlens, lengths = torch.tensor([0, 3, 4, 8], dtype=torch.int32), [3, 1, 4]
    packed = mamba_ssm.selective_scan_fn(**arguments, delta_softplus=True, cu_seqlens=cu_seqlens)
    pieces = {name: arguments[name].split(lengths, dim=2) for name in ("u", "delta", "B", "C", "z")}
    apart = [
        selective_scan(**(arguments | {k: t[i] for k, t in pieces.items()}), delta_softplus=True, backend="reference")
        for i in range(3)
    ]
    torch.testing.assert_close(packed, torch.cat(apart, dim=2), **CLOSE)
    compiled = torch.compile(mamba_ssm.selective_scan_fn, fullgraph=True, backend="eager")
    assert packed.equal(compiled(**arguments, delta_softplus=True, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 8], "cu_seqlens is a list: expected a tensor"),
        (torch.tensor([0.0, 8.0]), r"cu_seqlens is torch.float32 of shape \(2,\) on cpu: expected int32 or int64"),
        (torch.tensor([[0, 8]]), r"of shape \(1, 2\) on cpu: expected int32 or int64, \(k \+ 1,\), on cpu"),
        (torch.tensor([0, 3, 9]), r"cu_seqlens is \[0, 3, 9\]: expected rising numbers, the first 0 and the last l"),
        (torch.tensor([3, 5, 8]), "expected rising numbers"),
        (torch.tensor([0, 5, 3, 8]), "expected rising numbers"),
    ],
)
def test_cumulative_lengths_that_do_not_divide_the_sequence_are_refused(cu_seqlens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba_ssm.selective_scan_fn(**make_arguments(Case(1, 3, 8, 2)), cu_seqlens=cu_seqlens)


def test_alternating_parts_of_B_and_C_are_complex_numbers() -> None:
    u, delta, A, B, C = (normal(*s, seed=i) for i, s in enumerate([(2, 3, 5)] * 2 + [(3, 2)] + [(2, 2, 10)] * 2))
    A = torch.complex(-A.abs(), A)
    found = mamba_ssm.selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    B, C = (torch.complex(t[..., ::2], t[..., 1::2]) for t in (B, C))
    torch.testing.assert_close(
        found, selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference"), **CLOSE
    )
    xz, conv, x_proj = normal(1, 6, 4), normal(3, 1, 2, seed=1), normal(1 + 8, 3, seed=2)
    block = xz, conv, None, x_proj, normal(3, 1, seed=3), torch.eye(3).double(), None, A
    u = causal_conv1d(xz[:, :3], conv)
    assert isinstance(u, Tensor)
    low, B, C = (x_proj @ u).split([1, 4, 4], dim=1)
    B, C = (torch.complex(t[:, ::2], t[:, 1::2]) for t in (B, C))
    y = selective_scan(u, block[4] @ low, A, B, C, z=xz[:, 3:], delta_softplus=True, backend="reference")
    torch.testing.assert_close(mamba_ssm.mamba_inner_fn(*block), y.transpose(1, 2), **CLOSE)


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after the test what it registers, and whatever is installed under these names before."""
    monkeypatch.setattr(
        sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith(("mamba_", "causal_"))}
    )


@pytest.mark.usefixtures("clean_modules")
def test_code_that_imports_the_packages_finds_ours() -> None:
    mamba_ssm.install_as_mamba_ssm(replace=True)
    mamba_ssm.install_as_mamba_ssm()  # once more does no harm
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    assert interface.selective_scan_fn is mamba_ssm.selective_scan_fn
    import causal_conv1d as package
    import mamba_ssm.ops.triton.selective_state_update as update

    assert update.selective_state_update is mamba_ssm.selective_state_update
    assert package.causal_conv1d_fn is mamba_ssm.causal_conv1d_fn
    assert importlib.util.find_spec("causal_conv1d") is not None
    with pytest.raises(ModuleNotFoundError, match="ssd_combined"):
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@pytest.mark.usefixtures("clean_modules")
def test_an_installed_package_is_not_hidden_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "causal_conv1d.py").write_text("MINE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"causal_conv1d is installed at .*: pass replace=True"):
        mamba_ssm.install_as_mamba_ssm()
    assert importlib.import_module("causal_conv1d").MINE
    mamba_ssm.install_as_mamba_ssm(replace=True)
    assert not hasattr(importlib.import_module("causal_conv1d"), "MINE")


def test_a_step_takes_a_complex_A_as_the_scan_does() -> None:
    A = torch.complex(-normal(3, 4).abs(), normal(3, 4, seed=1))
    B = torch.complex(normal(2, 4, 6, seed=2), normal(2, 4, 6, seed=3))
    u, delta, C = normal(2, 3, 6, seed=4), normal(2, 3, 6, seed=5).abs(), B.flip(2)
    state = torch.zeros(2, 3, 4, dtype=torch.complex128)
    whole = selective_scan(u, delta, A, B, C, backend="reference")
    for t in range(6):
        y = mamba_ssm.selective_state_update(state, u[..., t], delta[..., t], A, B[..., t], C[..., t])
        torch.testing.assert_close(y, whole[..., t], **CLOSE)


def test_a_padded_row_is_0_whatever_lies_in_the_first_state() -> None:
    pool, x, A, B = torch.full((2, 3, 2), torch.nan).double(), normal(1, 3), -torch.ones(3, 2).double(), normal(1, 2)
    y = mamba_ssm.selective_state_update(pool, x, x.abs(), A, B, B, state_batch_indices=torch.tensor([-1]))
    assert not y.any()


@pytest.mark.parametrize("given", ["B", "C"])
def test_the_inner_block_may_be_given_one_of_B_and_C(given: str) -> None:
    d, n, r, l = 4, 3, 2, 5
    xz, conv, out = normal(2, 2 * d, l), normal(d, 1, 4, seed=1), normal(6, d, seed=2)
    x_proj, dt_proj, A = normal(r + n, d, seed=3), normal(d, r, seed=4), -normal(d, n, seed=5).abs()
    known = {given: normal(2, n, l, seed=6)}
    found = mamba_ssm.mamba_inner_fn(xz, conv, None, x_proj, dt_proj, out, None, A, **known)
    u = F.silu(F.conv1d(xz[:, :d], conv, padding=3, groups=d)[:, :, :l])
    low, projected = (x_proj @ u).split([r, n], dim=1)
    B, C = known.get("B", projected), known.get("C", projected)
    y = selective_scan(u, dt_proj @ low, A, B, C, z=xz[:, d:], delta_softplus=True, backend="reference")
    torch.testing.assert_close(found, (out @ y).transpose(1, 2), **CLOSE)


def test_a_padded_row_of_a_convolution_is_0_and_touches_no_state() -> None:
    state, before = (torch.arange(18.0).view(3, 2, 3) for _ in range(2))
    step = torch.ones(2, 2), state, torch.ones(2, 4)
    y = mamba_ssm.causal_conv1d_update(*step, conv_state_indices=torch.tensor([1, -1]))
    expected = mamba_ssm.causal_conv1d_update(torch.ones(1, 2), before[1:2], torch.ones(2, 4))
    assert torch.equal(y, torch.cat([expected, torch.zeros(1, 2)]))
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("name", "shape"), [("state", (2, 4, 3)), ("dt", (1, 1)), ("A", (3,)), ("D", (1,)), ("z", (4,)), ("dt_bias", ())]
)
def test_a_step_refuses_what_would_broadcast(name: str, shape: tuple[int, ...]) -> None:
    sizes = {"state": (1, 4, 3), "x": (1, 4), "dt": (1, 4), "A": (4, 3), "B": (1, 3), "C": (1, 3)}
    sizes |= {"D": (4,), "z": (1, 4), "dt_bias": (4,)}
    given = {each: normal(*size) for each, size in (sizes | {name: shape}).items()}
    with pytest.raises(ValueError, match=rf"{name} has shape .*: expected \("):
        mamba_ssm.selective_state_update(**given)


def test_an_update_refuses_the_state_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"conv_state has shape \(1, 3, 3\): expected \(b, d, s\) = \(2, 3, 3\)"):
        mamba_ssm.causal_conv1d_update(normal(2, 3), normal(1, 3, 3), normal(3, 4))


def test_a_state_remembers_no_gradient() -> None:
    """Which would grow with every token."""
    x, A, B = (normal(*shape).requires_grad_() for shape in ((2, 4), (4, 3), (2, 3)))
    state, margin, rows = normal(2, 4, 3), normal(2, 4, 3), torch.tensor([1, 0])
    for chosen in (None, rows):
        mamba_ssm.selective_state_update(state, x, x, A, B, B, state_batch_indices=chosen)
        mamba_ssm.causal_conv1d_update(x, margin, normal(4, 4), conv_state_indices=chosen)
    assert not state.requires_grad
    assert not margin.requires_grad
