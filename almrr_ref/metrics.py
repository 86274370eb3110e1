"""The metrics of section 4.1, and AUPRO.

    image AUROC, AP   over all scores, 1 = defective
    pixel AUROC, AP   over all pixels of all images pooled, good images included; AP is scikit-learn's step sum
    AUPRO             for each threshold, the covered fraction of a component, averaged over all 8-connected components
                      of all masks, against the false-positive rate over all defect-free pixels of all images; the area
                      from 0 to 0.3, interpolated linearly at 0.3, divided by 0.3
    per type          the images of one defect type against the good images

What counts as what:
  * A good image without a mask is defect-free everywhere; a defective one counts for the image metrics only.
  * A mask is taken at its word: where it is empty, the pixels of a defective image are defect-free; where it is not, a
    good image has defect pixels. For the image metrics the label decides.
  * Pixels outside a region of interest do not count; components are those inside. The label stays the image's.
  * A metric that needs both classes is None where one is missing, AP too (it would be 1 for any ranking).

Source: the paper (AUROC, AP); Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", section 5.2 (AUPRO). Pixels
are counted in a RankHistogram: exact up to 262,144 distinct values, within 1e-4 beyond (measured: 4e-6). Whatever the
number of images, it takes 2 MB * (4 + 3 * defect types) and about 100 MB of work space.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from almrr_ref.report.rank_histogram import CAPACITY, Array, RankHistogram

METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
PRO_LIMIT = 0.3
COUNTED = "images good defective without_mask empty_masks good_with_defects normal_pixels defect_pixels components"
Map = npt.ArrayLike | torch.Tensor
Plane = npt.NDArray[np.bool_]


def auroc(normal: Array, defect: Array) -> float:
    """Area under the ROC curve of weights per bin, (n,) and (n,) in descending order of value; a bin is a tie."""
    defect_above = np.cumsum(defect) - defect
    return float(np.sum(normal * (defect_above + defect / 2)) / (normal.sum() * defect.sum()))


def average_precision(normal: Array, defect: Array) -> float:
    """Step sum of precision over recall of weights per bin, (n,) and (n,) in descending order of value."""
    occupied = (normal + defect) > 0
    normal, defect = normal[occupied], defect[occupied]
    true_positives = np.cumsum(defect)
    return float(np.sum(defect * true_positives / (true_positives + np.cumsum(normal))) / defect.sum())


def area_under_pro(normal: Array, overlap: Array, components: int) -> float:
    """Area under the per-region-overlap curve up to the false-positive rate PRO_LIMIT, divided by it.

    Args:
        normal: defect-free pixels per bin, (n,), in descending order of value.
        overlap: sum over the defect pixels in a bin of 1 / (size of the pixel's component), (n,).
        components: how many components there are in all, > 0.
    """
    rate = np.append(0.0, np.cumsum(normal) / normal.sum())
    pro = np.append(0.0, np.cumsum(overlap) / components)
    beyond = int(np.searchsorted(rate, PRO_LIMIT, side="right"))
    if beyond < rate.size:
        step = (PRO_LIMIT - rate[beyond - 1]) / (rate[beyond] - rate[beyond - 1])
        pro = np.append(pro[:beyond], pro[beyond - 1] + step * (pro[beyond] - pro[beyond - 1]))
        rate = np.append(rate[:beyond], PRO_LIMIT)
    return float(np.sum(np.diff(rate) * (pro[1:] + pro[:-1]) / 2) / PRO_LIMIT)


class AnomalyMetrics:
    """Accumulate anomaly maps, masks and scores image by image; `compute` may be called at any time."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._pixels = RankHistogram(capacity)
        self._scores: dict[str | None, list[float]] = {}  # by group: the defect type, or None for good
        self._components: Counter[str | None] = Counter()
        self._counts: Counter[str] = Counter()

    def update(
        self,
        anomaly_map: Map,
        mask: Map | None,
        score: float,
        label: int,
        defect_type: str = "defect",
        roi: Map | None = None,
    ) -> None:
        """Add one image.

        Args:
            anomaly_map, score: finite, larger is more anomalous; the map is (h, w) or (1, h, w).
            mask: the ground truth, defective where > 0.5, (h, w) or (1, h, w); None if there is none.
            label, defect_type: 1 defective, 0 good; the type is not used for a good image.
            roi: bool (h, w) or (1, h, w): pixels that count; None: all.
        Raises:
            ValueError: if a shape, the label or a value is not as above; nothing has been added then.
        """
        group = defect_type if label else None
        image = f"image {self._counts['images'] + 1} ({group or 'good'})"
        if label not in (0, 1):
            raise ValueError(f"the label of {image} is {label!r}; expected 0 or 1")
        if score is None or not np.isfinite(score):
            raise ValueError(f"the score of {image} is {score}; expected a finite number")
        values = _as_map(anomaly_map, f"anomaly map of {image}")
        truth = np.zeros(values.shape) if mask is None else _as_map(mask, f"mask of {image}")
        if truth.shape != values.shape:
            raise ValueError(f"the mask of {image} is {truth.shape}, its map {values.shape}; resize the mask first")
        counted = np.ones(values.shape) if roi is None else _as_map(roi, f"region of interest of {image}")
        if counted.shape != values.shape:
            raise ValueError(f"the region of interest of {image} is {counted.shape}, its map {values.shape}")
        if mask is None and label:
            self._counts["without_mask"] += 1
        else:
            self._add_pixels(group, values, truth > 0.5, counted > 0.5)
        self._scores.setdefault(group, []).append(float(score))
        self._counts.update(["images", "defective" if label else "good"])

    def _add_pixels(self, group: str | None, values: Array, defective: Plane, counted: Plane) -> None:
        """Count those values (h, w) of one image that are counted; its defective pixels (h, w) are known."""
        normal, defective = ~defective & counted, defective & counted
        self._pixels.add(values[normal], {(group, "normal"): None})
        self._counts["normal_pixels"] += int(np.count_nonzero(normal))
        if not defective.any():
            self._counts["empty_masks"] += group is not None
            return
        labels, components = ndimage.label(defective, structure=np.ones((3, 3)))
        labels = labels[defective]
        overlap = 1.0 / np.bincount(labels)[labels]
        self._pixels.add(values[defective], {(group, "defect"): None, (group, "overlap"): overlap})
        self._components[group] += components
        self._counts.update(components=components, defect_pixels=int(labels.size), good_with_defects=int(group is None))

    def compute(self) -> dict[str, Any]:
        """Return the metrics, overall and per defect type, as plain numbers that JSON can hold.

        Keys: METRICS (None where undefined), reasons (metric -> why), per_type (type -> the same and images), counts.
        """
        scores = RankHistogram(max(16, self._counts["images"]))  # a bin for each score: always exact
        for group, values in self._scores.items():
            scores.add(np.array(values), {(group, "score"): None})
        bins = self._pixels.counts() | scores.counts()
        types = sorted(name for name in self._scores if name is not None)
        per_type = {t: self._evaluate([t], [t], bins) | {"images": len(self._scores[t])} for t in types}
        counts = {name: self._counts[name] for name in COUNTED.split()}
        return self._evaluate(types, [*types, None], bins) | {"per_type": per_type, "counts": counts}

    def _evaluate(self, types: list[str], defects_of: list[str | None], bins: dict[Any, Array]) -> dict[str, Any]:
        """Evaluate some defect types against the good images; defect pixels are those of the groups `defects_of`."""

        def total(groups: Iterable[str | None], column: str) -> Array:
            columns = [bins[group, column] for group in groups if (group, column) in bins]
            return sum(columns, np.zeros(columns[0].size if columns else 0))

        metrics: dict[str, Any] = dict.fromkeys(METRICS) | {"reasons": {}}
        good, defective = total([None], "score"), total(types, "score")
        if good.any() and defective.any():
            metrics |= {"image_auroc": auroc(good, defective), "image_ap": average_precision(good, defective)}
        else:
            missing = "defective" if good.any() else "good"
            metrics["reasons"] |= dict.fromkeys(METRICS[:2], f"no {missing} image in the test part")
        normal, defect = total([None, *types], "normal"), total(defects_of, "defect")
        if normal.any() and defect.any():
            components = sum(self._components[group] for group in defects_of)
            metrics |= {"pixel_auroc": auroc(normal, defect), "pixel_ap": average_precision(normal, defect)}
            metrics["aupro"] = area_under_pro(normal, total(defects_of, "overlap"), components)
        else:
            missing = "defect-free pixel" if defect.any() else "defect pixel in any mask"
            metrics["reasons"] |= dict.fromkeys(METRICS[2:], f"no {missing} in the test part")
        return metrics


def anomaly_metrics(
    maps: Iterable[Map],
    masks: Iterable[Map | None] | None,
    scores: Iterable[float],
    labels: Iterable[int],
    defect_types: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Evaluate a whole test set at once: n maps, masks, scores and labels -> the dictionary of AnomalyMetrics.compute.

    Args:
        maps, scores, labels: n each, as for AnomalyMetrics.update; the maps may be one array (n, h, w) or (n, 1, h, w).
        masks: n masks, None for an image without one; or None: no image has a mask.
        defect_types: n names, of which those of good images do not matter; or None: one type, "defect".
    Raises:
        ValueError: if the numbers of entries disagree, or as AnomalyMetrics.update.
    """
    columns: list[list[Any]] = [list(maps), list(scores), list(labels)]
    columns.append([None] * len(columns[0]) if masks is None else list(masks))
    columns.append(["defect"] * len(columns[0]) if defect_types is None else list(defect_types))
    if len({len(column) for column in columns}) > 1:
        lengths = [len(column) for column in columns]
        raise ValueError(f"expected as many maps, scores, labels, masks and types; got {lengths}")
    metrics = AnomalyMetrics()
    for anomaly_map, score, label, mask, defect_type in zip(*columns):
        metrics.update(anomaly_map, mask, float(score), int(label), defect_type)
    return metrics.compute()


def _as_map(values: Map, name: str) -> Array:
    """Return (h, w) or (1, h, w) numbers as float64 (h, w); ValueError if the shape or a value is wrong."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"the {name} has shape {array.shape}; expected (h, w) or (1, h, w)")
    if not np.isfinite(array).all():
        raise ValueError(f"the {name} holds NaN or infinite values; expected finite numbers")
    return array
