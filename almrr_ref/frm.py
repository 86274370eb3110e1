"""The feature refinement module (FRM), section 3.4: a U-Net from features and their reconstruction to an anomaly map.

The paper says "a structure similar to U-net". Here it has the shape of DRAEM's segmentation network: five poolings,
widths w, 2w, 4w, 8w, 8w, 8w, two 3x3 convolutions with batch norm and ReLU a level, bilinear upsampling, skips.

The caller resizes the logits to the image, then takes the softmax; the paper does not say in which order. So the
contour of a defect lies where the evidence changes sign, and the loss sees the map that is reported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch norm; a batch of a single value a channel, which has no variance, is normalised by the running statistics.

    That is the lowest level of small images (128 pixels or fewer) trained with a batch size of 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(x)


def convolutions(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    """Stack 3x3 convolution, batch norm and ReLU `count` times: (b, in, h, w) -> (b, out, h, w)."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(out_channels if i else in_channels, out_channels, 3, padding=1, bias=False)]
        layers += [BatchNorm(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FRM(nn.Module):
    """Refine: (b, in_channels, h, w) -> logits of normal and anomalous, (b, 2, h, w).

    Args:
        in_channels: 2 for the paper's input, the channel means of F_hat and F.
        width: channels of the first level.
        levels: number of poolings; h and w must be at least 2 ** levels.
    """

    def __init__(self, in_channels: int, width: int = 64, levels: int = 5) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(levels + 1)]
        self.down = nn.ModuleList(convolutions(i, o, 2) for i, o in zip([in_channels, *widths], widths))
        up_widths = widths[::-1]  # deepest first
        outputs = [*up_widths[2:], width]  # each level's result already has the width of the level above it
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        below = up_widths[0]
        for skip, out in zip(up_widths[1:], outputs):
            self.up.append(convolutions(below, out, 1))
            self.merge.append(convolutions(out + skip, out, 2))
            below = out
        self.head = nn.Conv2d(below, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = x.to(self.head.weight.dtype), []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge):
            skip = skips.pop()
            x = up(F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False))
            x = merge(torch.cat([x, skip], dim=1))
        return self.head(x)
