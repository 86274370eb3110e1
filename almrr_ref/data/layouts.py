"""Data folders: a folder -> lists of samples, by the layout that its sub-folders show (`find_dataset`).

    MVTec category   train/good, test/good, test/<type>, ground_truth/<type>/<stem>_mask.png
                     (MVTec LOCO: ground_truth/<type>/<stem>/*.png, together one mask)
    BTAD product     train/ok, test/ok, test/ko, ground_truth/ko
    MT-Defect        MT_Free/Imgs, MT_<Type>/Imgs: images .jpg, mask = same stem .png; train_filenames.txt
    NanoTWICE        Normal, Anomalous/images, Anomalous/gt
    VisA object      Data/Images, Data/Masks, and ../split_csv/1cls.csv (visa.py)
    plain folder     good images only, in the folder and its sub-folders: all of them train, none test (plain_folder.py)

A test folder alone is enough to evaluate a network.
"""

import os
from pathlib import Path

import numpy as np

from almrr_ref.data import visa
from almrr_ref.data.dataset import (
    DataError,
    DataSet,
    Sample,
    describe,
    good_samples,
    images_in,
    require_good,
    size_of,
    with_masks,
)
from almrr_ref.data.folders import list_folder
from almrr_ref.data.plain_folder import read_plain
from almrr_ref.run.text import one_line

__all__ = ["DataError", "DataSet", "Sample", "describe", "find_dataset", "layout_of", "require_good"]
_MARKS = {"MVTec category": "train/good", "BTAD product": "train/ok", "MT-Defect": "MT_Free", "NanoTWICE": "Anomalous"}


def find_dataset(path: str | os.PathLike[str]) -> DataSet:
    """Folder -> its samples, by the layout that its sub-folders show.

    Raises:
        DataError: if the folder is missing, without images to train on or to test, of no known layout, or ambiguous.
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
        dataset.train = good_samples(images_in(dataset, "Normal"))
        images, masks = images_in(dataset, "Anomalous/images"), images_in(dataset, "Anomalous/gt")
        dataset.test = with_masks(dataset, images, masks, "anomalous")
    elif layout == visa.LAYOUT:
        visa.read_split(dataset)
    else:
        read_plain(dataset, [name for name in list_folder(root)[1] if layout_of(root / name)])
    if not dataset.test:
        require_good(dataset)
    for label, kind, lost in ((0, "normal", "image AUROC and AP"), (1, "defective", "all metrics")):
        if dataset.test and all(sample.label != label for sample in dataset.test):
            dataset.notes.append(f"there are no {kind} test images: {lost} will be undefined")
    for sample in dataset.test:
        image, mask = size_of(sample.path), size_of(sample.mask_path) if sample.mask_path else None
        if image and mask and image != mask:
            of_image = f"its image {one_line(sample.path)} is {image[0]}x{image[1]}"
            of_mask = f"mask {one_line(sample.mask_path)} is {mask[0]}x{mask[1]}"
            raise DataError(f"{of_mask} but {of_image}; save both at one size")
    return dataset


def layout_of(root: Path) -> str:
    """Folder -> name of the layout that its sub-folders show, or "" if none."""
    layouts = [name for name, mark in _MARKS.items() if os.path.isdir(root / mark)]
    layouts += [visa.LAYOUT] if visa.is_object(root) or visa.is_collection(root) else []
    if not layouts and os.path.isdir(root / "test"):  # alone: enough to evaluate a trained network
        btad = any(os.path.isdir(root / "test" / name) for name in ("ok", "ko"))
        layouts = ["BTAD product" if btad else "MVTec category"]
    if len(layouts) > 1:
        raise DataError(f"{one_line(root)} looks like {' and '.join(layouts)} at once; keep one of the layouts in it")
    return layouts[0] if layouts else ""


def _read_train_test(dataset: DataSet, good: str) -> None:
    """train/<good>, test/<good>, test/<type>, ground_truth/<type>."""
    test = dataset.root / "test"
    dataset.train = good_samples(images_in(dataset, f"train/{good}"))
    if not test.is_dir():
        dataset.notes.append("there is no test/ folder: nothing to evaluate on")
        return
    loose, types, _ = list_folder(test)
    if loose:
        remedy = f"move it to test/{good} or test/<defect type>"
        raise DataError(f"{one_line(test / loose[0])} lies directly in test/; {remedy}")
    for name in types:
        images = images_in(dataset, f"test/{name}")
        if name == good:
            dataset.test += good_samples(images)
        else:
            dataset.test += with_masks(dataset, images, _masks(dataset, name), name)


def _masks(dataset: DataSet, defect_type: str) -> list[Path]:
    """The masks of a type. Where there are only folders, each folder of masks is one mask, as in MVTec LOCO."""
    folder = dataset.root / "ground_truth" / defect_type
    names, folders, _ = list_folder(folder) if folder.is_dir() else ([], [], [])
    if folders and not names:
        return [folder / name for name in folders]
    return images_in(dataset, f"ground_truth/{defect_type}")


def _read_mt_defect(dataset: DataSet) -> None:
    """MT_<Type>/Imgs holds images (.jpg) and masks (same stem, .png) side by side."""
    for folder in list_folder(dataset.root)[1]:
        if folder.startswith("MT_"):
            files = images_in(dataset, f"{folder}/Imgs")
            images = [file for file in files if file.suffix.lower() != ".png"]
            if folder == "MT_Free":
                names = _training_names(dataset, images)
                dataset.train = good_samples([image for image in images if image.name in names])
                dataset.test = good_samples([image for image in images if image.name not in names]) + dataset.test
            else:
                masks = [file for file in files if file not in images]
                dataset.test += with_masks(dataset, images, masks, folder.removeprefix("MT_").lower())


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
