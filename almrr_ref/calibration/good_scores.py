"""Good images judged as new ones will be: the balance of the evidence, the threshold, and what it promises.

Every good image is used, also those that were trained on. For each, its patches are left out of the memory
(cross-fitting), the balance is fitted to the other images, and the folded network sees the image as it will see new
ones: whole, or by tiles where it was trained with tiles. The memory is the completed one, which is deployed. What the
network has learned of the images that it was trained on is measured and corrected (shifts.py). The gap that an image's
patches leave in the memory is not corrected: it makes the threshold safer.

There are two regimes. Of *seen* parts the memory holds other images, so only the image itself is left out. Of *new*
parts it holds nothing, so all images of the part are left out. The network calls a part that it was trained on good
however odd the part is, and no correction of its score mends that. So once the network has learned, only the images
kept aside count for new parts, also for the balance.
Source: ours; the paper sets no threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from almrr_ref.calibration.shifts import Shift, shifted, training_shift
from almrr_ref.calibration.thresholds import Promise, promise
from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, load_image, read_image
from almrr_ref.data.split import Good
from almrr_ref.data.tiling import blend_tiles, cut_tiles
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.plus.evidence import image_peaks
from almrr_ref.plus.memory import SURPLUS
from almrr_ref.report.result import logit
from almrr_ref.run.text import LOGGER, Countdown

REGIMES = ("seen", "new")
BATCH = 8  # tiles of an image at a time
RATE = 0.01  # of false alarms, where the user asks for none
MOST = 1000  # images that are measured; more do not improve the promise of 1%
MOST_VALUES = 2**27  # of the evidence of all images together: half a gigabyte


@dataclass(frozen=True)
class Measured:
    """Evidence of one image, (regimes, tiles, k, h, w), and the (height, width) of its map.

    There is only one regime where both leave out the same patches.
    """

    evidence: Tensor
    size: tuple[int, int]

    def of(self, regime: int) -> Tensor:
        """The evidence in a regime, (tiles, k, h, w)."""
        return self.evidence[min(regime, len(self.evidence) - 1)]


@dataclass(frozen=True)
class Calibration:
    """The scores of good images and what follows from them. "By regime" is a dict with the keys of REGIMES.

    good: the images measured, n.
    part_of: part ids by image id, of all images whose patches the memory holds.
    unreadable: images left out because they cannot be read.
    remarks: what was left out of the images that were read.
    scores: (n,) by regime, each as if the image were new.
    extremes: n pairs, in the regime whose threshold is set: the score as measured, and the highest pixel of the map.
    errors: standard errors of the logits of the scores, (n,) by regime.
    promises: by regime.
    regime: the one whose threshold is set.
    shifts: the shift of the logits of images trained on, and its standard error, by regime.
    counted: whether a score counts for the threshold, (n,) by regime.
    """

    good: list[Good]
    part_of: dict[int, int]
    unreadable: list[Picture]
    remarks: Remarks
    scores: dict[str, list[float]]
    extremes: list[tuple[float, float]]
    errors: dict[str, list[float]]
    promises: dict[str, Promise]
    regime: str
    shifts: dict[str, Shift]
    counted: dict[str, list[bool]]

    def basis(self, regime: str | None = None) -> dict[str, Any]:
        """The arguments of `promise` and `intervals` in a regime, by default the one whose threshold is set."""
        regime = regime or self.regime
        rows = zip(self.scores[regime], (entry.part_id for entry in self.good), self.errors[regime])
        scores, parts, errors = zip(*compress(rows, self.counted[regime]))
        return {"scores": scores, "parts": parts, "errors": errors, "new_parts": regime == "new"}


def read_for(judge: FusedALMRR, picture: Picture, remarks: Remarks | None = None) -> Tensor:
    """A picture as the network takes it: uint8 (3, *size), or (3, h, w) at full size, to be cut into tiles."""
    levels = Levels.of(judge.config)
    if judge.config.tile:
        return read_image(picture, levels, remarks)
    return load_image(picture, judge.config.size, levels, remarks)


def measure(judge: FusedALMRR, image: Tensor, masks: Sequence[Tensor] = ()) -> Measured:
    """The evidence of an image from `read_for`, computed as for new images.

    Args:
        masks: for each regime, (count,), the stored patches that do not count.
    """
    size, tile = judge.config.size, judge.config.tile
    tiles = cut_tiles(image, tile, size) if tile else iter([image])
    evidence = []
    while batch := list(islice(tiles, BATCH)):
        images = torch.stack(batch).to(judge.device).float() / 255
        evidence.append(torch.stack(judge.evidence_of(images, masks)).float().cpu())
    return Measured(torch.cat(evidence, dim=1), (image.shape[1], image.shape[2]))


def score(judge: FusedALMRR, measured: Measured) -> float:
    """The image score of evidence measured in one regime, under the judge's present balance."""
    return score_and_peak(judge, measured, 0)[0]


