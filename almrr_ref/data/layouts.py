"""Data folders: a folder -> lists of samples, by the layout that its sub-folders show (`find_dataset`).

    MVTec category   train/good, test/good, test/<type>, ground_truth/<type>/<stem>_mask.png
    BTAD product     train/ok, test/ok, test/ko, ground_truth/ko
    MT-Defect        MT_Free/Imgs, MT_<Type>/Imgs: images .jpg, mask = same stem .png; train_filenames.txt
    NanoTWICE        Normal, Anomalous/images, Anomalous/gt
    plain folder     good images only, in the folder and its sub-folders: all of them train, none test

What is ambiguous is an error that names both files; what is incomplete is a note in `DataSet.notes`.
"""

import math
import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from almrr_ref.data.decoding import pages, stem_and_page
from almrr_ref.data.folders import list_folder
from almrr_ref.data.images import IMAGE_EXTENSIONS, ImageError, image_size, read_image
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import one_line

_MARKS = {"MVTec category": "train/good", "BTAD product": "train/ok", "MT-Defect": "MT_Free", "NanoTWICE": "Anomalous"}
_NOT_GOOD = (  # sub-folders that show that a folder does not hold good images only
    "train", "test", "validation", "ground_truth", "gt", "mask", "masks", "bad", "ko", "ng", "nok", "defect", "defects",
    "defective", "anomaly", "anomalies", "anomalous", "abnormal", "broken",
)  # fmt: skip


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
    """Samples of a folder. `train` holds normal images only; `notes` what a user should know about the rest."""

    root: Path
    layout: str
    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_dataset(path: str | os.PathLike[str]) -> DataSet:
    """Folder -> its samples, by the layout that its sub-folders show.

    Raises:
        DataError: if the folder is missing, without good images, of no known layout, or ambiguous.
        OSError: if a folder or a list in it cannot be read.
    """
    root = Path(path)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {one_line(root)} {what}; give a folder of images")
    layout = layout_of(root)
    dataset = DataSet(root, layout or "folder of good images")
    if layout in ("MVTec category", "BTAD product"):
        _read_train_test(dataset, good=Path(_MARKS[layout]).name)
    elif layout == "MT-Defect":
        _read_mt_defect(dataset)
    elif layout == "NanoTWICE":
        dataset.train = _good(_images(dataset, "Normal"))
        images, masks = _images(dataset, "Anomalous/images"), _images(dataset, "Anomalous/gt")
        dataset.test = _with_masks(dataset, images, masks, "anomalous")
    else:
        _read_plain(dataset)
    if not dataset.train:
        read_as = "; ".join([f"read as: {dataset.layout}", *dataset.notes])
        known = f"known extensions: {' '.join(IMAGE_EXTENSIONS)}"
        raise DataError(f"no good images to train on in {one_line(root)} ({read_as}); {known}")
    for label, kind, lost in ((0, "normal", "image AUROC and AP"), (1, "defective", "all metrics")):
        if dataset.test and all(sample.label != label for sample in dataset.test):
            dataset.notes.append(f"there are no {kind} test images: {lost} will be undefined")
    for sample in dataset.test:
        image, mask = _size(sample.path), _size(sample.mask_path) if sample.mask_path else None
        if image and mask and image != mask:
            of_image = f"its image {one_line(sample.path)} is {image[0]}x{image[1]}"
            of_mask = f"mask {one_line(sample.mask_path)} is {mask[0]}x{mask[1]}"
            raise DataError(f"{of_mask} but {of_image}; save both at one size")
    return dataset


def layout_of(root: Path) -> str:
    """Folder -> name of the layout that its sub-folders show, or "" if none."""
    layouts = [name for name, mark in _MARKS.items() if os.path.isdir(root / mark)]
    if len(layouts) > 1:
        raise DataError(f"{one_line(root)} looks like {' and '.join(layouts)} at once; keep one of the layouts in it")
    return layouts[0] if layouts else ""


