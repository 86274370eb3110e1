"""Thresholds from scores: which false-positive rate a threshold promises, and how sure the promise is.

Score n good images as if they were new, and set the threshold just above the (a + 1)-th highest score: a images are
false alarms. A new good image reaches it with probability (a + 1) / (n + 1); over all draws of the n images, the rate
is Beta(a + 1, n - a) distributed. Images of one part alarm together, which widens the distribution: its parameters are
divided by the design effect, the variance of the alarms over whole parts relative to that over single images. Where
future images show other parts, the effect is at least that of the scores (Kish 1965): few alarms may all be of one odd
part, and no alarm says nothing. Where all scores were shifted by an estimate, its standard error widens it, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from almrr_ref.report.result import logit
from almrr_ref.run.text import counted, decimals

ROUNDING = 2e-5  # more than a score changes with the batch size or between the plain and the folded network
CONFIDENCE = 0.95  # of the interval
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
NEXT = 100  # future good images for which the expected number of false alarms is stated
FOLDS = 5  # of the cross-validation
FAR_OUT = 5.0  # robust deviations: of normally spread logits one image in three million lies farther out


@dataclass(frozen=True)
class Promise:
    """A threshold for a false-positive rate.

    value: an image whose score reaches it is called defective; at most 1, the highest score.
    asked, rate: the rate asked for, and the one promised: the next lower one, or, with too few images, a higher one.
    images: number of good scores behind it.
    low, high: the 95% interval of the true rate.
    of_next: the 95% interval of the number of false alarms among the next NEXT good images.
    more: number of good images still needed to promise the rate asked for.
    """

    value: float
    asked: float
    rate: float
    images: int
    low: float
    high: float
    of_next: tuple[int, int]
    more: int = 0

    def __str__(self) -> str:
        behind, (low, high) = counted(self.images, "good image"), self.of_next
        text = f"threshold {decimals(self.value)} for {percent(self.rate)} false alarms, from {behind} "
        text += f"(95% sure: {percent(self.low)} to {percent(self.high)}; of the next {NEXT} good ones {low} to {high})"
        if self.more:
            text += f"; {percent(self.asked)} would take {counted(self.more, 'good image')} more"
        return text


def promise(
    scores: Sequence[float],
    rate: float,
    parts: Sequence[int] | None = None,
    errors: Sequence[float] | float = 0.0,
    new_parts: bool = False,
) -> Promise:
    """The lowest threshold that promises a false-positive rate; with too few images, one with the lowest possible rate.

    Args:
        scores: of good images, each as if the image were new, (n,).
        rate: the fraction of good images that may be called defective.
        parts: which part each image shows, (n,); by default each shows another one.
        errors: standard error of the logits of the scores, (n,); all of them err in the same direction.
        new_parts: whether future images show other parts than these.
    """
    from scipy.stats import betabinom  # takes a second to import, which commands that set no threshold save

    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(values)
    allowed = max(0, math.floor(rate * (n + 1) + 1e-9) - 1)
    threshold = min(float(values[min(allowed, n - 1)]) + ROUNDING, 1.0)
    allowed = max(allowed, min(int((values >= threshold).sum()), n - 1))  # no threshold is above a score of 1
    a, b = _spread(scores, threshold, allowed, parts, errors, _least_effect(scores, parts, new_parts))
    low, high = (float(betaincinv(a, b, tail)) for tail in _TAILS)
    first, last = (int(betabinom.ppf(tail, NEXT, a, b)) for tail in _TAILS)
    more = max(0, math.ceil(1 / rate - 1e-9) - 1 - n) if rate > 0 else 0
    return Promise(threshold, rate, (allowed + 1) / (n + 1), n, low, high, (first, last), more)


def intervals(
    scores: Sequence[float],
    parts: Sequence[int] | None = None,
    errors: Sequence[float] | float = 0.0,
    new_parts: bool = False,
) -> list[tuple[float, float]]:
    """The 95% intervals of the true rate where 0, 1, ..., n - 1 of n good scores (n,) are alarms; see `promise`."""
    highest_first = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    least = _least_effect(scores, parts, new_parts)
    spreads = [
        _spread(scores, value + ROUNDING, alarms, parts, errors, least) for alarms, value in enumerate(highest_first)
    ]
    return np.stack([betaincinv(*np.transpose(spreads), tail) for tail in _TAILS], axis=1).tolist()


def _spread(
    scores: Sequence[float],
    threshold: float,
    alarms: int,
    parts: Sequence[int] | None,
    errors: Sequence[float] | float,
    least: float,
) -> tuple[float, float]:
    """The parameters of the rate's Beta distribution where ``alarms`` of the good scores reach a threshold."""
    n = len(scores)
    effect = design_effect(np.asarray(scores) >= threshold, np.arange(n) if parts is None else np.asarray(parts))
    effect = max(effect, least)
    effect += shift_effect(np.asarray(scores), threshold, np.asarray(errors))
    return (alarms + 1) / effect, (n - alarms) / effect


