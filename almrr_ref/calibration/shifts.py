"""What sets scores of images that the network was trained on apart from those of unseen ones, by images kept aside.

Source: ours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from almrr_ref.calibration.thresholds import logit

FEWEST = 10  # images kept aside that tell anything
SIGNIFICANT = 0.05
DRAWS = 200  # of a bootstrap
Shift = tuple[float, float]  # of logits, and its standard error
NO_SHIFT = 0.0, 0.0


def as_unseen(scores: Sequence[float], trained: Sequence[bool]) -> Shift:
    """Scores (n,), and which images were trained on -> what to add to the logits of these, to be as if none were.

    Where those kept aside score higher than chance explains (Mann-Whitney), it is the difference of the medians. With
    fewer than FEWEST kept aside nothing can be told, and nothing is added.
    """
    from scipy.stats import mannwhitneyu  # as in thresholds.py

    logits, known = logit(np.asarray(scores)), np.asarray(trained, dtype=bool)
    if min(known.sum(), (~known).sum()) < FEWEST:
        return NO_SHIFT
    if mannwhitneyu(logits[~known], logits[known], alternative="greater").pvalue >= SIGNIFICANT:
        return NO_SHIFT

    def difference(aside: np.ndarray, trained_on: np.ndarray) -> float:
        return max(0.0, float(np.median(aside) - np.median(trained_on)))

    return difference(logits[~known], logits[known]), bootstrap_error(difference, logits[~known], logits[known])


def bootstrap_error(estimate: Callable[..., float], *samples: np.ndarray) -> float:
    """The standard error of an estimate from samples, (n, ...) each, by drawing each again DRAWS times."""
    rng = np.random.default_rng(0)
    draws = ([values[rng.integers(len(values), size=len(values))] for values in samples] for _ in range(DRAWS))
    return float(np.std([estimate(*drawn) for drawn in draws]))


def shifted(scores: Sequence[float], moved: Sequence[bool], shift: float) -> list[float]:
    """Add to the logits of some of the scores."""
    higher = 1 / (1 + np.exp(-(logit(np.asarray(scores)) + shift)))
    return [float(new) if move and shift else old for old, new, move in zip(scores, higher, moved)]
