"""Good images judged as new ones will be: the balance of the evidence, the threshold, and what it promises.

Every good image serves, also those that were trained on: its own patches are left out of the memory (cross-fitting),
the balance is that of the other images, and the folded network sees it as it will see new images: whole, or by tiles
where it was trained with tiles. The memory is the completed one, which is deployed. What the network itself has learned
of the images that it was trained on is measured and allowed for (shifts.py). What a hole in the memory adds, where the
image's own patches were, is not: it makes a threshold safer.

Two regimes: of *seen* parts the memory knows other images, so the own image alone is left out; of *new* parts it knows
nothing, so all images of the part are left out. Of a part that it was trained on the network says good however odd the
part is, and no value added to its score mends that: for new parts those kept aside alone count, once it has learned,
for the balance, too.
Source: ours; the paper sets no threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from almrr_ref.calibration.shifts import Shift, as_unseen, shifted
from almrr_ref.calibration.thresholds import Promise, logit, promise
from almrr_ref.data.images import ImageError, Levels, Picture, load_image, read_image
from almrr_ref.data.split import Good
from almrr_ref.data.tiling import blend_tiles, cut_tiles
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.plus.evidence import image_peaks
from almrr_ref.run.text import LOGGER, Countdown

REGIMES = ("seen", "new")
BATCH = 8  # tiles of an image at a time
RATE = 0.01  # of false alarms, where none is asked for
MOST = 1000  # images that are measured; the promise of 1% does not gain by more
MOST_VALUES = 2**27  # of evidence, which is kept for all images: half a gigabyte


@dataclass(frozen=True)
class Measured:
    """Evidence of one image in every regime, (regimes, tiles, k, h, w), and the (height, width) that its map has.

    One evidence stands for both regimes where they leave out the same patches.
    """

    evidence: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Calibration:
    """What was found on good images.

    good: the images measured.
    part_of: part ids by image id, of all images whose patches the memory has.
    unreadable: images left out because they cannot be read.
    scores: of each, by regime, as if it had never been seen.
    extremes: of each, in the regime whose threshold is set: its score as measured, and the highest pixel of its map.
    promises: by regime.
    regime: the one whose threshold is set.
    errors: standard errors of the logits of the scores, by regime.
    shifts: what was added to the logit of a score of an image trained on, and its standard error, by regime.
    counted: which of the scores tell what new images will have, by regime.
    """

    good: list[Good]
    part_of: dict[int, int]
    unreadable: list[Picture]
    scores: dict[str, list[float]]
    extremes: list[tuple[float, float]]
    errors: dict[str, list[float]]
    promises: dict[str, Promise]
    regime: str
    shifts: dict[str, Shift]
    counted: dict[str, list[bool]]

    def basis(self, regime: str | None = None) -> dict[str, Any]:
        """What `promise` and `intervals` take in a regime, by default the one whose threshold is set."""
        regime = regime or self.regime
        parts = [entry.part_id for entry in self.good]
        rows = zip(self.scores[regime], parts, self.errors[regime], self.counted[regime])
        scores, parts, errors = zip(*(row[:3] for row in rows if row[3]))
        return {"scores": scores, "parts": parts, "errors": errors, "new_parts": regime == "new"}


def read_for(judge: FusedALMRR, picture: Picture) -> Tensor:
    """A picture as the network takes it: uint8 (3, *size), or whole, (3, h, w), to be cut into tiles."""
    levels = Levels.of(judge.config)
    return read_image(picture, levels) if judge.config.tile else load_image(picture, judge.config.size, levels)


def measure(judge: FusedALMRR, image: Tensor, masks: Sequence[Tensor] = ()) -> Measured:
    """Evidence of an image of `read_for`, by the path that judges new images.

    Args:
        masks: stored patches that do not count, for each regime.
    """
    size, tile = judge.config.size, judge.config.tile
    tiles = cut_tiles(image, tile, size) if tile else iter([image])
    evidence = []
    while batch := list(islice(tiles, BATCH)):
        images = torch.stack(batch).to(judge.device).float() / 255
        evidence.append(torch.stack(judge.evidence_of(images, masks)).float().cpu())
    return Measured(torch.cat(evidence, dim=1), (image.shape[1], image.shape[2]))


def anomaly_map(judge: FusedALMRR, measured: Measured, regime: int = 0) -> Tensor:
    """The map of measured evidence under the judge's present balance, (1, 1, h, w)."""
    maps = judge.to_map(measured.evidence[min(regime, len(measured.evidence) - 1)].to(judge.device))
    if judge.config.tile:
        maps = blend_tiles(iter(maps[:, 0].cpu()), *measured.size, judge.config.tile)[None]
    return maps


def score(judge: FusedALMRR, measured: Measured, regime: int = 0) -> float:
    """The image score of measured evidence under the judge's present balance."""
    return score_and_peak(judge, measured, regime)[0]


def score_and_peak(judge: FusedALMRR, measured: Measured, regime: int) -> tuple[float, float]:
    """The image score, and the highest pixel of the smoothed map, which decides on outlines."""
    smoothed = judge.smooth(anomaly_map(judge, measured, regime))
    return float(judge.scores_of(smoothed)[0]), float(smoothed.max())


