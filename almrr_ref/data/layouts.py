"""Data folders: a folder -> lists of samples, by the layout that its sub-folders show (`find_dataset`).

    MVTec category   train/good, test/good, test/<type>, ground_truth/<type>/<stem>_mask.png
    BTAD product     train/ok, test/ok, test/ko, ground_truth/ko
    MT-Defect        MT_Free/Imgs, MT_<Type>/Imgs: images .jpg, mask = same stem .png; train_filenames.txt
    NanoTWICE        Normal, Anomalous/images, Anomalous/gt
    plain folder     good images only, in the folder and its sub-folders: all of them train, none test

What is ambiguous is an error that names both files; what is incomplete is a note in `DataSet.notes`.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from almrr_ref.data.images import IMAGE_EXTENSIONS, ImageError, image_size
from almrr_ref.data.pairing import GOOD, DataError, Sample, good_samples, images_of, list_folder, pair_masks
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import one_line

_NOT_GOOD = (  # sub-folders that show that a folder does not hold good images only
    "train", "test", "validation", "ground_truth", "gt", "mask", "masks", "bad", "ko", "ng", "nok", "defect", "defects",
    "defective", "anomaly", "anomalies", "anomalous", "abnormal", "broken",
)  # fmt: skip
_TITLES = {"MVTec": "MVTec category", "BTAD": "BTAD product", "": "folder of good images"}
_DESCRIBED = 2000  # headers that describe() reads at most


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
        DataError: if the folder is missing, unreadable, without good images, of no known layout, or ambiguous.
    """
    root = Path(path)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {one_line(root)} {what}; give a folder of images")
    layout = layout_of(root)
    dataset = DataSet(root, _TITLES.get(layout, layout))
    if layout in ("MVTec", "BTAD"):
        _read_train_test(dataset, good="ok" if layout == "BTAD" else GOOD)
    elif layout == "MT-Defect":
        _read_mt_defect(dataset)
    elif layout == "NanoTWICE":
        _read_nanotwice(dataset)
    else:
        _read_plain(dataset)
    for label, kind, lost in ((0, "normal", "image AUROC and AP"), (1, "defective", "all metrics")):
        if dataset.test and all(sample.label != label for sample in dataset.test):
            dataset.notes.append(f"there are no {kind} test images: {lost} will be undefined")
    if not dataset.train:
        raise DataError(
            f"no good images to train on in {one_line(root)} (read as: {dataset.layout}); "
            f"known extensions: {' '.join(IMAGE_EXTENSIONS)}"
        )
    _check_mask_sizes(dataset.test)
    return dataset


def layout_of(root: Path) -> str:
    """Folder -> name of the layout that its sub-folders show, or "" if none."""
    marks = {"MVTec": "train/good", "BTAD": "train/ok", "MT-Defect": "MT_Free", "NanoTWICE": "Anomalous"}
    layouts = [name for name, mark in marks.items() if os.path.isdir(root / mark)]
    if len(layouts) > 1:
        raise DataError(f"{one_line(root)} looks like {' and '.join(layouts)} at once; keep one of the layouts in it")
    return layouts[0] if layouts else ""


def describe(dataset: DataSet) -> str:
    """Data set -> a few lines that say what was found: layout, counts by class, masks, sizes, notes."""
    types = Counter(sample.defect_type for sample in dataset.test if sample.label)
    masks = sum(sample.mask_path is not None for sample in dataset.test)
    lines = [f"data: {dataset.layout} at {one_line(dataset.root)}", f"train: {len(dataset.train)} good images"]
    tested = f"{len(dataset.test) - types.total()} good, {types.total()} defective" if dataset.test else "none"
    by_type = ", ".join(f"{one_line(name)} {count}" for name, count in sorted(types.items()))
    lines.append(f"test: {tested}" + (f" ({by_type}); masks for {masks}" if types else ""))
    lines.append(f"sizes: {_describe_sizes([sample.path for sample in dataset.train + dataset.test])}")
    return "\n".join(lines + [f"note: {note}" for note in dataset.notes])


