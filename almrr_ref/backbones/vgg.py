"""VGG19 without batch norm, up to the last block that is used, under torchvision's names (`features.N`).

Source: Simonyan & Zisserman 2015; ALMRR section 4.4 and Table 6 name VGG19 but not the layers taken from it.
Decision: block k is the output of max pool k + 1. So the strides are 4, 8, 16 and 32 as in the ResNets, and blocks 1 to
3 have 128 + 256 + 512 = 896 channels. That makes the paper's sentence true that for VGG19, as for ResNet-18 and -34
(448), the depth is below 1024 and the 1x1 reduction is not needed.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from .base import Backbone

# (channels, convolutions) between two max pools
GROUPS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
# index in `features` of the max pool that ends the stem and blocks 1 to 4
POOLS = (4, 9, 18, 27, 36)


class VGG19(Backbone):
    """VGG19's convolutions: normalised images (b, 3, h, w) -> maps of the chosen blocks.

    Args:
        blocks: the chosen blocks, rising numbers out of 1..4.
    """

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(blocks, tuple(channels for channels, _ in GROUPS[1:]))
        layers: list[nn.Module] = []
        inputs = 3
        for channels, convolutions in GROUPS[: self.blocks[-1] + 1]:
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def stem(self, images: Tensor) -> Tensor:
        """First two convolutions and max pool: (b, 3, h, w) -> (b, 64, h / 2, w / 2)."""
        return self.features[: POOLS[0] + 1](images)

    def block(self, number: int, x: Tensor) -> Tensor:
        """Run the convolutions after the previous max pool and max pool `number` + 1."""
        return self.features[POOLS[number - 1] + 1 : POOLS[number] + 1](x)

    def block_of(self, key: str) -> int | None:
        """`features.5.weight` -> 1 (after the first max pool), `classifier.0.weight` -> None."""
        match = re.match(r"features\.(\d+)\.", key)
        if not match:
            return None
        return next((number for number, pool in enumerate(POOLS) if int(match.group(1)) <= pool), None)
