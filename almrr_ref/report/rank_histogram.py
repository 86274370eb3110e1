"""The histogram in which metrics.py pools pixels. Its bins follow the data: exact while possible, bounded always.

Uniform bins do not suit anomaly maps: a saturated softmax puts millions of pixels within 1e-6 of 0 and of 1, a distance
map has no upper end, an untrained network returns 0.5001 everywhere. Here every distinct value has its own bin until
there are too many. Then neighbours are joined, so that a bin holds about 1 in 15,000 of the pixels *above* it. Ranking
metrics need that resolution: precision at rank r is off by a bin's mass over r. The top stays exact.
"""

from collections.abc import Hashable, Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CAPACITY = 2**18  # bins; one column of counts then takes 2 MB
_PENDING = 2**20  # pixels gathered before they are sorted in
_CROWDED = 4  # a bin that receives more than this many times its mass at once is opened


class RankHistogram:
    """Count values in named columns over one shared set of bins, disjoint closed intervals [low, high] of values.

    Up to `capacity` >= 16 distinct values have bins of their own, and nothing is lost. Memory: 8 bytes * capacity *
    (3 + columns), and about 50 MB of work space.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        assert capacity >= 16, f"{capacity} bins are too few"
        self.capacity = capacity
        self._low, self._high, self._mass = np.empty((3, 0))  # each (bins,), ascending in value; mass of all columns
        self._columns: dict[Hashable, Array] = {}  # each (bins,)
        self._pending: list[tuple[Array, Mapping[Hashable, Array | None]]] = []
        self._pending_size = 0

    def add(self, values: Array, columns: Mapping[Hashable, Array | None]) -> None:
        """Add finite values (n,) to the named columns, each with weights (n,) or, for None, weight 1 each."""
        if all(weights is None for weights in columns.values()):
            values = np.sort(values)  # searching a table for sorted values is several times as fast
        self._pending.append((values, columns))
        self._pending_size += values.size
        if self._pending_size >= _PENDING:
            self._flush()

    def counts(self) -> dict[Hashable, Array]:
        """Return column -> weight per bin (bins,), bins in descending order of value."""
        self._flush()
        return {name: column[::-1] for name, column in self._columns.items()}

    def _flush(self) -> None:
        """Sort the pending values into the bins, and join bins where there are too many."""
        if not self._pending:
            return
        low, high, mass = self._with_bins_for(np.sort(np.concatenate([v for v, _ in self._pending]), kind="stable"))
        if low.size > self.capacity:
            first = _first_of_groups(mass, self.capacity // 2)
            low, high, mass = low[first], high[np.append(first[1:], low.size) - 1], np.add.reduceat(mass, first)
        moved = _bin_of(self._low, low)
        columns = {name: np.zeros(low.size) + np.bincount(moved, c, low.size) for name, c in self._columns.items()}
        for pending, pending_columns in self._pending:
            position = _bin_of(pending, low)
            for name, weights in pending_columns.items():
                columns[name] = columns.get(name, np.zeros(low.size)) + np.bincount(position, weights, low.size)
        self._low, self._high, self._mass, self._columns = low, high, mass, columns
        self._pending, self._pending_size = [], 0

    def _with_bins_for(self, values: Array) -> tuple[Array, Array, Array]:
        """Return low, high and mass of the bins once each sorted value (n,) outside all bins has one of its own."""
        distinct = values[np.append(True, values[1:] != values[:-1])[: values.size]]
        old_high = self._high
        if old_high.size:
            position = _bin_of(values, self._low)
            position = position[(position >= 0) & (values <= old_high[position])]
            # Where the stream has moved into a bin, the bin shrinks to a point and the new values get bins of their
            # own. Without this a late, narrow distribution would share a few old bins.
            crowded = np.bincount(position, minlength=old_high.size) > _CROWDED * self._mass
            old_high = np.where(crowded, self._low, old_high)
            position = _bin_of(distinct, self._low)
            distinct = distinct[(position < 0) | (distinct > old_high[position])]
        low = np.sort(np.concatenate([self._low, distinct]))
        high = np.sort(np.concatenate([old_high, distinct]))  # the intervals are disjoint: both ends sort alike
        mass = np.bincount(_bin_of(values, low), minlength=low.size).astype(np.float64)
        mass[_bin_of(self._low, low)] += self._mass
        return low, high, mass


def _bin_of(values: Array, low: Array) -> npt.NDArray[np.intp]:
    """Return the index of the last bin that starts at or below each value, -1 where none does."""
    return np.searchsorted(low, values, side="right") - 1


def _first_of_groups(mass: Array, bins: int) -> npt.NDArray[np.intp]:
    """Join neighbours into at most `bins` + 1 groups: mass (n,) ascending in value -> index of each group's first bin.

    group = floor(m log(1 + rank / m)) spans about 1/m of the mass above it; as long as rank << m it is the rank itself,
    hence exact. A bin's rank is taken at its middle: a heavy single value keeps a group of its own.
    """
    total, m = float(mass.sum()), float(bins)
    while m * np.log1p(total / m) > bins:
        m *= 0.98
    rank = total - np.cumsum(mass) + mass / 2
    group = np.floor(m * np.log1p(rank / m))
    return np.flatnonzero(np.append(True, group[1:] != group[:-1]))
