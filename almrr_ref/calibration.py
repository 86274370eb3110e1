"""What is measured on good images: the features' mean and deviation before training, the threshold after it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from almrr_ref.config import TrainConfig
from almrr_ref.model import ALMRR
from almrr_ref.runs import Countdown

ROUNDING = 2e-5  # more than a score changes with the folded network or another batch size


def counted_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) in batches, float in [0, 1], with progress on the screen."""
    batches, progress = images.split(size), Countdown("measuring features")
    for done, batch in enumerate(batches, start=1):
        yield batch.float() / 255
        progress(done, len(batches))


def calibrate(model: ALMRR, images: Tensor, config: TrainConfig) -> float:
    """The threshold: the score that at most a share ``false_positive_rate`` of the given good images exceeds.

    Args:
        images: good images that were not trained on, uint8 (n, 3, s, s).
    """
    scores = torch.cat([model.predict(batch.float() / 255)[1].cpu() for batch in images.split(config.batch_size)])
    allowed = int(config.false_positive_rate * len(scores))  # images that may lie above
    highest = scores.sort(descending=True).values[allowed]
    return float(highest) + ROUNDING  # a score at the threshold counts as defective
