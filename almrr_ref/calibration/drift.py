"""Whether good pictures still score as they did in calibration: four CUSUM charts of sequential normal scores.

The score of a picture judged good is ranked in a reference: the good scores of calibration below the threshold, and
later scores judged good, until the reference holds MOST. As long as nothing has changed the rank is exactly uniform,
whatever the distribution of the scores and however few the calibration had. p = (rank - 1/2) / (n + 1) gives two
standard normal series: probit(p) for the location, probit(|2 p - 1|) for the spread. Each is summed upwards and
downwards, less SLACK per picture, never below 0. A sum of LIMIT or more is a warning, which lasts until the sum is back
at 0; meanwhile the reference does not grow.

Calibration's scores and new ones are cut at the same place, just below the threshold: given the good score that set it,
both come from one distribution below it.

By simulation: 0.1 to 0.3 false warnings in 10,000 pictures in control; a shift by one standard deviation is found after
25 to 45 pictures at the median, and within 200 in all of 60 streams where the reference held 100 scores when it came.
With 50 that holds for four of five, with 30 for a third: the reference takes up the shifted scores too soon.

Source: Page 1954 (CUSUM); sequential ranks: Bakir & Reynolds 1979, McDonald 1990.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from almrr_ref.calibration.thresholds import ROUNDING

MOST = 1000  # scores of the reference
SLACK, LIMIT = 0.25, 20.0  # in standard deviations: of one picture, of the sum
_PROBIT = NormalDist().inv_cdf
_SAID = {"higher": "score higher", "lower": "score lower", "wider": "spread wider", "narrower": "spread less"}


class Drift:
    """The scores of good pictures, one after another -> warnings.

    Args:
        scores: of calibration's good images, judged as new ones. If there are none, the first pictures that are judged
            good are the reference.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        self.reference: list[float] = []
        self.charts = dict.fromkeys(_SAID, 0.0)
        self.standing: list[str] = []  # warnings: keys of the charts
        self.begin(scores)

    def begin(self, scores: Sequence[float]) -> None:
        """Start again with the scores of another calibration."""
        self._calibration, self.standing = list(scores), []
        self._threshold = ""  # so the next `add`, in whichever thread, restarts the charts

    @classmethod
    def of(cls, calibration: Mapping[str, Any] | None) -> "Drift":
        """From a checkpoint's calibration record; without one (an exported network) the reference begins empty."""
        return cls((calibration or {}).get("good_scores", ()))

    def add(self, score: float, threshold: float) -> str:
        """Add the score of a picture judged good; -> a message, mostly "". A changed threshold restarts the charts."""
        if f"{threshold:.6g}" != self._threshold:
            self._restart(threshold)
        if score >= self._cut:
            return ""
        n, below = len(self.reference), bisect_left(self.reference, score)
        ties = bisect_right(self.reference, score) - below
        p = (below + (ties + 1) / 2) / (n + 1)
        smallest = 0.5 / (n + 1)
        location, spread = _PROBIT(p), _PROBIT(min(max(abs(2 * p - 1), smallest), 1 - smallest))
        steps = {"higher": location, "lower": -location, "wider": spread, "narrower": -spread}
        for name, step in steps.items():
            self.charts[name] = min(2 * LIMIT, max(0.0, self.charts[name] + step - SLACK))
        before = self.standing
        self.standing = [name for name, sum in self.charts.items() if sum >= LIMIT or (name in before and sum > 0)]
        if not self.standing and n < MOST:
            insort(self.reference, score)
        if set(self.standing) - set(before):
            return self.said()
        return "drift: good pictures score as in calibration again" if before and not self.standing else ""

    def said(self) -> str:
        """The present warnings, in words."""
        kinds = " and ".join(_SAID[name] for name in self.standing)
        return f"drift: good pictures {kinds} than in calibration (by chance once in 50,000); look, or calibrate again"

    def _restart(self, threshold: float) -> None:
        self._threshold, self._cut = f"{threshold:.6g}", threshold - 1.5 * ROUNDING
        self.reference = sorted(score for score in self._calibration if score < self._cut)
        self.charts, self.standing = dict.fromkeys(_SAID, 0.0), []
