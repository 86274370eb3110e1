"""From scores to a verdict: which threshold keeps which promise, and how sure that is.

Of n good images that were scored as new ones would be, a lie above a threshold right over the (a + 1)-th highest score.
A new good image lies above it with probability (a + 1) / (n + 1); over all draws of the n images the rate is
Beta(a + 1, n - a) distributed. Images of one part alarm together, which widens that: a and n count as if divided by the
design effect, the variance of the alarms over whole parts against that of single images. Where images to come show
other parts, the effect is at least what the scores show (Kish 1965): the few alarms may be those of one odd part, and
none says nothing. What is not sure in the scores themselves widens it, too, where all of them were moved by a value
that is known to an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

ROUNDING = 2e-5  # more than a score changes with another batch size or the plain network
CONFIDENCE = 0.95  # of the interval
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
NEXT = 100  # good images for which the number of false alarms to expect is stated


@dataclass(frozen=True)
class Promise:
    """A threshold for a false-positive rate.

    value: an image whose score reaches it is called defective.
    asked, rate: the rate wanted, and the one that is promised: higher where there are too few images for it.
    images: number of good scores behind it.
    low, high: within which the true rate lies, with 95% confidence.
    of_next: false alarms among the next NEXT good images, from and to, with 95% confidence.
    more: images missing for the rate wanted.
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
        text = f"threshold {self.value:.4f} for {percent(self.rate)} false alarms, from {self.images} good images"
        text += f" (95% sure: {percent(self.low)} to {percent(self.high)}; of the next {NEXT} good ones "
        text += f"{self.of_next[0]} to {self.of_next[1]})"
        if self.more:
            text += f"; {percent(self.asked)} was asked for, which takes {self.more} good images more"
        return text


def promise(
    scores: Sequence[float],
    rate: float,
    parts: Sequence[int] | None = None,
    errors: Sequence[float] | float = 0.0,
    new_parts: bool = False,
) -> Promise:
    """The lowest threshold that promises a false-positive rate, or if there are too few images the lowest possible one.

    Args:
        scores: of good images, each as if it had never been seen, (n,).
        rate: the fraction of good images that may be called defective.
        parts: which part each image shows, (n,); by default each shows another one.
        errors: standard error of the logits of the scores, (n,), all of which are off together.
        new_parts: whether images to come show other parts than these.
    """
    from scipy.stats import betabinom  # a second that a command which sets no threshold need not wait

    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(values)
    allowed = max(0, math.floor(rate * (n + 1) + 1e-9) - 1)
    threshold = float(values[min(allowed, n - 1)]) + ROUNDING
    a, b = _spread(scores, threshold, allowed, parts, errors, _least_effect(scores, parts, new_parts))
    low, high = (float(betaincinv(a, b, tail)) for tail in _TAILS)
    first, last = (int(betabinom.ppf(tail, NEXT, a, b)) for tail in _TAILS)
    more = max(0, math.ceil(1 / rate - 1e-9) - 1 - n) if rate > 0 else 0
    return Promise(threshold, rate, max(rate, 1 / (n + 1)), n, low, high, (first, last), more)


def intervals(
    scores: Sequence[float],
    parts: Sequence[int] | None = None,
    errors: Sequence[float] | float = 0.0,
    new_parts: bool = False,
) -> list[tuple[float, float]]:
    """Within which the true rate lies, with 95% confidence, where 0, 1, ..., n - 1 of n good scores (n,) are alarms."""
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
    """The two parameters of the rate's Beta distribution, where ``alarms`` of the good scores are above a threshold."""
    n = len(scores)
    effect = design_effect(np.asarray(scores) >= threshold, np.arange(n) if parts is None else np.asarray(parts))
    effect = max(effect, least)
    effect += shift_effect(np.asarray(scores), threshold, np.asarray(errors))
    return (alarms + 1) / effect, (n - alarms) / effect


def _least_effect(scores: Sequence[float], parts: Sequence[int] | None, new_parts: bool) -> float:
    """The design effect that holds whatever the alarms show."""
    return effect_of_parts(logit(np.asarray(scores)), np.asarray(parts)) if new_parts and parts is not None else 1.0


def shift_effect(scores: np.ndarray, threshold: float, errors: np.ndarray) -> float:
    """What an error of all logits (n,) together adds to the variance of the share of alarms, as a design effect."""
    low, high = (float((logit(scores) + sign * errors >= logit(np.asarray(threshold))).mean()) for sign in (-1, 1))
    rate = (low + high) / 2
    return len(scores) * ((high - low) / 2) ** 2 / (rate * (1 - rate)) if 0 < rate < 1 else 0.0


