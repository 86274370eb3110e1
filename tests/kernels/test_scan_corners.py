"""Autograd's corners on a CPU: what the table in kernels/README.md says is what happens."""

import corners
import pytest
import torch
from scan_cases import NUMBA, Case, make_arguments

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own notes on vmap and checkpoints


@pytest.mark.parametrize("backend", ["reference", "chunked", NUMBA])
@pytest.mark.parametrize("name", corners.CORNERS)
def test_the_table_of_corners_is_true(name: str, backend: str) -> None:
    corners.assert_corner(name, backend)


def test_the_table_has_every_corner() -> None:
    assert corners.table().keys() == corners.CORNERS.keys()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_pass_pytorchs_own_check(reverse: bool, keep: bool) -> None:
    case = Case(2, 4, 3, 2, g=2, initial_state=True, D=False, z=False, delta_bias=False)
    arguments = (*(t.detach() for t in make_arguments(case).values()), torch.zeros(2, 3, dtype=torch.bool))
    y, last, starts = torch.ops.almrr_ref.scan(*arguments, reverse, keep)
    torch.library.opcheck(torch.ops.almrr_ref.scan.default, (*arguments, reverse, keep))
    torch.library.opcheck(torch.ops.almrr_ref.scan_backward.default, (y, last, starts, *arguments, reverse, keep))
