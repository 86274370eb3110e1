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
