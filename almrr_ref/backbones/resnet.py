"""ResNet-18, -34 and -50 up to the last block that is used, under torchvision's names.

Source: He et al. 2016 (the paper's [10]); torchvision's "v1.5" layer order, which its weights need: in a bottleneck the
stride sits in the 3x3 convolution, not in the first 1x1. Blocks 1..4 are `layer1`..`layer4`.
Deviation: no pooling and no classifier, and no layer after the last chosen block.
"""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone

WIDTHS = (64, 128, 256, 512)
STEM_NAMES = ("conv1.", "bn1.")


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Projection of the identity path where its shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (b, c_in, h, w) -> (b, width, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(out + identity, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a shortcut: (b, c_in, h, w) -> (b, 4 width, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(out + identity, inplace=True)


class ResNet(Backbone):
    """ResNet without its head: normalised images (b, 3, h, w) -> maps of the chosen blocks.

    Args:
        unit: BasicBlock or Bottleneck.
        depths: units in each of the four layers.
        blocks: the chosen blocks, rising numbers out of 1..4.
    """

    def __init__(self, unit: type[BasicBlock | Bottleneck], depths: tuple[int, ...], blocks: Sequence[int]) -> None:
        super().__init__(blocks, tuple(width * unit.expansion for width in WIDTHS))
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number in range(1, self.blocks[-1] + 1):
            units = []
            for index in range(depths[number - 1]):
                stride = 2 if number > 1 and index == 0 else 1
                units.append(unit(inputs, WIDTHS[number - 1], stride))
                inputs = WIDTHS[number - 1] * unit.expansion
            self.add_module(f"layer{number}", nn.Sequential(*units))

    def stem(self, images: Tensor) -> Tensor:
        """7x7 convolution and max pool: (b, 3, h, w) -> (b, 64, h / 4, w / 4)."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1)

    def block(self, number: int, x: Tensor) -> Tensor:
        """Run `layer<number>`."""
        return self.get_submodule(f"layer{number}")(x)

    def block_of(self, key: str) -> int | None:
        """`layer3.0.conv1.weight` -> 3, `conv1.weight` -> 0, `fc.weight` -> None."""
        match = re.match(r"layer([1-4])\.", key)
        if match:
            return int(match.group(1))
        return 0 if key.startswith(STEM_NAMES) else None


def resnet18(blocks: Sequence[int]) -> ResNet:
    """ResNet-18 (64, 128, 256, 512 channels) up to the last of `blocks`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), blocks)


def resnet34(blocks: Sequence[int]) -> ResNet:
    """ResNet-34 (64, 128, 256, 512 channels) up to the last of `blocks`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), blocks)


def resnet50(blocks: Sequence[int]) -> ResNet:
    """ResNet-50 (256, 512, 1024, 2048 channels) up to the last of `blocks`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), blocks)
