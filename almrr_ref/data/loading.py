"""Many pictures -> one tensor of the network's size, in memory, or above a budget in a file that the system caches.

Each picture is decoded once, in two threads.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.data.copies import digest, thumbnail
from almrr_ref.data.folders import DataError, Sample
from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, load_image, read_image, resize_image
from almrr_ref.data.tiling import cut_tiles
from almrr_ref.run.text import Countdown, one_line

IN_MEMORY = 2**30  # bytes; a hundred thousand images of 256 x 256 have 20 times as many
Failures = list[tuple[Path, str]]  # broken pictures with the reasons


class ImageRows:
    """Images uint8 (n, 3, height, width), whose number can grow. Their file is gone once nothing uses them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.images = torch.empty((0, 3, *size), dtype=torch.uint8)

    def reserve(self, count: int) -> None:
        """Make room for ``count`` images in all; the present ones stay. Raises DataError if the disk is full."""
        if count <= len(self.images):
            return
        before, shape = self.images, (count, *self.images.shape[1:])
        fits = math.prod(shape) <= IN_MEMORY  # rows that are never written take no memory
        self.images = torch.empty(shape, dtype=torch.uint8) if fits else _in_a_file(shape)
        self.images[: len(before)] = before

    def arrange(self, numbers: list[int]) -> Tensor:
        """Move the images of these numbers, all different, to the front, in place as a copy might not fit; -> them."""
        order = [*numbers, *sorted(set(range(len(self.images))).difference(numbers))]
        for start in range(len(order)):
            if order[start] == start:
                continue
            first, to = self.images[start].clone(), start
            while (row := order[to]) != start:
                self.images[to] = self.images[row]
                order[to], to = to, row
            self.images[to] = first
            order[to] = to
        return self.images[: len(numbers)]


@dataclass
class Decoded:
    """Decoded pictures. Each list but `failures` has one entry per picture, also for a broken one.

    rows: the images of all pictures, one after the other.
    counts: how many images each picture gave: 1, the number of its tiles, or 0 if it is broken.
    digests, thumbnails: by which copies are recognised (copies.py).
    """

    rows: ImageRows
    names: list[Path] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    digests: list[bytes | None] = field(default_factory=list)
    thumbnails: list[Tensor | None] = field(default_factory=list)
    failures: Failures = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """uint8 (n, 3, *size)."""
        return self.rows.images


def load_images(
    samples: Sequence[Sample],
    size: tuple[int, int],
    levels: Levels = Levels(),  # noqa: B008
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Failures]:
    """Samples -> images uint8 (n, 3, *size), and the broken files. Raises DataError if none can be read."""
    decoded = decode([sample.path for sample in samples], size, None, levels, Remarks(), progress)
    return decoded.images, decoded.failures


def decode(
    pictures: Sequence[Picture],
    size: tuple[int, int],
    tile: int | None,
    levels: Levels,
    remarks: Remarks,
    progress: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Pictures -> images of `size`, (height, width), or their tiles. Raises DataError if none can be read."""

    def load(picture: Picture) -> tuple[list[Tensor], Tensor] | ImageError:
        try:
            if not tile:
                whole = load_image(picture, size, levels, remarks)
                return [whole], thumbnail(whole)
            whole = read_image(picture, levels, remarks)
            return list(cut_tiles(whole, tile, size)), thumbnail(resize_image(whole, size))
        except ImageError as error:
            return error

    progress = progress or Countdown("reading images")
    rows, n = ImageRows(size), 0
    rows.reserve(len(pictures))
    decoded = Decoded(rows)
    with ThreadPoolExecutor(2) as pool:  # Pillow releases the interpreter's lock
        for picture, loaded in zip(pictures, pool.map(load, pictures)):
            name = Path(picture) if isinstance(picture, str | PathLike) else Path(f"picture {len(decoded.counts)}")
            if isinstance(loaded, ImageError):
                decoded.failures.append((name, loaded.reason))
            images, small = ([], None) if isinstance(loaded, ImageError) else loaded
            if n + len(images) > len(rows.images):  # tiles: more images than pictures
                rows.reserve(2 * (n + len(images)))
            for image in images:
                rows.images[n] = image
                n += 1
            decoded.names.append(name)
            decoded.counts.append(len(images))
            decoded.digests.append(digest(images) if images else None)
            decoded.thumbnails.append(small)
            progress(len(decoded.counts), len(pictures))
    if decoded.failures and not n:
        path, reason = decoded.failures[0]
        raise DataError(f"none of {len(pictures)} images can be read; the first: {one_line(path)}: {reason}")
    rows.images = rows.images[:n]
    return decoded


def _in_a_file(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor of a shape, in a temporary file that is already unlinked.

    Windows keeps a file that is in use: there the next one that is made removes it.
    """
    size, folder = math.prod(shape), tempfile.gettempdir()
    for left in Path(folder).glob("almrr-*.images") if sys.platform == "win32" else ():
        with suppress(OSError):  # of a run that still uses it
            left.unlink()
    handle, name = tempfile.mkstemp(prefix="almrr-", suffix=".images", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is an error now, not a crash later
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(shape)
    except OSError as error:
        raise DataError(
            f"the images take {size / 1e9:.1f} GB, for which {folder} has no room ({error.strerror}); let TMPDIR name "
            "a folder on another disk"
        ) from error
    finally:
        os.close(handle)
        with suppress(PermissionError):  # Windows
            os.unlink(name)