def _describe_sizes(paths: list[Path]) -> str:
    """Range of the image sizes, from the headers of at most _DESCRIBED evenly spread files."""
    looked_at = paths[:: -(-len(paths) // _DESCRIBED)]
    sizes = [size for size in map(_size, looked_at) if size]
    widths, heights = zip(*sizes) if sizes else ([0], [0])
    if len(set(sizes)) == 1:
        text = f"{widths[0]}x{heights[0]}"
    else:
        text = f"{min(widths)}-{max(widths)} x {min(heights)}-{max(heights)}, {len(set(sizes))} different"
    text += f" (of {len(looked_at)} files looked at)" if len(looked_at) < len(paths) else ""
    broken = len(looked_at) - len(sizes)
    return text + (f"; {broken} files are no readable images" if broken else "")


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) by the file's header; None for a broken file, which the loading will report."""
    try:
        return image_size(path)
    except ImageError:
        return None


def _check_mask_sizes(samples: list[Sample]) -> None:
    for sample in samples:
        image, mask = _size(sample.path), _size(sample.mask_path) if sample.mask_path else None
        if image and mask and image != mask:
            raise DataError(
                f"mask {one_line(sample.mask_path)} is {mask[0]}x{mask[1]} but its image {one_line(sample.path)} "
                f"is {image[0]}x{image[1]}; save both at one size"
            )


def _read_train_test(dataset: DataSet, good: str) -> None:
    """train/<good>, test/<good>, test/<type>, ground_truth/<type>."""
    root = dataset.root
    dataset.train = good_samples(images_of(root / "train" / good, dataset.notes))
    if not os.path.isdir(root / "test"):
        dataset.notes.append("there is no test/ folder: nothing to evaluate on")
        return
    loose, folders = list_folder(root / "test", [])
    if loose:
        raise DataError(f"{one_line(loose[0])} lies directly in test/; move it to test/{good} or test/<defect type>")
    for folder in folders:
        images = images_of(folder, dataset.notes)
        if folder.name == good:
            dataset.test += good_samples(images)
        else:
            masks = images_of(root / "ground_truth" / folder.name, dataset.notes, optional=True)
            dataset.test += pair_masks(images, masks, folder.name, dataset.notes)


def _read_mt_defect(dataset: DataSet) -> None:
    """MT_<Type>/Imgs holds images (.jpg) and masks (same stem, .png) side by side."""
    for folder in list_folder(dataset.root, [])[1]:
        if not folder.name.startswith("MT_"):
            continue
        files = images_of(folder / "Imgs", dataset.notes)
        images = [file for file in files if file.suffix.lower() != ".png"]
        masks = [file for file in files if file.suffix.lower() == ".png"]
        if folder.name == "MT_Free":
            names = _training_names(images, dataset)
            dataset.train = good_samples([image for image in images if image.name in names])
            dataset.test = good_samples([image for image in images if image.name not in names]) + dataset.test
        else:
            dataset.test += pair_masks(images, masks, folder.name.removeprefix("MT_").lower(), dataset.notes)


def _training_names(good: list[Path], dataset: DataSet) -> set[str]:
    """The canonical training names of MT-Defect, or without their list a fixed random 80 % of the good images."""
    path = dataset.root / "train_filenames.txt"
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except FileNotFoundError:
        order = np.random.default_rng(0).permutation(len(good))
        dataset.notes.append(f"{path.name} is missing: a fixed random 80 % of the good images train, the rest test")
        return {good[i].name for i in order[: round(0.8 * len(good))]}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of training names {one_line(path)}: {error}") from error
    missing = sorted(names - {image.name for image in good})
    if missing:
        dataset.notes.append(f"{len(missing)} of {len(names)} names in {path.name} have no image (first: {missing[0]})")
    return names


def _read_nanotwice(dataset: DataSet) -> None:
    """Normal/*.tif trains; Anomalous/images/*.tif with Anomalous/gt/*.png tests."""
    dataset.train = good_samples(images_of(dataset.root / "Normal", dataset.notes))
    images = images_of(dataset.root / "Anomalous" / "images", dataset.notes)
    masks = images_of(dataset.root / "Anomalous" / "gt", dataset.notes, optional=True)
    dataset.test = pair_masks(images, masks, "anomalous", dataset.notes)


def _read_plain(dataset: DataSet) -> None:
    """A folder of good images, recursively. Whatever suggests that not all of them are good images is an error."""
    root = dataset.root
    nested = [folder.name for folder in list_folder(root, [])[1] if layout_of(folder)]
    if nested:
        raise DataError(
            f"{one_line(root)} holds {len(nested)} data sets: {', '.join(map(one_line, nested))}; "
            f"give one of them, as in --data {one_line(root / nested[0])}"
        )
    pending = [root]
    while pending:
        images, folders = list_folder(pending.pop(), dataset.notes)
        dataset.train += good_samples(images)
        for folder in folders:
            if folder.name.lower() in _NOT_GOOD:
                raise DataError(
                    f"a plain folder must hold good images only, but there is {one_line(folder)}; give the folder "
                    "of the good ones, or arrange train/good, test/good, test/<type>, ground_truth/<type>"
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
