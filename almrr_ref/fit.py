"""Good images -> a trained, calibrated network: what `train_detector` and ``python -m almrr_ref.train`` share.

What the user did not set is chosen here; each choice is logged in one message with its reason.
"""

import dataclasses
import os
import signal
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.backbones.weights import choose_backbone
from almrr_ref.calibration.good_features import fit_features, settle_brightness, settle_standardise
from almrr_ref.calibration.of_training import by_memory_alone, judge_by_memory, judge_good_images
from almrr_ref.config import SETTINGS, ModelConfig, TrainConfig, from_dict, make_configs
from almrr_ref.data.folders import DataSet, Sample, describe, require_good
from almrr_ref.data.images import ImageError, Picture, copied_picture, is_one_picture, read_image
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.recognise import recognise_levels
from almrr_ref.data.roi import draw_inside, settle_roi
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.shape import settle_size
from almrr_ref.data.split import (
    GoodImages,
    pixel_mark,
    read_part_ids,
    refuse_other_files,
    split_good_images,
    training_files,
)
from almrr_ref.data.textures import texture_source
from almrr_ref.deploy.packed import folded
from almrr_ref.detector import Detector
from almrr_ref.features import FeatureCache, FeatureExtractor
from almrr_ref.model import ALMRR, build_extractor, describe_model, restore_model
from almrr_ref.plus.varied import varied_anomaly
from almrr_ref.report.overlays import contact_sheet, save_picture
from almrr_ref.report.scores import clear_results
from almrr_ref.run import distributed
from almrr_ref.run.cli import pick_device
from almrr_ref.run.files import CALIBRATION
from almrr_ref.run.folder import open_run
from almrr_ref.run.text import LOGGER, one_line
from almrr_ref.timing import how_long
from almrr_ref.training import Progress, Trainer

SHOWN = 8  # samples on the sheet
IN_MEMORY = "pictures in memory"  # the field `data` where there is no folder


@dataclass(frozen=True)
class Fitted:
    """The result of a training: the network, calibrated unless a signal stopped it before the last step."""

    model: ALMRR
    step: int
    stopped_by: signal.Signals | None
    unreadable: int  # number of broken files
    calibration: dict[str, Any] | None  # as in the checkpoint


def choose_preset(preset: str, data: str | None, device: torch.device) -> tuple[str, str]:
    """Return the preset, chosen if it is "auto", and the message that says why ("" if it was named)."""
    if preset != "auto":
        return preset, ""
    if data == "demo":
        return "plus", "preset plus: it trains on the demo within minutes; say otherwise with --preset"
    if device.type == "cuda":
        return "paper", "preset paper: there is a CUDA GPU; say otherwise with --preset plus"
    return "plus", "preset plus: made for computing without a CUDA GPU; say otherwise with --preset paper"


def with_backbone(config: ModelConfig) -> ModelConfig:
    """Choose the backbone if it is "auto", and say why."""
    if config.backbone != "auto":
        return config
    name, reason = distributed.from_first(lambda: choose_backbone(config.weights))
    LOGGER.info(f"backbone {name}: {one_line(reason)}; say otherwise with --backbone or --weights")
    return dataclasses.replace(config, backbone=name)


