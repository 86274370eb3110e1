"""Autograd's corners on a CPU: what the table in kernels/README.md says is what happens."""

import corners
import pytest
import torch
from almrr_ref.kernels import selective_scan
from scan_cases import NUMBA, Case, gradients, make_arguments

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own notes on vmap and checkpoints


@pytest.mark.parametrize("backend", ["reference", "chunked", NUMBA])
@pytest.mark.parametrize("name", corners.CORNERS)
def test_the_table_of_corners_is_true(name: str, backend: str) -> None:
    corners.assert_corner(name, backend)


def test_the_table_has_every_corner() -> None:
    assert corners.table().keys() == corners.CORNERS.keys()


@pytest.mark.parametrize("backend", ["chunked", NUMBA])
def test_groups_compile_for_any_size(backend: str) -> None:
    """Also where B and C differ in their number."""
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, dynamic=True, fullgraph=True, backend="aot_eager")
    for g, more in ((2, 2), (6, 1)):
        arguments = make_arguments(Case(2, 12, 5, 3, g=g))
        arguments["C"] = arguments["C"].detach().repeat_interleave(more, dim=1).requires_grad_()
        found, expected = (scan(**arguments, backend=backend) for scan in (compiled, selective_scan))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients([found], arguments), gradients([expected], arguments))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_pass_pytorchs_own_check(reverse: bool, keep: bool) -> None:
    case = Case(2, 4, 3, 2, g=2, initial_state=True, D=False, z=False, delta_bias=False)
    arguments = (*(t.detach() for t in make_arguments(case).values()), torch.zeros(2, 3, dtype=torch.bool))
    y, last, starts = torch.ops.almrr_ref.scan(*arguments, reverse, keep)
    torch.library.opcheck(torch.ops.almrr_ref.scan.default, (*arguments, reverse, keep))
    torch.library.opcheck(torch.ops.almrr_ref.scan_backward.default, (y, last, starts, *arguments, reverse, keep))


@pytest.mark.parametrize("backend", ["chunked", NUMBA])
def test_a_gate_that_is_shut_gives_0_whatever_it_shuts(backend: str) -> None:
    u, A = torch.full((1, 1, 4), 9.0), -torch.ones(1, 1)
    z = torch.full((1, 1, 4), -3e38, requires_grad=True)
    y = selective_scan(u, torch.ones_like(u), A, u, u, z=z, backend=backend)
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    assert float(y.detach().abs().max()) == 0
    assert z.grad is not None
    assert float(z.grad.abs().max()) == 0
