"""Checkpoints: one file that rebuilds its network, written whole or not at all, loaded without running code.

A checkpoint is a dictionary saved by ``torch.save``: format number, both configs, all weights (the frozen backbone's
too, so that the file is enough by itself), optimiser, step, state of the random generators, threshold, versions.
``torch.load`` reads it with ``weights_only=True``; before that the checksums which the zip container carries are
verified, since torch does not.
"""

import dataclasses
import io
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from almrr_ref import __version__
from almrr_ref.config import ModelConfig, TrainConfig, from_dict
from almrr_ref.model import ALMRR
from almrr_ref.run.files import atomic_write

FORMAT = 5
MEMORY_FORMAT = 5  # before it a memory, where there was one, held patches made otherwise
SAMPLES_FORMAT = 4  # before it the seed chose the initial weights alone, so that no run can go on with the same samples
CONTENT = ("model_config", "train_config", "weights", "threshold", "training", "versions")


class CheckpointError(ValueError):
    """The file is no usable checkpoint; the message names it and says why."""


def save_checkpoint(path: Path, model: ALMRR, train: TrainConfig, training_state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash either the old file or the new one is there, whole.

    Raises:
        CheckpointError: if a weight is NaN or infinite, so that a ruined network never replaces a good one.
        OutputError: if the file cannot be written; the old one is still there then.
    """
    weights = model.state_dict()
    ruined = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if ruined:
        raise CheckpointError(
            f"{path} is not written: {len(ruined)} weights, such as {ruined[0]}, are no longer finite numbers; "
            "an older file stays as it is: try a lower --lr, or no --amp"
        )
    content = {
        "program": "almrr-ref",
        "format": FORMAT,
        "model_config": dataclasses.asdict(model.config),
        "train_config": dataclasses.asdict(train),
        "weights": weights,
        "threshold": model.threshold,
        "training": training_state,
        "versions": {"almrr_ref": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and check a checkpoint's dictionary, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; training writes RUN/last.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(
                f"{path} is damaged (checksum of {damaged}); take a copy of it from elsewhere, or train again"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile and torch.load raise a dozen types on foreign bytes; all mean the same here
        raise CheckpointError(
            f"{path} is not a checkpoint of almrr-ref, or is damaged ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("program") != "almrr-ref":
        raise CheckpointError(f"{path} is not a checkpoint of almrr-ref; training writes RUN/last.pt")
    version = content.get("format")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is not a checkpoint of almrr-ref: its format is {version!r}, not a number")
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads up to {FORMAT}: update almrr-ref")
    missing = [name for name in CONTENT if name not in content]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint of almrr-ref: it lacks {', '.join(missing)}")
    return content


def restore_model(content: dict[str, Any], device: torch.device | str = "cpu") -> ALMRR:
    """Rebuild the network of a checkpoint's dictionary, in evaluation mode.

    Raises:
        CheckpointError: if its configuration and its weights do not make a network.
    """
    try:
        config = from_dict(ModelConfig, content["model_config"])
        if content["format"] < MEMORY_FORMAT and config.memory:
            raise ValueError(f"its memory is of format {content['format']}, whose patches are others: train again")
        model = ALMRR(dataclasses.replace(config, weights="checkpoint"))
        model.load_state_dict(content["weights"])
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's network cannot be rebuilt: {str(error).splitlines()[0]}") from error
    model.config, model.threshold = config, content["threshold"]
    return model.to(device).eval()


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> ALMRR:
    """Load a trained network from a checkpoint file; ``.config`` and ``.threshold`` come with it.

    Raises:
        CheckpointError: if the file is missing, damaged, foreign, or of a newer format.
    """
    return restore_model(read_checkpoint(path), device)
