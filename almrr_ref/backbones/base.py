"""What all backbones share: which blocks are built, the walk through them, and staying frozen.

Source: ALMRR section 3.2 ("a frozen ResNet-50 pre-trained on ImageNet is utilized as backbone").
Every backbone is a stem and four blocks at strides 4, 8, 16 and 32. Deviation from the authors' code, which computes
the last block and drops it: nothing beyond the last chosen block is built.
"""

from collections.abc import Sequence

from torch import Tensor, nn

BLOCKS = (1, 2, 3, 4)
STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """Frozen feature network: normalised images (b, 3, h, w) -> one map per chosen block, (b, c_k, h / s_k, w / s_k).

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
        chosen = tuple(blocks)
        if not chosen or any(number not in BLOCKS for number in chosen) or list(chosen) != sorted(set(chosen)):
            raise ValueError(f"blocks are {chosen}; choose from {BLOCKS}, at least one, each once and in rising order")
        self.blocks = chosen
        self.channels = tuple(block_channels[number - 1] for number in chosen)
        self.strides = tuple(STRIDES[number - 1] for number in chosen)
        self.layer_names = layer_names

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run the stem and the blocks: (b, 3, h, w) -> [(b, c_k, h / s_k, w / s_k), ...].

        Raises:
            ValueError: if the shape does not fit, or a side is shorter than the last chosen stride.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.strides[-1]:
            raise ValueError(
                f"expected images of shape (b, 3, h, w) with h and w at least {self.strides[-1]}, "
                f"got {tuple(images.shape)}; resize them or convert them to RGB"
            )
        x, maps = images, []
        for number, names in enumerate(self.layer_names[: self.blocks[-1] + 1]):
            for name in names:
                x = self.get_submodule(name)(x)
            if number in self.blocks:
                maps.append(x)
        return maps

    def block_of(self, key: str) -> int | None:
        """Find where a name of a state dict belongs: 0 for the stem, 1..4, or None (head, unknown)."""
        for number, names in enumerate(self.layer_names):
            if key.startswith(tuple(f"{name}." for name in names)):
                return number
        return None

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the parent module does: batch norms must keep ImageNet's statistics."""
        return super().train(False)


def numbered_layers(prefix: str, last_indices: Sequence[int]) -> list[list[str]]:
    """Name the layers of a numbered list in groups: ("f", (1, 3)) -> [["f.0", "f.1"], ["f.2", "f.3"]]."""
    first_indices = (0, *(last + 1 for last in last_indices))
    return [[f"{prefix}.{i}" for i in range(first, last + 1)] for first, last in zip(first_indices, last_indices)]