def fit(
    good: DataSet | Sequence[Picture],
    model_config: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    run: Path | None = None,
    stored: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train on good pictures, or on the good images of a data set, and calibrate.

    Args:
        model_config: its backbone may be "auto".
        run: folder for last.pt, log.jsonl, calibration.json and synthetic.png; without one nothing is written.
        stored: content of the checkpoint to continue from, with the same configs.
        progress: called with the step, the number of steps and the losses by name, now and then.
    Raises:
        ValueError: if the images or the backbone's weights cannot be used, or the loss is no longer finite.
    """
    distributed.rank_batch_size(config.batch_size)  # refuses at once a batch that the ranks cannot divide
    if config.steps == 0 and (model_config.frm_input != "memory" or not model_config.memory_weight):
        raise ValueError("--steps 0 judges by the memory alone, which this network has not: take --preset plus")
    pictures: Sequence[Picture]
    if isinstance(good, DataSet):
        require_good(good)
        data, pictures = good, [sample.path for sample in good.train]
    elif config.parts:
        raise ValueError(f"parts {config.parts!r} is looked for in names of files; give a folder or a list of paths")
    else:
        data, pictures = DataSet(Path(), "pictures"), good
    if stored:
        model_config = from_dict(ModelConfig, stored["model_config"])
    else:
        model_config = settle_size(pictures, recognise_levels(pictures, with_backbone(model_config), LOGGER.info))
        model_config = settle_roi(config.roi, pictures, model_config)
    part_ids = read_part_ids(data, config.parts) if data.train else range(len(pictures))
    images = split_good_images(pictures, part_ids, model_config, config)
    distributed.check_equal(zlib.crc32(images.training.numpy().data), "training images")
    cache = FeatureCache(images.training, device)
    if stored:
        model = restore_model(stored, device)
        fold_for_training(model.extractor, device)
    else:
        model = new_model(model_config, config.seed, images, cache)
    LOGGER.info(describe_model(model))
    samples = make_samples(images, config, model.extractor.roi)
    files = training_files(data, samples.source, config.roi)
    if not data.train:  # row i is image id i, as `save_verdict` takes it
        marks = map(pixel_mark, pictures)
        files["images"] = {f"picture {number}": mark for number, mark in enumerate(marks)}
    if stored and run:
        refuse_other_files(stored["training"]["files"], files, run)
    float_cache = None if config.amp else cache  # with amp the features that training keeps have 16 bits
    trainer = Trainer(model, samples, files, run, stored, progress, float_cache)
    if distributed.rank() == 0:
        prepare(trainer, images, data.root, fresh=not stored)
    stopped_by = trainer.fit()
    if trainer.steps and not stopped_by and model.evidence is not None:
        model.evidence.weigh(memory_alone=False)
    finished_before = model.threshold is not None and not by_memory_alone(trainer)  # and resumed
    if distributed.rank() == 0 and not stopped_by and not finished_before:
        judge_good_images(trainer, images, data.root)
    return Fitted(model, trainer.done, stopped_by, images.unreadable, trainer.calibration)


def new_model(config: ModelConfig, seed: int, images: GoodImages, cache: FeatureCache) -> ALMRR:
    """A network before training, on the cache's device, with what the good images decide: brightness, ``standardise``.

    Args:
        cache: of the training images; it keeps the features that the choice has looked at.
    """
    config = settle_brightness(config, images.training)
    extractor = build_extractor(config, config.weights).to(cache.device)
    fold_for_training(extractor, cache.device)
    config = distributed.from_first(lambda: settle_standardise(config, images, extractor, cache))
    return ALMRR(config, seed, extractor=extractor).to(cache.device)


def fold_for_training(extractor: FeatureExtractor, device: torch.device) -> None:
    """On a CPU, let the folded backbone compute the features that are trained on: the same, a sixth faster."""
    if device.type == "cpu":
        extractor.stand_in[:] = [folded(extractor.backbone)]


def make_samples(images: GoodImages, config: TrainConfig, roi: Tensor | None = None) -> TrainingSamples:
    """Good images -> the row of training samples, with anomalies and textures as the config says.

    Args:
        roi: bool (h, w): where anomalies may be drawn; None: everywhere.
    """
    varied = config.anomaly_style == "varied"
    textures = texture_source(config.anomaly_source, images.training, mixed=varied)
    draw = varied_anomaly if varied else textured_anomaly
    draw = draw if roi is None else partial(draw_inside, draw, roi.cpu())
    return TrainingSamples(images.training, textures, config, draw, images.part_ids)


def prepare(trainer: Trainer, images: GoodImages, root: Path, fresh: bool) -> None:
    """Before the first step: draw sample images, estimate the time, fit features and memory, judge by them alone."""
    if trainer.run:
        save_sample_sheet(trainer.samples, trainer.run / "synthetic.png")
    if trainer.done < trainer.steps:
        LOGGER.info(how_long(trainer, len(images.held_out), fresh))
    if not fresh:
        return
    fit_features(trainer.model, trainer.samples, trainer.float_features)
    if trainer.run:
        clear_results(trainer.run / "evaluation", overwrite=True)
        for name in ("last.pt", CALIBRATION):  # only now: an error above must not cost the earlier run
            (trainer.run / name).unlink(missing_ok=True)
    judge_by_memory(trainer, images, root)


def train_detector(
    good: str | os.PathLike[str] | Sequence[Picture],
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    preset: str = "auto",
    device: str = "auto",
    **fields: Any,
) -> Detector:
    """Train on good pictures -> a `Detector`, calibrated; in any thread, and silently but for the log "almrr_ref".

    Args:
        good: a folder, in any layout that the command knows; or paths, or pictures as `Detector` takes them.
        out: new folder for last.pt, log.jsonl, calibration.json and synthetic.png; without it all stays in memory.
        progress: called now and then with the step, the number of steps and the losses by name.
        preset: "paper", "plus", or "auto": paper where there is a CUDA GPU, plus otherwise.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        fields: any field of ModelConfig and TrainConfig but `data`, over the preset's; backbone may be "auto".
    Raises:
        ValueError: if a name or value is none that it can be, a picture is no picture, or ``out`` holds a run.
        KeyboardInterrupt: after Ctrl-C; the run in ``out`` is saved and can be resumed by the command.
    """
    _refuse_unknown(fields)
    if out is not None and (not isinstance(out, str | os.PathLike) or out == ""):
        raise ValueError(f"out is a folder or None; got {out!r}")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress is a function or None; got {progress!r}")
    compute_on = pick_device(device)
    where = str(Path(good).resolve()) if isinstance(good, str | os.PathLike) else IN_MEMORY
    preset, reason = choose_preset(preset, where, compute_on)
    configs = make_configs(preset, {**fields, "data": where}, {"backbone": "auto"})
    data = find_pictures(good)
    with open_run(Path(out), where, {}) if out is not None else nullcontext((None, None)) as (run, _):
        if reason:
            LOGGER.info(reason)
        fitted = fit(data, *configs, compute_on, run, progress=progress)
    if fitted.stopped_by:
        signal.raise_signal(fitted.stopped_by)
        raise KeyboardInterrupt(f"training was stopped by {fitted.stopped_by.name} after step {fitted.step}")
    return Detector(fitted.model.fuse(), calibration=fitted.calibration)


def _refuse_unknown(fields: dict[str, Any]) -> None:
    """Raise ValueError for a name that is no field, with a near one if there is any."""
    for name in fields:
        if name == "data" or name not in SETTINGS:
            near = get_close_matches(name, sorted(SETTINGS - {"data"} | {"out", "progress", "preset", "device"}), 1)
            hint = f"did you mean {near[0]!r}?" if near else "beside its own it takes any field of the configs"
            raise ValueError(f"train_detector has no argument {name!r}; {hint} (almrr_ref/config.py)")


def find_pictures(good: str | os.PathLike[str] | Sequence[Picture]) -> DataSet | list[Picture]:
    """The argument of `train_detector` -> a data set of files, or pictures in memory. Raises ValueError."""
    if isinstance(good, str | os.PathLike):
        data_set = find_dataset(good)
        LOGGER.info(describe(data_set))
        return data_set
    if is_one_picture(good):
        raise ValueError("good is one picture; give a list of them, or a folder")
    if not isinstance(good, Iterable) or isinstance(good, dict) or getattr(good, "ndim", 1) == 0:
        raise ValueError(f"good is of type {type(good).__name__}; give a folder, or a list of paths or pictures")
    pictures = list(map(copied_picture, good))
    if not pictures:
        raise ValueError("good is empty; give a folder, or a list of paths or pictures")
    paths = [Path(picture).absolute() for picture in pictures if isinstance(picture, str | os.PathLike)]
    if len(paths) == len(pictures):
        paths = list(dict.fromkeys(paths))
        root = Path(os.path.commonpath([path.parent for path in paths]))
        return DataSet(root, "list of files", [Sample(path, 0, "good") for path in paths])
    for number, picture in enumerate(pictures):
        try:
            read_image(picture)
        except ImageError as error:
            raise ValueError(f"good[{number}]: {error.reason}") from error
    return pictures


def save_sample_sheet(samples: TrainingSamples, path: Path) -> None:
    """Draw the first simulated anomalies of the run, as in the paper's Fig. 3: clean | augmented | mask."""
    drawn = (samples[number] for number in range(100 * SHOWN))
    shown = (sample for sample in drawn if sample[1].any() or samples.config.clean_probability == 1)
    rows = [(samples.images[index].float() / 255, augmented, mask) for augmented, mask, index in islice(shown, SHOWN)]
    save_picture(path, contact_sheet(rows, ("clean", "augmented", "mask"), columns=2))
