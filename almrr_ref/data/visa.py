"""VisA's layout: the objects' images and masks side by side, and the split in a table.

    <object>/Data/Images/{Normal,Anomaly}, <object>/Data/Masks/Anomaly, split_csv/1cls.csv:
    object,split,label,image,mask with paths below the folder of all objects

Source: Zou et al. 2022, "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation".
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from almrr_ref.data.folders import DataError, DataSet, Sample
from almrr_ref.run.text import counted, one_line

LAYOUT = "VisA object"
_COLUMNS = {"object", "split", "label", "image", "mask"}
_LABELS = "normal", "anomaly"


def is_object(root: Path) -> bool:
    return (root / "Data" / "Images").is_dir() and _table(_absolute(root).parent) is not None


def is_collection(root: Path) -> bool:
    return _table(root) is not None


def read_split(dataset: DataSet) -> None:
    """Fill in the samples of one object by the table. Raises DataError, OSError."""
    root = dataset.root
    base = root if is_collection(root) else _absolute(root).parent
    table = _table(base)
    assert table is not None
    rows = list(_rows(table))
    objects = sorted({row["object"] for row in rows})
    if base != root:
        name, known = _absolute(root).name, ", ".join(map(one_line, objects))
        if name not in objects:
            raise DataError(f"{one_line(table)} has no object {one_line(name)}, but {known}; rename the folder")
        objects = [name]
    if len(objects) != 1:
        remedy = f"give one of them, such as {one_line(root / objects[0])}" if objects else "its table is empty"
        raise DataError(f"{one_line(root)} holds {len(objects)} objects: {', '.join(map(one_line, objects))}; {remedy}")
    missing = missing_masks = 0
    for row in rows:
        if row["object"] != objects[0]:
            continue
        for name in filter(None, (row["image"], row["mask"])):
            if base != root and Path(name).parts[:1] != (objects[0],):
                raise DataError(f"{one_line(table)}: {one_line(name)} does not begin with {one_line(objects[0])}/")
        path = _below(root, base, row["image"])
        if not path.is_file():
            missing += 1
        elif row["split"] == "train" and row["label"] == "normal":
            dataset.train.append(Sample(path, 0, "good"))
        elif row["split"] == "test":
            mask = _below(root, base, row["mask"]) if row["mask"] else None
            if mask and not mask.is_file():
                mask, missing_masks = None, missing_masks + 1
            normal = row["label"] == "normal"
            dataset.test.append(Sample(path, int(not normal), "good" if normal else "anomaly", mask))
    if missing:
        dataset.notes.append(f"missing: {counted(missing, 'image')} of {one_line(table)}")
    if missing_masks:
        which = f"missing: {counted(missing_masks, 'mask')} of {one_line(table)}"
        dataset.notes.append(f"{which}: their images count for the image metrics only")


def _below(root: Path, base: Path, name: str) -> Path:
    """A path of the table, below the data folder as the user wrote it."""
    return root / name if base == root else root / Path(name).relative_to(_absolute(root).name)


def _absolute(root: Path) -> Path:
    """A folder with its name and parent, as the user wrote it: the folder of an object may be a link."""
    return Path(os.path.abspath(root))


def _table(base: Path) -> Path | None:
    path = base / "split_csv" / "1cls.csv"
    return path if path.is_file() else None


def _rows(table: Path) -> Iterator[dict[str, str]]:
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        if not set(reader.fieldnames or []) >= _COLUMNS:
            expected = ",".join(sorted(_COLUMNS))
            raise DataError(f"{one_line(table)} has the columns {reader.fieldnames}; expected {expected}")
        for row in reader:
            if any(not row[name] for name in _COLUMNS - {"mask"}) or ".." in row["image"] + (row["mask"] or ""):
                raise DataError(f"{one_line(table)}, line {reader.line_num}: not an object, split, label and image")
            if row["label"] not in _LABELS:
                what = f"label {row['label']!r}; expected {' or '.join(_LABELS)}"
                raise DataError(f"{one_line(table)}, line {reader.line_num}: {what}")
            yield row
