"""A plain folder: good images only, in it and in its sub-folders. Whatever may not be good is refused.

Training takes every image for good, so one folder of defects makes a network that finds none. Folders of classes side
by side, folders named for defects or masks, and masks beside their images are therefore errors. They say how many
images lie where and what to give instead. Folders by date, lot or camera are accepted.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from almrr_ref.data.dataset import DataError, DataSet, all_pages, good_samples
from almrr_ref.data.folders import Links, list_folder
from almrr_ref.data.images import ImageError, read_image
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import one_line

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


def read_plain(dataset: DataSet, data_sets: Sequence[str]) -> None:
    """Take every image below the root for training. `data_sets`: sub-folders that are data sets of their own.

    Raises DataError for whatever suggests that not all of them are good images; OSError.
    """
    root = dataset.root
    if data_sets:
        remedy = f"give one of them, as in --data {one_line(root / data_sets[0])}"
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
            notes.append(f"{len(empty)} empty masks beside their images in {one_line(parent)} are not read")
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
    return (
        _has(name, _BAD) or _has(name, _SPLITS_AND_MASKS) or bool(_NEGATED.search(re.sub(r"[\W_]+", " ", name.lower())))
    )


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
        remedy = f"give the good ones: --data {one_line(parent / good[0])}"
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
        what = f"{len(masks)} masks lie beside their images (first: {one_line(masks[0])})"
        remedy = "move the masks, and the images they belong to, elsewhere"
        raise DataError(f"{one_line(parent)}: {what}, and would train as good images; {remedy}")


def _count(folder: Path) -> int:
    """Number of the image files in a folder and all folders below it, links left out."""
    return sum(len(list_folder(Path(parent))[0]) for parent, _, _ in os.walk(folder))
