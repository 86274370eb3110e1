"""Mean and deviation of features over good images, per channel or per channel and position (``standardise``).

Per position, both are those of a 3x3 neighbourhood, and a deviation is at least FLOOR times that of its channel over
all positions, so that a spot where no good image varies does not turn every difference into an alarm. Per position is
right for parts that always lie alike in the image; what it does to a loose texture was not measured.
Source: ours; the paper takes features as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 0.3


class FeatureStatistics:
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

    def result(self, positions: bool) -> tuple[Tensor, Tensor]:
        """Mean and deviation of all stages, flat, one after the other: of c_k or of c_k h_k w_k values each."""
        means, deviations = [], []
        for total, square in zip(self.totals, self.squares):
            moments = total / self.count, square / self.count
            mean, deviation = _mean_and_deviation(*(moment.mean(dim=(1, 2), keepdim=True) for moment in moments))
            if positions:
                floor = FLOOR * deviation
                near = (F.avg_pool2d(moment, 3, 1, 1, count_include_pad=False) for moment in moments)
                mean, deviation = _mean_and_deviation(*near)
                deviation = deviation.maximum(floor)
            means.append(mean.flatten())
            deviations.append(deviation.flatten())
        deviation = torch.cat(deviations)
        return torch.cat(means), deviation.clamp(min=1e-3 * float(deviation.max()))  # a dead channel must not blow up


def _mean_and_deviation(mean: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    return mean, (second_moment - mean.square()).clamp(min=0).sqrt()
