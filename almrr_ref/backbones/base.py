"""What all backbones share: which blocks are built, the walk through them, and staying frozen.

Source: ALMRR section 3.2 ("a frozen ResNet-50 pre-trained on ImageNet is utilized as backbone").
Deviation from the authors' code, which computes the last block and drops it: nothing beyond the last chosen block is
built.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

BLOCKS = (1, 2, 3, 4)
STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """Frozen stem and four blocks: normalised images (b, 3, h, w) -> maps of the chosen blocks, (b, c_k, h/s_k, w/s_k).

    `channels` and `strides` hold c_k and s_k. RGB images in [0, 1] are normalised by `mean` and `std` before.

    Args:
        blocks: the chosen blocks, rising numbers out of 1..4.
        block_channels: channels of all four blocks.
        layer_names: names of the submodules to run one after the other, for the stem and each of the four blocks. A
            subclass registers those up to the last chosen block.
    Raises:
        ValueError: if the choice of blocks is not valid.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __init__(
        self, blocks: Sequence[int], block_channels: Sequence[int], layer_names: Sequence[Sequence[str]]
    ) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        if not blocks or not set(blocks) <= set(BLOCKS) or any(a >= b for a, b in pairwise(blocks)):
            raise ValueError(f"blocks are {self.blocks}; choose at least one of {BLOCKS}, in rising order")
        self.channels = tuple(block_channels[number - 1] for number in blocks)
        self.strides = tuple(STRIDES[number - 1] for number in blocks)
        self.layer_names = layer_names

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for number, names in enumerate(self.layer_names[: self.blocks[-1] + 1]):
            for name in names:
                x = self.get_submodule(name)(x)
            if number in self.blocks:
                maps.append(x)
        return maps

    def block_of(self, key: str) -> int:
        """Find where a name of a state dict belongs: 0 for the stem, 1..4, or -1 (head, unknown)."""
        for number, names in enumerate(self.layer_names):
            if key.startswith(tuple(f"{name}." for name in names)):
                return number
        return -1

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the parent module does: batch norms must keep ImageNet's statistics."""
        return super().train(False)


def numbered_layers(prefix: str, last_indices: Sequence[int]) -> list[list[str]]:
    """Name the layers of a numbered list in groups: ("f", (1, 3)) -> [["f.0", "f.1"], ["f.2", "f.3"]]."""
    return [[f"{prefix}.{i}" for i in range(last + 1, end + 1)] for last, end in pairwise((-1, *last_indices))]
