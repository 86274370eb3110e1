"""Many pictures -> one tensor of the network's size. Each is decoded once, in two threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from torch import Tensor

from almrr_ref.data.copies import digest, thumbnail
from almrr_ref.data.dataset import DataError, Sample
from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, load_image, read_image, resize_image
from almrr_ref.data.rows import ImageRows
from almrr_ref.data.tiling import cut_tiles
from almrr_ref.run.text import Countdown, one_line

Failures = list[tuple[Path, str]]  # broken pictures with the reasons


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
