"""Features with mean 0 and deviation 1 over the good images, per channel or per channel and position (``standardise``).

Per position, both are those of a 3x3 neighbourhood, and a deviation is at least FLOOR times that of its channel over
all positions, so that a spot where no good image varies does not turn every difference into an alarm. Per position is
right for parts that always lie alike in the image.
Source: ours; the paper takes features as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 0.3


class Standardise(nn.Module):
    """Stages [(b, c_k, h_k, w_k)] -> the same, standardised.

    Args:
        channels: c_k of every stage.
        sides: h_k = w_k of every stage; 1 where positions are not told apart.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[int], sides: Sequence[int]) -> None:
        super().__init__()
        self.shapes = [(c, side, side) for c, side in zip(channels, sides)]
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

    def fit(self, sums: "FeatureSums") -> None:
        """Take mean and deviation from the sums over the good images."""
        moments = [_moments(*stage, side > 1) for stage, (_, side, _) in zip(sums.means(), self.shapes)]
        means, deviations = zip(*moments)
        deviation = torch.cat(deviations)
        self.mean.copy_(torch.cat(means))
        self.std.copy_(deviation.clamp(min=1e-3 * float(deviation.max())))  # a dead channel must not blow up


class FeatureSums:
    """Sums over the stages of many images, in float64, from which mean and deviation follow."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, stages: list[Tensor]) -> None:
        """Add a batch, [(b, c_k, h_k, w_k)]."""
        doubles = [stage.double() for stage in stages]
        if not self.count:
            self.totals = [torch.zeros_like(stage[0]) for stage in doubles]
            self.squares = [torch.zeros_like(stage[0]) for stage in doubles]
        for stage, total, square in zip(doubles, self.totals, self.squares):
            total += stage.sum(dim=0)
            square += stage.square().sum(dim=0)
        self.count += len(stages[0])

    def means(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and mean square of every stage, (c_k, h_k, w_k) each."""
        return [(total / self.count, square / self.count) for total, square in zip(self.totals, self.squares)]


def _moments(mean: Tensor, mean_square: Tensor, positions: bool) -> tuple[Tensor, Tensor]:
    """Mean and mean square (c, h, w) -> mean and deviation, flat: c values each, or c h w with ``positions``."""
    channel_mean, deviation = _deviation(*(moment.mean(dim=(1, 2), keepdim=True) for moment in (mean, mean_square)))
    if not positions:
        return channel_mean.flatten(), deviation.flatten()
    nearby = (F.avg_pool2d(moment, 3, 1, 1, count_include_pad=False) for moment in (mean, mean_square))
    local_mean, local_deviation = _deviation(*nearby)
    return local_mean.flatten(), local_deviation.maximum(FLOOR * deviation).flatten()


def _deviation(mean: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor]:
    return mean, (mean_square - mean.square()).clamp(min=0).sqrt()
