"""A torch.export program of a network with a memory, whose patches lie in the packed search alone."""

import dataclasses

import pytest

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.onnx import check_export, to_pt2
from almrr_ref.model import ALMRR

SIZES = ModelConfig(
    backbone="resnet18", weights="random", image_size=32, blocks=(1, 2), reduced_channels=8, d_model=12, depth=1,
    decoder_channels=(10, 6), frm_width=4, frm_levels=2,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
def test_a_network_with_a_memory_can_be_saved_as_a_torch_export_program() -> None:
    model = ALMRR(dataclasses.replace(SIZES, frm_input="memory", memory=5)).eval()
    assert check_export(to_pt2(model.fuse()), ".pt2", model) < 1e-5
