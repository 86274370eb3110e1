"""A data set: the samples of a folder, what a user should know about them, and how masks find their images.

What is ambiguous is an error that names both files; what is incomplete is a note in `DataSet.notes`.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from almrr_ref.data.decoding import Source, pages, stem_and_page
from almrr_ref.data.folders import list_folder
from almrr_ref.data.images import IMAGE_EXTENSIONS, ImageError, image_size
from almrr_ref.run.text import one_line


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


def require_good(dataset: DataSet) -> None:
    """Raise DataError where there is nothing to train on."""
    if not dataset.train:
        read_as = "; ".join([f"read as: {dataset.layout}", *dataset.notes])
        known = f"known extensions: {' '.join(IMAGE_EXTENSIONS)}"
        raise DataError(f"no good images to train on in {one_line(dataset.root)} ({read_as}); {known}")


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
        f"train: {len(dataset.train)} good images",
        f"test: {counts}" + (f" ({by_type}); masks for {masks}" if types else ""),
        f"sizes of {len(sizes)} images: {' to '.join(f'{w}x{h}' for w, h in extremes)}{unreadable}",
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
    for mask in masks:
        masks_of[stem_and_page(mask)].append(mask)
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
        dataset.notes.append(f"{len(unused)} masks of type {one_line(defect_type)} fit no image (first: {unused[0]})")
    return samples