def logit(scores: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores.astype(np.float64), 1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped))


def design_effect(alarms: np.ndarray, parts: np.ndarray) -> float:
    """How many times wider whole parts make the variance of the share of alarms: (n,) bool, (n,) -> at least 1."""
    n, rate = len(alarms), float(alarms.mean())
    if not 0 < rate < 1:
        return 1.0
    _, part_of = np.unique(parts, return_inverse=True)
    excess = np.bincount(part_of, alarms - rate)  # of every part
    return max(1.0, float((excess**2).sum()) / (n * rate * (1 - rate)))


def effect_of_parts(values: np.ndarray, parts: np.ndarray) -> float:
    """How many times wider whole parts make the variance of the mean of values: (n,), (n,) -> at least 1.

    1 + (m - 1) rho, with m images of a part (the mean over images) and rho the correlation of two of them, estimated by
    the analysis of variance. Source: Kish, Survey Sampling, 1965.
    """
    _, part_of, sizes = np.unique(parts, return_inverse=True, return_counts=True)
    n, groups = len(values), len(sizes)
    if not 1 < groups < n:
        return 1.0
    means = np.bincount(part_of, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (groups - 1)
    within = float(((values - means[part_of]) ** 2).sum()) / (n - groups)
    mean_size, size_of_an_image = (n - (sizes**2).sum() / n) / (groups - 1), float((sizes**2).sum()) / n
    total = between + (mean_size - 1) * within
    rho = max(0.0, (between - within) / total) if total > 0 else 0.0
    return 1 + (size_of_an_image - 1) * rho


def percent(rate: float) -> str:
    """A rate as people say it: 1%, 0.37%, 12%, and 0% for less than one in 20,000."""
    return f"{100 * rate:.2g}%" if 5e-5 <= rate < 0.1 else f"{100 * rate:.0f}%"


def best_point(good: Sequence[float], defective: Sequence[Sequence[float]], least: float) -> float:
    """The lowest threshold, at least ``least``, with the highest share found less the share of false alarms.

    ``least`` itself, unless another is better even if it lost one image more of each group: ten defective images, all
    of one kind, must not cost those of others for half a percent of false alarms.

    Args:
        good: scores of good images.
        defective: scores of defective images in groups that count alike, such as real and simulated ones.
    """
    values = np.sort(np.asarray(good, dtype=np.float64))
    candidates = np.unique([least, *(value + ROUNDING for value in values if value + ROUNDING > least)])
    alarms = 1 - np.searchsorted(values, candidates, side="left") / len(values)
    shares = [1 - np.searchsorted(np.sort(group), candidates, side="left") / len(group) for group in defective]
    gain = np.mean(shares, axis=0) - alarms
    gain[1:] -= np.mean([1 / len(group) for group in defective])
    return float(candidates[np.argmax(gain)])


def cross_validated(
    good: Sequence[float], defective: Sequence[float], simulated: Sequence[float], least: float, folds: int = 5
) -> tuple[float, float]:
    """What `best_point` is worth on images that it was not chosen by: share found of the defective, false alarms."""
    hits = alarms = 0
    folds = min(folds, len(defective), len(good))
    for fold in range(folds):
        kept = [[value for i, value in enumerate(values) if i % folds != fold] for values in (good, defective)]
        groups = [group for group in (kept[1], simulated) if len(group)]
        chosen = best_point(kept[0], groups, least) if groups and kept[0] else least
        hits += sum(value >= chosen for value in list(defective)[fold::folds])
        alarms += sum(value >= chosen for value in list(good)[fold::folds])
    return hits / len(defective), alarms / len(good)


FAR_OUT = 5.0  # robust deviations: of normally spread logits one image in three million lies farther out


def outliers(logits: np.ndarray) -> list[int]:
    """Which scores stand far outside: above the median by more than FAR_OUT robust deviations of the upper half.

    The deviation is 1.48 times the median distance of those above the median: the outliers themselves cannot move it.
    """
    middle = float(np.median(logits))
    above = logits[logits > middle] - middle
    if len(above) < 5:
        return []
    return np.flatnonzero(logits - middle > FAR_OUT * 1.4826 * float(np.median(above))).tolist()
