"""Set a checkpoint's threshold or judged region by hand. Its calibration record keeps the earlier ones."""

import json
from pathlib import Path
from typing import Any

from almrr_ref.calibration.simulated import SimulatedDefect, detection_rates
from almrr_ref.config import ModelConfig, from_dict
from almrr_ref.data.roi import require_region
from almrr_ref.report.scores import write_metrics
from almrr_ref.run.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from almrr_ref.run.files import CALIBRATION
from almrr_ref.run.text import LOGGER, one_line


def set_threshold(path: Path, threshold: float) -> None:
    """Set the threshold of a checkpoint; the earlier ones stay in its history.

    Raises:
        ValueError: if the threshold does not lie where scores do, or the checkpoint was never calibrated.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold lies within 0 and 1, as scores do; got {threshold}")
    content = read_checkpoint(path)
    before = calibration_of(content, path)
    how = {"operating_point": "by hand"}
    record = {**before, "thresholds": [*before["thresholds"], {"value": threshold, **how}]}
    write_checkpoint(path, {**content, "threshold": threshold, "calibration": record})
    simulated = [SimulatedDefect("", strength, score) for strength, score in record.get("simulated_scores", [])]
    rates = {"simulated": detection_rates(simulated, threshold), "defective": {}}  # whose scores are not stored
    _change_report(path, {"threshold": threshold, **how, **rates})


def set_region(path: Path, png: str | None) -> None:
    """Restrict a checkpoint to a drawn region (data/roi.py), or with None to all that its network sees.

    The earlier regions stay in its history. Threshold and calibration's figures stay as they are; the figures hold for
    the region that they were measured in (run/checkpoint.py, `valid_calibration`).

    Raises:
        ValueError: if the checkpoint was never calibrated, or the region does not suit it.
    """
    content = read_checkpoint(path)
    before = calibration_of(content, path)
    config = content["model_config"]
    require_region(from_dict(ModelConfig, config), png)
    regions = before.get("regions", [config.get("judged_png")])
    record = {**before, "regions": regions if regions[-1] == png else [*regions, png]}
    write_checkpoint(path, {**content, "model_config": {**config, "judged_png": png}, "calibration": record})
    outdated = None if record.get("judged_png") == png else "another region is judged since: calibrate again"
    _change_report(path, {"outdated": outdated})


def calibration_of(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record of a checkpoint's calibration; CheckpointError if it has none."""
    if "calibration" not in content:
        raise CheckpointError(
            f"{path} has no record of its good images: its training has not ended (--resume it), or an earlier version "
            "trained it (train again)"
        )
    return content["calibration"]


def _change_report(path: Path, facts: dict[str, Any]) -> None:
    """Update calibration.json, if it exists, beside a checkpoint that is written; the log says where that fails."""
    report = path.with_name(CALIBRATION)
    if report.exists():
        try:
            write_metrics(report, {**json.loads(report.read_text("utf-8")), **facts})
        except (OSError, ValueError, TypeError) as error:
            LOGGER.warning(f"{one_line(report)} is damaged or cannot be written, and stays as it was: {error}")
