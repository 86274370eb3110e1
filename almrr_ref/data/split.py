"""The good images of a run: decoded once, and a share of them held out for the threshold.

Several pictures of one physical part (other light, another place) are nearly the same picture. A part both trained on
and held out makes the threshold too low, and a memory that knows the part makes training too easy. ``--parts`` says how
file names tell parts apart; whole parts are then held out. Tiles of one image overlap, and count as one part, too.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig, check_parts
from almrr_ref.data.images import ImageError, load_image, read_image
from almrr_ref.data.layouts import DataSet
from almrr_ref.data.pairing import DataError, Sample
from almrr_ref.data.tiling import cut_tiles
from almrr_ref.run.distributed import rank
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import Countdown, one_line

Failures = list[tuple[Path, str]]  # broken files with the reasons


@dataclass(frozen=True)
class GoodImages:
    """Good images as they are trained on, or their tiles.

    training: uint8 (n, 3, size, size). part_ids: (n,), of the physical part that each shows; images of one part are
    never compared with each other in training. held_out: uint8 (m, 3, size, size), for the threshold; may be empty.
    unreadable: number of broken files.
    """

    training: Tensor
    part_ids: Tensor
    held_out: Tensor
    unreadable: int


def load_good_images(data: DataSet, model: ModelConfig, config: TrainConfig) -> GoodImages:
    """Decode the training images once, and hold a seeded share of them out for the threshold, by whole parts.

    Raises:
        DataError: if no image can be read, or a file's name does not say which part it shows.
    """
    part_ids = read_part_ids(data, config.parts)
    trained, held_out = split_parts(part_ids, config.holdout, config.seed)
    order = [*trained, *held_out]
    paths = [data.train[i].path for i in order]
    images, counts, failures = _decode(paths, model.image_size, model.tile, Countdown("reading images"))
    n = sum(counts[: len(trained)]) or len(images)  # if only held-out images can be read, they train
    ids = torch.tensor([part_ids[i] for i in order]).repeat_interleave(torch.tensor(counts))[:n]
    for path, reason in failures if rank() == 0 else []:
        print(f"not read: {one_line(path)}: {reason}", file=sys.stderr)
    kind = "tiles" if model.tile else "images"
    of_parts = f" of {len(ids.unique())} parts" if config.parts else ""
    print(f"{n} {kind}{of_parts} to train on, {len(images) - n} good ones kept aside for the threshold")
    if n == len(images):
        print("note: the threshold comes from the training images themselves, so expect more false alarms than stated")
    return GoodImages(images[:n], ids, images[n:], len(failures))


def split_parts(part_ids: Sequence[int], holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images by whole parts: part id of every image -> indices trained on, indices held out.

    At least the share `holdout` of the images is held out, in a seeded random order of the parts; but one part at least
    is trained on.
    """
    order = torch.randperm(max(part_ids) + 1, generator=sample_generator(seed, 2, 0)).tolist()
    place_of = {part: place for place, part in enumerate(order)}
    places = [place_of[part] for part in part_ids]
    count = min(len(places) - 1, max(1, round(holdout * len(places)))) if holdout > 0 else 0
    last = min(sorted(places)[count - 1], len(order) - 2) if count else -1
    held_out = [i for i, place in enumerate(places) if place <= last]
    return [i for i, place in enumerate(places) if place > last], held_out


def read_part_ids(data: DataSet, pattern: str | None) -> list[int]:
    """Which part every training image shows, from 0; without a pattern every image shows another one.

    Raises:
        ValueError: if the pattern is no regular expression with a group; DataError if it is not found in a path.
    """
    if pattern is None:
        return list(range(len(data.train)))
    check_parts(pattern)
    id_of: dict[str, int] = {}
    part_ids = []
    for sample in data.train:
        path = sample.path.relative_to(data.root).as_posix() if sample.path.is_relative_to(data.root) else sample.path
        match = re.search(pattern, str(path))
        if match is None or match.group(1) is None:
            raise DataError(f"{one_line(sample.path)}: --parts '{pattern}' is not found in this path")
        part_ids.append(id_of.setdefault(match.group(1), len(id_of)))
    return part_ids


def load_images(
    samples: Sequence[Sample | str | os.PathLike[str]], size: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Failures]:
    """Samples or paths -> images uint8 (n, 3, size, size) in their order, without the broken ones; and those.

    Args:
        samples: at least one.
        size: edge of the images, pixels.
        progress: called with (done, total) after every image.
    Raises:
        DataError: if there is nothing to load or every image is broken.
    """
    paths = [sample.path if isinstance(sample, Sample) else Path(sample) for sample in samples]
    images, _, failures = _decode(paths, size, None, progress or (lambda done, total: None))
    return images, failures


def _decode(
    paths: list[Path], size: int, tile: int | None, progress: Callable[[int, int], None]
) -> tuple[Tensor, list[int], Failures]:
    """Files -> images or their tiles, uint8 (n, 3, size, size); how many of these each file gave; the broken files."""
    if not paths:
        raise DataError("no images to load")

    def load(path: Path) -> list[Tensor] | ImageError:
        try:
            return [load_image(path, size)] if tile is None else list(cut_tiles(read_image(path), tile, size))
        except ImageError as error:
            return error

    images = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    n = 0
    counts: list[int] = []
    failures: Failures = []
    with ThreadPoolExecutor(2) as pool:  # Pillow releases the interpreter's lock
        for path, loaded in zip(paths, pool.map(load, paths), strict=True):
            if isinstance(loaded, ImageError):
                failures.append((path, loaded.reason))
                loaded = []
            if n + len(loaded) > len(images):  # of tiles; what is unused of an empty tensor takes no memory
                grown = images.new_empty((2 * (n + len(loaded)), 3, size, size))
                grown[:n] = images[:n]
                images = grown
            for image in loaded:
                images[n] = image
                n += 1
            counts.append(len(loaded))
            progress(len(counts), len(paths))
    if failures and not n:
        path, reason = failures[0]
        raise DataError(f"none of {len(paths)} images can be read; the first: {one_line(path)}: {reason}")
    return images[:n], counts, failures
