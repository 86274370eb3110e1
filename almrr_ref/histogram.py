"""A histogram of pixel values whose bins follow the data: exact while it can be, bounded in memory always.

Source: own; the purpose is field-notes.md, "Metric definitions" (pooled pixel metrics in constant memory). Uniform bins
fail where anomaly maps live: a saturated softmax puts millions of pixels within 1e-6 of 0 and of 1, a distance map has
no upper end, an untrained network answers 0.5001 everywhere. Here every distinct value has its own bin until there are
too many; then neighbours are joined so that a bin holds a small share (about 1 in 15,000) of the pixels *above* it.
Ranking metrics need that resolution: precision at rank r is off by a bin's mass over r, and the top stays exact.
"""

from collections.abc import Hashable, Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CAPACITY = 2**18  # bins; one column of counts then takes 2 MB
_PENDING = 2**20  # pixels gathered before they are sorted in
_CROWDED = 4  # a bin that receives more than this many times its mass at once is opened


class RankHistogram:
    """Count values in named columns over one shared set of bins.

    Bins are disjoint closed intervals [low, high] of values seen. While no more than `capacity` distinct values came,
    each has its own bin and nothing is lost. Memory: 8 bytes * capacity * (3 + columns), and about 50 MB of work space.

    Args:
        capacity: largest number of bins, >= 16.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 16:
            raise ValueError(f"capacity is {capacity}; a histogram needs at least 16 bins")
        self.capacity = capacity
        self._low = np.empty(0)  # (bins,), ascending
        self._high = np.empty(0)  # (bins,), ascending
        self._mass = np.empty(0)  # (bins,), values of all columns together
        self._columns: dict[Hashable, Array] = {}
        self._pending: list[tuple[Array, Mapping[Hashable, Array | None]]] = []
        self._pending_values = 0

    def add(self, values: Array, columns: Mapping[Hashable, Array | None]) -> None:
        """Add finite values (n,) to the named columns, each with weights (n,) or, for None, weight 1 each."""
        if all(weights is None for weights in columns.values()):
            values = np.sort(values)  # searching a table for sorted values is several times as fast
        self._pending.append((values, columns))
        self._pending_values += values.size
        if self._pending_values >= _PENDING:
            self._flush()

    def counts(self) -> dict[Hashable, Array]:
        """Return column -> weight per bin (bins,), bins in descending order of value."""
        self._flush()
        return {name: column[::-1] for name, column in self._columns.items()}

    def _flush(self) -> None:
        """Sort the pending values into the bins, and join bins where there are too many."""
        if not self._pending:
            return
        values = np.sort(np.concatenate([chunk for chunk, _ in self._pending]), kind="stable")
        low, high, mass = self._with_bins_for(values)
        if low.size > self.capacity:
            first = _bins_to_start(mass, self.capacity // 2)
            low, high, mass = low[first], high[np.append(first[1:], low.size) - 1], np.add.reduceat(mass, first)
        moved = _bin_of(self._low, low)
        names = dict.fromkeys([*self._columns, *(name for _, columns in self._pending for name in columns)])
        table = {name: np.zeros(low.size) for name in names}
        for name, column in self._columns.items():
            table[name] += np.bincount(moved, column, low.size)
        for chunk, columns in self._pending:
            position = _bin_of(chunk, low)
            for name, weights in columns.items():
                table[name] += np.bincount(position, weights, low.size)
        self._low, self._high, self._mass, self._columns = low, high, mass, table
        self._pending, self._pending_values = [], 0

    def _with_bins_for(self, values: Array) -> tuple[Array, Array, Array]:
        """Return low, high and mass of the bins once each sorted value (n,) outside all bins has one of its own."""
        distinct = values[np.append(True, values[1:] != values[:-1])] if values.size else values
        old_low, old_high = self._low, self._high
        if old_low.size:
            position = _bin_of(values, old_low)
            position = position[(position >= 0) & (values <= old_high[position])]
            # Where the stream has moved into a bin, what was there is little by now: it shrinks to a point, and the
            # new values get bins of their own. Without this a late, narrow distribution would share a few old bins.
            crowded = np.bincount(position, minlength=old_low.size) > _CROWDED * self._mass
            old_high = np.where(crowded, old_low, old_high)
            position = _bin_of(distinct, old_low)
            distinct = distinct[(position < 0) | (distinct > old_high[position])]
        # The intervals are disjoint, so their ends sort alike.
        low = np.sort(np.concatenate([old_low, distinct]))
        high = np.sort(np.concatenate([old_high, distinct]))
        mass = np.bincount(_bin_of(values, low), minlength=low.size).astype(np.float64)
        mass[_bin_of(self._low, low)] += self._mass
        return low, high, mass


def _bin_of(values: Array, low: Array) -> npt.NDArray[np.intp]:
    """Return the index of the last bin that starts at or below each value, -1 where none does."""
    return np.searchsorted(low, values, side="right") - 1


def _bins_to_start(mass: Array, bins: int) -> npt.NDArray[np.intp]:
    """Choose at most `bins` + 1 groups of neighbours: mass (n,) ascending in value -> index of each group's first bin.

    A group spans about 1/m of the mass above it: group = floor(m log(1 + rank / m)), which is the rank itself, hence
    exact, as long as rank << m. A bin's rank is taken at its middle: a heavy single value keeps a group of its own.
    """
    total = float(mass.sum())
    m = float(bins)
    while m * np.log1p(total / m) > bins:
        m *= 0.98
    rank = total - np.cumsum(mass) + mass / 2
    group = np.floor(m * np.log1p(rank / m))
    return np.flatnonzero(np.append(True, group[1:] != group[:-1]))
