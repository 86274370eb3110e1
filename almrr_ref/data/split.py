"""The good images of a run: decoded once, and a share of them held out for the threshold.

Several pictures of one physical part (other light, another place) are nearly the same picture. A part both trained on
and held out makes the threshold too low, and a memory that knows the part makes training too easy. ``--parts`` says how
file names tell parts apart; whole parts are then held out. Tiles of one image overlap, and count as one part, too.

A checkpoint lists the files of its run, which is resumed on the same files only: one more gives all samples others.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig, check_parts
from almrr_ref.data.dataset import DataError, DataSet, Sample, require_good
from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, load_image, read_image, split_page
from almrr_ref.data.textures import MixedTextures, TextureFolder, TextureSource
from almrr_ref.data.tiling import cut_tiles
from almrr_ref.run.distributed import rank
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import LOGGER, Countdown, one_line

Failures = list[tuple[Path, str]]  # broken files with the reasons
Files = dict[str, dict[str, str]]  # kind of file -> path below the folder -> digest or size


@dataclass(frozen=True)
class GoodImages:
    """Good images, or their tiles."""

    training: Tensor  # uint8 (n, 3, size, size)
    part_ids: Tensor  # (n,), of physical parts: images of one part are never compared with each other in training
    held_out: Tensor  # uint8 (m, 3, size, size), for the threshold; m may be 0
    unreadable: int  # number of broken files


def load_good_images(data: DataSet, model: ModelConfig, config: TrainConfig) -> GoodImages:
    """Decode the training images once, and hold a seeded share of them out for the threshold, by whole parts.

    Raises DataError if no image can be read, or a file's name does not say which part it shows.
    """
    require_good(data)
    part_ids = read_part_ids(data, config.parts)
    return split_good_images([sample.path for sample in data.train], part_ids, model, config)


def split_good_images(
    pictures: Sequence[Picture], part_ids: Sequence[int], model: ModelConfig, config: TrainConfig
) -> GoodImages:
    """`load_good_images` of any pictures, each with the id of its part. Raises DataError if none can be read."""
    trained, held_out = split_parts(part_ids, config.holdout, config.seed)
    order = [*trained, *held_out]
    remarks = Remarks()
    images, counts, failures = _decode(
        [pictures[i] for i in order], model.image_size, model.tile, Levels.of(model), remarks
    )
    n = sum(counts[: len(trained)]) or len(images)  # if only held-out images can be read, they train
    ids = torch.tensor([part_ids[i] for i in order]).repeat_interleave(torch.tensor(counts))[:n]
    lines = [f"not read: {one_line(path)}: {reason}" for path, reason in failures]
    for line in [*lines, *(f"note: {line}" for line in remarks.lines())] if rank() == 0 else []:
        LOGGER.warning(line)
    kind = ("tiles" if model.tile else "images") + (f" of {len(ids.unique())} parts" if config.parts else "")
    LOGGER.info(f"{n} {kind} to train on, {len(images) - n} good ones kept aside for the threshold")
    if n == len(images):
        why = "the threshold comes from the training images themselves"
        LOGGER.info(f"note: {why}, so expect more false alarms than stated")
    return GoodImages(images[:n], ids, images[n:], len(failures))


def split_parts(part_ids: Sequence[int], holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images by whole parts: part id of every image -> indices trained on, indices held out.

    At least the share `holdout` of the images is held out, in a seeded random order of the parts; but one part at least
    is trained on.
    """
    place_of = torch.randperm(max(part_ids) + 1, generator=sample_generator(seed, 2, 0)).argsort().tolist()
    places = [place_of[part_id] for part_id in part_ids]
    count = min(len(places) - 1, max(1, round(holdout * len(places)))) if holdout > 0 else 0
    last = min(sorted(places)[count - 1], len(place_of) - 2) if count else -1
    held_out = [i for i, place in enumerate(places) if place <= last]
    return [i for i, place in enumerate(places) if place > last], held_out


