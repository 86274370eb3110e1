"""Checkpoints: one file that rebuilds its network, written whole or not at all, loaded without running code.

A checkpoint is a dictionary saved by ``torch.save``: format number, both configs, all weights (the frozen backbone's
too), threshold, the state of the training (optimiser, step, files), versions, and, once a threshold is set,
"calibration": how it came about. The checksums of the zip container are verified first, since ``torch.load`` does not.
"""

import dataclasses
import io
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.config import SETTINGS, VERSION, Config, ModelConfig, TrainConfig, from_dict
from almrr_ref.run.files import atomic_write
from almrr_ref.run.text import LOGGER

OLDEST, FORMAT = 6, 7  # that are read; that is written
FIGURES = ("good_scores", "intervals", "simulated_scores")  # of a calibration: what it promises and finds
CONTENT = ("model_config", "train_config", "weights", "threshold", "training", "versions")


class CheckpointError(ValueError):
    """The file is no usable checkpoint; the message names it and says why."""


def versions() -> dict[str, str]:
    """The versions that a checkpoint and metrics.json record."""
    return {"almrr_ref": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}


def save_checkpoint(
    path: Path,
    configs: tuple[ModelConfig, TrainConfig],
    weights: dict[str, Tensor],
    threshold: float | None,
    training: dict[str, Any],
    calibration: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically: after a crash either the old file or the new one is there, whole.

    Raises:
        CheckpointError: if a weight is NaN or infinite, so that a ruined network never replaces a good one.
        OutputError: if the file cannot be written.
    """
    ruined = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if ruined:
        raise CheckpointError(
            f"{path} is not written: {len(ruined)} weights, such as {ruined[0]}, are no longer finite numbers; "
            "an older file stays as it is: try a lower --lr, or no --amp"
        )
    model_config, train_config = (dataclasses.asdict(config) for config in configs)
    values = (model_config, train_config, weights, threshold, training, versions())
    content = dict(zip(CONTENT, values)) | ({"calibration": calibration} if calibration else {})
    write_checkpoint(path, content)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write the dictionary of a checkpoint as it is, atomically."""
    buffer = io.BytesIO()
    torch.save({"program": "almrr-ref", "format": FORMAT, **content}, buffer)
    atomic_write(path, buffer.getvalue())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and check a checkpoint's dictionary, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, foreign, or of a newer or too old a format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; training writes RUN/last.pt")
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an exported network, for predict, serve and Detector; give the run's last.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile and torch.load raise a dozen types on foreign bytes; all mean the same here
        kind = type(error).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of almrr-ref, or is damaged ({kind}); take a copy of it, or train again"
        ) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged (checksum of {damaged}); take a copy of it, or train again")
    if not isinstance(content, dict) or content.get("program") != "almrr-ref":
        raise CheckpointError(f"{path} is not a checkpoint of almrr-ref; training writes RUN/last.pt")
    version, missing = content.get("format"), [name for name in CONTENT if name not in content]
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads up to {FORMAT}: update almrr-ref")
    if isinstance(version, int) and version < OLDEST:
        raise CheckpointError(f"{path} has format {version}, this version reads from {OLDEST} on: train again")
    if not isinstance(version, int):
        missing.append("a number for its format")
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint of almrr-ref: it lacks {', '.join(missing)}")
    return content


def stored_config(config_class: type[Config], values: dict[str, Any]) -> Config:
    """The config that a file holds, with the defaults of what its version did not have.

    Raises:
        ValueError: if it sets what this version does not know, without which its scores would be others.
    """
    unknown = [f"{name}={value}" for name, value in values.items() if value and name not in SETTINGS]
    if unknown:
        raise ValueError(f"made with {', '.join(unknown)} by another version, which alone can use it")
    return from_dict(config_class, values)


def valid_calibration(record: dict[str, Any] | None, config: ModelConfig) -> dict[str, Any] | None:
    """The record of a checkpoint's calibration, for those who show it; None if there is none.

    Where another region is judged than when it was made, it comes without its FIGURES, and the log says so.
    """
    if record is None or record.get("judged_png") == config.judged_png:
        return record
    LOGGER.warning(
        "the region of interest was drawn after the calibration, whose figures are of another region: run "
        "python -m almrr_ref.calibrate with good images for this one"
    )
    return {name: value for name, value in record.items() if name not in FIGURES}
