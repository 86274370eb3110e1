"""The result for one picture: score, verdict, map and regions; and how it is shown."""

import html
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, special
from torch import Tensor

from almrr_ref.deploy.predictor import Predictor
from almrr_ref.report.overlays import data_url, overlay_row
from almrr_ref.run.text import counted, decimals, one_line

EDGE = 1e-9  # values nearer to 0 or 1 than this have no logit
STEP = 0.1  # of logits, to which a region's peak is known: that of the page's levels (layers.py)
Box = tuple[int, int, int, int]  # half open, as in Pillow and NumPy: x0 <= x < x1, y0 <= y < y1


@dataclass(frozen=True)
class Region:
    """One defect: connected pixels (also by their corners) whose smoothed map is high enough (`region_levels`).

    box and area are in pixels of the picture; peak and mean of the smoothed map, which is what the score is made of.
    """

    box: Box
    area: int
    peak: float
    mean: float


@dataclass(frozen=True, eq=False)
class Result:
    """The result for one picture.

    score: in [0, 1].
    threshold: the picture is defective if its score reaches it; None: no verdict.
    regions: the defects, the largest first; empty exactly when the verdict is good or there is none.
    size: (height, width) of the picture.
    pixels: the picture at the resolution of the network's map, uint8 (3, h, w).
    network_map: the network's map, (1, h, w) in [0, 1]; by tiles it has the picture's size.
    mask: all regions, bool (h, w), at the resolution of the network's map.
    path: of the file; None for a picture in memory.
    """

    score: float
    threshold: float | None
    regions: list[Region]
    size: tuple[int, int]
    pixels: Tensor = field(repr=False)
    network_map: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    path: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Arrays for tensors: multiprocessing would send each tensor as an open file."""
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.from_numpy(state[name]) for name in ("pixels", "network_map", "mask")}
        self.__dict__.update(state | tensors)

    @property
    def defective(self) -> bool | None:
        """The verdict; None without a threshold."""
        return None if self.threshold is None else not self.score < self.threshold

    @cached_property
    def anomaly_map(self) -> npt.NDArray[np.float32]:
        """The map at the picture's size, float32 (h, w) in [0, 1]."""
        if self.network_map.shape[1:] == self.size:
            return self.network_map[0].numpy()
        return F.interpolate(self.network_map[None], self.size, mode="bilinear")[0, 0].numpy()

    @property
    def area(self) -> int:
        """The area of all regions, in pixels of the picture."""
        return _in_pixels(int(self.mask.sum()), self.size, self.mask) if self.regions else 0

    @property
    def box(self) -> Box | None:
        """The box around all regions, in pixels of the picture; None without a region."""
        corners = list(zip(*(region.box for region in self.regions)))
        return (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])) if corners else None

    def overlay(self, truth: Tensor | None = None) -> Image.Image:
        """Draw the picture, ``truth`` (a mask of the map's size) if it is given, the map, and the outlined regions."""
        return overlay_row(self.pixels, self.network_map, self.threshold, truth, region=self.mask, size=self.size)

    def _repr_html_(self) -> str:
        """The overlay and the verdict, for notebooks."""
        verdict = {None: "no verdict", False: "good", True: "defective"}[self.defective]
        limit = "no threshold" if self.threshold is None else f"threshold {decimals(self.threshold)}"
        text = f"{verdict}, score {decimals(self.score)} ({limit}), {counted(len(self.regions), 'region')}"
        text = text if self.path is None else f"{one_line(self.path)}: {text}"
        image = f'<img src="{data_url(self.overlay(), "PNG")}">'
        return f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>"


def find_regions(
    model: Predictor, network_map: Tensor, threshold: float, size: tuple[int, int]
) -> tuple[Tensor, list[Region]]:
    """Outline the defects of a defective picture: its map (1, h, w) -> mask (h, w), regions.

    A region is where the smoothed map reaches both of `region_levels`, one everywhere, one somewhere. There is at least
    one.

    Args:
        size: (height, width) of the picture.
    """
    smoothed = model.smooth(network_map[None])[0, 0].double().numpy()  # as layers.py compares them, to the last bit
    edge, peak = region_levels(*highest_and_median(smoothed), threshold, model.outline_offset)
    labels, _ = ndimage.label(smoothed >= edge, structure=np.ones((3, 3)), output=np.int32)
    (height, width), (h, w), places, regions = size, labels.shape, ndimage.find_objects(labels), []
    with_peak = np.unique(labels[smoothed >= peak])
    for label in with_peak:
        y, x = place = places[label - 1]
        inside = smoothed[place][labels[place] == label]
        box = x.start * width // w, y.start * height // h, -(-x.stop * width // w), -(-y.stop * height // h)
        area = _in_pixels(len(inside), size, network_map)
        regions.append(Region(box, area, float(inside.max()), float(inside.mean())))
    regions.sort(key=lambda region: (region.area, region.peak), reverse=True)
    return torch.from_numpy(np.isin(labels, with_peak)), regions


def highest_and_median(smoothed: npt.NDArray[Any]) -> tuple[float, float]:
    """Of a smoothed map (h, w), which is -inf outside the region of interest."""
    inside = smoothed[smoothed > -np.inf]
    return float(inside.max()), float(np.median(inside))


def region_levels(highest: float, median: float, threshold: float, offset: float) -> tuple[float, float]:
    """What the smoothed map of a defective picture reaches in all of a region, and at its peak, at least.

    A peak is at `outline_level`, to a STEP, or the highest one. The region around it ends where the logit has fallen
    halfway to the map's median: to the edge of a blurred defect, faint or strong, or at the level itself if that is
    lower. On check sets regions so cover 64 to 80% of a defect (Dice), by the level alone 42 to 48% (bench/LOG.md).
    """
    level = min(outline_level(threshold, offset), highest)
    middle = (logit(highest) + logit(median)) / 2
    if middle >= logit(level):
        return level, level
    steps = math.floor((logit(level) - middle) / STEP)
    return float(special.expit(middle)), min(level, float(special.expit(middle + STEP * steps)))


def outline_level(threshold: float, offset: float) -> float:
    """The level of the smoothed map that a region's peak reaches: its logit is the threshold's plus ``offset``."""
    return float(special.expit(logit(threshold) + offset)) if offset and 0 < threshold < 1 else threshold


def logit(values: npt.ArrayLike) -> Any:
    """Log odds of a number or an array in [0, 1], float64, finite."""
    clipped = np.clip(np.asarray(values, np.float64), EDGE, 1 - EDGE)
    return np.log(clipped / (1 - clipped))


def _in_pixels(count: int, size: tuple[int, int], plane: Tensor) -> int:
    """A number of pixels of a plane -> the same area in pixels of a picture of ``size``, at least one; halves go up."""
    return max(1, math.floor(count * size[0] * size[1] / plane.numel() + 0.5))  # as picture.js rounds
