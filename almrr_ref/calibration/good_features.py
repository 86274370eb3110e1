"""What is learned from good images without a gradient: statistics and memory before training, more memory after it."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig
from almrr_ref.data.roi import roi_of
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.split import GoodImages
from almrr_ref.features import FeatureCache, FeatureExtractor, brightness, resize
from almrr_ref.model import ALMRR
from almrr_ref.plus.memory import POOL, SURPLUS
from almrr_ref.plus.standardise import FeatureSums, position_share
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import LOGGER, Countdown

MEASURED = 100  # images by which `standardise` is chosen
MOST = 20000  # images whose features are computed; a hundred thousand take five times as long and add nothing
REPEATED = 0.04  # of the variance on a grid of 64x64: magnetic tiles show 5 to 15%, by backbone, textures 0 to 3%


def looked_at(count: int) -> range:
    """Which of ``count`` images are used: all, or about MOST at even distances."""
    return range(0, count, math.ceil(count / MOST) or 1)


def batches(count: int, size: int, what: str) -> Iterator[range]:
    """The numbers of `looked_at`, in batches of ``size``, with progress on the screen."""
    numbers, progress = looked_at(count), Countdown(what)
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    for done, chunk in enumerate(chunks, start=1):
        yield chunk
        progress(done, len(chunks))


def settle_brightness(config: ModelConfig, images: Tensor) -> ModelConfig:
    """Set the brightness to the median of the training images, uint8 (n, 3, h, w), if it is levelled and not yet set.

    Tiles are not levelled: one of them may lie inside a stain.
    """
    if not config.level_brightness or config.tile or config.brightness is not None:
        return config
    roi = roi_of(config)
    values = torch.cat([brightness(images[i : i + 1].float() / 255, roi) for i in looked_at(len(images))])
    low, middle, high = (round(float(value), 3) for value in (values.min(), values.median(), values.max()))
    LOGGER.info(
        f"brightness {middle:g}, the middle of good images ({low:g} to {high:g}): all are brought there, so that "
        "lighting does not count; say otherwise with --set level_brightness=False"
    )
    return dataclasses.replace(config, brightness=middle)


@torch.no_grad()
def settle_standardise(
    config: ModelConfig, images: GoodImages, extractor: FeatureExtractor, cache: FeatureCache
) -> ModelConfig:
    """Replace `standardise` "auto" by "position" where positions repeat (REPEATED), else by "channel"; log why.

    Measured on at most MEASURED of the training images, half of the parts against the other half.

    Args:
        cache: of the training images; it keeps their features for later use.
    """
    if config.standardise != "auto":
        return config
    numbers = list(range(0, len(cache.images), 1 + len(cache.images) // MEASURED))
    parts = images.part_ids[numbers].unique(return_inverse=True)[1] % 2
    halves = FeatureSums(), FeatureSums()
    for batch in batches(len(numbers), 1, "measuring positions"):
        stages = cache.stages([numbers[batch[0]]], extractor.stages)
        halves[int(parts[batch[0]])].add(stages[:1])
    if not halves[0].count or not halves[1].count:
        choice, reason = "channel", "one part alone does not show whether positions repeat"
    else:
        explained = position_share(halves, extractor.roi)
        least = REPEATED * 32 * sum(1 / side for side in config.feature_size)  # the effect of the padding scales so
        choice = "position" if explained >= least else "channel"
        reason = f"a position explains {100 * explained:.1f}% of the features' variance"
        reason += ", alike in two halves of the images"
        reason += f" (parts that lie alike: {100 * least:.0f}% or more)"
    LOGGER.info(f"standardise {choice}: {reason}; say otherwise with --standardise")
    return dataclasses.replace(config, standardise=choice)


@torch.no_grad()
def fit_features(model: ALMRR, samples: TrainingSamples, cache: FeatureCache | None = None) -> None:
    """Before training: fit standardisation and memory, where the config has them, to the good images.

    There are three passes over their features: for mean and deviation; for the principal components of all patches; for
    the patches to choose from.

    Args:
        cache: keeps the features between the passes and for training, within its budget.
    """
    count, size = len(samples.images), samples.config.batch_size
    cache = cache or FeatureCache(samples.images, model.device)
    if model.standardise is not None:
        sums, grid = FeatureSums(), model.config.feature_size
        for numbers in batches(count, size, "measuring features"):
            raw = cache.stages(numbers, model.extractor.stages)
            positions = model.config.standardise == "position"
            sums.add(raw if positions else [resize(stage, grid) for stage in raw])
        model.standardise.fit(sums, model.extractor.roi)
        cache.change(model.standardise)
    if model.memory is not None:
        generator = sample_generator(samples.config.seed, 3, 0)
        model.memory.fit_axes(
            cache.stages(numbers, model.stages) for numbers in batches(count, size, "measuring patches")
        )
        patches = draw_patches(model, cache, size, math.ceil(POOL / len(looked_at(count))), generator)
        model.memory.fit(patches, samples.part_ids[looked_at(count)], Countdown("choosing patches"))


def draw_patches(model: ALMRR, cache: FeatureCache, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` patches of each image of a cache that `looked_at` names: -> (n, m, k) on the CPU."""
    assert model.memory is not None
    numbers = batches(len(cache.images), size, "filling the memory")
    return torch.cat([model.memory.draw(cache.stages(batch, model.stages), count, generator) for batch in numbers])


