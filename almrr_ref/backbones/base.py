"""What all backbones share: which blocks are built, the walk through them, and staying frozen.

Source: ALMRR section 3.2 ("a frozen ResNet-50 pre-trained on ImageNet is utilized as backbone").
Every backbone is a stem and up to four blocks at strides 4, 8, 16 and 32. Deviation from the authors' code, which
computes the last block and drops it: nothing beyond the last chosen block is built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCKS = (1, 2, 3, 4)
STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_blocks(blocks: Sequence[int]) -> tuple[int, ...]:
    """Check a choice of blocks: sequence -> tuple.

    Args:
        blocks: numbers out of 1..4, each at most once, rising.
    Raises:
        ValueError: if it is empty, out of order or names a block that does not exist.
    """
    chosen = tuple(blocks)
    if not chosen or any(number not in BLOCKS for number in chosen) or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"blocks are {chosen}; choose from {BLOCKS}, at least one, each once and in rising order")
    return tuple(int(number) for number in chosen)


class Backbone(nn.Module):
    """Frozen feature network: normalised images (b, 3, h, w) -> list of maps (b, c_k, h / s_k, w / s_k).

    One map per chosen block, in order. `channels` and `strides` hold c_k and s_k, `mean` and `std` the constants by
    which RGB images in [0, 1] are normalised before. A subclass provides `stem`, `block` and `block_of`.

    Args:
        blocks: the chosen blocks, rising numbers out of 1..4.
        block_channels: channels of all four blocks.
    Raises:
        ValueError: if the choice of blocks is not valid.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __init__(self, blocks: Sequence[int], block_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = check_blocks(blocks)
        self.channels = tuple(block_channels[number - 1] for number in self.blocks)
        self.strides = tuple(STRIDES[number - 1] for number in self.blocks)

    def stem(self, images: Tensor) -> Tensor:
        """Run everything before block 1: (b, 3, h, w) -> (b, c, h', w')."""
        raise NotImplementedError

    def block(self, number: int, x: Tensor) -> Tensor:
        """Run one block: output of block `number - 1` -> output of block `number`."""
        raise NotImplementedError

    def block_of(self, key: str) -> int | None:
        """Tell where a name of the state dict belongs: 0 for the stem, 1..4, or None (head, unknown)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images to one map per chosen block: (b, 3, h, w) -> [(b, c_k, h / s_k, w / s_k), ...].

        Args:
            images: RGB, normalised by `mean` and `std`, (b, 3, h, w); sides of at least the last chosen stride.
        Raises:
            ValueError: if the shape does not fit.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.strides[-1]:
            raise ValueError(
                f"expected images of shape (b, 3, h, w) with h and w at least {self.strides[-1]}, "
                f"got {tuple(images.shape)}; resize them or convert them to RGB"
            )
        maps = []
        x = self.stem(images)
        for number in range(1, self.blocks[-1] + 1):
            x = self.block(number, x)
            if number in self.blocks:
                maps.append(x)
        return maps

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the parent module does: batch norms must keep ImageNet's statistics."""
        return super().train(False)


def init_random(backbone: Backbone, generator: torch.Generator) -> None:
    """Fill a backbone with random weights: Kaiming normal convolutions, neutral batch norms, zero biases.

    Args:
        backbone: changed in place.
        generator: where every draw comes from (CPU).
    """
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            # fan_in, because for a depthwise convolution fan_out counts filters that never meet one output
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
