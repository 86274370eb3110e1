"""The evidence behind every pixel of the map, and its weights: what the U-Net, the feature distance and the memory say.

The U-Net alone is so sure of what it does not take for an anomaly that the order within is lost, and it knows only what
was simulated; the distances know neither. Their numbers have no common scale: a logit moves by several units where the
log of a distance moves by a tenth. So with ``balance`` each kind is measured by its own peaks on good images: less
their mean, in units of their standard deviation. A place then speaks up by as much as it exceeds what good images bring
forth at their worst, whoever says so, and the weights mean what they say.

Source: ours; the paper has the U-Net alone.
"""

import torch
from torch import Tensor, nn

from almrr_ref.config import ModelConfig

PEAK_SHARE = 0.005  # of an image's cells: the mean of the highest is the image's peak
LEAST_STD = 0.05  # of peaks, in logits or logs: a few images that are all alike must not make one kind drown the others


class Evidence(nn.Module):
    """Evidence by kind (b, k, n, n), in the order U-Net, distance, memory -> its weighted mean (b, 1, n, n).

    A mean, not a sum, because a float32 sigmoid near 1 has no digits left to tell an anomaly from a worse one.

    Args:
        config: the weights, and whether to balance. Kinds with weight 0 are left out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weights = [1.0, config.distance_weight, config.memory_weight if config.memory else 0.0]
        self.weights = [weight / sum(weights) for weight in weights if weight]
        self.balance = config.balance
        if self.balance:
            self.register_buffer("mean", torch.zeros(len(self.weights)))
            self.register_buffer("std", torch.ones(len(self.weights)))

    def forward(self, kinds: Tensor) -> Tensor:
        if self.balance:
            kinds = (kinds - self.mean[:, None, None]) / self.std[:, None, None]
        weighted = [weight * kinds[:, k : k + 1] for k, weight in enumerate(self.weights)]
        return torch.cat(weighted, dim=1).sum(dim=1, keepdim=True)

    def fit(self, peaks: Tensor) -> None:
        """Take mean and deviation from the peaks of good images, (n, k)."""
        self.mean.copy_(peaks.mean(dim=0))
        self.std.copy_(peaks.std(dim=0, correction=0).clamp(min=LEAST_STD))


def image_peaks(kinds: Tensor) -> Tensor:
    """The mean of the highest PEAK_SHARE of every map: (b, k, n, n) -> (b, k)."""
    cells = kinds.flatten(2)
    return cells.topk(max(1, round(PEAK_SHARE * cells.shape[2]))).values.mean(dim=2)