def read_part_ids(data: DataSet, pattern: str | None) -> list[int]:
    """Which part every training image shows, from 0; without a pattern every image shows another one.

    Raises ValueError if the pattern is no regular expression with a group, or is not found in a path.
    """
    if pattern is None:
        return list(range(len(data.train)))
    check_parts(pattern)
    id_of: dict[str, int] = {}
    part_ids = []
    for sample in data.train:
        match = re.search(pattern, sample.path.relative_to(data.root).as_posix())
        if match is None or match.group(1) is None:
            raise DataError(f"{one_line(sample.path)}: --parts '{pattern}' is not found in this path")
        part_ids.append(id_of.setdefault(match.group(1), len(id_of)))
    return part_ids


def load_images(
    samples: Sequence[Sample], size: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Failures]:
    """Samples -> images uint8 (n, 3, size, size), and the broken files. Raises DataError if none can be read."""
    images, _, failures = _decode([sample.path for sample in samples], size, None, Levels(), Remarks(), progress)
    return images, failures


def _decode(
    pictures: Sequence[Picture],
    size: int,
    tile: int | None,
    levels: Levels,
    remarks: Remarks,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, list[int], Failures]:
    """Pictures -> images or their tiles, uint8 (n, 3, size, size); how many of these each gave; the broken ones."""

    def load(picture: Picture) -> list[Tensor] | ImageError:
        try:
            if tile is None:
                return [load_image(picture, size, levels, remarks)]
            return list(cut_tiles(read_image(picture, levels, remarks), tile, size))
        except ImageError as error:
            return error

    progress = progress or Countdown("reading images")
    images, n = torch.empty((len(pictures), 3, size, size), dtype=torch.uint8), 0
    counts: list[int] = []
    failures: Failures = []
    with ThreadPoolExecutor(2) as pool:  # Pillow releases the interpreter's lock
        for loaded in pool.map(load, pictures):
            if isinstance(loaded, ImageError):
                failures.append((loaded.path, loaded.reason))
                loaded = []
            if n + len(loaded) > len(images):  # of tiles; what is unused of an empty tensor takes no memory
                images.resize_(2 * (n + len(loaded)), 3, size, size)
            for image in loaded:
                images[n] = image
                n += 1
            counts.append(len(loaded))
            progress(len(counts), len(pictures))
    if not pictures:
        raise DataError("no good images to train on")
    if failures and not n:
        path, reason = failures[0]
        raise DataError(f"none of {len(pictures)} images can be read; the first: {one_line(path)}: {reason}")
    return images[:n], counts, failures


def training_files(data: DataSet, textures: TextureSource) -> Files:
    """The files of a run: -> {"images": {path: digest}, "textures": {path: size}}, paths below their folders.

    Of textures the size must do: a collection has gigabytes, most of which a run may never draw.
    """
    digests = {sample.path.relative_to(data.root).as_posix(): _mark(sample.path, digest=True) for sample in data.train}
    source, sizes = textures.sources[0] if isinstance(textures, MixedTextures) else textures, {}
    if isinstance(source, TextureFolder):
        sizes = {path.relative_to(source.root).as_posix(): _mark(path, digest=False) for path in source.paths}
    return {"images": digests, "textures": sizes}


def refuse_other_files(before: Files, now: Files, run: Path) -> None:
    """Raise ValueError if the run in a folder began with other files (`before`, of its checkpoint); it names some."""
    differences = []
    for kind, new in now.items():
        old = before[kind]
        changed = [name for name in new if old.get(name, new[name]) != new[name]]
        for what, names in (("new", new.keys() - old), ("gone", old.keys() - new), ("changed", changed)):
            if names:
                differences.append(f"{len(names)} {kind} {what} (first: {one_line(min(names))})")
    if differences:
        raise ValueError(
            f"--resume: the files are not those that the run in {run} began with: {'; '.join(differences)}; "
            "put them back, or start anew with another --out"
        )


def _mark(path: Path, digest: bool) -> str:
    """Digest of a file's bytes, or its size; "" for what cannot be read, which training leaves out."""
    path, _ = split_page(path)
    with suppress(OSError):
        if path.is_file():  # reading a pipe would wait for ever
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if digest else str(path.stat().st_size)
    return ""
