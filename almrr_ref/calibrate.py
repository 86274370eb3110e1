"""A new threshold without new training: ``python -m almrr_ref.calibrate --checkpoint RUN/last.pt --good DIR``.

Every good image in DIR is judged as a new one will be; an image that the network was trained on is recognised by its
content, and its patches in the memory do not count. The checkpoint gets the new threshold and balance, and keeps the
history of its thresholds; calibration.json beside it says what they promise and find. With --threshold X in place of
--good, the threshold is set to X, and nothing is judged.
"""

import argparse
import dataclasses
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from almrr_ref.calibration.by_hand import calibration_of, set_threshold
from almrr_ref.calibration.good_features import renew_memory
from almrr_ref.calibration.verdict import POINTS, Verdict, set_verdict, stored_calibration, with_groups
from almrr_ref.config import TrainConfig, from_dict
from almrr_ref.data.folders import find_inputs, require_good
from almrr_ref.data.images import ImageError, Levels, Remarks, load_image, read_image, split_page
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import decode
from almrr_ref.data.split import Good, content_key, file_mark, part_name, pixel_mark
from almrr_ref.detector import Detector
from almrr_ref.model import ALMRR, restore_model
from almrr_ref.report.overlays import contact_sheet, save_picture
from almrr_ref.report.scores import write_metrics
from almrr_ref.run.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from almrr_ref.run.cli import (
    add_device_flag,
    add_max_pixels_flag,
    finite,
    make_parser,
    path_argument,
    pick_device,
    run_command,
)
from almrr_ref.run.files import CALIBRATION, hold_folder
from almrr_ref.run.text import LOGGER, counted, decimals, one_line

LOOKED_AT = 100  # new good images that tell how they were judged until now


def read_good(
    folder: Path, images: list[list[Any]], copies: dict[int, int], parts: str | None
) -> tuple[list[Good], dict[int, int], list[list[Any]]]:
    """Good images of a folder; the part id of every image id; and the images that the checkpoint does not know.

    Args:
        images: those of the checkpoint, in the order of their ids: digest, path, whether trained on.
        copies: id of an image of the checkpoint that repeats another pixel by pixel: that one's id.
        parts: regular expression for the part that a file shows; without it every image shows another one.
    Raises:
        DataError: if a path does not say which part its file shows.
    """
    data = find_dataset(folder)
    require_good(data)
    id_of: dict[str, int] = {}
    for image_id, (digest, _, _) in enumerate(images):
        id_of.setdefault(digest, copies.get(image_id, image_id))  # the first of copies: the memory has its patches
    part_ids: dict[str, int] = {}

    def part_id(name: str) -> int:
        return part_ids.setdefault(part_name(parts, name) if parts else name, len(part_ids))

    part_of = {image_id: part_id(name) for image_id, (_, name, _) in enumerate(images)}
    good, new, listed, left_out = [], [], set(), 0  # type: list[Good], list[list[Any]], set[int | str], int
    marks: dict[Path, str] = {}
    for sample in data.train:
        name = sample.path.relative_to(data.root).as_posix()
        digest = key_among(images, sample.path, marks)
        image_id = id_of.get(digest, -1)
        key = digest if image_id < 0 else image_id
        if key in listed and not digest.startswith("#"):  # a copy tells nothing; "#": unreadable, each is named
            left_out += 1
            continue
        listed.add(key)
        if image_id >= 0:
            good.append(Good(sample.path, image_id, part_of[image_id], bool(images[image_id][2])))
        else:
            new.append([digest, name, False])
            good.append(Good(sample.path, -1, part_id(name if parts else f"new {name}"), False))
    if left_out:
        LOGGER.info(f"{counted(left_out, 'good image')} left out: copies of others")
    return good, part_of, new


def key_among(images: list[list[Any]], path: Path, marks: dict[Path, str]) -> str:
    """The key by which a picture is found among known images; a run of pictures in memory knows those of pixels.

    Args:
        marks: the digests of files read so far, which grows: a file is read once for all its pages.
    """
    if any(re.fullmatch(r"picture \d+", name) for _, name, _ in images[:1]):
        with suppress(ImageError):
            return content_key(Path(), pixel_mark(path))  # a picture in memory is no page
    file = split_page(path)[0]
    if file not in marks:
        marks[file] = file_mark(file, digest=True)
    return content_key(path, marks[file])


