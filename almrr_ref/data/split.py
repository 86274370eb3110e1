"""The good images of a run: decoded once, a share of them kept aside, and which part each of them shows.

Several pictures of one part (other light, another place) are nearly the same picture. A part that is in training and
among the images kept aside makes the threshold too low, and a memory that knows the part makes training too easy:
``--parts`` says how file names tell parts apart. Tiles of one image overlap, and count as one part, too.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig, check_parts
from almrr_ref.data.datasets import DataError, DataSet, Sample, load_images
from almrr_ref.data.images import ImageError, read_image
from almrr_ref.data.samples import sample_generator
from almrr_ref.data.tiling import cut_tiles
from almrr_ref.run.distributed import rank
from almrr_ref.run.text import Countdown, one_line


@dataclass(frozen=True)
class GoodImages:
    """Good images as they are trained on; with ``tile`` their tiles.

    training: uint8 (n, 3, size, size). parts: (n,), which part each shows; images of one part are never compared with
    each other in training. held_out: uint8 (m, 3, size, size), for the threshold; may be empty. unreadable: files.
    """

    training: Tensor
    parts: Tensor
    held_out: Tensor
    unreadable: int


def load_good_images(data: DataSet, model: ModelConfig, config: TrainConfig) -> GoodImages:
    """Decode the training images once, and keep a seeded share of them aside for the threshold, whole parts of them.

    Raises:
        DataError: if no image can be read, or a file's name does not say which part it shows.
    """
    samples, parts = data.train, part_numbers(data, config.parts)
    order = torch.randperm(max(parts) + 1, generator=sample_generator(config.seed, 2, 0)).tolist()
    rank_of = {part: place for place, part in enumerate(order)}
    count = min(len(samples) - 1, max(1, round(config.holdout * len(samples)))) if config.holdout > 0 else 0
    ranks = sorted(rank_of[part] for part in parts)
    last = min(ranks[count - 1], len(order) - 2) if count else -1  # one part at least is left to train on
    aside = [i for i, part in enumerate(parts) if rank_of[part] <= last]
    kept = [i for i, part in enumerate(parts) if rank_of[part] > last]
    images, shares, failures = _load([samples[i] for i in [*kept, *aside]], model)
    number = sum(shares[: len(kept)]) or len(images)  # if only those aside can be read, they train
    numbers = torch.tensor([parts[i] for i in [*kept, *aside]]).repeat_interleave(torch.tensor(shares))
    training, held_out = images[:number], images[number:]
    for path, reason in failures if rank() == 0 else []:
        print(f"not read: {one_line(path)}: {reason}", file=sys.stderr)
    kind = "tiles" if model.tile else "images"
    of = f" of {len(numbers[:number].unique())} parts" if config.parts else ""
    print(f"{len(training)} {kind}{of} to train on, {len(held_out)} good ones kept aside for the threshold")
    if not len(held_out):
        print("note: the threshold comes from the training images themselves, so expect more false alarms than stated")
    return GoodImages(training, numbers[:number], held_out, len(failures))


def part_numbers(data: DataSet, pattern: str | None) -> list[int]:
    """Which part every training image shows, from 0; without a pattern each shows its own.

    Raises:
        ValueError: if the pattern is no regular expression with a group; DataError if it is not found in a path.
    """
    if pattern is None:
        return list(range(len(data.train)))
    check_parts(pattern)
    numbers: dict[str, int] = {}
    found = []
    for sample in data.train:
        path = sample.path.relative_to(data.root).as_posix() if sample.path.is_relative_to(data.root) else sample.path
        match = re.search(pattern, str(path))
        if match is None or match.group(1) is None:
            raise DataError(f"{one_line(sample.path)}: --parts '{pattern}' is not found in this path")
        found.append(numbers.setdefault(match.group(1), len(numbers)))
    return found


def _load(samples: list[Sample], model: ModelConfig) -> tuple[Tensor, list[int], list[tuple[Path, str]]]:
    """Samples -> images or their tiles in this order, how many each sample gave, and the broken files with reasons."""
    progress = Countdown("reading images")
    if model.tile is None:
        images, failures = load_images(samples, model.image_size, progress)
        broken = {path for path, _ in failures}
        return images, [int(sample.path not in broken) for sample in samples], failures
    tiles: list[Tensor] = []
    shares: list[int] = []
    failures = []
    for done, sample in enumerate(samples, start=1):
        before = len(tiles)
        try:
            tiles += cut_tiles(read_image(sample.path), model.tile, model.image_size)
        except ImageError as error:
            failures.append((error.path, error.reason))
        shares.append(len(tiles) - before)
        progress(done, len(samples))
    if not tiles:
        path, reason = failures[0]
        raise DataError(f"none of {len(samples)} images can be read; the first: {one_line(path)}: {reason}")
    return torch.stack(tiles), shares, failures
