"""ResNet-18, -34 and -50 up to the last block that is used, under torchvision's names.

Source: He et al. 2016 (the paper's [10]); torchvision's "v1.5" layer order, which its weights need: in a bottleneck the
stride sits in the 3x3 convolution, not in the first 1x1. Blocks 1..4 are `layer1`..`layer4`.
Deviation: no pooling and no classifier, and no layer after the last chosen block.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.base import Backbone

WIDTHS = (64, 128, 256, 512)
LAYER_NAMES = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Projection of the identity path where its shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b, c_in, h, w) -> (b, width, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(out + identity, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, and a shortcut: (b, c_in, h, w) -> (b, 4 width, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(out + identity, inplace=True)


class ResNet(Backbone):
    """ResNet without its head: normalised images (b, 3, h, w) -> maps of the chosen `blocks`, see `Backbone`.

    Args:
        unit: BasicBlock or Bottleneck.
        depths: units in each of the four layers.
    """

    def __init__(self, unit: type[BasicBlock | Bottleneck], depths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__(blocks, [width * unit.expansion for width in WIDTHS], LAYER_NAMES)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for number, width, depth in zip(range(1, self.blocks[-1] + 1), WIDTHS, depths):
            outputs = width * unit.expansion
            first = unit(inputs, width, stride=1 if number == 1 else 2)
            self.add_module(f"layer{number}", nn.Sequential(first, *(unit(outputs, width, 1) for _ in range(1, depth))))
            inputs = outputs
