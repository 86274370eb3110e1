"""VGG19 without batch norm, up to the last block that is used, under torchvision's names (`features.N`).

Source: Simonyan & Zisserman 2015. ALMRR section 4.4 and Table 6 name VGG19 but not the layers taken from it.
Decision: block k is the output of max pool k + 1. So the strides are 4, 8, 16 and 32 as in the ResNets, and blocks 1 to
3 have 128 + 256 + 512 = 896 channels. That fits the paper's sentence that for VGG19, as for ResNet-18 and -34 (448),
the depth is below 1024 and the 1x1 reduction is not needed.
"""

from collections.abc import Sequence

from torch import nn

from almrr_ref.backbones.base import Backbone, numbered_layers

# (channels, convolutions) of the stem and blocks 1 to 4; a max pool follows each
GROUPS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
POOLS = (4, 9, 18, 27, 36)  # indices of these max pools in `features`


class VGG19(Backbone):
    """VGG19's convolutions: normalised images (b, 3, h, w) -> maps of the chosen `blocks`, see `Backbone`."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(blocks, [channels for channels, _ in GROUPS[1:]], numbered_layers("features", POOLS))
        layers: list[nn.Module] = []
        inputs = 3
        for channels, convolutions in GROUPS[: self.blocks[-1] + 1]:
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
