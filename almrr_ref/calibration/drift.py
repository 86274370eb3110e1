"""Whether good pictures still score as they did in calibration: four CUSUM charts of sequential normal scores.

What is judged good is compared with the good scores of calibration that lie below the threshold, and with those judged
good since, until the reference holds MOST. The rank of a new score in the reference is exactly uniform as long as
nothing has changed, whatever the scores' distribution and however few the calibration had; p = (rank - 1/2) / (n + 1)
gives two standard normal series, one for the location, probit(p), one for the spread, probit(|2 p - 1|). Each is summed
up and down less SLACK a picture, never below 0. A sum of LIMIT or more is a warning, which stands until the sum is back
at 0; while it stands the reference does not grow.

Both sides are cut at the same place, just below the threshold: given the good score that set it, those below it and the
new ones below it come from one distribution.

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
_SAID = {
    "higher": "score higher",
    "lower": "score lower",
    "wider": "spread wider",
    "narrower": "spread less",
}


class Drift:
    """The scores of good pictures, one after another -> warnings.

    Args:
        scores: of calibration's good images, as if they had never been seen; may be empty: then the first pictures that
            are judged good are the reference.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        self.reference: list[float] = []
        self.charts = dict.fromkeys(_SAID, 0.0)
        self.standing: list[str] = []  # warnings: keys of the charts
        self.begin(scores)

    def begin(self, scores: Sequence[float]) -> None:
        """Begin anew, by the scores of another calibration."""
        self._calibration, self.standing = list(scores), []
        self._threshold = ""  # the last, for a thread that adds: the next score begins

    @classmethod
    def of(cls, calibration: Mapping[str, Any] | None) -> "Drift":
        """By a checkpoint's record of its calibration; an exported network has none."""
        return cls((calibration or {}).get("good_scores", ()))

    def add(self, score: float, threshold: float) -> str:
        """Take up the score of a picture that was judged good; -> what there is to say, mostly nothing.

        Another threshold than the last begins anew.
        """
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
        self.standing = [n for n, sum in self.charts.items() if sum >= LIMIT or (n in before and sum > 0)]
        if not self.standing and n < MOST:
            insort(self.reference, score)
        if set(self.standing) - set(before):
            return self.said()
        return "drift: good pictures score as in calibration again" if before and not self.standing else ""

    def said(self) -> str:
        """The warnings that stand, in words."""
        kinds = " and ".join(_SAID[name] for name in self.standing)
        return f"drift: good pictures {kinds} than in calibration (by chance once in 50,000); look, or calibrate again"

    def _restart(self, threshold: float) -> None:
        self._threshold, self._cut = f"{threshold:.6g}", threshold - 1.5 * ROUNDING
        self.reference = sorted(score for score in self._calibration if score < self._cut)
        self.charts, self.standing = dict.fromkeys(_SAID, 0.0), []
