"""What is measured on good images: features' mean and deviation before training, evidence and threshold after it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from almrr_ref.cli import Countdown
from almrr_ref.config import TrainConfig
from almrr_ref.model import ALMRR
from almrr_ref.sampling import sample_generator

FEWEST = 10  # images kept aside that tell how widely their peaks spread; of fewer, the training images must tell
ROUNDING = 2e-5  # more than a score changes with the folded network or another batch size


def counted_batches(images: Tensor, size: int, what: str) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) in batches, float in [0, 1], with progress on the screen."""
    batches, progress = images.split(size), Countdown(what)
    for done, batch in enumerate(batches, start=1):
        yield batch.float() / 255
        progress(done, len(batches))


def fit_features(model: ALMRR, images: Tensor, config: TrainConfig) -> None:
    """Learn what needs no gradient and the config has: standardisation, then memory; images uint8 (n, 3, s, s)."""
    if model.config.standardise != "none":
        model.fit_statistics(counted_batches(images, config.batch_size, "measuring features"))
    if model.memory is not None:
        model.fit_memory_axes(counted_batches(images, config.batch_size, "measuring patches"))
        generator = sample_generator(config.seed, 3, 0)
        batches = counted_batches(images, config.batch_size, "filling the memory")
        model.fit_memory(batches, len(images), generator, Countdown("choosing patches"))


def numbered(batches: Iterable[Tensor], trained: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches, each with the numbers of its images (`ALMRR.nearest`) if the network was trained on them."""
    first = 0
    for batch in batches:
        yield batch, torch.arange(first, first + len(batch)) if trained else None
        first += len(batch)


def fit_evidence(model: ALMRR, held_out: Tensor, training: Tensor, config: TrainConfig) -> None:
    """Set the scale of every kind of evidence, where the config wants it: images uint8 (n, 3, s, s)."""
    if model.config.balance and model.frm is not None:
        trained = len(held_out) < FEWEST
        batches = counted_batches(training if trained else held_out, config.batch_size, "measuring evidence")
        model.fit_evidence(numbered(batches, trained))


@torch.inference_mode()
def calibrate(model: ALMRR, held_out: Tensor, training: Tensor, config: TrainConfig) -> float:
    """The threshold: the score that at most a share ``false_positive_rate`` of good images exceeds.

    Args:
        held_out: good images that were not trained on, uint8 (n, 3, s, s); where there are none,
        training: those that were.
    """
    trained = not len(held_out)
    batches = counted_batches(training if trained else held_out, config.batch_size, "setting the threshold")
    device, was_training = model.feature_mean.device, model.training
    model.eval()
    maps = (model.defect_maps(batch.to(device), own) for batch, own in numbered(batches, trained))
    scores = torch.cat([model.image_scores(part).cpu() for part in maps])
    model.train(was_training)
    allowed = int(config.false_positive_rate * len(scores))  # images that may lie above
    highest = scores.sort(descending=True).values[allowed]
    return float(highest) + ROUNDING  # a score at the threshold counts as defective
