"""The threshold that training and the command calibrate set, and how the screen and calibration.json describe it.

The promise comes from the good images alone (good_scores.py, thresholds.py). Defective images may raise the threshold;
they lower it only on request ("balanced"). Simulated defects tell what will be found (simulated.py).
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from almrr_ref.calibration.good_scores import RATE, Calibration, calibrate, keep_promise, measure, read_for, score
from almrr_ref.calibration.groups import find_groups
from almrr_ref.calibration.simulated import SimulatedDefect, describe_rates, detection_rates, simulate
from almrr_ref.calibration.thresholds import (
    Promise,
    best_point,
    cross_validated,
    intervals,
    outliers,
    percent,
    promise,
)
from almrr_ref.config import TrainConfig
from almrr_ref.data.split import Good
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.model import ALMRR
from almrr_ref.report.result import logit
from almrr_ref.run.text import LOGGER, counted, decimals, one_line

POINTS = ("fpr", "balanced")
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # of false alarms, for which calibration.json states the detection rates
ENOUGH = 0.5  # of the simulated defects: to find so many, a rate above RATE is taken where the user asks for none
SHOWN = 5  # outliers named on the screen


@dataclass(frozen=True)
class Verdict:
    """A calibration, the `content` of calibration.json, the `scores` behind it, `outliers` among the good images."""

    content: dict[str, Any]
    scores: dict[str, Any]
    outliers: list[Good]
    calibration: Calibration


def choose_regime(config: TrainConfig) -> tuple[str, str]:
    """The regime whose threshold is set, and why."""
    if config.calibrate_for != "auto":
        return config.calibrate_for, f"--calibrate-for {config.calibrate_for}"
    if config.parts:
        return "new", "--parts is given, so images to come are taken to show new parts"
    return "seen", "without --parts, images to come are taken to be like these"


def with_groups(model: ALMRR, good: Sequence[Good]) -> list[Good]:
    """Give near-identical images one part id, for data without --parts; log it."""
    groups = find_groups(model, [entry.picture for entry in good])
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
    config: TrainConfig,
    defective: Sequence[Path] = (),
    point: str = "fpr",
    part_of: dict[int, int] | None = None,
    known: dict[int, list[Tensor]] | None = None,
) -> Verdict:
    """Set balance and threshold of a network in its final form, in place, and log what they promise.

    Args:
        good: all good images.
        config: seed, regime, and the fraction of new good images that may be called defective; None: RATE, or the
            lowest of RATES above it at which ENOUGH of the simulated defects are found.
        defective: files of defective images, which may raise the threshold.
        point: "fpr" keeps the promise; "balanced" maximises the rate of detections less that of false alarms.
        part_of, known: as in `calibrate`.
    """
    (regime, reason), rate = choose_regime(config), config.false_positive_rate
    calibration, judge = calibrate(model, good, RATE if rate is None else rate, regime, part_of, config.seed, known)
    simulated = simulate(model, judge, calibration, config.seed)
    if rate is None and simulated:
        allow_enough(model, judge, calibration, simulated)
    with torch.inference_mode():
        defective_scores = [score(judge, measure(judge, read_for(judge, path))) for path in defective]
    promised = calibration.promises[regime]
    value, expected = choose_point(calibration, simulated, defective_scores, promised, point)
    model.threshold = value
    logits = logit(np.asarray(calibration.scores["seen"]))
    outside = [calibration.good[i] for i in outliers(logits)]
    content = {
        "threshold": value,
        "outline_offset": model.outline_offset,
        "operating_point": point,
        "regime": regime,
        "reason": reason,
        "promises": {name: dataclasses.asdict(p) for name, p in calibration.promises.items()},
        "learned_of_trained_images": calibration.shifts,
        "defective": expected,
        "simulated": detection_rates(simulated, value),
        "curve": curve(calibration, simulated),
        "outliers": [name_of(entry) for entry in outside],
    }
    scores = {**scores_behind(calibration, simulated), "judged_png": model.config.judged_png}
    print_verdict(calibration, content, promised, scores)
    if outside:
        names = ", ".join(one_line(name_of(entry)) for entry in outside[:SHOWN])
        LOGGER.info(f"look at {counted(len(outside), 'good image')} scoring far outside the others: {names}")
    return Verdict(content, scores, outside, calibration)


def allow_enough(model: ALMRR, judge: FusedALMRR, calibration: Calibration, simulated: list[SimulatedDefect]) -> None:
    """Set the threshold of the lowest of RATES, from RATE on, at which ENOUGH of the simulated defects are found.

    Log it. Where none of the rates is enough, the threshold stays.
    """
    thresholds = {rate: promise(rate=rate, **calibration.basis()).value for rate in RATES if rate >= RATE}
    detected = {rate: detection_rates(simulated, value)["all"] for rate, value in thresholds.items()}
    chosen = next((rate for rate in detected if detected[rate] >= ENOUGH), RATE)
    if chosen > RATE:
        keep_promise(model, judge, calibration, chosen)
        LOGGER.info(
            f"at {percent(RATE)} false alarms {percent(detected[RATE])} of the simulated defects would be found, at "
            f"{percent(chosen)} {percent(detected[chosen])}: that is allowed; say otherwise with --false-positive-rate"
        )


def choose_point(
    calibration: Calibration, simulated: list[SimulatedDefect], defective: list[float], promised: Promise, point: str
) -> tuple[float, dict[str, Any]]:
    """The threshold, and the detection rates on defective images, by their scores; {} without such images."""
    good, drawn = calibration.basis()["scores"], [defect.score for defect in simulated]
    groups = [group for group in (defective, drawn) if group]
    lower, value = point == "balanced", promised.value
    if groups and (defective or lower):
        value = best_point(good, groups, None if lower else value)
    if not defective:
        return value, {}
    cross_validated_found, alarms = cross_validated(good, defective, drawn, promised.value, lower)
    at_promise = float(np.mean(np.asarray(defective) >= promised.value))
    if point == "fpr" and cross_validated_found < at_promise:
        value = promised.value  # a threshold chosen on some of them does worse on the others
        cross_validated_found, alarms = at_promise, float(np.mean(np.asarray(good) >= value))
    return value, {
        "images": len(defective),
        "found_at_promise": at_promise,
        "found_at_threshold": float(np.mean(np.asarray(defective) >= value)),
        "cross_validated_found": cross_validated_found,
        "cross_validated_false_alarms": alarms,
    }


def curve(calibration: Calibration, simulated: list[SimulatedDefect]) -> list[dict[str, Any]]:
    """Promise and detection rates at each of RATES, in the regime that is set; each threshold once."""
    points = {p.value: p for p in (promise(rate=rate, **calibration.basis()) for rate in RATES)}
    return [{**dataclasses.asdict(p), "found": detection_rates(simulated, p.value)} for p in points.values()]


def scores_behind(calibration: Calibration, simulated: list[SimulatedDefect]) -> dict[str, Any]:
    """From what the page and the station compute promise and detection rates of any threshold.

    good_scores: in the regime that is set, the highest first; intervals: entry i is the interval of the rate,
    [low, high], where i of them are alarms; simulated_scores: [strength, score] of each simulated defect.
    """
    basis = calibration.basis()
    return {
        "good_scores": sorted(basis["scores"], reverse=True),
        "intervals": [[round(low, 6), round(high, 6)] for low, high in intervals(**basis)],
        "simulated_scores": [[defect.strength, defect.score] for defect in simulated],
    }


def rate_at(value: float, scores: dict[str, Any]) -> dict[str, float]:
    """The false-positive rate of any threshold, and its 95% interval, by `scores_behind`."""
    good = scores["good_scores"]
    alarms = sum(one >= value for one in good)
    low, high = [*scores["intervals"], (0.0, 1.0)][alarms]
    return {"rate": (alarms + 1) / (len(good) + 1), "low": low, "high": high}


def print_verdict(calibration: Calibration, content: dict[str, Any], promised: Promise, scores: dict[str, Any]) -> None:
    """Log which threshold is set, why, what it promises, and what it will find; ``scores`` of `scores_behind`."""
    LOGGER.info(str(promised))
    other = next(name for name in calibration.promises if name != calibration.regime)
    p = calibration.promises[other]
    if abs(p.value - promised.value) > 1e-3:
        LOGGER.info(
            f"that is for {_parts(calibration.regime)} ({content['reason']}); for {_parts(other)} it would be "
            f"{decimals(p.value)} (--calibrate-for {other})"
        )
    shift, _ = calibration.shifts[calibration.regime]
    aside = list(compress(calibration.good, calibration.counted[calibration.regime]))
    if len(aside) < len(calibration.good):
        LOGGER.info(
            f"the {len(aside)} images of {len({entry.part_id for entry in aside})} parts kept aside count, as the "
            "network knows the parts that it was trained on; --holdout keeps more aside"
        )
    elif shift:
        LOGGER.info(f"scores of images trained on are raised by {shift:.2f} (logit), as those kept aside score higher")
    value, expected = content["threshold"], content["defective"]
    if value != promised.value:
        false_alarms = rate_at(value, scores)
        balanced = content["operating_point"] == "balanced"
        by = ["--operating-point balanced"] * balanced + ["--defective"] * bool(expected)
        LOGGER.info(
            f"threshold {decimals(value)} is set, by {' and '.join(by)}: {percent(false_alarms['rate'])} false alarms "
            f"(95% sure: {percent(false_alarms['low'])} to {percent(false_alarms['high'])})"
        )
    if expected:
        LOGGER.info(
            f"defective images: {percent(expected['found_at_promise'])} of {expected['images']} found at the promised "
            f"threshold, {percent(expected['found_at_threshold'])} at {decimals(value)}, which is set; expect "
            f"{percent(expected['cross_validated_found'])} of others like them (cross-validated)"
        )
    if content["simulated"]:
        LOGGER.info(describe_rates(content["simulated"]))


def _parts(regime: str) -> str:
    return "new parts" if regime == "new" else "parts like those seen"


def name_of(entry: Good) -> str:
    """The name of an image: its path, or for a picture in memory its number."""
    return str(entry.picture) if isinstance(entry.picture, str | Path) else f"picture {entry.image_id}"


def stored_calibration(verdict: Verdict, images: list[list[Any]], before: dict[str, Any] | None) -> dict[str, Any]:
    """The checkpoint's record: images, histories of thresholds and drawn regions, and the scores behind this verdict.

    Args:
        images: of every image in the order of the ids: its digest, its path below the data, whether it was trained on.
        before: the record to continue; None: there is none.
    """
    content = verdict.content
    facts = {name: content[name] for name in ("operating_point", "regime", "defective")}
    entry, value = content["promises"][content["regime"]], content["threshold"]
    if value != entry["value"]:  # what is promised is promised of another threshold
        entry = {"asked": entry["asked"], "images": entry["images"], **rate_at(value, verdict.scores)}
    entry = {**entry, **facts, "value": value}
    history = before["thresholds"] if before else []
    stays: dict[str, Any] = {name: before[name] for name in ("regions", "copies") if before and name in before}
    record = {"images": images, "outline_offset": content["outline_offset"], **stays}
    return {**record, **verdict.scores, "thresholds": [*history, entry]}
