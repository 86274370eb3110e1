"""How much lower images that the network was trained on score than unseen ones, measured by the images kept aside.

Source: ours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from almrr_ref.report.result import logit

FEWEST = 10  # images kept aside, and images trained on, for a comparison
SIGNIFICANT = 0.05  # largest p-value at which a shift is assumed
DRAWS = 200  # of a bootstrap
Shift = tuple[float, float]  # of logits, and its standard error
NO_SHIFT = 0.0, 0.0


def training_shift(scores: Sequence[float], trained: Sequence[bool], parts: Sequence[int] | None = None) -> Shift:
    """Scores (n,), and which images were trained on -> the shift that makes these images' logits like unseen ones'.

    It is the difference of the medians where the images kept aside score higher than chance explains (Mann-Whitney),
    else 0; also 0 with fewer than FEWEST images on either side.

    Args:
        parts: which part each image shows, (n,); by default each shows another one.
    """
    from scipy.stats import mannwhitneyu  # slow to import, as in thresholds.py

    logits, known = logit(np.asarray(scores)), np.asarray(trained, dtype=bool)
    part_of = np.arange(len(logits)) if parts is None else np.asarray(parts)
    if min(known.sum(), (~known).sum()) < FEWEST:
        return NO_SHIFT
    if mannwhitneyu(logits[~known], logits[known], alternative="greater").pvalue >= SIGNIFICANT:
        return NO_SHIFT

    def difference(aside: np.ndarray, trained_on: np.ndarray) -> float:
        return max(0.0, float(np.median(aside) - np.median(trained_on)))

    samples = [[logits[side & (part_of == part)] for part in np.unique(part_of[side])] for side in (~known, known)]
    return difference(logits[~known], logits[known]), bootstrap_error(difference, *samples)


def bootstrap_error(estimate: Callable[..., float], *samples: list[np.ndarray]) -> float:
    """The standard error of an estimate from samples, each a list of parts (images,): whole parts are drawn again.

    Images of one part are alike, so drawing single images would give too small an error.
    """
    rng = np.random.default_rng(0)
    draws = (
        [np.concatenate([sample[i] for i in rng.integers(len(sample), size=len(sample))]) for sample in samples]
        for _ in range(DRAWS)
    )
    return float(np.std([estimate(*drawn) for drawn in draws]))


def shifted(scores: Sequence[float], trained: Sequence[bool], shift: float) -> list[float]:
    """Add a shift to the logits of the scores of images trained on."""
    higher = 1 / (1 + np.exp(-(logit(np.asarray(scores)) + shift)))
    return [float(new) if known and shift else old for old, new, known in zip(scores, higher, trained)]