def describe(dataset: DataSet) -> str:
    """Data set -> a few lines that say what was found: layout, counts by class, masks, sizes, notes."""
    types = Counter(one_line(sample.defect_type) for sample in dataset.test if sample.label)
    by_type = ", ".join(f"{name} {count}" for name, count in sorted(types.items()))
    masks = sum(sample.mask_path is not None for sample in dataset.test)
    counts = f"{len(dataset.test) - types.total()} good, {types.total()} defective" if dataset.test else "none"
    samples = (dataset.train + dataset.test)[:: 1 + len(dataset.train + dataset.test) // 2000]  # 2000 headers at most
    sizes = [size for sample in samples if (size := _size(sample.path))]
    extremes = dict.fromkeys(pick(sizes, key=math.prod, default=(0, 0)) for pick in (min, max))
    unreadable = f"; {len(samples) - len(sizes)} unreadable" if len(sizes) < len(samples) else ""
    lines = [
        f"data: {dataset.layout} at {one_line(dataset.root)}",
        f"train: {len(dataset.train)} good images",
        f"test: {counts}" + (f" ({by_type}); masks for {masks}" if types else ""),
        f"sizes of {len(sizes)} images: {' to '.join(f'{w}x{h}' for w, h in extremes)}{unreadable}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in dataset.notes])


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) by the file's header; None for a broken file, which the loading will report."""
    try:
        return image_size(path)
    except ImageError:
        return None


def _read_train_test(dataset: DataSet, good: str) -> None:
    """train/<good>, test/<good>, test/<type>, ground_truth/<type>."""
    test = dataset.root / "test"
    dataset.train = _good(_images(dataset, f"train/{good}"))
    if not test.is_dir():
        dataset.notes.append("there is no test/ folder: nothing to evaluate on")
        return
    loose, types, _ = list_folder(test)
    if loose:
        remedy = f"move it to test/{good} or test/<defect type>"
        raise DataError(f"{one_line(test / loose[0])} lies directly in test/; {remedy}")
    for name in types:
        images = _images(dataset, f"test/{name}")
        if name == good:
            dataset.test += _good(images)
        else:
            dataset.test += _with_masks(dataset, images, _images(dataset, f"ground_truth/{name}"), name)


def _read_mt_defect(dataset: DataSet) -> None:
    """MT_<Type>/Imgs holds images (.jpg) and masks (same stem, .png) side by side."""
    for folder in list_folder(dataset.root)[1]:
        if folder.startswith("MT_"):
            files = _images(dataset, f"{folder}/Imgs")
            images = [file for file in files if file.suffix.lower() != ".png"]
            if folder == "MT_Free":
                names = _training_names(dataset, images)
                dataset.train = _good([image for image in images if image.name in names])
                dataset.test = _good([image for image in images if image.name not in names]) + dataset.test
            else:
                masks = [file for file in files if file not in images]
                dataset.test += _with_masks(dataset, images, masks, folder.removeprefix("MT_").lower())


def _training_names(dataset: DataSet, good: list[Path]) -> set[str]:
    """The canonical training names of MT-Defect, or without their list a fixed random 80 % of the good images."""
    path = dataset.root / "train_filenames.txt"
    if not path.exists():
        order = np.random.default_rng(0).permutation(len(good))
        dataset.notes.append(f"{path.name} is missing: a fixed random 80 % of the good images train, the rest test")
        return {good[i].name for i in order[: round(0.8 * len(good))]}
    names = set(path.read_text(encoding="utf-8-sig", errors="backslashreplace").split())
    missing = sorted(names - {image.name for image in good})
    if missing:
        first = one_line(missing[0])
        dataset.notes.append(f"{len(missing)} of {len(names)} names in {path.name} have no image (first: {first})")
    return names


def _read_plain(dataset: DataSet) -> None:
    """A folder of good images, recursively. Whatever suggests that not all of them are good images is an error."""
    root = dataset.root
    nested = [one_line(name) for name in list_folder(root)[1] if layout_of(root / name)]
    if nested:
        remedy = f"give one of them, as in --data {one_line(root / nested[0])}"
        raise DataError(f"{one_line(root)} holds {len(nested)} data sets: {', '.join(nested)}; {remedy}")
    pending = [root]
    while pending:
        parent = pending.pop()
        images, folders, notes = list_folder(parent)
        dataset.notes += notes
        dataset.train += _good(_pages(parent, _without_empty_masks(dataset, parent, images)))
        for folder in (parent / name for name in folders):
            if folder.name.lower() in _NOT_GOOD:
                remedy = "give the folder of the good ones, or arrange train/good, test/good, test/<type>, ground_truth"
                raise DataError(f"a plain folder must hold good images only, but there is {one_line(folder)}; {remedy}")
            if is_of_results(folder):
                what = "holds pictures of earlier results, which must not be trained on"
                raise DataError(f"{one_line(folder)} {what}; move them out of {one_line(root)}, with {SCORES}")
            if folder.is_symlink():
                dataset.notes.append(f"linked folder {one_line(folder)} is not followed")
            else:
                pending.append(folder)
    dataset.train.sort(key=lambda sample: sample.path.relative_to(root).as_posix())


def _images(dataset: DataSet, name: str) -> list[Path]:
    """Images directly in a folder below the root; what else is in it, or that there is none, becomes a note."""
    folder = dataset.root / name
    if not folder.is_dir():
        dataset.notes.append(f"there is no folder {one_line(name)}")
        return []
    images, folders, notes = list_folder(folder)
    dataset.notes += notes + [f"sub-folder {one_line(folder / name)} is not read" for name in folders]
    return _pages(folder, images)


def _pages(folder: Path, names: list[str]) -> list[Path]:
    return [page for name in names for page in pages(folder / name)]


def _without_empty_masks(dataset: DataSet, folder: Path, names: list[str]) -> list[str]:
    """Leave out every PNG that is black and shares its stem with an image of another kind, as in MT_Free/Imgs.

    It is that image's mask, and says that the image is good.
    """
    others = {Path(name).stem for name in names if not name.lower().endswith(".png")}
    pairs = [name for name in names if name.lower().endswith(".png") and Path(name).stem in others]
    empty = set()
    for name in pairs:
        with suppress(ImageError):
            if not read_image(folder / name).any():
                empty.add(name)
    if empty:
        which = f"{len(empty)} empty masks beside images in {one_line(folder)} (first: {one_line(min(empty))})"
        dataset.notes.append(f"{which}: their images are good")
    return [name for name in names if name not in empty]


def _good(images: list[Path]) -> list[Sample]:
    return [Sample(image, 0, "good") for image in _unique(images)]


def _unique(images: list[Path]) -> list[Path]:
    """Refuse two images with one stem in a folder: one may be the other's mask, and a mask would belong to both."""
    image_of: dict[tuple[str, str], Path] = {}  # stem and page -> image
    for image in images:
        other = image_of.setdefault(stem_and_page(image), image)
        if other is not image:
            raise DataError(f"{one_line(other)} and {one_line(image.name)} have one stem; rename or remove one of them")
    return images


def _with_masks(dataset: DataSet, images: list[Path], masks: list[Path], defect_type: str) -> list[Sample]:
    """Defective images of one type -> samples, each with the mask of its stem: `x`, `x_mask` or `x_gt`.

    The mask of a page is the same page of a mask file. An image stays defective when its mask is empty (MT-Defect has
    four) or missing.
    """
    masks_of: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)  # by stem and page
    for mask in masks:
        masks_of[stem_and_page(mask)].append(mask)
    samples: list[Sample] = []
    image_of: dict[Path, Path] = {}  # mask -> image
    for image in _unique(images):
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