def read_defective(folder: Path, model: ALMRR, images: list[list[Any]]) -> tuple[list[Path], int]:
    """The pictures of a folder that can be read, and the number of the others, which are logged.

    They are read before the good images are judged, so that a mistake does not cost minutes.

    Args:
        images: the good ones, as in a checkpoint's record.
    Raises:
        ValueError: if the folder cannot be read, or no picture in it, or one is among the good images.
    """
    readable, unreadable, good = [], 0, {digest for digest, _, _ in images}  # type: list[Path], int, set[str]
    marks: dict[Path, str] = {}
    for entry in find_inputs(folder, "--defective"):
        try:
            if isinstance(entry, ImageError):
                raise entry
            read_image(entry, Levels.of(model.config))
            if key_among(images, entry, marks) in good:
                raise ValueError(f"--defective {one_line(entry)}: a good image, by --good or in training; take it away")
            readable.append(entry)
        except ImageError as error:
            LOGGER.warning(f"not read: {error}")
            unreadable += 1
    if not readable:
        raise ValueError(f"--defective {one_line(folder)}: no image that can be read")
    return readable, unreadable


def change_memory(
    model: ALMRR, good: list[Good], part_of: dict[int, int], images: list[list[Any]], dropped: set[int], extend: bool
) -> list[Good]:
    """Drop images from the memory, ``extend`` it by new ones -> the good images with their ids; changes part_of."""
    new = [entry for entry in good if entry.image_id < 0] if extend else []
    ids = range(len(images), len(images) + len(new))
    pictures, config = [entry.picture for entry in new], model.config
    decoded = decode(pictures, config.size, config.tile, Levels.of(config), Remarks())
    image_ids = torch.tensor([i for i, count in zip(ids, decoded.counts) for _ in range(count)], dtype=torch.long)
    renew_memory(model, dropped, decoded.images, image_ids, seed=0)
    id_of = {id(entry): image_id for entry, image_id in zip(new, ids)}
    good = [dataclasses.replace(entry, image_id=id_of.get(id(entry), entry.image_id)) for entry in good]
    part_of |= {entry.image_id: entry.part_id for entry in good}
    return good


def say_alarms(model: ALMRR, good: list[Good], extend: bool) -> None:
    """Log how many of the new good images have been called defective until now: another product's mostly are.

    Args:
        extend: whether they will be in the memory, out of which nothing takes them.
    """
    new = [entry.picture for entry in good if entry.image_id < 0]
    judged = Detector(model.eval().fuse()).stream(new[:: 1 + len(new) // LOOKED_AT], Remarks()) if new else ()
    verdicts = [bool(result.defective) for result in judged if not isinstance(result, ImageError)]
    if not verdicts:
        return
    line = f"{sum(verdicts)} of {len(verdicts)} of the new ones were called defective until now"
    if 2 * sum(verdicts) <= len(verdicts):
        LOGGER.info(line)
    else:
        remedy = "take back a copy of the checkpoint" if extend else "calibrate again with others"
        LOGGER.warning(f"note: {line}; if they are not all good, or of another product, {remedy}")


def show_outliers(outliers: list[Good], model: ALMRR, path: Path, dropped: bool) -> None:
    """Draw good images that score far outside the others, and say where; without any, remove an earlier picture."""
    path.unlink(missing_ok=True)
    if outliers:
        levels, size = Levels.of(model.config), model.config.size
        rows = [[load_image(entry.picture, size, levels)] for entry in outliers]
        save_picture(path, contact_sheet(rows, ["good?"], columns=4))
        print(f"they are shown in {one_line(path)}" + ("" if dropped else "; --drop-outliers leaves them out"))


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "calibrate",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.calibrate --checkpoint runs/carpet/last.pt --good new_good/ --false-positive-rate 0.05\n"
        "  python -m almrr_ref.calibrate --checkpoint runs/carpet/last.pt --good new_good/ --defective defects/\n"
        "  python -m almrr_ref.calibrate --checkpoint runs/carpet/last.pt --threshold 0.42",
    )
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="FILE", help="last.pt of a training run; rewritten")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--threshold", type=finite, metavar="X",
        help="set this threshold, as chosen on the report's page; the other flags do not matter then")  # fmt: skip
    source.add_argument("--good", type=path_argument, metavar="DIR",
        help="good images; where there is a train part, it is taken")  # fmt: skip
    add("--defective", type=path_argument, metavar="DIR",
        help="some defective images: where they show that a higher threshold finds as much, it is raised")  # fmt: skip
    add("--false-positive-rate", type=float, metavar="X",
        help="fraction of new good images that may be called defective (default: that of the training)")  # fmt: skip
    add("--operating-point", choices=POINTS, default=POINTS[0],
        help="fpr: the false-positive rate is kept; balanced: most found for the fewest false alarms, by --defective "
        "and simulated defects, above that rate if need be (default: fpr)")  # fmt: skip
    add("--calibrate-for", choices=("auto", "seen", "new"), default="auto",
        help="parts like those seen, or new parts (default: auto, as in training)")  # fmt: skip
    add("--parts", metavar="RE", help="which part a file shows, as in training (default: that of the training)")
    add("--extend-memory", action="store_true",
        help="the new good images' patches count as good from now on; copy FILE first, to go back")  # fmt: skip
    add("--drop-outliers", action="store_true",
        help="good images that score far outside are left out, of the memory too; copy FILE first")  # fmt: skip
    add_max_pixels_flag(parser)
    add_device_flag(parser)
    return parser


