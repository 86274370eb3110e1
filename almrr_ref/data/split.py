"""The good images of a run: decoded once, and a fraction of them held out for the threshold.

Several pictures of one physical part (other light, another place) are nearly the same picture. A part both trained on
and held out makes the threshold too low, and a memory that knows the part makes training too easy. ``--parts`` says how
file names tell parts apart; whole parts are then held out. The tiles of one image overlap, and count as one part.

A checkpoint lists the files of its run. A run is resumed on the same files only: one file more changes every sample.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig, check_parts
from almrr_ref.data.copies import describe_copies, find_copies, join_parts
from almrr_ref.data.folders import DataError, DataSet
from almrr_ref.data.images import Levels, Picture, Remarks, read_image, split_page
from almrr_ref.data.loading import Decoded, decode
from almrr_ref.data.textures import MixedTextures, TextureFolder, TextureSource
from almrr_ref.run.distributed import rank
from almrr_ref.run.random import sample_generator
from almrr_ref.run.text import LOGGER, counted, one_line

Files = dict[str, dict[str, str]]  # kind of file -> path below the folder -> digest or size


@dataclass(frozen=True)
class Good:
    """A good image to calibrate with.

    image_id: the id of its patches in the memory; -1 if it has none there.
    part_id: the id of the physical part that it shows.
    trained: whether the network was trained on it.
    """

    picture: Picture
    image_id: int
    part_id: int
    trained: bool


@dataclass(frozen=True)
class GoodImages:
    """Good images, or their tiles."""

    training: Tensor  # uint8 (n, 3, *size)
    part_ids: Tensor  # (n,), physical parts: in training, images of one part are never compared with each other
    held_out: Tensor  # uint8 (m, 3, *size), for the threshold; m may be 0
    image_ids: Tensor  # (n + m,), for each row of `training`, then of `held_out`, the number of its picture
    calibration: list[Good]  # the pictures behind both
    unreadable: int  # number of broken files
    copies: dict[int, int] = field(default_factory=dict)  # number of a picture that repeats another: that one's number


def split_good_images(
    pictures: Sequence[Picture], part_ids: Sequence[int], model: ModelConfig, config: TrainConfig
) -> GoodImages:
    """Decode good pictures once, and hold a seeded fraction of them out for the threshold, by whole parts.

    Args:
        part_ids: the part that each picture shows.
    Raises:
        DataError: if no picture can be read.
    """
    remarks = Remarks()
    decoded = decode(pictures, model.size, model.tile, Levels.of(model), remarks)
    copies, near = find_copies(decoded.digests, decoded.thumbnails)
    part_ids = join_parts(part_ids, [*copies.items(), *near])
    trained, held_out = split_parts(part_ids, config.share_aside, config.seed)
    counts = [0 if i in copies else count for i, count in enumerate(decoded.counts)]
    if not any(counts[i] for i in trained):  # if only held-out images can be read, they train
        trained, held_out = held_out, []
    ids = torch.tensor([part_ids[i] for i in trained]).repeat_interleave(torch.tensor([counts[i] for i in trained]))
    training, kept_aside = _arranged(decoded, counts, trained, held_out)
    lines = [f"not read: {one_line(path)}: {reason}" for path, reason in decoded.failures]
    lines += [f"note: {line}" for line in [*remarks.lines(), *describe_copies(decoded.names, copies, near)]]
    for line in lines if rank() == 0 else []:
        LOGGER.warning(line)
    shown = counted(len(training), "tile" if model.tile else "image")
    shown += f" of {counted(len(ids.unique()), 'part')}" if config.parts else ""
    LOGGER.info(f"{shown} to train on, {counted(len(kept_aside), 'good one')} kept aside for the threshold")
    if not len(kept_aside):
        LOGGER.info("note: none is kept aside, so what the network learned of these very images cannot be told")
    order, first_held_out = [*trained, *held_out], len(trained)
    image_ids = torch.tensor(order).repeat_interleave(torch.tensor([counts[i] for i in order]))
    good = [Good(pictures[i], i, part_ids[i], k < first_held_out) for k, i in enumerate(order) if counts[i]]
    return GoodImages(training, ids, kept_aside, image_ids, good, len(decoded.failures), copies)


def _arranged(
    decoded: Decoded, counts: Sequence[int], trained: Sequence[int], held_out: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The images of the pictures trained on, and of those held out; `counts`: how many images of each picture."""
    starts = [0, *itertools.accumulate(decoded.counts)]
    training, kept_aside = (
        [row for i in pictures for row in range(starts[i], starts[i] + counts[i])] for pictures in (trained, held_out)
    )
    images = decoded.rows.arrange([*training, *kept_aside])
    return images[: len(training)], images[len(training) :]


