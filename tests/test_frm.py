"""The refinement U-Net: shape of DRAEM's, odd sizes, every parameter used."""

import pytest
import torch

from almrr_ref.frm import FRM


@pytest.mark.parametrize("shape", [(17, 23), (8, 40)])
def test_logits_have_the_size_of_the_input(shape: tuple[int, int]) -> None:
    frm = FRM(in_channels=2, width=3, levels=3)
    logits = frm(torch.randn(2, 2, *shape))
    assert logits.shape == (2, 2, *shape)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in frm.parameters())


def test_paper_size_has_the_levels_and_widths_of_draem() -> None:
    frm = FRM(in_channels=2, width=64)
    assert [level[0].out_channels for level in frm.down] == [64, 128, 256, 512, 512, 512]
    assert [merge[0].in_channels for merge in frm.merge] == [1024, 256 + 512, 128 + 256, 64 + 128, 128]


def test_skip_connections_carry_detail_that_the_deepest_level_cannot() -> None:
    """A single bright cell must change the logits next to it more than far away."""
    torch.manual_seed(0)
    frm = FRM(in_channels=1, width=4, levels=3).eval()
    flat, spot = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    spot[..., 5, 5] = 1
    change = (frm(spot) - frm(flat)).detach().abs().sum(dim=1)[0]
    assert float(change[4:7, 4:7].mean()) > 5 * float(change[20:, 20:].mean())
