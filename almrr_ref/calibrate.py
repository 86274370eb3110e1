"""What is measured on good images: statistics of features and memory before training, evidence and threshold after."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from almrr_ref.config import TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.deploy.folding import resize
from almrr_ref.model import ALMRR
from almrr_ref.plus.evidence import image_peaks
from almrr_ref.plus.memory import POOL
from almrr_ref.plus.standardise import FeatureStatistics
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import Countdown

FEWEST = 10  # images kept aside that tell how widely their peaks spread; of fewer, the training images must tell
ROUNDING = 2e-5  # more than a score changes with the folded network or another batch size


def counted_batches(images: Tensor, size: int, what: str) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) in batches, float in [0, 1], with progress on the screen."""
    batches, progress = images.split(size), Countdown(what)
    for done, batch in enumerate(batches, start=1):
        yield batch.float() / 255
        progress(done, len(batches))


def fit_features(model: ALMRR, samples: TrainingSamples) -> None:
    """Learn what needs no gradient and the config has, from the clean images: standardisation, then memory."""
    if model.config.standardise != "none":
        fit_statistics(model, samples.images, samples.config)
    if model.memory is not None:
        fit_memory(model, samples)


@torch.no_grad()
def fit_statistics(model: ALMRR, images: Tensor, config: TrainConfig) -> None:
    """Learn the features' mean and deviation from good images, uint8 (n, 3, s, s)."""
    statistics, positions = FeatureStatistics(), model.config.standardise == "position"
    for batch in counted_batches(images, config.batch_size, "measuring features"):
        stages = model.extractor.stages(batch.to(model.feature_mean.device))
        statistics.add(stages if positions else [resize(stage, model.config.feature_size) for stage in stages])
    mean, std = statistics.result(positions)
    model.feature_mean.copy_(mean)
    model.feature_std.copy_(std)


@torch.no_grad()
def fit_memory(model: ALMRR, samples: TrainingSamples) -> None:
    """Fill the memory from the clean images; after `fit_statistics`.

    They pass twice: first the principal components of all patches are found, then the patches to choose from are drawn.
    """
    assert model.memory is not None
    images, size, generator = samples.images, samples.config.batch_size, sample_generator(samples.config.seed, 3, 0)
    model.memory.fit_axes(standardised_batches(model, images, size, "measuring patches"))
    drawn = draw_patches(model, images, size, math.ceil(POOL / len(images)), generator)
    model.memory.fit(drawn, samples.part_ids, Countdown("choosing patches"))


@torch.no_grad()
def complete_memory(model: ALMRR, held_out: Tensor, samples: TrainingSamples) -> None:
    """Choose the stored patches anew, now also among those of the images kept aside; when nothing is to be measured.

    What is normal on those images is then known as well. The threshold was measured without them, as new parts are
    measured; components and middle stay, so a distance still says the same.
    """
    if model.memory is None or not len(held_out):
        return
    size, generator = samples.config.batch_size, sample_generator(samples.config.seed, 3, 1)
    share = math.ceil(POOL / (len(samples.images) + len(held_out)))
    drawn = [draw_patches(model, images, size, share, generator) for images in (samples.images, held_out)]
    others = int(samples.part_ids.max()) + 1 + torch.arange(len(held_out))
    model.memory.store(torch.cat(drawn), torch.cat([samples.part_ids, others]), Countdown("choosing patches again"))


def standardised_batches(model: ALMRR, images: Tensor, size: int, what: str) -> Iterator[list[Tensor]]:
    """Images uint8 (n, 3, s, s) -> standardised stages of every batch, with progress on the screen."""
    for batch in counted_batches(images, size, what):
        yield model.standardised(model.extractor.stages(batch.to(model.feature_mean.device)))


def draw_patches(model: ALMRR, images: Tensor, size: int, share: int, generator: torch.Generator) -> Tensor:
    """Images uint8 (n, 3, s, s) -> at most ``share`` patches of each, (n, m, k) on the CPU."""
    assert model.memory is not None
    batches = standardised_batches(model, images, size, "filling the memory")
    return torch.cat([model.memory.draw(stages, share, generator) for stages in batches])


def good_batches(
    held_out: Tensor, samples: TrainingSamples, trained: bool, what: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of the images kept aside, or of those trained on; the latter with their parts, for `ALMRR.nearest`."""
    size = samples.config.batch_size
    if not trained:
        for batch in counted_batches(held_out, size, what):
            yield batch, None
    else:
        yield from zip(counted_batches(samples.images, size, what), samples.part_ids.split(size))


@torch.no_grad()
def fit_evidence(model: ALMRR, held_out: Tensor, samples: TrainingSamples) -> None:
    """Set the scale of every kind of evidence, where the config wants it, from good images uint8 (n, 3, s, s)."""
    if not model.config.balance or model.frm is None:
        return
    trained, was_training = len(held_out) < FEWEST, model.training
    model.eval()
    peaks = []
    for batch, own in good_batches(held_out, samples, trained, "measuring evidence"):
        stages = model.standardised(model.extractor.stages(batch.to(model.feature_mean.device)))
        features, nearest = model.extractor.join(stages), model.nearest(stages, own)
        seen = model.frm_view(features, model.mfrm(features), nearest)
        peaks.append(image_peaks(model.evidence_maps(seen, nearest)))
    model.evidence.fit(torch.cat(peaks))
    model.train(was_training)


@torch.inference_mode()
def calibrate(model: ALMRR, held_out: Tensor, samples: TrainingSamples) -> float:
    """The threshold: the score that at most a share ``false_positive_rate`` of good images exceeds.

    Args:
        held_out: good images that were not trained on, uint8 (n, 3, s, s); where there are none, those that were serve.
        samples: with the images that were trained on, and ``false_positive_rate``.
    """
    trained = not len(held_out)
    batches = good_batches(held_out, samples, trained, "setting the threshold")
    device, was_training = model.feature_mean.device, model.training
    model.eval()
    maps = (model.defect_maps(batch.to(device), own) for batch, own in batches)
    scores = torch.cat([model.image_scores(part).cpu() for part in maps])
    model.train(was_training)
    allowed = int(samples.config.false_positive_rate * len(scores))  # images that may lie above
    highest = scores.sort(descending=True).values[allowed]
    return float(highest) + ROUNDING  # a score at the threshold counts as defective
