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


def as_unseen(scores: Sequence[float], trained: Sequence[bool], parts: Sequence[int] | None = None) -> Shift:
    """Scores (n,), and which images were trained on -> what to add to the logits of these, to be as if none were.

    Where those kept aside score higher than chance explains (Mann-Whitney), it is the difference of the medians. With
    fewer than FEWEST kept aside nothing can be told, and nothing is added.

    Args:
        parts: which part each image shows, (n,); by default each shows another one.
    """
    from scipy.stats import mannwhitneyu  # as in thresholds.py

    logits, known = logit(np.asarray(scores)), np.asarray(trained, dtype=bool)
    part_of = np.arange(len(logits)) if parts is None else np.asarray(parts)
    if min(known.sum(), (~known).sum()) < FEWEST:
        return NO_SHIFT
    if mannwhitneyu(logits[~known], logits[known], alternative="greater").pvalue >= SIGNIFICANT:
        return NO_SHIFT

    def difference(aside: np.ndarray, trained_on: np.ndarray) -> float:
        return max(0.0, float(np.median(aside) - np.median(trained_on)))

    halves = [[logits[chosen & (part_of == part)] for part in np.unique(part_of[chosen])] for chosen in (~known, known)]
    return difference(logits[~known], logits[known]), bootstrap_error(difference, *halves)


def bootstrap_error(estimate: Callable[..., float], *samples: list[np.ndarray]) -> float:
    """The standard error of an estimate from samples of images, part by part: parts are drawn again DRAWS times.

    Images of one part are alike, so to draw single ones would say that more is known than is.
    """
    rng = np.random.default_rng(0)
    draws = (
        [np.concatenate([sample[i] for i in rng.integers(len(sample), size=len(sample))]) for sample in samples]
        for _ in range(DRAWS)
    )
    return float(np.std([estimate(*drawn) for drawn in draws]))


def shifted(scores: Sequence[float], moved: Sequence[bool], shift: float) -> list[float]:
    """Add to the logits of some of the scores."""
    higher = 1 / (1 + np.exp(-(logit(np.asarray(scores)) + shift)))
    return [float(new) if move and shift else old for old, new, move in zip(scores, higher, moved)]
