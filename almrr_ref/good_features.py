"""What good images teach without a gradient: statistics and memory before training, the completed memory after it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from almrr_ref.data.samples import TrainingSamples
from almrr_ref.features import resize
from almrr_ref.model import ALMRR
from almrr_ref.plus.memory import POOL
from almrr_ref.plus.standardise import FeatureSums
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import Countdown


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
def complete_memory(model: ALMRR, held_out: Tensor, samples: TrainingSamples, image_ids: Tensor) -> None:
    """After training: choose the stored patches anew, now also among those of the held-out images.

    What is normal on those images is then known as well. Components and middle stay, so a distance still says the same.
    From now on a patch's id is that of its image, so that calibration can leave out single images and whole parts.

    Args:
        held_out: good images that were not trained on, uint8 (m, 3, s, s).
        samples: with the n images that were trained on, and the config.
        image_ids: of the images trained on, then of those held out, (n + m,).
    """
    if model.memory is None or (not len(held_out) and samples.part_ids.equal(image_ids)):
        return
    model.eval()
    size, generator = samples.config.batch_size, sample_generator(samples.config.seed, 3, 1)
    count = math.ceil(POOL / len(image_ids))
    patches = [
        draw_patches(model, images, size, count, generator) for images in (samples.images, held_out) if len(images)
    ]
    model.memory.store(torch.cat(patches), image_ids, Countdown("choosing patches again"))


@torch.no_grad()
def renew_memory(model: ALMRR, dropped: set[int], images: Tensor, image_ids: Tensor, seed: int) -> None:
    """Choose the stored patches anew among themselves, without some images' and with those of new good images.

    Args:
        dropped: ids of the images whose patches go.
        images: uint8 (n, 3, s, s), the new ones.
        image_ids: (n,), theirs.
    """
    memory = model.memory
    assert memory is not None
    kept = ~torch.isin(memory.patch_parts, memory.patch_parts.new_tensor(sorted(dropped)))
    pool, ids = [memory.patches[kept].cpu()], [memory.patch_parts[kept].cpu()]
    if len(images):
        count = math.ceil(POOL / (len(images) + len(ids[0].unique())))
        drawn = draw_patches(model, images, 8, count, sample_generator(seed, 3, 2))
        pool.append(drawn.flatten(0, 1))
        ids.append(image_ids.repeat_interleave(drawn.shape[1]))
    memory.store(torch.cat(pool)[:, None], torch.cat(ids), Countdown("choosing patches again"))
