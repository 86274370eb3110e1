"""One folder's images -> samples: which files count as images, and which mask belongs to which image.

A mask belongs to the image whose stem it has (`x`, `x_mask` or `x_gt`, any image extension). Two masks for an image, or
two images for a mask, are an error that names both; an image or a mask left over is a note. Nothing is paired by
guess. Hidden files and clutter (dotfiles, Thumbs.db, __MACOSX) are no images. Every list is sorted.

A defective image stays defective when its mask is empty (MT-Defect has four) or missing (`mask_path` is None then).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from almrr_ref.data.images import is_image_file
from almrr_ref.run.text import one_line

GOOD = "good"
_MASK_SUFFIXES = ("", "_mask", "_gt")
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


def list_folder(folder: Path, notes: list[str]) -> tuple[list[Path], list[Path]]:
    """Folder -> (files named like images, sub-folders), both sorted. Other files than known clutter become a note.

    A folder, pipe or dangling link that is *named* like an image counts as one, so that loading it reports it.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {one_line(folder)}: {error.strerror}") from error
    images: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        if not entry.name.startswith(".") and entry.name.lower() not in _CLUTTER:
            (images if is_image_file(entry) else folders if os.path.isdir(entry) else others).append(entry)
    if others:
        first = one_line(others[0].name)
        notes.append(f"{len(others)} other files in {one_line(folder)} skipped (first: {first})")
    return images, folders


def images_of(folder: Path, notes: list[str], optional: bool = False) -> list[Path]:
    """Folder without sub-folders -> its images; a sub-folder becomes a note. An `optional` folder may be missing."""
    if optional and not os.path.isdir(folder):
        return []
    images, folders = list_folder(folder, notes)
    notes += [f"sub-folder {one_line(sub)} is not read" for sub in folders]
    return images


def good_samples(images: list[Path]) -> list[Sample]:
    return [Sample(image, 0, GOOD) for image in _unique(images)]


def _unique(images: list[Path]) -> list[Path]:
    """Refuse two images with one stem in a folder: one may be the other's mask, and a mask would belong to both."""
    by_stem: dict[Path, Path] = {}
    for image in images:
        other = by_stem.setdefault(image.with_suffix(""), image)
        if other is not image:
            raise DataError(f"{one_line(other)} and {one_line(image.name)} have one stem; rename or remove one of them")
    return images


def pair_masks(images: list[Path], masks: list[Path], defect_type: str, notes: list[str]) -> list[Sample]:
    """Defective images and the masks of their folder -> samples, paired by stem."""
    by_stem: dict[str, list[Path]] = {}
    for mask in masks:
        by_stem.setdefault(mask.stem, []).append(mask)
    samples: list[Sample] = []
    image_of: dict[Path, Path] = {}  # mask -> image
    for image in _unique(images):
        fitting = [mask for suffix in _MASK_SUFFIXES for mask in by_stem.get(image.stem + suffix, [])]
        if len(fitting) > 1:
            both = " and ".join(map(one_line, fitting[:2]))
            raise DataError(f"two masks for {one_line(image)}: {both}; keep one")
        for mask in fitting:
            other = image_of.setdefault(mask, image)
            if other is not image:
                both = f"{one_line(other)} and {one_line(image)}"
                raise DataError(f"mask {one_line(mask)} fits two images: {both}; rename one")
        samples.append(Sample(image, 1, defect_type, fitting[0] if fitting else None))
    kind = one_line(defect_type)
    unpaired = [one_line(sample.path.name) for sample in samples if sample.mask_path is None]
    if unpaired:
        notes.append(
            f"{len(unpaired)} of {len(images)} images of type {kind} have no mask "
            f"(first: {unpaired[0]}): they count for the image metrics only"
        )
    unused = [one_line(mask.name) for mask in masks if mask not in image_of]
    if unused:
        notes.append(f"{len(unused)} masks of type {kind} fit no image (first: {unused[0]})")
    return samples