def left_out(model: ALMRR, entry: Good, part_of: dict[int, int]) -> list[Tensor]:
    """Stored patches that do not count for an image, by regime, (count,) each; one for both where no other image shows
    the part; none without a memory.

    Args:
        part_of: part ids by image id.
    """
    if model.memory is None:
        return []
    ids = model.memory.patch_parts
    siblings = [image_id for image_id, part_id in part_of.items() if part_id == entry.part_id and image_id >= 0]
    own = (ids == entry.image_id) & (ids >= 0)
    of_part = own | torch.isin(ids, ids.new_tensor(siblings))
    alone = torch.equal(own, of_part) or bool(of_part.all())  # of a single part nothing would be left
    return [own] if alone else [own, of_part]


def measure_good(
    model: ALMRR, judge: FusedALMRR, good: Sequence[Good], part_of: dict[int, int], known: dict[int, list[Tensor]]
) -> tuple[list[tuple[Good, Measured]], list[Picture]]:
    """Good images -> what was measured of each in both regimes, and those that cannot be read.

    Args:
        known: stages [(1, c_k, h_k, w_k)] by image id, where the caller has them; such an image is not read.
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
                image = read_for(judge, entry.picture)
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
    """Scores of every regime, (regimes, n), each image under the balance of the others in one; peaks in that one (n,).

    The judge is left with the balance of all of them. Of either, those counted alone serve.
    """
    balanced = judge.evidence is not None and judge.evidence.balance
    scores: list[list[float]] = [[] for _ in REGIMES]
    highest = []
    evidence = [entry.evidence[min(regime, len(entry.evidence) - 1)] for entry in measured]
    if balanced and judge.evidence is not None:
        judge.evidence.cpu().fit_border(evidence)
        evidence = [judge.evidence.levelled(kinds) for kinds in evidence]
        judge.evidence.to(judge.device)
    peaks = [image_peaks(kinds, judge.roi) for kinds in evidence]
    owners = torch.arange(len(peaks)).repeat_interleave(torch.tensor([len(values) for values in peaks]))
    counts = torch.tensor(counted)[owners]
    together = torch.cat(peaks).to(judge.device)
    for number, entry in enumerate(measured):
        others = counts & (owners != number)
        if balanced:
            judge.evidence.fit(together[(others if bool(others.any()) else counts).to(judge.device)])
        for k, values in enumerate(scores):
            value, peak = score_and_peak(judge, entry, k)
            values.append(value)
            highest += [peak] if k == regime else []
    if balanced:
        judge.evidence.fit(together[counts.to(judge.device)])
    return scores, highest


def keep_promise(model: ALMRR, judge: FusedALMRR, found: Calibration, rate: float) -> None:
    """Set the threshold that keeps a false-positive rate, and the level of the outlines, in place.

    As many good images as have a score at the threshold have a pixel at the level of the outlines.
    """
    found.promises.update({name: promise(rate=rate, **found.basis(name)) for name in REGIMES})
    model.threshold = judge.threshold = found.promises[found.regime].value
    counting = [both for both, counts in zip(found.extremes, found.counted[found.regime]) if counts]
    limits = [promise(values, rate).value for values in zip(*counting)]
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
        good: all that there are, those held out included; MOST of them are drawn.
        rate: the fraction of new good images that may be called defective.
        regime: "seen" or "new", the regime whose threshold is set.
        part_of: part ids by image id, where the memory has images that are not among the good ones.
        known: of `measure_good`.
    Returns:
        What was found, and the network that judged.
    Raises:
        ValueError: if none of the images can be read.
    """
    part_of = part_of or {entry.image_id: entry.part_id for entry in good}
    judge = model.eval().fuse()
    drawn = [good[i] for i in np.random.default_rng(seed).permutation(len(good))[:MOST]]
    pairs, unreadable = measure_good(model, judge, drawn, part_of, known or {})
    if not pairs:
        raise ValueError(f"none of {len(good)} good images can be read, so no threshold can be set")
    drawn, measured = [entry for entry, _ in pairs], [values for _, values in pairs]
    parts, trained = [entry.part_id for entry in drawn], [entry.trained for entry in drawn]
    everyone, aside = [True] * len(drawn), [not known for known in trained]
    raw, peaks = cross_fitted_scores(judge, measured, REGIMES.index(regime), everyone)
    counted = {"seen": everyone, "new": aside if as_unseen(raw[1], trained, parts)[0] else everyone}
    if counted[regime] is aside:
        raw, peaks = cross_fitted_scores(judge, measured, REGIMES.index(regime), aside)
    scores, errors, shifts = {}, {}, {}
    for name, values in zip(REGIMES, raw):
        shifts[name] = shift, error = as_unseen(values, trained, parts)
        scores[name] = shifted(values, trained, shift)
        errors[name] = (error * np.asarray(trained)).tolist()
    extremes = list(zip(raw[REGIMES.index(regime)], peaks))
    found = Calibration(drawn, part_of, unreadable, scores, extremes, errors, {}, regime, shifts, counted)
    if model.evidence is not None and judge.evidence is not None and judge.evidence.balance:
        model.evidence.load_state_dict(judge.evidence.state_dict())
    keep_promise(model, judge, found, rate)
    return found, judge
