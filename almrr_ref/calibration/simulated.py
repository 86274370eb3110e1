"""What a network will find: simulated defects at several strengths, drawn on good images, judged as new images are.

The kinds are those of the demo (demo/defects.py), which training does not draw. An image with a defect is judged
without its own patches in the memory, as calibration does. By tiles, a window of two tiles is judged in place of the
whole image: no more than that is found in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from almrr_ref.calibration.good_scores import REGIMES, Calibration, left_out, measure, read_for, score
from almrr_ref.demo.defects import DEFECTS, FAINT_DEFECTS, full_damage, quantise
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.run.text import Countdown

STRENGTHS = (0.25, 0.5, 1.0)  # of a defect: how much of the change is applied
DRAWS = 3  # images for each of the eleven kinds, each at all strengths
TRIES = 20  # of a defect, until it lies in the region of interest
SMALLEST_SIDE = 64  # pixels, of the square of the least area on which a defect can be drawn


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

    Nothing is drawn on images too small for it and outside the region of interest, and none of the demo's six on one
    that is all black or white.
    """
    tile = judge.config.tile
    size = (tile, tile) if tile else judge.config.size
    if math.prod(size) < SMALLEST_SIDE**2:
        return []
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in (*DEFECTS, *FAINT_DEFECTS) for _ in range(draws)]
    chosen = rng.permutation(len(calibration.good))
    regime, found, progress = REGIMES.index(calibration.regime), [], Countdown("judging simulated defects")
    for done, kind in enumerate(kinds, start=1):
        entry = calibration.good[chosen[done % len(chosen)]]
        masks = left_out(model, entry, calibration.part_of)
        masks = masks[regime : regime + 1] or masks[-1:]
        window = cut_window(read_for(judge, entry.picture), size, rng)
        y, x = (max(0, (length - side) // 2) for length, side in zip(window.shape[1:], size))
        clean = window[:, y : y + size[0], x : x + size[1]].permute(1, 2, 0).numpy() / 255.0
        damaged = damage_inside(clean, kind, rng, judge.roi)
        if damaged is None:
            continue
        for strength in STRENGTHS:
            weakened = quantise(clean + strength * (damaged - clean))
            image = window.clone()
            image[:, y : y + size[0], x : x + size[1]] = torch.from_numpy(weakened).permute(2, 0, 1)
            found.append(SimulatedDefect(kind, strength, score(judge, measure(judge, image, masks))))
        progress(done, len(kinds))
    return found


def damage_inside(
    clean: np.ndarray, kind: str, rng: np.random.Generator, roi: Tensor | None
) -> npt.NDArray[np.float64] | None:
    """Good image (h, w, 3) -> the image with a defect at least half of which lies inside the region, and cut to it.

    None if no such defect comes out.
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
    from_each = []
    for length, side in zip(image.shape[1:], size):
        cut = min(length, 2 * side)
        from_each.append((int(rng.integers(length - cut + 1)), cut))
    (y, h), (x, w) = from_each
    return image[:, y : y + h, x : x + w]


def found_shares(simulated: Sequence[SimulatedDefect], threshold: float) -> dict[str, float]:
    """The fraction that reaches a threshold, by strength ("25%"), and of all ("all")."""
    groups: dict[str, list[bool]] = {"all": []}
    for defect in simulated:
        for name in ("all", f"{100 * defect.strength:.0f}%"):
            groups.setdefault(name, []).append(defect.score >= threshold)
    return {name: sum(hits) / len(hits) for name, hits in groups.items() if hits}


def describe_found(shares: Mapping[str, float]) -> str:
    """One line: found of simulated defects: 93% at full strength, ..."""
    parts = [f"{100 * share:.0f}% at {name} of their strength" for name, share in shares.items() if name != "all"]
    return "simulated defects found: " + ", ".join(reversed(parts))