def _least_effect(scores: Sequence[float], parts: Sequence[int] | None, new_parts: bool) -> float:
    """The smallest design effect that is assumed, whatever the alarms show."""
    return effect_of_parts(logit(np.asarray(scores)), np.asarray(parts)) if new_parts and parts is not None else 1.0


def shift_effect(scores: np.ndarray, threshold: float, errors: np.ndarray) -> float:
    """The design effect that standard errors of the logits (n,) add: a common error changes the fraction of alarms."""
    low, high = (float((logit(scores) + sign * errors >= logit(np.asarray(threshold))).mean()) for sign in (-1, 1))
    rate = (low + high) / 2
    return len(scores) * ((high - low) / 2) ** 2 / (rate * (1 - rate)) if 0 < rate < 1 else 0.0


def design_effect(alarms: np.ndarray, parts: np.ndarray) -> float:
    """By what factor whole parts raise the variance of the rate of alarms: (n,) bool, part ids (n,) -> at least 1."""
    n, rate = len(alarms), float(alarms.mean())
    if not 0 < rate < 1:
        return 1.0
    _, part_of = np.unique(parts, return_inverse=True)
    excess = np.bincount(part_of, alarms - rate)  # of every part
    return max(1.0, float((excess**2).sum()) / (n * rate * (1 - rate)))


def effect_of_parts(values: np.ndarray, parts: np.ndarray) -> float:
    """By what factor whole parts raise the variance of the mean of values: (n,), part ids (n,) -> at least 1.

    1 + (m - 1) rho, with m images of a part (mean over images) and rho the correlation within a part, estimated by an
    analysis of variance. Source: Kish, Survey Sampling, 1965.
    """
    _, part_of, sizes = np.unique(parts, return_inverse=True, return_counts=True)
    n, groups = len(values), len(sizes)
    if not 1 < groups < n:
        return float(n) if groups == 1 else 1.0  # one part says as much as one image
    means = np.bincount(part_of, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (groups - 1)
    within = float(((values - means[part_of]) ** 2).sum()) / (n - groups)
    mean_size, size_of_an_image = (n - (sizes**2).sum() / n) / (groups - 1), float((sizes**2).sum()) / n
    total = between + (mean_size - 1) * within
    rho = max(0.0, (between - within) / total) if total > 0 else 0.0
    return 1 + (size_of_an_image - 1) * rho


def percent(rate: float) -> str:
    """A rate as people say it: 1%, 0.37%, 12%, 0% for less than one in 20,000, and 100% for no less than all."""
    return f"{100 * rate:.2g}%" if 5e-5 <= rate < 0.1 else f"{99 if 0.99 < rate < 1 else 100 * rate:.0f}%"


def best_point(good: Sequence[float], defective: Sequence[Sequence[float]], least: float | None) -> float:
    """The lowest threshold, at least ``least``, with the highest rate of detections less that of false alarms.

    It is ``least`` itself unless another stays better with one detection less in each group: a few defective images,
    all of one kind, must not hide other kinds for half a percent of false alarms. Without ``least`` all are alike.

    Args:
        good: scores of good images.
        defective: scores of defective images, in groups of equal weight, such as real and simulated ones.
    """
    values = np.sort(np.asarray(good, dtype=np.float64))
    above = np.minimum(values + ROUNDING, 1.0)
    candidates = np.unique(above if least is None else [least, *above[above > least]])
    alarms = 1 - np.searchsorted(values, candidates, side="left") / len(values)
    detections = [1 - np.searchsorted(np.sort(group), candidates, side="left") / len(group) for group in defective]
    gain = np.mean(detections, axis=0) - alarms
    if least is not None:
        gain[1:] -= np.mean([1 / len(group) for group in defective])
    return float(candidates[np.argmax(gain)])


def cross_validated(
    good: Sequence[float], defective: Sequence[float], simulated: Sequence[float], promised: float, lower: bool
) -> tuple[float, float]:
    """Cross-validate `best_point`, at least ``promised`` unless it may be ``lower``: -> the rate of detections, of
    ``defective``, and the rate of false alarms."""
    hits = alarms = 0
    folds = min(FOLDS, len(defective), len(good))
    for fold in range(folds):
        rest, bad = ([value for i, value in enumerate(values) if i % folds != fold] for values in (good, defective))
        groups = [group for group in (bad, simulated) if len(group)]
        chosen = best_point(rest, groups, None if lower else promised) if groups and rest else promised
        hits += sum(value >= chosen for value in list(defective)[fold::folds])
        alarms += sum(value >= chosen for value in list(good)[fold::folds])
    return hits / len(defective), alarms / len(good)


def outliers(logits: np.ndarray) -> list[int]:
    """Logits (n,) -> the numbers of those that exceed the median by more than FAR_OUT robust deviations.

    The deviation is 1.48 times the median distance of the logits above the median, which outliers cannot change.
    """
    middle = float(np.median(logits))
    above = logits[logits > middle] - middle
    if len(above) < 5:
        return []
    return np.flatnonzero(logits - middle > FAR_OUT * 1.4826 * float(np.median(above))).tolist()
