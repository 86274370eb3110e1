"""What the page draws of a picture at any threshold: the picture, the levels of its map, its mask; one script each.

A page opened from a file may not read the pixels of other files, but it may load scripts: `layers(...)` with the
pictures as data URLs, which picture.js decodes. A level is the logit of the smoothed map in steps, in 8 bits:

    level = 128 + floor((logit(map) - logit(centre)) / STEP),    centre: the lower of `region_levels` at the threshold

so the outlines of that threshold are exact, and others are off by one step at most. Level 0 is not judged. Large maps
are reduced; a pixel of the reduced map takes the highest of its levels, so that no defect gets lost.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from almrr_ref.deploy.predictor import Predictor
from almrr_ref.report.overlays import data_url
from almrr_ref.report.result import STEP, Result, highest_and_median, logit, region_levels
from almrr_ref.run.files import LAYERS, atomic_write

_LARGEST = 1024  # longer side of what the page draws, in pixels


def layers_name(number: int) -> str:
    """The script of a picture, by its row in scores.csv from 0; at most a thousand in a folder, for memory sticks."""
    return f"{LAYERS}/{number // 1000}/{number % 1000}.js"


def write_layers(out: Path, number: int, model: Predictor, result: Result, truth: Tensor | None = None) -> None:
    """Write the layers of a picture into a folder of results; OutputError if that fails."""
    atomic_write(out / layers_name(number), f"layers({json.dumps(picture_layers(model, result, truth))})\n")


def picture_layers(model: Predictor, result: Result, truth: Tensor | None = None) -> dict[str, Any]:
    """A result -> what picture.js draws, ready for JSON.

    Args:
        truth: mask of the map's size, (h, w) or (1, h, w), defective where > 0.5.
    """
    smoothed = model.smooth(result.network_map[None])[0, 0].double().numpy()
    highest, median = highest_and_median(smoothed)
    threshold = result.threshold or 0.5  # at 0 all that is judged is a region
    centre, _ = region_levels(highest, median, threshold, model.outline_offset)
    levels = map_levels(smoothed, centre)
    levels[np.isneginf(smoothed)] = 0  # outside the region of interest, and only there: never outlined
    scale = min(1.0, _LARGEST / max(levels.shape))
    h, w = (max(1, round(scale * side)) for side in levels.shape)
    picture = Image.fromarray(result.pixels.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.LANCZOS)
    return {
        "picture": data_url(picture, "JPEG", quality=90),
        "levels": data_url(_reduced(levels, h, w), "PNG", compress_level=1),
        "mask": None if truth is None else data_url(_reduced(_binary(truth), h, w).convert("1"), "PNG"),
        "size": list(result.size),
        "reduced": scale < 1,
        "centre": logit(centre),
        "highest": logit(highest),
        "median": logit(median),
    }


def map_levels(smoothed: npt.NDArray[np.float64], centre: float) -> npt.NDArray[np.uint8]:
    """A smoothed map (h, w) in [0, 1] -> its levels, uint8 (h, w): 128 and more exactly where it reaches the centre."""
    steps = np.floor((logit(smoothed) - logit(centre)) / STEP)
    above = smoothed >= centre
    return (128 + np.where(above, steps.clip(0, 127), steps.clip(-127, -1))).astype(np.uint8)


def _binary(truth: Tensor) -> npt.NDArray[np.uint8]:
    """A mask (h, w) or (1, h, w) -> 0 or 255, (h, w)."""
    return (truth.reshape(truth.shape[-2:]) > 0.5).numpy().astype(np.uint8) * np.uint8(255)


def _reduced(plane: npt.NDArray[np.uint8], height: int, width: int) -> Image.Image:
    """Reduce a plane (h, w) to a picture whose pixels have the highest of the values that they cover."""
    if plane.shape != (height, width):
        pooled = F.adaptive_max_pool2d(torch.from_numpy(plane).float()[None], (height, width))
        plane = pooled[0].byte().numpy()
    return Image.fromarray(plane)
