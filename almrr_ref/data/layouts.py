"""Data folders: a folder -> lists of samples, by the layout that its sub-folders show (`find_dataset`).

    MVTec category   train/good, test/good, test/<type>, ground_truth/<type>/<stem>_mask.png
                     (MVTec LOCO: ground_truth/<type>/<stem>/*.png, together one mask)
    BTAD product     train/ok, test/ok, test/ko, ground_truth/ko
    MT-Defect        MT_Free/Imgs, MT_<Type>/Imgs: images .jpg, mask = same stem .png; train_filenames.txt
    NanoTWICE        Normal, Anomalous/images, Anomalous/gt
    VisA object      Data/Images, Data/Masks, and ../split_csv/1cls.csv (visa.py)
    plain folder     good images only, in the folder and its sub-folders: all of them train, none test

A test folder alone is enough to evaluate a network. Of a plain folder training takes every image for good, so one
folder of defects would make a network that finds none. Folders of classes side by side, folders named for defects or
masks, and masks beside their images are therefore errors, which say how many images lie where and what to give instead.
Folders by date, lot or camera are accepted.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from almrr_ref.data import visa
from almrr_ref.data.folders import (
    DataError,
    DataSet,
    Links,
    all_pages,
    good_samples,
    images_in,
    list_folder,
    require_good,
    size_of,
    with_masks,
)
from almrr_ref.data.images import ImageError, read_image
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import counted, one_line

_MARKS = {"MVTec category": "train/good", "BTAD product": "train/ok", "MT-Defect": "MT_Free", "NanoTWICE": "Anomalous"}
# Words in folder names, in the languages of labelling tools and factories. An asterisk stands for any ending.
_GOOD = "good ok okay normal normals healthy gut io bon bons bueno buenos buono buoni bom bons iyi saglam godna dobre"
_GOOD += " годные 良品 正常 合格 양품 정상"
_BAD = (
    "bad ng nok nio ko reject* scrap* fail* fault* defect* anomal* abnormal* outlier* broken damage* flaw* contaminat* "
    "crack* scratch* blowhole* dent dents stain* corros* rust* notok notgood nogood unacceptable "
    "schlecht ausschuss fehler* defekt* mauvais defaut* rebut* malo malos rechaz* difett* scart* defeit* ruim hatali "
    "kusur* wada wady брак дефект* 不良* 缺陷* 次品* 异常* 異常* 欠陥* 불량* 결함*"
)
_SPLITS_AND_MASKS = "train test val valid validation gt ground groundtruth mask masks label labels annotation*"
_FREE = re.compile(
    r"(no|non|without|zero|ohne)[\W_]*(defect|anomal|fault|defekt)|(defect|anomaly|fault)s?[\W_]*(free|less)"
)
_NEGATED = re.compile(r"\b(not|no|non|n)\W*(good|ok|okay|conform\w*)\b")
_MASK = re.compile(r"(.+)[ ._-](masks?|gt|labels?|seg|segmentation|ground_?truth|annotations?)", re.IGNORECASE)


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
        image = size_of(sample.path)
        for file in _files_of(sample.mask_path):
            mask = size_of(file)
            if image and mask and image != mask:
                of_image = f"its image {one_line(sample.path)} is {image[0]}x{image[1]}"
                of_mask = f"mask {one_line(file)} is {mask[0]}x{mask[1]}"
                raise DataError(f"{of_mask} but {of_image}; save both at one size")
    return dataset


def _files_of(mask: Path | None) -> list[Path]:
    """The files of a mask: those in its folder, where it is one."""
    if mask is None:
        return []
    return [mask / name for name in list_folder(mask)[0]] if mask.is_dir() else [mask]


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
        if is_of_results(test / name):
            dataset.notes.append(f"earlier results in {one_line(test / name)} are not read as images")
            continue
        images = images_in(dataset, f"test/{name}")
        if name == good:
            dataset.test += good_samples(images)
            masks = dataset.root / "ground_truth" / name
            if masks.is_dir() and any(list_folder(masks)[:2]):
                dataset.notes.append(f"masks in {one_line(masks)} are not read: images in test/{name} count as good")
        elif says_good(name):
            what = f"is named as good, but beside train/{good} its images would count as defective"
            raise DataError(f"{one_line(test / name)} {what}; rename it to {good}")
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


def read_plain(dataset: DataSet, data_sets: Sequence[str]) -> None:
    """Take every image below the root for training. `data_sets`: sub-folders that are data sets of their own.

    Raises DataError for whatever suggests that not all of them are good images; OSError.
    """
    root = dataset.root
    if data_sets:
        remedy = f"give one of them, such as {one_line(root / data_sets[0])}"
        listed = ", ".join(map(one_line, data_sets))
        raise DataError(f"{one_line(root)} holds {len(data_sets)} data sets: {listed}; {remedy}")
    links = Links(root)
    pending = [root]
    while pending:
        parent = pending.pop()
        images, names, notes = list_folder(parent)
        images, empty = _without_empty_masks(parent, images)
        _refuse_masks(parent, images)
        names, left_out = links.first_paths(parent, names)
        _refuse_classes(root, parent, images, names)
        for folder in (parent / name for name in names):
            if is_of_results(folder):
                what = "holds pictures of earlier results, which must not be trained on"
                raise DataError(f"{one_line(folder)} {what}; move them out of {one_line(root)}, with {SCORES}")
            pending.append(folder)
        if empty:
            notes.append(f"not read: {counted(len(empty), 'empty mask')} beside images in {one_line(parent)}")
        dataset.notes += notes + left_out
        dataset.train += good_samples(all_pages(parent, images))
    dataset.train.sort(key=lambda sample: sample.path.relative_to(root).as_posix())


def says_good(name: str) -> bool:
    """Whether the name of a folder says that its images are good: good, OK_2, no_defects."""
    return bool(_FREE.search(name.lower())) or (_has(name, _GOOD) and not says_not_good(name))


def says_not_good(name: str) -> bool:
    """Whether the name of a folder says that some of its images may not be good: NG, defects, reject-2, masks, test."""
    if _FREE.search(name.lower()):
        return False
    words = re.sub(r"[\W_]+", " ", name.lower())
    return _has(name, _BAD) or _has(name, _SPLITS_AND_MASKS) or bool(_NEGATED.search(words))


def _has(name: str, words: str) -> bool:
    """Whether one of the words, separated by spaces, occurs in a name."""
    patterns = (re.escape(word).replace(r"\*", r"\w*") for word in words.split())
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # badParts: bad parts
    return bool(re.search(rf"\b({'|'.join(patterns)})\b", re.sub(r"[\W\d_]+", " ", spaced).lower()))


def _refuse_classes(root: Path, parent: Path, images: list[str], names: list[str]) -> None:
    """Raise DataError if sub-folders are classes: one is named as not good, or some as good beside other images."""
    good = [name for name in names if says_good(name)]
    others = [name for name in names if name not in good]
    if not any(map(says_not_good, others)) and not (good and (others or images)):
        return
    counts = [f"{one_line(name)} {_count(parent / name)}" for name in names]
    counts += [f"directly in it {len(images)}"] if images else []
    remedy = "give the folder of the good ones, or arrange train/good, test/good, test/<type>, ground_truth/<type>"
    if len(good) == 1:
        remedy = f"give the good ones: {one_line(parent / good[0])}"
    where = f"{one_line(parent)} holds folders of classes with images: {', '.join(counts)}"
    raise DataError(f"a plain folder must hold good images only, but {where}; {remedy}")


def _without_empty_masks(parent: Path, images: list[str]) -> tuple[list[str], list[str]]:
    """Names of images -> the photographs, and the empty masks among them.

    An empty mask says that an image is good, as in MT-Defect: a black PNG beside a JPEG of its stem.
    """
    photographs = {os.path.splitext(name)[0] for name in images if name.lower().endswith((".jpg", ".jpeg"))}
    empty = set()
    for name in images:
        stem, extension = os.path.splitext(name)
        if extension.lower() == ".png" and stem in photographs:
            with suppress(ImageError):
                if not read_image(parent / name).any():
                    empty.add(name)
    return [name for name in images if name not in empty], sorted(empty)


def _refuse_masks(parent: Path, images: list[str]) -> None:
    """Raise DataError if a mask lies beside its image."""
    stems = {os.path.splitext(name)[0] for name in images}
    masks = [name for name in images if (match := _MASK.fullmatch(os.path.splitext(name)[0])) and match[1] in stems]
    if masks:
        what = f"{counted(len(masks), 'mask')} beside images (first: {one_line(masks[0])})"
        remedy = "move the masks, and the images they belong to, elsewhere"
        raise DataError(f"{one_line(parent)}: {what} would train as good images; {remedy}")


def _count(folder: Path) -> int:
    """Number of the image files in a folder and all folders below it, links left out."""
    return sum(len(list_folder(Path(parent))[0]) for parent, _, _ in os.walk(folder))
