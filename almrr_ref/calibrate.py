"""What is measured on good images: statistics and memory before training; scale of the evidence and threshold after."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from almrr_ref.data.samples import TrainingSamples
from almrr_ref.features import resize
from almrr_ref.model import ALMRR, ForwardPass
from almrr_ref.plus.evidence import image_peaks
from almrr_ref.plus.memory import POOL
from almrr_ref.plus.standardise import FeatureSums
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import Countdown

FEWEST_HELD_OUT = 10  # images that tell how widely their peaks spread; with fewer, the training images tell
ROUNDING = 2e-5  # more than a score changes with the folded network or another batch size


def batches(images: Tensor, size: int, what: str) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) in batches, float in [0, 1], with progress on the screen."""
    chunks, progress = images.split(size), Countdown(what)
    for done, chunk in enumerate(chunks, start=1):
        yield chunk.float() / 255
        progress(done, len(chunks))


@torch.no_grad()
def fit_features(model: ALMRR, samples: TrainingSamples) -> None:
    """Before training: learn what needs no gradient and the config has, standardisation and memory, from clean images.

    For the memory the images pass twice: first the principal components of all patches are found, then the patches to
    choose from are drawn.
    """
    images, size = samples.images, samples.config.batch_size
    if model.standardise is not None:
        sums, grid = FeatureSums(), model.config.feature_size
        for batch in batches(images, size, "measuring features"):
            raw = model.extractor.stages(batch.to(model.device))
            positions = model.config.standardise == "position"
            sums.add(raw if positions else [resize(stage, grid) for stage in raw])
        model.standardise.fit(sums)
    if model.memory is not None:
        generator = sample_generator(samples.config.seed, 3, 0)
        stages = (model.stages(batch.to(model.device)) for batch in batches(images, size, "measuring patches"))
        model.memory.fit_axes(stages)
        patches = draw_patches(model, images, size, math.ceil(POOL / len(images)), generator)
        model.memory.fit(patches, samples.part_ids, Countdown("choosing patches"))


def draw_patches(model: ALMRR, images: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Images uint8 (n, 3, s, s) -> at most ``count`` patches of each, (n, m, k) on the CPU."""
    assert model.memory is not None
    stages = (model.stages(batch.to(model.device)) for batch in batches(images, size, "filling the memory"))
    return torch.cat([model.memory.draw(batch, count, generator) for batch in stages])


@torch.no_grad()
def calibrate(model: ALMRR, held_out: Tensor, samples: TrainingSamples) -> None:
    """After training: set the scale of the evidence and the threshold, then complete the memory.

    Args:
        model: trained in full; changed in place.
        held_out: good images that were not trained on, uint8 (n, 3, s, s); where there are too few, those that were
            trained on serve.
        samples: with the images that were trained on, and the config.
    """
    model.eval()
    if model.evidence is not None and model.evidence.balance:
        passes = _passes(model, held_out, samples, len(held_out) < FEWEST_HELD_OUT, "measuring evidence")
        evidence = (result.evidence for result in passes)
        model.evidence.fit(torch.cat([image_peaks(kinds) for kinds in evidence if kinds is not None]))
    passes = _passes(model, held_out, samples, not len(held_out), "setting the threshold")
    scores = torch.cat([model.image_scores(result.anomaly_map).cpu() for result in passes])
    model.threshold = threshold(scores, samples.config.false_positive_rate)
    complete_memory(model, held_out, samples)


def threshold(good_scores: Tensor, false_positive_rate: float) -> float:
    """The score that at most a fraction ``false_positive_rate`` of good images (n,) exceeds."""
    allowed = int(false_positive_rate * len(good_scores))  # images that may lie above
    highest = good_scores.sort(descending=True).values[allowed]
    return float(highest) + ROUNDING  # a score at the threshold counts as defective


def complete_memory(model: ALMRR, held_out: Tensor, samples: TrainingSamples) -> None:
    """Choose the stored patches anew, now also among those of the held-out images, once nothing is to be measured.

    What is normal on those images is then known as well. The threshold was measured without them, as new parts are
    measured; components and middle stay, so a distance still says the same.
    """
    if model.memory is None or not len(held_out):
        return
    size, generator = samples.config.batch_size, sample_generator(samples.config.seed, 3, 1)
    count = math.ceil(POOL / (len(samples.images) + len(held_out)))
    patches = [draw_patches(model, images, size, count, generator) for images in (samples.images, held_out)]
    new_ids = int(samples.part_ids.max()) + 1 + torch.arange(len(held_out))
    model.memory.store(torch.cat(patches), torch.cat([samples.part_ids, new_ids]), Countdown("choosing patches again"))


def _passes(
    model: ALMRR, held_out: Tensor, samples: TrainingSamples, trained: bool, what: str
) -> Iterator[ForwardPass]:
    """One forward pass a batch, of the held-out images, or of those trained on, whose own parts then do not count."""
    size = samples.config.batch_size
    if not trained:
        yield from (model(batch.to(model.device)) for batch in batches(held_out, size, what))
    else:
        for batch, part_ids in zip(batches(samples.images, size, what), samples.part_ids.split(size)):
            yield model(batch.to(model.device), part_ids)
