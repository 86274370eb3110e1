"""The verdicts of a training run: by the memory alone before the first step, by the whole network after the last."""

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from almrr_ref.calibration.good_features import complete_memory
from almrr_ref.calibration.thresholds import percent
from almrr_ref.calibration.verdict import Verdict, set_verdict, stored_calibration, with_groups
from almrr_ref.data.split import GoodImages, content_key
from almrr_ref.report.scores import write_metrics
from almrr_ref.run.files import CALIBRATION
from almrr_ref.run.text import LOGGER
from almrr_ref.training import Trainer

FIRST = 100  # largest number of images that set the threshold of the memory alone
FEWEST_ASIDE = 10  # images kept aside; with fewer, the images trained on serve, too


def judge_good_images(trainer: Trainer, images: GoodImages, root: Path) -> None:
    """After the last step: complete the memory, set balance and threshold, and save both with what they promise."""
    model, config = trainer.model, trainer.config
    complete_memory(model, images.held_out, trainer.samples, images.image_ids, trainer.float_features)
    good = images.calibration if config.parts else with_groups(model, images.calibration)
    verdict = set_verdict(model, good, config, known=known_stages(trainer, images))
    if by_memory_alone(trainer) and trainer.calibration and trainer.calibration["memory_alone"]:
        LOGGER.info(f"the memory alone found {percent(trainer.calibration['memory_alone']['all'])} of all of them")
    save_verdict(trainer, verdict, images, root)


def known_stages(trainer: Trainer, images: GoodImages) -> dict[int, list[Tensor]]:
    """Stages by image id of the whole images whose features training has cached: the backbone need not run again."""
    if trainer.float_features is None or trainer.model.config.tile:
        return {}
    return {int(images.image_ids[row]): stages for row, stages in trainer.float_features.cached.items()}


def judge_by_memory(trainer: Trainer, images: GoodImages, root: Path) -> None:
    """Before the first step: save a detector by the memory alone, so that a stopped run has one, too.

    The images kept aside set its threshold, or all good images where these are few. With --steps 0 this only weighs the
    evidence; `judge_good_images` sets the threshold.
    """
    model, config = trainer.model, trainer.config
    if model.evidence is None or not model.evidence.used[2]:
        return
    model.evidence.weigh(memory_alone=True)
    if not trainer.steps:
        return
    good = [replace(entry, image_id=-1) for entry in images.calibration if not entry.trained]
    if len(good) < FEWEST_ASIDE:  # before `complete_memory` a patch's id is that of its part
        good = [replace(entry, image_id=entry.part_id) for entry in images.calibration]
    LOGGER.info("before any training, by the memory of good patches alone:")
    drawn = good[:: math.ceil(len(good) / FIRST)]  # of all parts: they come in the order of their files
    verdict = set_verdict(model, drawn, config)
    save_verdict(trainer, verdict, images, root, memory_alone=True)


def by_memory_alone(trainer: Trainer) -> bool:
    """Whether the threshold is still that of `judge_by_memory`."""
    return "memory_alone" in (trainer.calibration or {})


def save_verdict(
    trainer: Trainer, verdict: Verdict, images: GoodImages, root: Path, memory_alone: bool = False
) -> None:
    """Write calibration.json and last.pt."""
    if trainer.run:
        write_metrics(trainer.run / CALIBRATION, verdict.content)
    files, trained = trainer.files["images"], {entry.image_id for entry in images.calibration if entry.trained}
    listed = [[content_key(root / name, mark), name, i in trained] for i, (name, mark) in enumerate(files.items())]
    trainer.calibration = {**stored_calibration(verdict, listed, None), "copies": images.copies}
    if memory_alone:
        trainer.calibration["memory_alone"] = verdict.content["simulated"]
    trainer.save()
