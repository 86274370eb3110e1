"""The threshold that training and the command calibrate set, in the words of the screen and of calibration.json.

The promise comes from the good images alone (good_scores.py, thresholds.py). Defective images may raise it, and lower
it only where that is asked for. What will be found is stated by simulated defects (simulated.py).
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from almrr_ref.calibration.good_scores import RATE, Calibration, calibrate, keep_promise, measure, read_for, score
from almrr_ref.calibration.groups import find_groups
from almrr_ref.calibration.simulated import SimulatedDefect, describe_found, found_shares, simulate
from almrr_ref.calibration.thresholds import (
    Promise,
    best_point,
    cross_validated,
    intervals,
    logit,
    outliers,
    percent,
    promise,
)
from almrr_ref.data.images import ImageError
from almrr_ref.data.split import Good
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.report.scores import write_metrics
from almrr_ref.run.text import LOGGER, one_line

POINTS = ("fpr", "balanced")
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # at which calibration.json says what is found
ENOUGH = 0.5  # of the simulated defects: to find so many, more false alarms are allowed where nobody asked for a rate
SHOWN = 5  # outliers named on the screen


@dataclass(frozen=True)
class Verdict:
    """What a calibration found: `content` of calibration.json, `scores` behind it, `outliers` among the good images."""

    content: dict[str, Any]
    scores: dict[str, Any]
    outliers: list[Good]
    calibration: Calibration


def choose_regime(wanted: str, parts: bool) -> tuple[str, str]:
    """--calibrate-for -> the regime, and why."""
    if wanted != "auto":
        return wanted, f"--calibrate-for {wanted}"
    if parts:
        return "new", "--parts is given, so images to come are taken to show new parts"
    return "seen", "without --parts, images to come are taken to be like these"


def with_groups(model: ALMRR, good: Sequence[Good]) -> list[Good]:
    """Give near-identical images one part, where no --parts says which show the same; say so."""
    try:
        groups = find_groups(model, [entry.picture for entry in good])
    except ImageError:  # named when it is measured
        return list(good)
    sizes = Counter(groups)
    if len(sizes) == len(good):
        return list(good)
    first = next(group for group in groups if sizes[group] > 1)
    pair = [one_line(name_of(entry)) for entry, group in zip(good, groups) if group == first][:2]
    LOGGER.info(
        f"{len(good)} good images look like {len(sizes)} parts (such as {' and '.join(pair)}): say by --parts which "
        "images show the same one"
    )
    return [dataclasses.replace(entry, part_id=group) for entry, group in zip(good, groups)]


def set_verdict(
    model: ALMRR,
    good: Sequence[Good],
    rate: float | None,
    regime: tuple[str, str],
    defective: Sequence[Path] = (),
    point: str = "fpr",
    part_of: dict[int, int] | None = None,
    seed: int = 0,
    known: dict[int, list[Tensor]] | None = None,
) -> Verdict:
    """Set balance and threshold of a network in its final form, in place, and print what they promise.

    Args:
        good: all good images.
        rate: the fraction of new good images that may be called defective; None: RATE, or the lowest of RATES at which
            ENOUGH of the simulated defects are found.
        regime: of `choose_regime`.
        defective: images that sharpen the threshold.
        part_of, known: of `calibrate`.
        point: "fpr" keeps the promise; "balanced" goes where most is found for the fewest false alarms.
    """
    calibration, judge = calibrate(model, good, RATE if rate is None else rate, regime[0], part_of, seed, known)
    simulated = simulate(model, judge, calibration, seed)
    if rate is None and simulated:
        allow_enough(model, judge, calibration, simulated)
    with torch.inference_mode():
        found = [score(judge, measure(judge, read_for(judge, path))) for path in defective]
    promised = calibration.promises[regime[0]]
    value, expected = choose_point(calibration, simulated, found, promised, point)
    model.threshold = value
    logits = logit(np.asarray(calibration.scores["seen"]))
    outside = [calibration.good[i] for i in outliers(logits)]
    content = {
        "threshold": value,
        "outline_offset": model.outline_offset,
        "operating_point": point,
        "regime": regime[0],
        "reason": regime[1],
        "promises": {name: dataclasses.asdict(p) for name, p in calibration.promises.items()},
        "learned_of_trained_images": calibration.shifts,
        "defective": expected,
        "simulated": found_shares(simulated, value),
        "curve": curve(calibration, simulated),
        "outliers": [name_of(entry) for entry in outside],
    }
    print_verdict(calibration, content, promised)
    if outside:
        names = ", ".join(one_line(name_of(entry)) for entry in outside[:SHOWN])
        LOGGER.info(f"look at these: {len(outside)} good images score far outside the others: {names}")
    scores = {**scores_behind(calibration, simulated), "judged_png": model.config.judged_png}
    return Verdict(content, scores, outside, calibration)


def allow_enough(model: ALMRR, judge: FusedALMRR, calibration: Calibration, simulated: list[SimulatedDefect]) -> None:
    """Set the threshold of the lowest of RATES, from RATE on, at which ENOUGH of the simulated defects are found.

    Say so. Where none of them is enough, the threshold stays.
    """
    found = {
        rate: found_shares(simulated, promise(rate=rate, **calibration.basis()).value)["all"]
        for rate in RATES
        if rate >= RATE
    }
    chosen = next((rate for rate, share in found.items() if share >= ENOUGH), RATE)
    if chosen > RATE:
        keep_promise(model, judge, calibration, chosen)
        LOGGER.info(
            f"at {percent(RATE)} false alarms {percent(found[RATE])} of the simulated defects would be found, at "
            f"{percent(chosen)} {percent(found[chosen])}: that is allowed; say otherwise with --false-positive-rate"
        )


def choose_point(
    calibration: Calibration, simulated: list[SimulatedDefect], found: list[float], promised: Promise, point: str
) -> tuple[float, dict[str, Any]]:
    """The threshold, and what it finds of the defective images that are there."""
    good, drawn = calibration.basis()["scores"], [defect.score for defect in simulated]
    groups = [group for group in (found, drawn) if group]
    least = 0.0 if point == "balanced" else promised.value
    value, expected = promised.value, {}  # type: float, dict[str, Any]
    if groups and (found or point == "balanced"):
        value = best_point(good, groups, least)
    if found:
        share, alarms = cross_validated(good, found, drawn, least)
        at_promise = float(np.mean(np.asarray(found) >= promised.value))
        if point == "fpr" and share < at_promise:
            value = promised.value  # what was chosen on some of them does not hold on the others
        expected = {"images": len(found), "found_at_promise": at_promise, "found_at_threshold": None}
        expected["found_at_threshold"] = float(np.mean(np.asarray(found) >= value))
        expected |= {"cross_validated_found": share, "cross_validated_false_alarms": alarms}
    return value, expected


def curve(calibration: Calibration, simulated: list[SimulatedDefect]) -> list[dict[str, Any]]:
    """What is promised and found at several false-positive rates, in the regime that is set."""
    points = {p.value: p for p in (promise(rate=rate, **calibration.basis()) for rate in RATES)}
    return [{**dataclasses.asdict(p), "found": found_shares(simulated, p.value)} for p in points.values()]


def scores_behind(calibration: Calibration, simulated: list[SimulatedDefect]) -> dict[str, Any]:
    """What tells of any threshold what it promises and finds: the report's page and the station draw it.

    good_scores: in the regime that is set, the highest first; intervals: of the rate, [low, high], where so many of
    them as an entry's place says are alarms; simulated_scores: [strength, score] of each simulated defect.
    """
    basis = calibration.basis()
    stated = intervals(**basis)
    return {
        "good_scores": sorted(basis["scores"], reverse=True),
        "intervals": [[round(low, 6), round(high, 6)] for low, high in stated],
        "simulated_scores": [[defect.strength, defect.score] for defect in simulated],
    }


def print_verdict(calibration: Calibration, content: dict[str, Any], promised: Promise) -> None:
    """Say which threshold is set, why, what it promises, and what it will find."""
    LOGGER.info(f"{promised}")
    other = next(name for name in calibration.promises if name != calibration.regime)
    p = calibration.promises[other]
    if abs(p.value - promised.value) > 1e-3:
        LOGGER.info(
            f"that is for {_parts(calibration.regime)} ({content['reason']}); for {_parts(other)} it would be "
            f"{p.value:.4f} (--calibrate-for {other})"
        )
    shift, _ = calibration.shifts[calibration.regime]
    counted = [entry for entry, counts in zip(calibration.good, calibration.counted[calibration.regime]) if counts]
    if len(counted) < len(calibration.good):
        LOGGER.info(
            f"the {len(counted)} images of {len({entry.part_id for entry in counted})} parts kept aside count, as the "
            "network knows the parts that it was trained on; --holdout keeps more aside"
        )
    elif shift:
        LOGGER.info(f"scores of images trained on are raised by {shift:.2f} (logit), as those kept aside score higher")
    expected = content["defective"]
    if expected:
        LOGGER.info(
            f"defective images: {percent(expected['found_at_promise'])} of {expected['images']} found at the promised "
            f"threshold, {percent(expected['found_at_threshold'])} at {content['threshold']:.4f}, which is set; expect "
            f"{percent(expected['cross_validated_found'])} of others like them (cross-validated)"
        )
    if content["simulated"]:
        LOGGER.info(describe_found(content["simulated"]))


def _parts(regime: str) -> str:
    return "new parts" if regime == "new" else "parts like those seen"


def name_of(entry: Good) -> str:
    """How an image is named: by its path, or as the picture of an array by its number."""
    return str(entry.picture) if isinstance(entry.picture, str | Path) else f"picture {entry.image_id}"


def stored_calibration(verdict: Verdict, images: list[list[Any]], before: dict[str, Any] | None) -> dict[str, Any]:
    """What the checkpoint keeps: the history of thresholds and drawn regions, the images, the scores behind the last
    threshold that was calibrated, and the region that they were measured in.

    Args:
        images: of every image in the order of the ids: its digest, its path below the data, whether it was trained on.
    """
    content = verdict.content
    facts = {name: content[name] for name in ("operating_point", "regime", "defective")}
    entry = {**content["promises"][content["regime"]], **facts, "value": content["threshold"]}
    history = before["thresholds"] if before else []
    kept = {"outline_offset": content["outline_offset"]}
    kept |= {name: value for name, value in (before or {}).items() if name == "regions"}
    return {"images": images, **kept, **verdict.scores, "thresholds": [*history, entry]}


def write_calibration(path: Path, verdict: Verdict) -> None:
    """Write calibration.json."""
    write_metrics(path, verdict.content)