def split_parts(part_ids: Sequence[int], holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images by whole parts: part id of every image -> indices trained on, indices held out.

    At least the fraction `holdout` of the images is held out, by a seeded random order of the parts; but at least one
    part is trained on.
    """
    place_of = torch.randperm(max(part_ids) + 1, generator=sample_generator(seed, 2, 0)).argsort().tolist()
    places = [place_of[part_id] for part_id in part_ids]
    count = min(len(places) - 1, max(1, round(holdout * len(places)))) if holdout > 0 else 0
    last = min(sorted(places)[count - 1], len(place_of) - 2) if count else -1
    held_out = [i for i, place in enumerate(places) if place <= last]
    return [i for i, place in enumerate(places) if place > last], held_out


def read_part_ids(data: DataSet, pattern: str | None) -> list[int]:
    """The part id of every training image, from 0; without a pattern each image shows a part of its own.

    Raises ValueError if the pattern is no regular expression with a group, or is not found in a path.
    """
    if pattern is None:
        return list(range(len(data.train)))
    check_parts(pattern)
    names = [part_name(pattern, sample.path.relative_to(data.root).as_posix()) for sample in data.train]
    id_of: dict[str, int] = {}
    return [id_of.setdefault(name, len(id_of)) for name in names]


def part_name(pattern: str, path: str) -> str:
    """What the group of --parts matches in a path below the data: the name of the part. Raises DataError."""
    match = re.search(pattern, path)
    if match is None or match.group(1) is None:
        raise DataError(f"--parts '{pattern}' is not found in {one_line(path)}; '(.*)' makes every image a part")
    return match.group(1)


def training_files(data: DataSet, textures: TextureSource, roi: str | None = None) -> Files:
    """The files of a run: -> {"images": {path: digest}, "textures": {path: size}}, paths below their folders.

    Of textures only the size is taken: a collection has gigabytes, and a run may never draw most of them. With the mask
    of --roi, if it is still there, also "masks": {name: digest}.
    """
    files = {sample.path: split_page(sample.path)[0] for sample in data.train}
    of_file = {file: file_mark(file, digest=True) for file in dict.fromkeys(files.values())}  # once for all its pages
    digests = {path.relative_to(data.root).as_posix(): of_file[file] for path, file in files.items()}
    source, sizes = textures.sources[0] if isinstance(textures, MixedTextures) else textures, {}
    if isinstance(source, TextureFolder):
        sizes = {path.relative_to(source.root).as_posix(): file_mark(path, digest=False) for path in source.paths}
    mask = file_mark(Path(roi), digest=True) if roi else ""
    return {"images": digests, "textures": sizes} | ({"masks": {Path(roi).name: mask}} if roi and mask else {})


def refuse_other_files(before: Files, now: Files, run: Path) -> None:
    """Raise ValueError if a run's files differ from those in its checkpoint (`before`); the message names some."""
    differences = []
    for kind, new in now.items():
        old = before.get(kind, new)  # earlier runs know nothing of their masks
        changed = [name for name in new if old.get(name, new[name]) != new[name]]
        for what, names in (("new", new.keys() - old), ("gone", old.keys() - new), ("changed", changed)):
            if names:
                differences.append(f"{what} {kind}: {len(names)} (first: {one_line(min(names))})")
    if differences:
        raise ValueError(
            f"--resume: the files are not those that the run in {run} began with: {'; '.join(differences)}; "
            "put all back as it was, or start anew with another --out"
        )


def content_key(path: Path, digest: str) -> str:
    """The key that identifies a picture: the digest of its file, and its page."""
    return f"{digest}#{split_page(path)[1]}"


def file_mark(path: Path, digest: bool) -> str:
    """The digest of a file's bytes, or its size; "" for a file that cannot be read, which training leaves out."""
    with suppress(OSError):
        if path.is_file():  # reading a pipe would wait for ever
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if digest else str(path.stat().st_size)
    return ""


def pixel_mark(picture: Picture) -> str:
    """The digest of a picture's pixels, by which one in memory is known; ImageError if it cannot be read."""
    return hashlib.sha256(read_image(picture).numpy().data).hexdigest()[:16]
