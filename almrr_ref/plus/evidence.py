"""The evidence behind every pixel of the map, and its weights: U-Net, feature distance and memory.

A logit moves by several units where the log of a distance moves by a tenth. With ``balance`` each kind is measured by
its peaks on good images: less their mean, in units of their standard deviation. A place then counts by how far it
exceeds what good images show at their worst. Source: ours; the paper has the U-Net alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from almrr_ref.config import ModelConfig

PEAK_FRACTION = 0.005  # of an image's cells: the mean of the highest is the image's peak
LEAST_STD = 0.05  # of peaks, in logits or logs: a few images that are all alike must not make one kind drown the others


class Evidence(nn.Module):
    """Evidence by kind (b, k, h, w), in the order U-Net, distance, memory -> its weighted mean (b, 1, h, w).

    A mean, not a sum, because a float32 sigmoid near 1 has no digits left to tell an anomaly from a worse one.

    Args:
        config: the weights, and whether to balance. A kind with weight 0 is left out.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weights = (1.0, config.distance_weight, config.memory_weight)
        self.used = [weight > 0 for weight in weights]
        self.chosen = [weight / sum(weights) for weight in weights if weight]
        self.register_buffer("weights", torch.tensor(self.chosen))
        self.balance = config.balance
        if self.balance:
            self.register_buffer("mean", torch.zeros(len(self.chosen)))
            self.register_buffer("std", torch.ones(len(self.chosen)))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Checkpoints of earlier versions have no weights: theirs are the config's."""
        state_dict.setdefault(prefix + "weights", self.weights)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def by_memory_alone(self) -> bool:
        return self.used[2] and not bool(self.weights[:-1].any())

    def weigh(self, memory_alone: bool) -> None:
        """Let the memory alone count, which needs no training, or every kind as the config says."""
        last = len(self.chosen) - 1
        chosen = [float(k == last) for k in range(last + 1)] if memory_alone else self.chosen
        self.weights.copy_(torch.tensor(chosen))

    def kinds(self, logits: Tensor, stage_errors: Tensor, nearest: Tensor) -> Tensor:
        """The kinds of evidence, (b, k, h, w).

        Args:
            logits: of normal and anomalous, (b, 2, h, w).
            stage_errors: mean square error of every stage, (b, stages, h, w): the mean of their logs is the distance.
            nearest: log distance to the memory's nearest patch, (b, 1, h, w).
        """
        logits = logits.float()
        distance = stage_errors.float().clamp(min=1e-6).log().mean(dim=1, keepdim=True)
        kinds = (logits[:, 1:] - logits[:, :1], distance, nearest)
        return torch.cat([kind for kind, used in zip(kinds, self.used) if used], dim=1)

    def forward(self, kinds: Tensor) -> Tensor:
        if self.balance:
            kinds = (kinds - self.mean[:, None, None]) / self.std[:, None, None]
        return (self.weights[:, None, None] * kinds).sum(dim=1, keepdim=True)

    def fit(self, peaks: Tensor) -> None:
        """Take mean and deviation from the peaks of good images, (n, k)."""
        self.mean.copy_(peaks.mean(dim=0))
        self.std.copy_(peaks.std(dim=0, correction=0).clamp(min=LEAST_STD))


def image_peaks(kinds: Tensor) -> Tensor:
    """The mean of the highest PEAK_FRACTION of every map: (b, k, h, w) -> (b, k)."""
    cells = kinds.flatten(2)
    return cells.topk(max(1, round(PEAK_FRACTION * cells.shape[2]))).values.mean(dim=2)
