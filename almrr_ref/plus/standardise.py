"""Features with mean 0 and deviation 1 over the good images, per channel or per channel and position (``standardise``).

Per position, both are taken over a 3x3 neighbourhood, and a deviation is at least FLOOR times that of its channel over
all positions; else, where good images do not vary, every difference would be an alarm. Per position suits parts that
always lie alike in the image; `position_share` measures whether they do.
Source: ours; the paper takes features as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.data.roi import roi_cells

FLOOR = 0.3


class Standardise(nn.Module):
    """Stages [(b, c_k, h_k, w_k)] -> the same, standardised.

    Args:
        channels: c_k of every stage.
        sizes: (h_k, w_k) of every stage; (1, 1) each to standardise per channel only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = [(c, h, w) for c, (h, w) in zip(channels, sizes)]
        length = sum(c * h * w for c, h, w in self.shapes)
        self.register_buffer("mean", torch.zeros(length))  # of all stages, flat
        self.register_buffer("std", torch.ones(length))

    def by_stage(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and deviation of every stage, (c_k, h_k, w_k) or (c_k, 1, 1) each."""
        lengths = [c * h * w for c, h, w in self.shapes]
        pairs = zip(self.mean.split(lengths), self.std.split(lengths), self.shapes)
        return [(mean.view(shape), std.view(shape)) for mean, std, shape in pairs]

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        return [(stage - mean) / std for stage, (mean, std) in zip(stages, self.by_stage())]

    def fit(self, sums: "FeatureSums", roi: Tensor | None = None) -> None:
        """Set mean and deviation from sums over the good images; a channel's are taken over a region, bool (h, w)."""
        stages = zip(sums.means(), self.shapes)
        means, deviations = zip(*(_moments(moments, h * w > 1, roi) for moments, (_, h, w) in stages))
        deviation = torch.cat(deviations)
        self.mean.copy_(torch.cat(means))
        self.std.copy_(deviation.clamp(min=max(1e-6, 1e-3 * float(deviation.max()))))  # a dead channel must not blow up


def position_share(halves: Sequence["FeatureSums"], roi: Tensor | None = None) -> float:
    """The fraction of the first stage's variance that positions explain: sums over two halves of the images -> 0 to 1.

    It is the covariance of the two halves' means over positions, relative to the variance, averaged over the channels:
    chance differs between the halves and adds nothing. The outermost cells, which see the padding, are left out.

    Args:
        roi: bool (h, w): a region outside of which nothing counts; its edge is a border, too.
    """
    means = [half.means()[0] for half in halves]
    inner = [moments[:, :, _inner_cells(moments, roi)] for moments in means]  # (2, c, cells)
    first, second = (moments[0] - moments[0].mean(dim=1, keepdim=True) for moments in inner)
    deviation = _deviation(((inner[0] + inner[1]) / 2).mean(dim=2))[1]
    alive = deviation > 1e-3 * deviation.max()
    if not alive.any():  # even images, or a stage of fewer than 3x3 cells
        return 0.0
    return float(((first * second).mean(dim=1)[alive] / deviation[alive].square()).mean())


class FeatureSums:
    """Sums of the stages of many images and of their squares, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []  # of values and of squares, (2, c_k, h_k, w_k) each

    def add(self, stages: list[Tensor]) -> None:
        """Add a batch, [(b, c_k, h_k, w_k)]."""
        doubles = [stage.double() for stage in stages]
        sums = [torch.stack([stage.sum(dim=0), stage.square().sum(dim=0)]) for stage in doubles]
        self.totals = [total + new for total, new in zip(self.totals, sums)] if self.count else sums
        self.count += len(stages[0])

    def means(self) -> list[Tensor]:
        """Mean and mean square of every stage, (2, c_k, h_k, w_k) each."""
        return [total / self.count for total in self.totals]


def _inner_cells(moments: Tensor, roi: Tensor | None) -> Tensor:
    """Which cells (h, w) of moments (2, c, h, w) touch neither the border nor a cell outside the region."""
    size = (moments.shape[2], moments.shape[3])
    outside = moments.new_zeros(size) if roi is None else roi_cells(~roi, size).to(moments)
    return F.max_pool2d(F.pad(outside, (1, 1, 1, 1), value=1.0)[None], 3, 1)[0] == 0


def _moments(moments: Tensor, positions: bool, roi: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and mean square (2, c, h, w) -> mean and deviation, flat: c values each, or c h w with ``positions``."""
    size = (moments.shape[2], moments.shape[3])
    counted = moments.flatten(2) if roi is None else moments[:, :, roi_cells(roi, size)]
    mean, deviation = _deviation(counted.mean(dim=2)[..., None, None])
    if not positions:
        return mean.flatten(), deviation.flatten()
    local_mean, local_deviation = _deviation(F.avg_pool2d(moments, 3, 1, 1, count_include_pad=False))
    return local_mean.flatten(), local_deviation.maximum(FLOOR * deviation).flatten()


def _deviation(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square (2, ...) -> mean and deviation."""
    return moments[0], (moments[1] - moments[0].square()).clamp(min=0).sqrt()