def score_and_peak(judge: FusedALMRR, measured: Measured, regime: int) -> tuple[float, float]:
    """The image score, and the highest pixel of the smoothed map, which decides on outlines."""
    maps = judge.to_map(measured.of(regime).to(judge.device))
    if judge.config.tile:
        maps = blend_tiles(maps[:, 0].cpu(), *measured.size, judge.config.tile)[None]
    smoothed = judge.smooth(maps)
    return float(judge.scores_of(smoothed)[0]), float(smoothed.max())


def left_out(model: ALMRR, entry: Good, part_of: dict[int, int]) -> list[Tensor]:
    """The stored patches that do not count for an image: a mask (count,) for each regime.

    One mask serves both regimes where no other image shows the part, or no patch would remain. Without a memory there
    is none.

    Args:
        part_of: part ids by image id.
    """
    if model.memory is None:
        return []
    ids = model.memory.patch_parts
    siblings = [image_id for image_id, part_id in part_of.items() if part_id == entry.part_id and image_id >= 0]
    of_image = (ids == entry.image_id) & (ids >= 0)
    of_part = of_image | torch.isin(ids, ids.new_tensor(siblings))
    one_mask = torch.equal(of_image, of_part) or bool((of_part | (ids == SURPLUS)).all())
    return [of_image] if one_mask else [of_image, of_part]


def measure_good(
    model: ALMRR,
    judge: FusedALMRR,
    good: Sequence[Good],
    part_of: dict[int, int],
    known: dict[int, list[Tensor]],
    remarks: Remarks,
) -> tuple[list[tuple[Good, Measured]], list[Picture]]:
    """Good images -> the evidence of each in both regimes, and those that cannot be read.

    Args:
        known: stages [(1, c_k, h_k, w_k)] by image id, as far as the caller has them; such an image is not read.
    """
    progress, values = Countdown("judging good images"), 0
    measured: list[tuple[Good, Measured]] = []
    unreadable: list[Picture] = []
    for done, entry in enumerate(good, start=1):
        masks = left_out(model, entry, part_of)
        if entry.image_id in known:
            evidence = torch.stack(judge.evidence_of(known[entry.image_id], masks)).float().cpu()
            measured.append((entry, Measured(evidence, judge.config.size)))
        else:
            try:
                image = read_for(judge, entry.picture, remarks)
            except ImageError as error:
                LOGGER.warning(f"not read: {error}")
                unreadable.append(entry.picture)
                continue
            measured.append((entry, measure(judge, image, masks)))
        values += measured[-1][1].evidence.numel()
        if values > MOST_VALUES:
            break
        progress(done, len(good))
    return measured, unreadable


def cross_fitted_scores(
    judge: FusedALMRR, measured: Sequence[Measured], regime: int, counted: Sequence[bool]
) -> tuple[list[list[float]], list[float]]:
    """Score each image as the others balance and level it -> scores (regimes, n); highest pixels (n,) in one regime.

    The judge is left with those of all images.

    Args:
        regime: the number of the regime to whose evidence both are fitted.
        counted: (n,), the images to which both are fitted.
    """
    balanced = judge.evidence if judge.evidence is not None and judge.evidence.balance else None
    scores: list[list[float]] = [[] for _ in REGIMES]
    highest = []
    evidence = [entry.of(regime) for entry in measured]
    owners = torch.arange(len(evidence)).repeat_interleave(torch.tensor([len(kinds) for kinds in evidence]))
    counts = torch.tensor(counted)[owners]
    if balanced:
        balanced.cpu().fit_border(evidence)
        levelled = [balanced.border_evened(kinds) for kinds in evidence]
        peaks = torch.cat([image_peaks(kinds, judge.roi) for kinds in levelled]).to(judge.device)
        levels = torch.cat([balanced.image_levels(kinds) for kinds in levelled]).to(judge.device)
        balanced.to(judge.device)
    for number, entry in enumerate(measured):
        if balanced:
            others = counts & (owners != number)
            fitted = (others if bool(others.any()) else counts).to(judge.device)
            balanced.fit(peaks[fitted], levels[fitted])
        for k, values in enumerate(scores):
            value, peak = score_and_peak(judge, entry, k)
            values.append(value)
            if k == regime:
                highest.append(peak)
    if balanced:
        fitted = counts.to(judge.device)
        balanced.fit(peaks[fitted], levels[fitted])
    return scores, highest


