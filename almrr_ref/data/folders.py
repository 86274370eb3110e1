"""Folders -> the images in them, and data sets: their samples, notes, and how masks find their images.

The pages of a file of several pages are images; the file itself is none (decoding.py). Hidden files and clutter
(Thumbs.db, __MACOSX) are left out. A folder, pipe or dangling link that is *named* like an image counts as one, so that
loading it reports what is wrong. Of a data set, what is ambiguous is an error that names both files; what is incomplete
is a note in `DataSet.notes`.
"""

import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from almrr_ref.data.decoding import Source, pages, split_page, stem_and_page
from almrr_ref.data.images import IMAGE_EXTENSIONS, ImageError, image_size, is_image_file
from almrr_ref.run.distributed import rank
from almrr_ref.run.files import BOXES, SCORES, is_of_results
from almrr_ref.run.text import counted, one_line

_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")


class DataError(ValueError):
    """A data folder that cannot be used as it is; the message is one line with the remedy."""


@dataclass(frozen=True)
class Sample:
    """One image: label 0 is normal (defect_type "good"), 1 defective; mask_path is None where there is no mask."""

    path: Path
    label: int
    defect_type: str
    mask_path: Path | None = None


@dataclass
class DataSet:
    """Samples of a folder. `train` holds normal images only; `notes` what a user should know about the other files."""

    root: Path
    layout: str
    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Folder -> names of its images, names of its sub-folders, at most one note on other files. Raises OSError."""
    images: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    for name in sorted(os.listdir(folder)):  # names: the paths of a hundred thousand images need much memory
        if is_image_file(name):
            images.append(name)
        elif not name.startswith((".", SCORES, BOXES)) and name.lower() not in _CLUTTER:
            (folders if os.path.isdir(folder / name) else others).append(name)
    note = f"not named like images: {counted(len(others), 'file')} in {one_line(folder)}"
    return images, folders, [f"{note} (first: {one_line(others[0])})"] if others else []


class Links:
    """Which paths below a folder to follow, so that each folder is read once, however many links lead to it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._read = {self._identity(root)}

    def first_paths(self, parent: Path, names: list[str]) -> tuple[list[str], list[str]]:
        """Names of a folder's sub-folders -> those to follow, and notes on the others."""
        followed, notes = [], []
        for name in names:
            path = parent / name
            inside = path.is_symlink() and self.root in path.resolve().parents
            identity = self._identity(path)
            if inside or identity in self._read:
                notes.append(f"linked folder {one_line(path)} is not read: {one_line(path.resolve())} is read already")
            else:
                self._read.add(identity)
                followed.append(name)
        return followed, notes

    @staticmethod
    def _identity(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino


def find_inputs(source: Path, flag: str = "--input") -> Iterator[Path | ImageError]:
    """The pictures of a file; or those of the image files in a folder and all folders below it, sorted.

    A folder that cannot be read is an ImageError. Earlier results, and links to folders that are read already, are left
    out with a note on the screen. Raises ValueError, which names the command's ``flag``, if the source cannot be read.
    """
    if split_page(source)[0].is_file():
        yield from _pages(source)
    elif not source.is_dir():
        raise ValueError(f"{flag} {one_line(source)}: no such file or folder")
    elif not os.access(source, os.R_OK | os.X_OK):
        raise ValueError(f"{flag} {one_line(source)}: no permission to read it")
    else:
        yield from _images_below(source, Links(source))


def _images_below(folder: Path, links: Links) -> Iterator[Path | ImageError]:
    try:
        names, folders, notes = list_folder(folder)
        folders, left_out = links.first_paths(folder, folders)
    except OSError as error:
        yield ImageError(folder, f"the folder cannot be read ({error.strerror})")
        return
    notes += left_out
    for name in folders:
        path = folder / name
        if is_of_results(path):
            notes.append(f"earlier results in {one_line(path)} are not read as images")
        else:
            names.append(name)
    for note in notes if rank() == 0 else []:
        print(f"note: {note}", file=sys.stderr)
    for name in sorted(names):
        if is_image_file(name):
            yield from _pages(folder / name)
        else:
            yield from _images_below(folder / name, links)


def _pages(path: Path) -> list[Path] | list[ImageError]:
    try:
        return pages(path)
    except ImageError as error:
        return [error]


def require_good(dataset: DataSet) -> None:
    """Raise DataError where there is nothing to train on."""
    if not dataset.train:
        read_as = "; ".join([f"read as: {dataset.layout}", *dataset.notes])
        known = f"known extensions: {' '.join(IMAGE_EXTENSIONS)}"
        raise DataError(f"no good images in {one_line(dataset.root)} ({read_as}); {known}")


def describe(dataset: DataSet) -> str:
    """Data set -> a few lines on its layout, counts by class, masks, sizes, and notes."""
    types = Counter(one_line(sample.defect_type) for sample in dataset.test if sample.label)
    by_type = ", ".join(f"{name} {count}" for name, count in sorted(types.items()))
    masks = sum(sample.mask_path is not None for sample in dataset.test)
    counts = f"{len(dataset.test) - types.total()} good, {types.total()} defective" if dataset.test else "none"
    samples = dataset.train + dataset.test
    samples = samples[:: 1 + len(samples) // 2000]  # at most 2000 headers are read
    sizes = [size for sample in samples if (size := size_of(sample.path))]
    extremes = dict.fromkeys(pick(sizes, key=math.prod, default=(0, 0)) for pick in (min, max))
    unreadable = f"; {len(samples) - len(sizes)} unreadable" if len(sizes) < len(samples) else ""
    lines = [
        f"data: {dataset.layout} at {one_line(dataset.root)}",
        f"train: {counted(len(dataset.train), 'good image')}",
        f"test: {counts}" + (f" ({by_type}); masks for {masks}" if types else ""),
        f"sizes of {counted(len(sizes), 'image')}: {' to '.join(f'{w}x{h}' for w, h in extremes)}{unreadable}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in dataset.notes])


def size_of(picture: Source) -> tuple[int, int] | None:
    """(width, height) by the header; None for a broken file, which loading will report."""
    try:
        return image_size(picture)
    except ImageError:
        return None


def images_in(dataset: DataSet, name: str) -> list[Path]:
    """The images directly in a folder below the root. A missing folder, and other things in it, become notes."""
    folder = dataset.root / name
    if not folder.is_dir():
        dataset.notes.append(f"there is no folder {one_line(name)}")
        return []
    images, folders, notes = list_folder(folder)
    dataset.notes += notes + [f"sub-folder {one_line(folder / name)} is not read" for name in folders]
    return all_pages(folder, images)


def all_pages(folder: Path, names: list[str]) -> list[Path]:
    """Folder and names of image files -> the paths of all their pictures."""
    return [page for name in names for page in pages(folder / name)]


def good_samples(images: list[Path]) -> list[Sample]:
    return [Sample(image, 0, "good") for image in unique(images)]


def unique(images: list[Path]) -> list[Path]:
    """Refuse two images with one stem in a folder: one may be the other's mask, and a mask would belong to both."""
    image_of: dict[tuple[str, str], Path] = {}  # stem and page -> image
    for image in images:
        other = image_of.setdefault(stem_and_page(image), image)
        if other is not image:
            raise DataError(f"{one_line(other)} and {one_line(image.name)} have one stem; rename or remove one of them")
    return images


def with_masks(dataset: DataSet, images: list[Path], masks: list[Path], defect_type: str) -> list[Sample]:
    """Defective images of one type -> samples, each with the mask of its stem: `x`, `x_mask` or `x_gt`.

    The mask of a page is the same page of a mask file. An image stays defective when its mask is empty (MT-Defect has
    four) or missing.
    """
    masks_of: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)  # by stem and page
    for mask in masks:  # a folder's name has no extension
        masks_of[stem_and_page(mask) if is_image_file(mask) else (mask.name, "")].append(mask)
    samples: list[Sample] = []
    image_of: dict[Path, Path] = {}  # mask -> image
    for image in unique(images):
        stem, page = stem_and_page(image)
        fitting = [mask for suffix in ("", "_mask", "_gt") for mask in masks_of[stem + suffix, page]]
        if len(fitting) > 1:
            both = " and ".join(map(one_line, fitting[:2]))
            raise DataError(f"two masks for {one_line(image)}: {both}; keep one")
        for mask in fitting:
            other = image_of.setdefault(mask, image)
            if other is not image:
                both = f"{one_line(other)} and {one_line(image)}"
                raise DataError(f"mask {one_line(mask)} fits two images: {both}; rename one")
        samples.append(Sample(image, 1, defect_type, fitting[0] if fitting else None))
    without = [one_line(sample.path.name) for sample in samples if sample.mask_path is None]
    if without:
        which = f"{len(without)} of {len(images)} images of type {one_line(defect_type)}"
        dataset.notes.append(f"{which} have no mask (first: {without[0]}): they count for the image metrics only")
    unused = [one_line(mask.name) for mask in masks if mask not in image_of]
    if unused:
        which = f"{counted(len(unused), 'mask')} of type {one_line(defect_type)}"
        dataset.notes.append(f"{which} without an image (first: {unused[0]})")
    return samples