def command(arguments: argparse.Namespace) -> int:
    if not arguments.checkpoint.is_file():
        read_checkpoint(arguments.checkpoint)  # says what is wrong, before the folder would be made
    with hold_folder(arguments.checkpoint.parent):
        if arguments.threshold is None:
            return recalibrate(arguments)
        set_threshold(arguments.checkpoint, arguments.threshold)
        print(f"threshold {decimals(arguments.threshold)} in {one_line(arguments.checkpoint)}")
        return 0


def settings_of(arguments: argparse.Namespace, content: dict[str, Any]) -> TrainConfig:
    """The settings of a checkpoint's training, with the flags of this command in their place. Raises ValueError."""
    flags = {name: getattr(arguments, name) for name in ("false_positive_rate", "calibrate_for", "parts")}
    named = {name: value for name, value in flags.items() if value not in (None, "", "auto")}
    return dataclasses.replace(from_dict(TrainConfig, content["train_config"]), **named)


def recalibrate(arguments: argparse.Namespace) -> int:
    """Read the checkpoint, calibrate, write it back; return the exit code of the command."""
    path, content = arguments.checkpoint, read_checkpoint(arguments.checkpoint)
    before, config = calibration_of(content, path), settings_of(arguments, content)
    if "memory_alone" in before:
        raise CheckpointError(f"{path}: its training has not ended, so the memory alone judges: --resume it first")
    model = restore_model(content, pick_device(arguments.device))
    images = list(before["images"])
    good, part_of, new = read_good(arguments.good, images, before.get("copies", {}), config.parts)
    print(f"{counted(len(good), 'good image')}, {len(good) - len(new)} of which the network knows")
    defective, unreadable = [], 0  # type: list[Path], int
    if arguments.defective:
        defective, unreadable = read_defective(arguments.defective, model, images + new)
    if arguments.extend_memory and model.memory is None:
        raise ValueError("--extend-memory: this network has no memory of good patches, as --preset plus has")
    if not config.parts:
        good = with_groups(model, good)
        above = 1 + max(entry.part_id for entry in good)
        part_of = {i: part + above for i, part in part_of.items()}  # of images that are not among these
        part_of |= {entry.image_id: entry.part_id for entry in good if entry.image_id >= 0}

    def judge(good: list[Good]) -> Verdict:
        return set_verdict(model, good, config, defective, arguments.operating_point, part_of)

    say_alarms(model, good, arguments.extend_memory)
    if arguments.extend_memory and new:
        good = change_memory(model, good, part_of, images, set(), extend=True)
        images += new
    verdict = judge(good)
    show_outliers(verdict.outliers, model, path.with_name("outliers.png"), arguments.drop_outliers)
    if arguments.drop_outliers and verdict.outliers:
        odd_ones = {id(odd) for odd in verdict.outliers}
        good = [entry for entry in good if id(entry) not in odd_ones]
        if model.memory is not None:
            dropped = {odd.image_id for odd in verdict.outliers if odd.image_id >= 0}
            good = change_memory(model, good, part_of, images, dropped, extend=False)
        print(f"without these {len(verdict.outliers)}:")
        verdict = judge(good)
    for remark in verdict.calibration.remarks.lines():
        LOGGER.warning(f"note: {remark}")
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    record = stored_calibration(verdict, images, before)
    write_checkpoint(path, {**content, "weights": weights, "threshold": model.threshold, "calibration": record})
    write_metrics(path.with_name(CALIBRATION), verdict.content)
    print(f"threshold {decimals(model.threshold)} in {one_line(path)}")
    return 1 if verdict.calibration.unreadable or unreadable else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