def drawn_from(good: Sequence[Good], regime: str, seed: int) -> list[Good]:
    """At most MOST good images, drawn; for new parts three quarters of them kept aside, as those alone may count."""
    drawn = [good[i] for i in np.random.default_rng(seed).permutation(len(good))]
    if regime == "new" and len(drawn) > MOST:
        aside = [entry for entry in drawn if not entry.trained][: MOST - MOST // 4]
        drawn = aside + [entry for entry in drawn if entry.trained]
    return drawn[:MOST]


def keep_promise(model: ALMRR, judge: FusedALMRR, calibration: Calibration, rate: float) -> None:
    """Set the threshold that keeps a false-positive rate, and the level of the outlines, in place.

    As many good images have a pixel at the level of the outlines as have a score at the threshold.
    """
    regime = calibration.regime
    calibration.promises.update({name: promise(rate=rate, **calibration.basis(name)) for name in REGIMES})
    model.threshold = judge.threshold = calibration.promises[regime].value
    counted = compress(calibration.extremes, calibration.counted[regime])
    limits = [promise(values, rate).value for values in zip(*counted)]
    model.outline_offset = max(0.0, float(np.diff(logit(np.asarray(limits)))[0]))


@torch.inference_mode()
def calibrate(
    model: ALMRR,
    good: Sequence[Good],
    rate: float,
    regime: str,
    part_of: dict[int, int] | None = None,
    seed: int = 0,
    known: dict[int, list[Tensor]] | None = None,
) -> tuple[Calibration, FusedALMRR]:
    """Set balance, threshold and level of the outlines of a network, in place, by good images.

    Args:
        good: all good images, those held out included; at most MOST of them are measured.
        rate: the fraction of new good images that may be called defective.
        regime: "seen" or "new", the regime whose threshold is set.
        part_of: part ids by image id, where the memory holds images that are not in `good`.
        known: as in `measure_good`.
    Returns:
        The calibration, and the folded network that judged.
    Raises:
        ValueError: if none of the images can be read.
    """
    part_of = part_of or {entry.image_id: entry.part_id for entry in good}
    judge, remarks = model.eval().fuse(), Remarks()
    drawn = drawn_from(good, regime, seed)
    pairs, unreadable = measure_good(model, judge, drawn, part_of, known or {}, remarks)
    if not pairs:
        raise ValueError(f"none of {len(good)} good images can be read, so no threshold can be set")
    drawn, measured = [entry for entry, _ in pairs], [values for _, values in pairs]
    parts, trained = [entry.part_id for entry in drawn], [entry.trained for entry in drawn]
    if model.memory is not None and any(trained) and int(model.memory.patch_parts.max()) < 0:
        LOGGER.warning("the memory holds one part alone, compared with itself: the threshold is too low; give more")
    number, everyone, kept_aside = REGIMES.index(regime), [True] * len(drawn), [not entry for entry in trained]
    raw, peaks = cross_fitted_scores(judge, measured, number, everyone)
    learned = training_shift(raw[REGIMES.index("new")], trained, parts)[0] > 0
    counted = {"seen": everyone, "new": kept_aside if learned else everyone}
    if regime == "new" and learned:  # the balance, too, by those kept aside
        raw, peaks = cross_fitted_scores(judge, measured, number, kept_aside)
    scores, errors, shifts = {}, {}, {}
    for name, values in zip(REGIMES, raw):
        shifts[name] = shift, error = training_shift(values, trained, parts)
        scores[name] = shifted(values, trained, shift)
        errors[name] = (error * np.asarray(trained)).tolist()
    extremes = list(zip(raw[number], peaks))
    calibration = Calibration(
        drawn, part_of, unreadable, remarks, scores, extremes, errors, {}, regime, shifts, counted
    )
    if model.evidence is not None and judge.evidence is not None and judge.evidence.balance:
        model.evidence.load_state_dict(judge.evidence.state_dict())
    keep_promise(model, judge, calibration, rate)
    return calibration, judge
