"""The layouts of data folders, and the pairing of images with masks: a folder -> lists of samples.

Layouts, told apart by their folders (`read_layout`):

    MVTec category   train/good, test/good, test/<type>, ground_truth/<type>/<stem>_mask.png
    BTAD product     train/ok, test/ok, test/ko, ground_truth/ko
    MT-Defect        MT_Free/Imgs, MT_<Type>/Imgs: images .jpg, mask = same stem .png; train_filenames.txt
    NanoTWICE        Normal, Anomalous/images, Anomalous/gt
    plain folder     good images only, in the folder and its sub-folders: all of them train, there is no test part

A mask belongs to the image whose stem it has (`x`, `x_mask` or `x_gt`, any image extension). What is ambiguous is an
error that names both files, what is incomplete is a note in `DataSet.notes`: nothing is paired or skipped by guess.
Files that hide (dotfiles, Thumbs.db, __MACOSX …) are no images. Every list is sorted: it is the same everywhere.
No image is opened here: datasets.py does that.

A defective image stays defective when its mask is empty (MT-Defect has four) or missing (`mask_path` is None then).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from almrr_ref.data.images import is_image_file
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import one_line

GOOD = "good"
_MASK_SUFFIXES = ("", "_mask", "_gt")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
# Sub-folders that show that a folder is not one of good images only.
_NOT_GOOD = (
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
    train: list[Sample]
    test: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_layout(root: Path) -> DataSet:
    """Existing folder -> its samples, by the layout that its sub-folders show; perhaps none.

    Raises:
        DataError: if a folder cannot be read, or the layout or a pairing is ambiguous.
    """
    layout = layout_of(root)
    if layout == "MVTec":
        return _read_train_test(root, "MVTec category", GOOD)
    if layout == "BTAD":
        return _read_train_test(root, "BTAD product", "ok")
    if layout == "MT-Defect":
        return _read_mt_defect(root)
    return _read_nanotwice(root) if layout == "NanoTWICE" else _read_plain(root)


def layout_of(root: Path) -> str:
    """Folder -> name of the layout that its sub-folders show, or "" if none."""
    marks = {"MVTec": "train/good", "BTAD": "train/ok", "MT-Defect": "MT_Free", "NanoTWICE": "Anomalous"}
    found = [name for name, mark in marks.items() if os.path.isdir(root / mark)]
    if len(found) > 1:
        raise DataError(f"{one_line(root)} looks like {' and '.join(found)} at once; keep one of the layouts in it")
    return found[0] if found else ""


def _read_train_test(root: Path, layout: str, good: str) -> DataSet:
    """train/<good>, test/<good>, test/<type>, ground_truth/<type> -> samples."""
    dataset = DataSet(root, layout, [])
    dataset.train = _good(_images_of(root / "train" / good, dataset.notes))
    if not os.path.isdir(root / "test"):
        dataset.notes.append("there is no test/ folder: nothing to evaluate on")
        return dataset
    loose, folders = _list_folder(root / "test", [])
    if loose:
        raise DataError(f"{one_line(loose[0])} lies directly in test/; move it to test/{good} or test/<defect type>")
    for folder in folders:
        images = _images_of(folder, dataset.notes)
        if folder.name == good:
            dataset.test += _good(images)
        else:
            masks = _images_of_optional(root / "ground_truth" / folder.name, dataset.notes)
            dataset.test += _pair(images, masks, folder.name, dataset.notes)
    return dataset


def _read_mt_defect(root: Path) -> DataSet:
    """MT_<Type>/Imgs holds images (.jpg) and masks (same stem, .png) side by side."""
    dataset = DataSet(root, "MT-Defect", [])
    _, folders = _list_folder(root, [])
    free: list[Path] = []
    for folder in (folder for folder in folders if folder.name.startswith("MT_")):
        files = _images_of(folder / "Imgs", dataset.notes)
        images = [file for file in files if file.suffix.lower() != ".png"]
        if folder.name == "MT_Free":
            free = images
        else:
            masks = [file for file in files if file.suffix.lower() == ".png"]
            dataset.test += _pair(images, masks, folder.name.removeprefix("MT_").lower(), dataset.notes)
    names = _training_names(root, free, dataset.notes)
    dataset.train = _good([image for image in free if image.name in names])
    dataset.test = _good([image for image in free if image.name not in names]) + dataset.test
    return dataset


def _training_names(root: Path, free: list[Path], notes: list[str]) -> set[str]:
    """The canonical training names of MT-Defect, or without their list a fixed random 80 % of the good images."""
    path = root / "train_filenames.txt"
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except FileNotFoundError:
        order = np.random.default_rng(0).permutation(len(free))
        notes.append("train_filenames.txt is missing: a fixed random 80 % of the good images train, the rest test")
        return {free[i].name for i in order[: round(0.8 * len(free))]}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of training names {one_line(path)}: {error}") from error
    missing = sorted(names - {image.name for image in free})
    if missing:
        notes.append(f"{len(missing)} of {len(names)} names in train_filenames.txt have no image (first: {missing[0]})")
    return names


def _read_nanotwice(root: Path) -> DataSet:
    """Normal/*.tif trains; Anomalous/images/*.tif with Anomalous/gt/*.png tests."""
    dataset = DataSet(root, "NanoTWICE", [])
    for folder in (root / "Normal", root / "Anomalous" / "images"):
        if not os.path.isdir(folder):
            raise DataError(f"NanoTWICE layout without the folder {one_line(folder)}")
    dataset.train = _good(_images_of(root / "Normal", dataset.notes))
    images = _images_of(root / "Anomalous" / "images", dataset.notes)
    masks = _images_of_optional(root / "Anomalous" / "gt", dataset.notes)
    dataset.test = _pair(images, masks, "anomalous", dataset.notes)
    return dataset


def _read_plain(root: Path) -> DataSet:
    """A folder of good images, recursively. Whatever suggests that not all of them are good images is an error."""
    dataset = DataSet(root, "folder of good images", [])
    nested = [folder.name for folder in _list_folder(root, [])[1] if layout_of(folder)]
    if nested:
        names = ", ".join(map(one_line, nested))
        raise DataError(
            f"{one_line(root)} holds {len(nested)} data sets: {names}; "
            f"give one of them, as in --data {one_line(root / nested[0])}"
        )
    pending = [root]
    while pending:
        images, folders = _list_folder(pending.pop(), dataset.notes)
        dataset.train += _good(images)
        for folder in folders:
            if folder.name.lower() in _NOT_GOOD:
                raise DataError(
                    f"a plain folder must hold good images only, but there is {one_line(folder)}; "
                    "give the folder of the good ones, or arrange train/good, test/good, test/<type>, "
                    "ground_truth/<type>"
                )
            if is_of_results(folder):
                raise DataError(
                    f"{one_line(folder)} holds pictures of earlier results, which must not be trained on; "
                    f"move them out of {one_line(root)}, with {SCORES}"
                )
            if folder.is_symlink():
                dataset.notes.append(f"linked folder {one_line(folder)} is not followed")
            else:
                pending.append(folder)
    dataset.train.sort(key=lambda sample: sample.path.relative_to(root).as_posix())
    return dataset


def _list_folder(folder: Path, notes: list[str]) -> tuple[list[Path], list[Path]]:
    """Folder -> (files named like images, sub-folders), both sorted. Other files than known clutter become a note.

    A folder, pipe or dangling link that is *named* like an image counts as one, so that loading it reports it.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {one_line(folder)}: {error.strerror}") from error
    entries = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _CLUTTER]
    images = [entry for entry in entries if is_image_file(entry)]
    folders = [entry for entry in entries if not is_image_file(entry) and os.path.isdir(entry)]
    others = [entry.name for entry in entries if not is_image_file(entry) and not os.path.isdir(entry)]
    if others:
        notes.append(f"{len(others)} other files in {one_line(folder)} skipped (first: {one_line(others[0])})")
    return images, folders


def _images_of(folder: Path, notes: list[str]) -> list[Path]:
    """Folder without sub-folders -> its images; a sub-folder becomes a note."""
    images, folders = _list_folder(folder, notes)
    notes += [f"sub-folder {one_line(sub)} is not read" for sub in folders]
    return images


def _images_of_optional(folder: Path, notes: list[str]) -> list[Path]:
    return _images_of(folder, notes) if os.path.isdir(folder) else []


def _good(images: list[Path]) -> list[Sample]:
    _check_unique(images)
    return [Sample(image, 0, GOOD) for image in images]


def _check_unique(images: list[Path]) -> None:
    """Refuse two images with one stem in a folder: one may be the other's mask, and a mask would belong to both."""
    first: dict[Path, Path] = {}
    for image in images:
        other = first.setdefault(image.with_suffix(""), image)
        if other is not image:
            raise DataError(f"{one_line(other)} and {one_line(image.name)} have one stem; rename or remove one of them")


def _pair(images: list[Path], masks: list[Path], defect_type: str, notes: list[str]) -> list[Sample]:
    """Defective images and the masks of their folder -> samples, paired by stem."""
    _check_unique(images)
    by_stem: dict[str, list[Path]] = {}
    for mask in masks:
        by_stem.setdefault(mask.stem, []).append(mask)
    samples: list[Sample] = []
    owner: dict[Path, Path] = {}
    for image in images:
        found = [mask for suffix in _MASK_SUFFIXES for mask in by_stem.get(image.stem + suffix, [])]
        if len(found) > 1:
            raise DataError(f"two masks for {one_line(image)}: {one_line(found[0])} and {one_line(found[1])}; keep one")
        if found and found[0] in owner:
            both = f"{one_line(owner[found[0]])} and {one_line(image)}"
            raise DataError(f"mask {one_line(found[0])} fits two images: {both}; rename one")
        owner.update(dict.fromkeys(found, image))
        samples.append(Sample(image, 1, defect_type, found[0] if found else None))
    unpaired = [sample.path for sample in samples if sample.mask_path is None]
    if unpaired:
        notes.append(
            f"{len(unpaired)} of {len(images)} images of type {one_line(defect_type)} have no mask "
            f"(first: {one_line(unpaired[0].name)}): they count for the image metrics only"
        )
    left = [mask for mask in masks if mask not in owner]
    if left:
        first = one_line(left[0].name)
        notes.append(f"{len(left)} masks of type {one_line(defect_type)} fit no image (first: {first})")
    return samples
