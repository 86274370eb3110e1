"""Good images -> a trained, calibrated network: what ``python -m almrr_ref.train`` and `train_detector` share.

Whatever is not asked for by name is chosen here, and each choice is one message with its reason.
"""

import dataclasses
import signal
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.backbones.weights import choose_backbone
from almrr_ref.calibrate import calibrate, fit_features
from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.layouts import DataSet
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.split import load_good_images, refuse_other_files, training_files
from almrr_ref.data.textures import texture_source
from almrr_ref.model import ALMRR, describe_model, restore_model
from almrr_ref.plus.varied import varied_anomaly
from almrr_ref.report.overlays import contact_sheet, save_picture
from almrr_ref.report.scores import clear_results
from almrr_ref.run import distributed
from almrr_ref.run.text import LOGGER, duration, one_line
from almrr_ref.training import Progress, Trainer

DRAW = {"perlin": textured_anomaly, "varied": varied_anomaly}  # by anomaly_style


@dataclass(frozen=True)
class Fitted:
    """What came of a training: the network, calibrated unless a signal stopped it before the last step."""

    model: ALMRR
    step: int
    stopped_by: signal.Signals | None
    unreadable: int  # number of broken files


def choose_preset(preset: str, data: str | None, device: torch.device) -> tuple[str, str]:
    """Choose the preset if it is "auto" -> preset, and the message that says why; "" if it was named."""
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
    data: DataSet,
    model_config: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    run: Path | None = None,
    stored: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train on the good images of a data set, and calibrate.

    Args:
        model_config: its backbone may be "auto".
        run: folder for last.pt, log.jsonl and synthetic.png; without one nothing is written.
        stored: content of the checkpoint to continue from, with the same configs.
        progress: called with the step, the number of steps and the losses by name, now and then.
    Raises:
        ValueError: if the images or the backbone's weights cannot be used, or the loss is no longer finite.
    """
    distributed.rank_batch_size(config.batch_size)  # refuses at once a batch that the ranks cannot divide
    if stored:
        model = restore_model(stored, device)
    else:
        model = ALMRR(with_backbone(model_config), seed=config.seed).to(device)
    LOGGER.info(describe_model(model))
    good = load_good_images(data, model.config, config)
    distributed.check_equal(zlib.crc32(good.training.numpy().data), "training images")
    varied = config.anomaly_style == "varied"
    textures = texture_source(config.anomaly_source, good.training, model.config.image_size, mixed=varied)
    files = training_files(data, textures)
    if stored and run:
        refuse_other_files(stored["training"]["files"], files, run)
    samples = TrainingSamples(good.training, textures, config, DRAW[config.anomaly_style], good.part_ids)
    trainer = Trainer(model, samples, files, run, stored["training"] if stored else None, progress)
    if distributed.rank() == 0:
        if run:
            save_sample_sheet(samples, run / "synthetic.png")
        if trainer.done < trainer.steps:
            say_how_long(trainer)
        if not stored:
            fit_features(model, samples)
            if run:
                (run / "last.pt").unlink(missing_ok=True)  # only now: whatever was wrong above has cost nothing
                clear_results(run / "evaluation", overwrite=True)
    stopped_by = trainer.fit()
    if distributed.rank() == 0 and not stopped_by and model.threshold is None:  # else a finished run was resumed
        calibrate(model, good.held_out, samples)
        trainer.save()
    return Fitted(model, trainer.done, stopped_by, good.unreadable)


def save_sample_sheet(samples: TrainingSamples, path: Path, count: int = 8) -> None:
    """Draw the first simulated anomalies of the run, as in the paper's Fig. 3: clean | augmented | mask."""
    drawn = (samples[number][:3] for number in range(100 * count))
    rows = list(islice((row for row in drawn if row[2].any() or samples.config.clean_probability == 1), count))
    save_picture(path, contact_sheet(rows, ("clean", "augmented", "mask"), columns=2))


def say_how_long(trainer: Trainer) -> None:
    """Say how long the run will take, from a timed step."""
    step, left = trainer.time_step(), trainer.steps - trainer.done
    LOGGER.info(f"{left} steps of {step:.2g} s will take about {duration(step * left)}")