@torch.no_grad()
def complete_memory(
    model: ALMRR, held_out: Tensor, samples: TrainingSamples, image_ids: Tensor, cache: FeatureCache | None = None
) -> None:
    """After training: choose the stored patches again, now also among those of the held-out images.

    Components and middle stay, so distances stay comparable. From now on a patch's id is that of its image, not of its
    part, so that calibration can leave out single images and whole parts.

    Args:
        held_out: good images that were not trained on, uint8 (m, 3, h, w).
        samples: the n images that were trained on, and the config.
        image_ids: of the images trained on, then of those held out, (n + m,).
        cache: of features of the images trained on.
    """
    if model.memory is None or (not len(held_out) and samples.part_ids.equal(image_ids)):
        return
    model.eval()
    size, generator = samples.config.batch_size, sample_generator(samples.config.seed, 3, 1)
    trained = cache or FeatureCache(samples.images, model.device, budget=0)
    caches = [trained, FeatureCache(held_out, model.device, budget=0)]
    ids = [ids[looked_at(len(ids))] for ids in image_ids.split([len(samples.images), len(held_out)])]
    count = math.ceil(POOL / sum(map(len, ids)))
    patches = [draw_patches(model, images, size, count, generator) for images in caches if len(images.images)]
    model.memory.store(torch.cat(patches), torch.cat(ids), Countdown("choosing patches again"))


@torch.no_grad()
def renew_memory(model: ALMRR, dropped: set[int], images: Tensor, image_ids: Tensor, seed: int) -> None:
    """Choose the stored patches again among themselves and those of new good images, without those of some images.

    Args:
        dropped: ids of the images whose patches are removed.
        images: the new images, uint8 (n, 3, h, w).
        image_ids: ids of the new images, (n,).
    """
    memory = model.memory
    assert memory is not None
    remaining = ~torch.isin(memory.patch_parts, memory.patch_parts.new_tensor([SURPLUS, *sorted(dropped)]))
    pool, ids = [memory.patches[remaining].cpu()], [memory.patch_parts[remaining].cpu()]
    if len(images):
        count = math.ceil(POOL / (len(images) + len(ids[0].unique())))
        cache = FeatureCache(images, model.device, budget=0)
        drawn = draw_patches(model, cache, 8, count, sample_generator(seed, 3, 2))
        pool.append(drawn.flatten(0, 1))
        ids.append(image_ids.repeat_interleave(drawn.shape[1]))
    memory.store(torch.cat(pool)[:, None], torch.cat(ids), Countdown("choosing patches again"))
