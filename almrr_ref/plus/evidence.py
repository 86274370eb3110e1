"""The evidence behind every pixel of the map, and its weights: U-Net, feature distance and memory.

A logit changes by several units where the log of a distance changes by a tenth. With ``balance`` each kind is
standardised by its peaks on good images: less their mean, divided by their standard deviation. Evidence then says how
far a place exceeds the worst that good images show.

Along the border networks see their own padding, and good images have other values there. So each of the outermost
BORDER rings of cells is scaled to the mean and deviation of the inner cells of good images.

One good image lies farther from the memory, and from its reconstruction, than another in all its cells, and that says
nothing of a defect. So most of what an image's level, the mean of its quietest quarter, exceeds that of good images by
is taken off both distances, as far as good images differ among themselves: what is strange all over stays so. A quieter
image is left as it is: a part that training knows is not made as strange as new ones. By the memory alone it does not
pay, and is not done.

Source: ours; the paper has the U-Net alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.data.roi import roi_cells

PEAK_FRACTION = 0.005  # of an image's cells, the highest, whose mean is the image's peak
MOST_SCALE = 3.0  # largest factor by which the border is stretched or shrunk
BORDER = 4  # rings of cells, of 4 pixels each
QUIET_FRACTION = 0.25  # of an image's cells, the lowest, whose mean is its level: no defect is there
TAKEN_OFF = 0.7  # of how far the level lies above that of good images
MOST_DEVIATIONS = 3.0  # of good images' levels, that a level may lie above theirs for it to be taken off
LEAST_STD = 0.05  # of peaks, in logits or logs: a few images that are all alike must not make one kind drown the others


class Evidence(nn.Module):
    """Evidence by kind (b, k, h, w), in the order U-Net, distance, memory -> its weighted mean (b, 1, h, w).

    A mean, not a sum, because a float32 sigmoid near 1 has no digits left to tell an anomaly from a worse one.

    Args:
        config: the weights, and whether to balance. A kind with weight 0 is left out.
        roi: bool (h, w): a region outside of which nothing counts; its edge is a border, too.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor
    border_scale: Tensor
    border_shift: Tensor
    level: Tensor
    rings: Tensor

    def __init__(self, config: ModelConfig, roi: Tensor | None = None) -> None:
        super().__init__()
        weights = (1.0, config.distance_weight, config.memory_weight)
        self.used = [weight > 0 for weight in weights]
        self.chosen = [weight / sum(weights) for weight in weights if weight]
        self.register_buffer("weights", torch.tensor(self.chosen))
        self.balance = config.balance
        if self.balance:
            self.register_buffer("mean", torch.zeros(len(self.chosen)))
            self.register_buffer("std", torch.ones(len(self.chosen)))
        self.register_buffer("border_scale", torch.ones(len(self.chosen), BORDER))
        self.register_buffer("border_shift", torch.zeros(len(self.chosen), BORDER))
        self.register_buffer("level", torch.zeros(2, len(self.chosen)))  # of good images: mean and deviation
        self.register_buffer("rings", rings_of(config.feature_size, roi), persistent=False)
        self.quiet = max(1, round(QUIET_FRACTION * int((self.rings <= BORDER).sum())))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept checkpoints of versions that knew no level: none is taken off then."""
        state_dict.setdefault(prefix + "level", self.level)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def by_memory_alone(self) -> bool:
        """Whether only the memory has a weight."""
        return self.used[2] and not bool(self.weights[:-1].any())

    def weigh(self, memory_alone: bool) -> None:
        """Set the weights: the memory alone, which needs no training, or every kind as the config says."""
        alone = [0.0] * (len(self.chosen) - 1) + [1.0]
        self.weights.copy_(torch.tensor(alone if memory_alone else self.chosen))

    def kinds(self, logits: Tensor, stage_errors: Tensor, nearest: Tensor) -> Tensor:
        """The kinds of evidence that the config uses, (b, k, h, w).

        Args:
            logits: of normal and anomalous, (b, 2, h, w).
            stage_errors: mean square error of every stage, (b, stages, h, w): the mean of their logs is the distance.
            nearest: log distance to the memory's nearest patch, (b, 1, h, w).
        """
        logits = logits.float()
        distance = stage_errors.float().clamp(min=1e-6).log().mean(dim=1, keepdim=True)
        kinds = (logits[:, 1:] - logits[:, :1], distance, nearest)
        return torch.cat([kind for kind, used in zip(kinds, self.used) if used], dim=1)

    def border_evened(self, kinds: Tensor) -> Tensor:
        """Bring the border to the scale of the inner cells: (b, k, h, w) -> the same."""
        scale, shift = F.pad(self.border_scale, (0, 2), value=1.0), F.pad(self.border_shift, (0, 2))
        return kinds * scale[:, self.rings] + shift[:, self.rings]

    def image_levels(self, kinds: Tensor) -> Tensor:
        """The mean of the quietest cells of every map, which `border_evened` has given: (b, k, h, w) -> (b, k)."""
        inside = kinds.masked_fill(self.rings > BORDER, math.inf).flatten(2)
        return inside.topk(self.quiet, largest=False, sorted=False).values.mean(dim=2)

    def forward(self, kinds: Tensor) -> Tensor:
        kinds = self.border_evened(kinds)
        usual, deviation = self.level[:, :, None, None]
        excess = self.image_levels(kinds)[:, :, None, None] - usual
        kinds = kinds - TAKEN_OFF * excess.clamp(min=0).minimum(MOST_DEVIATIONS * deviation)
        if self.balance:
            kinds = (kinds - self.mean[:, None, None]) / self.std[:, None, None]
        return (self.weights[:, None, None] * kinds).sum(dim=1, keepdim=True)

    def fit_border(self, images: Sequence[Tensor]) -> None:
        """Fit the scales of the border to the evidence of good images, (b, k, h, w) each."""
        rings = self.rings.flatten().to(images[0].device)
        count = sum(map(len, images)) * rings.bincount(minlength=BORDER + 2)
        sums = torch.zeros(2, len(self.chosen), BORDER + 2, dtype=torch.float64, device=rings.device)
        for kinds in images:
            cells = kinds.double().flatten(2)
            for total, values in zip(sums, (cells, cells.square())):
                total.index_add_(1, rings, values.sum(dim=0))
        if count[BORDER] == 0:
            return  # no cell lies inside
        mean = sums[0] / count.clamp(min=1)
        std = (sums[1] / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        mean_inside, std_inside = mean[:, BORDER, None], std[:, BORDER, None]
        scale = std_inside / std[:, :BORDER].clamp(min=1e-6)
        scale = torch.where(std_inside > 0, scale.clamp(1 / MOST_SCALE, MOST_SCALE), 1.0)
        self.border_scale.copy_(scale)
        self.border_shift.copy_(mean_inside - mean[:, :BORDER] * scale)

    def fit(self, peaks: Tensor, levels: Tensor) -> None:
        """Fit the balance to the peaks of good images, (n, k), and the level to their levels, (n, k)."""
        self.mean.copy_(peaks.mean(dim=0))
        self.std.copy_(peaks.std(dim=0, correction=0).clamp(min=LEAST_STD))
        self.level.copy_(torch.stack([levels.mean(dim=0), levels.std(dim=0, correction=0)]))
        self.level[1, : None if self.by_memory_alone else 1] = 0.0  # the U-Net's logits, and the memory alone, stay


def rings_of(size: tuple[int, int], roi: Tensor | None = None) -> Tensor:
    """Each cell's ring, (h, w): 0 along the border, BORDER for all inner cells, BORDER + 1 outside a region.

    Args:
        roi: bool, of any size: the region; its edge is a border, too.
    """
    counted = torch.ones(size, dtype=torch.bool) if roi is None else roi_cells(roi, size)
    rings, inside = torch.zeros(size, dtype=torch.long), counted.float()
    for _ in range(BORDER):
        inside = 1 - F.max_pool2d(F.pad(1 - inside, (1, 1, 1, 1), value=1.0)[None], 3, 1)[0]
        rings += inside.long()
    return rings.where(counted, BORDER + 1)


def image_peaks(kinds: Tensor, roi: Tensor | None = None) -> Tensor:
    """The mean of the highest PEAK_FRACTION of every map: (b, k, h, w) -> (b, k).

    Args:
        roi: bool, of any size: where cells count; None: everywhere.
    """
    size = (kinds.shape[2], kinds.shape[3])
    cells = kinds.flatten(2) if roi is None else kinds[:, :, roi_cells(roi.to(kinds.device), size)]
    return cells.topk(max(1, round(PEAK_FRACTION * cells.shape[2]))).values.mean(dim=2)
