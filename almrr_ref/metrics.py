"""Image AUROC and AP, pixel AUROC and AP, AUPRO at 0.3: streaming, in constant memory for pixels.

Source: paper section 4.2 (AUROC, AP); Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset" (AUPRO).
Definitions, as in field-notes.md:

    image AUROC, AP   over all scores, 1 = defective
    pixel AUROC, AP   over all pixels of all images pooled, good images included; AP is scikit-learn's step sum
    AUPRO             per threshold the mean, over ALL 8-connected components of all masks, of the covered share of the
                      component, against the false-positive rate over all defect-free pixels of all images; integrated
                      from 0 to 0.3 with linear interpolation at 0.3, divided by 0.3
    per type          the images of one defect type against the good images (its pixels and the good images' pixels)

What counts as what:
  * A good image without a mask is defect-free everywhere.
  * A defective image without a mask (None) counts for the image metrics only; `without_mask` counts such images.
  * A mask is taken at its word: a defective image whose mask is empty counts as defective for the image metrics, and
    its pixels are defect-free (what pooling all masks amounts to); `empty_masks` counts such images. A good image whose
    mask is not empty has defect pixels in the overall pixel metrics; `good_with_defects` counts such images.
  * A metric that needs both classes is None where one is missing, AP too (it would be 1 for any ranking).

Deviation: none in the definitions. Pixels go through histogram.RankHistogram: exact up to 262,144 distinct values,
within 1e-4 beyond (measured: 4e-6 at worst). Memory: 2 MB * (4 + 3 * defect types) and about 100 MB of work space,
whatever the number of images; the image scores take about 30 bytes an image.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from almrr_ref.histogram import CAPACITY, RankHistogram

FPR_LIMIT = 0.3
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")

Array = npt.NDArray[np.float64]
Map = npt.ArrayLike | torch.Tensor
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def auroc(normal: Array, defect: Array) -> float:
    """Area under the ROC curve of weights per bin, (n,) and (n,) in descending order of value; a bin is a tie."""
    found_before = np.cumsum(defect) - defect
    return float(np.sum(normal * (found_before + defect / 2)) / (normal.sum() * defect.sum()))


def average_precision(normal: Array, defect: Array) -> float:
    """Step sum of precision over recall of weights per bin, (n,) and (n,) in descending order of value."""
    occupied = (normal + defect) > 0
    normal, defect = normal[occupied], defect[occupied]
    found = np.cumsum(defect)
    return float(np.sum(defect * found / (found + np.cumsum(normal))) / defect.sum())


def area_under_pro(normal: Array, overlap: Array, components: int, limit: float = FPR_LIMIT) -> float:
    """Normalised area under the per-region-overlap curve up to a false-positive rate.

    Args:
        normal: defect-free pixels per bin, (n,), in descending order of value.
        overlap: sum over the defect pixels in a bin of 1 / (size of the pixel's component), (n,).
        components: how many components there are in all, > 0.
        limit: the false-positive rate to integrate to, in (0, 1].
    Source: Bergmann et al. 2021, section 5.2; field-notes.md.
    """
    rate = np.append(0.0, np.cumsum(normal) / normal.sum())
    pro = np.append(0.0, np.cumsum(overlap) / components)
    end = int(np.searchsorted(rate, limit, side="right"))  # the first point beyond the limit
    if end < rate.size:
        step = (limit - rate[end - 1]) / (rate[end] - rate[end - 1])
        pro = np.append(pro[:end], pro[end - 1] + step * (pro[end] - pro[end - 1]))
        rate = np.append(rate[:end], limit)
    return float(np.sum(np.diff(rate) * (pro[1:] + pro[:-1]) / 2) / limit)


class AnomalyMetrics:
    """Accumulate anomaly maps, masks and scores image by image; `compute` may be called at any time.

    Args:
        capacity: bins of the pixel histogram; the default is right but for tests.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._pixels = RankHistogram(capacity)
        self._scores: dict[str | None, list[float]] = {None: []}  # defect type -> scores; None is good
        self._components: Counter[str | None] = Counter()
        self._counts: Counter[str] = Counter()

    def update(self, anomaly_map: Map, mask: Map | None, score: float, label: int, defect_type: str = "defect") -> None:
        """Add one image.

        Args:
            anomaly_map: finite, larger is more anomalous, (h, w) or (1, h, w).
            mask: the ground truth, defective where > 0.5, (h, w) or (1, h, w); None: unknown if the image is defective,
                defect-free if it is good.
            score: finite, larger is more anomalous.
            label: 1 defective, 0 good.
            defect_type: the name of a defective image's group; not used for a good image.
        Raises:
            ValueError: if a shape, the label or a value is not as above; nothing has been added then.
        """
        which = f"image {self._counts['images'] + 1} ({defect_type if label else 'good'})"
        if label not in (0, 1):
            raise ValueError(f"the label of image {self._counts['images'] + 1} is {label!r}; expected 0 or 1")
        if not np.isfinite(score):
            raise ValueError(f"the score of {which} is {score}; expected a finite number")
        group = defect_type if label else None
        if mask is not None or not label:
            self._add_pixels(group, anomaly_map, mask, which)
        else:
            _as_map(anomaly_map, f"anomaly map of {which}")
            self._counts["without_mask"] += 1
        self._scores.setdefault(group, []).append(float(score))
        self._counts["images"] += 1

    def _add_pixels(self, group: str | None, anomaly_map: Map, mask: Map | None, which: str) -> None:
        """Add the pixels of one image whose truth is known."""
        values = _as_map(anomaly_map, f"anomaly map of {which}")
        truth = np.zeros(values.shape) if mask is None else _as_map(mask, f"mask of {which}")
        if truth.shape != values.shape:
            raise ValueError(f"the mask of {which} is {truth.shape}, its map {values.shape}; resize the mask first")
        defective = truth > 0.5
        self._pixels.add(values[~defective], {(group, "normal"): None})
        self._counts["normal_pixels"] += int(np.count_nonzero(~defective))
        if not defective.any():
            self._counts["empty_masks"] += group is not None
            return
        labels, components = ndimage.label(defective, structure=_EIGHT_NEIGHBOURS)
        labels = labels[defective]
        share = 1.0 / np.bincount(labels)[labels]
        self._pixels.add(values[defective], {(group, "defect"): None, (group, "overlap"): share})
        self._components[group] += components
        self._counts["defect_pixels"] += int(labels.size)
        self._counts["good_with_defects"] += group is None

    def compute(self) -> dict[str, Any]:
        """Return the metrics, overall and per defect type, as plain numbers that JSON can hold.

        Keys: image_auroc, image_ap, pixel_auroc, pixel_ap, aupro (None where undefined), reasons (metric -> why it is
        None), per_type (type -> the same five, reasons, images), counts.
        """
        pixels = self._pixels.counts()
        types = sorted(name for name in self._scores if name is not None)
        defective = [score for name in types for score in self._scores[name]]
        result = self._evaluate([*types, None], [None, *types], defective, pixels)
        result["per_type"] = {
            name: self._evaluate([name], [None, name], self._scores[name], pixels) | {"images": len(self._scores[name])}
            for name in types
        }
        names = ("without_mask", "empty_masks", "good_with_defects", "normal_pixels", "defect_pixels")
        counts = {"images": self._counts["images"], "good": len(self._scores[None]), "defective": len(defective)}
        counts |= {name: self._counts[name] for name in names} | {"components": self._components.total()}
        return result | {"counts": counts}

    def _evaluate(
        self,
        defects_of: Sequence[str | None],
        pixels_of: Sequence[str | None],
        defective_scores: Sequence[float],
        pixels: dict[Hashable, Array],
    ) -> dict[str, Any]:
        """Evaluate one selection: the defect pixels of some groups, the defect-free ones of some, and their scores."""
        good_scores = self._scores[None]
        metrics: dict[str, Any] = dict.fromkeys(METRICS)
        reasons: dict[str, str] = {}
        if good_scores and defective_scores:
            normal, defect = _score_bins(good_scores, defective_scores)
            metrics |= {"image_auroc": auroc(normal, defect), "image_ap": average_precision(normal, defect)}
        else:
            missing = "defective" if good_scores else "good"
            reasons |= dict.fromkeys(("image_auroc", "image_ap"), f"no {missing} image in the test part")
        normal = _total(pixels, [(group, "normal") for group in pixels_of])
        defect = _total(pixels, [(group, "defect") for group in defects_of])
        overlap = _total(pixels, [(group, "overlap") for group in defects_of])
        if normal.any() and defect.any():
            components = sum(self._components[group] for group in defects_of)
            metrics |= {"pixel_auroc": auroc(normal, defect), "pixel_ap": average_precision(normal, defect)}
            metrics |= {"aupro": area_under_pro(normal, overlap, components)}
        else:
            missing = "defect-free pixel" if defect.any() else "defect pixel in any mask"
            reasons |= dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"), f"no {missing} in the test part")
        return metrics | {"reasons": reasons}


def anomaly_metrics(
    maps: Iterable[Map],
    masks: Iterable[Map | None] | None,
    scores: Iterable[float],
    labels: Iterable[int],
    defect_types: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Evaluate a whole test set at once: n maps, masks, scores and labels -> the dictionary of AnomalyMetrics.compute.

    Args:
        maps: n maps, (h, w) or (1, h, w) each; also one array (n, h, w) or (n, 1, h, w).
        masks: n masks of the same sizes, or None where there is none; None: no image has a mask.
        scores: n finite scores.
        labels: n labels, 1 defective, 0 good.
        defect_types: n names; only those of defective images matter. None: one type, "defect".
    Raises:
        ValueError: if the numbers of entries disagree, or as AnomalyMetrics.update.
    """
    columns: list[list[Any]] = [list(maps), list(scores), list(labels)]
    columns.append([None] * len(columns[0]) if masks is None else list(masks))
    columns.append(["defect"] * len(columns[0]) if defect_types is None else list(defect_types))
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            "expected one score, label, mask and type for each map, came {} maps, {} scores, {} labels, {} masks, "
            "{} types".format(*lengths)
        )
    metrics = AnomalyMetrics()
    for anomaly_map, score, label, mask, defect_type in zip(*columns, strict=True):
        metrics.update(anomaly_map, mask, float(score), int(label), defect_type)
    return metrics.compute()


def _as_map(values: Map, name: str) -> Array:
    """Return (h, w) or (1, h, w) numbers as float64 (h, w); ValueError if the shape or a value is wrong."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"the {name} has shape {array.shape}; expected (h, w) or (1, h, w)")
    if not np.isfinite(array).all():
        raise ValueError(f"the {name} holds NaN or infinite values; expected finite numbers")
    return array


def _score_bins(good: Sequence[float], defective: Sequence[float]) -> tuple[Array, Array]:
    """Count scores of good and of defective images per distinct score, in descending order: two arrays (n,)."""
    values, position = np.unique(np.array([*good, *defective]), return_inverse=True)
    counts = (np.bincount(part, minlength=values.size) for part in np.split(position, [len(good)]))
    normal, defect = (count[::-1].astype(np.float64) for count in counts)
    return normal, defect


def _total(columns: dict[Hashable, Array], names: Iterable[Hashable]) -> Array:
    """Sum the named columns (n,); a name that is absent counts as zeros."""
    size = next((column.size for column in columns.values()), 0)
    return sum((columns[name] for name in names if name in columns), np.zeros(size))
