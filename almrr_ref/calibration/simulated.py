"""Which defects a network will find: simulated ones of several strengths, drawn on good images, judged as new images.

The kinds are those of the demo (demo/defects.py), which training does not draw. As in calibration, an image's patches
are left out of the memory. A network that sees tiles judges a window of two tiles each way in place of the whole image.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from almrr_ref.calibration.good_scores import REGIMES, Calibration, left_out, measure, read_for, score
from almrr_ref.data.images import ImageError
from almrr_ref.data.split import Good
from almrr_ref.demo.defects import DEFECTS, FAINT_DEFECTS, full_damage, quantise
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.run.text import LOGGER, Countdown

STRENGTHS = (0.25, 0.5, 1.0)  # of a defect: how much of the change is applied
DRAWS = 3  # images for each of the eleven kinds, each at all strengths
TRIES = 20  # draws of a defect until it lies in the region of interest
SMALLEST_SIDE = 64  # pixels; no defect is drawn on an area smaller than this squared


@dataclass(frozen=True)
class SimulatedDefect:
    """One defect on one image, and the image's score."""

    kind: str
    strength: float
    score: float


@torch.inference_mode()
def simulate(
    model: ALMRR, judge: FusedALMRR, calibration: Calibration, seed: int = 0, draws: int = DRAWS
) -> list[SimulatedDefect]:
    """Draw every kind of defect on ``draws`` of the calibration's images and judge them in its regime.

    Nothing is drawn on too small images, on one that cannot be read any more, or outside the region of interest; and
    none of the demo's six kinds on an image that is all black or white.
    """
    tile = judge.config.tile
    size = (tile, tile) if tile else judge.config.size
    if math.prod(size) < SMALLEST_SIDE**2:
        return []
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in (*DEFECTS, *FAINT_DEFECTS) for _ in range(draws)]
    good = sorted(calibration.good, key=_place)  # in training and in calibrate alike
    chosen = rng.permutation(len(good))
    regime, simulated, progress = REGIMES.index(calibration.regime), [], Countdown("judging simulated defects")
    for done, kind in enumerate(kinds, start=1):
        entry = good[chosen[done % len(chosen)]]
        masks = left_out(model, entry, calibration.part_of)
        masks = masks[regime : regime + 1] or masks[-1:]
        try:
            window = cut_window(read_for(judge, entry.picture), size, rng)
        except ImageError as error:  # training keeps its features, so nothing has read it again until now
            LOGGER.warning(f"no simulated defect on {error}")
            continue
        y, x = (max(0, (length - side) // 2) for length, side in zip(window.shape[1:], size))
        clean = window[:, y : y + size[0], x : x + size[1]].permute(1, 2, 0).numpy() / 255.0
        damaged = damage_inside(clean, kind, rng, judge.roi)
        if damaged is None:
            continue
        for strength in STRENGTHS:
            weakened = quantise(clean + strength * (damaged - clean))
            image = window.clone()
            image[:, y : y + size[0], x : x + size[1]] = torch.from_numpy(weakened).permute(2, 0, 1)
            simulated.append(SimulatedDefect(kind, strength, score(judge, measure(judge, image, masks))))
        progress(done, len(kinds))
    return simulated


def _place(entry: Good) -> tuple[str, int]:
    """What good images are sorted by: their paths, or their numbers in memory."""
    return str(entry.picture) if isinstance(entry.picture, str | os.PathLike) else "", entry.image_id


def damage_inside(
    clean: np.ndarray, kind: str, rng: np.random.Generator, roi: Tensor | None
) -> npt.NDArray[np.float64] | None:
    """Draw a defect that lies at least half inside the region, and cut it to the region: (h, w, 3) -> the same.

    None if no such defect can be drawn.
    """
    counts = np.ones(clean.shape[:2], dtype=bool) if roi is None else roi.cpu().numpy()
    for _ in range(TRIES):
        try:
            damaged, mask = full_damage(clean, kind, rng)
        except ValueError:
            return None
        if (mask[counts] > 0).sum() * 2 >= (mask > 0).sum():
            return np.where(counts[..., None], damaged, clean)
    return None


def cut_window(image: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A random window of at most twice ``size`` each way: (3, h, w) -> (3, h', w')."""
    h, w = (min(length, 2 * side) for length, side in zip(image.shape[1:], size))
    y, x = (int(rng.integers(length - cut + 1)) for length, cut in zip(image.shape[1:], (h, w)))
    return image[:, y : y + h, x : x + w]


def detection_rates(simulated: Sequence[SimulatedDefect], threshold: float) -> dict[str, float]:
    """The fraction of the defects whose score reaches a threshold: of all ("all"), and by strength ("25%")."""
    groups: dict[str, list[bool]] = {"all": []}
    for defect in simulated:
        for name in ("all", f"{100 * defect.strength:.0f}%"):
            groups.setdefault(name, []).append(defect.score >= threshold)
    return {name: sum(hits) / len(hits) for name, hits in groups.items() if hits}


def describe_rates(rates: Mapping[str, float]) -> str:
    """`detection_rates` -> one line: simulated defects found: 93% at 100% of their strength, ..."""
    texts = [f"{100 * rate:.0f}% at {name} of their strength" for name, rate in rates.items() if name != "all"]
    return "simulated defects found: " + ", ".join(reversed(texts))
