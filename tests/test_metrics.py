"""Metrics against scikit-learn on pooled pixels, AUPRO against a brute-force loop over thresholds and components."""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, special
from sklearn.metrics import average_precision_score, roc_auc_score

from almrr_ref.evaluate import print_metrics
from almrr_ref.metrics import METRICS, AnomalyMetrics, anomaly_metrics

Arrays = list[np.ndarray]


def brute_force_aupro(maps: Arrays, masks: Arrays, limit: float = 0.3) -> float:
    """Walk over all distinct thresholds; threshold every map at each; integrate to the limit and divide by it."""
    regions = []
    for values, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(values, labels == number) for number in range(1, count + 1)]
    normal = np.concatenate([values[mask == 0] for values, mask in zip(maps, masks, strict=True)])
    points = [(0.0, 0.0)]
    for threshold in sorted(set(np.concatenate([values.ravel() for values in maps]).tolist()), reverse=True):
        overlap = np.mean([np.mean(values[region] >= threshold) for values, region in regions])
        points.append((float(np.mean(normal >= threshold)), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_set(seed: int, count: int = 6, shape: tuple[int, int] = (9, 11)) -> tuple[Arrays, Arrays, list[int]]:
    """Noise maps, raised by 1 on the masks; every third image good; masks with touching corners and single pixels."""
    generator = np.random.default_rng(seed)
    masks = [(generator.random(shape) < 0.08 * (index % 3 > 0)).astype(np.uint8) for index in range(count)]
    for mask in masks[1::3]:
        mask[2:7, 3:9] = 1
    maps = [generator.normal(size=shape) + mask for mask in masks]
    return maps, masks, [int(mask.any()) for mask in masks]


def expect_pixel_metrics(result: dict, maps: Arrays, masks: Arrays, tolerance: float) -> None:
    truth, values = (np.concatenate([array.ravel() for array in arrays]) for arrays in (masks, maps))
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=tolerance)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(truth, values), abs=tolerance)


def streamed(maps: Arrays, masks: Arrays, capacity: int, flush_every: int = 1) -> dict:
    """Metrics of maps that are sorted into the bins after every image, the hardest case, or every few images."""
    metrics = AnomalyMetrics(capacity)
    for index, (values, mask) in enumerate(zip(maps, masks, strict=True), start=1):
        metrics.update(values, mask, 0.0, int(mask.any()))
        if index % flush_every == 0:
            metrics._pixels._flush()
    return metrics.compute()


@pytest.mark.parametrize("seed", range(4))
def test_small_sets_agree_exactly_with_the_oracles(seed: int) -> None:
    maps, masks, labels = random_set(seed)
    maps = [np.round(values * 8) / 8 for values in maps] if seed % 2 else maps  # odd seeds: heavy ties
    scores = [float(np.round(values.max(), 1)) for values in maps]
    result = anomaly_metrics(maps, masks, scores, labels)
    expect_pixel_metrics(result, maps, masks, 1e-12)
    assert result["aupro"] == pytest.approx(brute_force_aupro(maps, masks), abs=1e-12)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert result["reasons"] == {}


DISTRIBUTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saturated near 0 and 1": lambda z: special.expit(8 * z).astype(np.float32),
    "around 0.5": lambda z: (0.5 + 1e-4 * z).astype(np.float32),
    "distances up to 1e6": lambda z: np.minimum(np.exp(3 * z), 1e6),
    "constant": lambda z: np.full_like(z, 0.5),
}


def narrowing_set() -> tuple[Arrays, Arrays]:
    """Three wide maps, for which the bins are made, then narrow ones."""
    generator = np.random.default_rng(1)
    masks = [(generator.random((64, 64)) < 0.02).astype(np.uint8) for _ in range(12)]
    narrow = [0.5 + 1e-5 * (generator.normal(size=mask.shape) + mask) for mask in masks]
    return [10 ** generator.uniform(-7, 0, mask.shape) if i < 3 else narrow[i] for i, mask in enumerate(masks)], masks


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_more_values_than_bins_stay_within_1e_4(kind: str) -> None:
    generator = np.random.default_rng(7)
    masks = [np.zeros((64, 72), np.uint8) for _ in range(12)]
    for mask in masks[::2]:
        y, x = generator.integers(0, 50, 2)
        mask[y : y + 11, x : x + 14] = 1
    masks[1][5, 9] = 1  # a defect of one pixel
    maps = [DISTRIBUTIONS[kind](generator.normal(size=mask.shape) + 1.5 * mask) for mask in masks]
    coarse, exact = streamed(maps, masks, 2**13), streamed(maps, masks, 2**18)
    expect_pixel_metrics(exact, maps, masks, 1e-9)
    expect_pixel_metrics(coarse, maps, masks, 1e-4)
    assert coarse["aupro"] == pytest.approx(exact["aupro"], abs=1e-4)


def test_a_late_narrow_distribution_keeps_its_accuracy() -> None:
    expect_pixel_metrics(streamed(*narrowing_set(), 2**12, flush_every=3), *narrowing_set(), 1e-4)


def test_memory_is_bounded_however_many_images_come() -> None:
    metrics, generator = AnomalyMetrics(capacity=2**12), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(150):
        values = generator.normal(size=(150, 150))
        metrics.update(values, values > 2.5, 0.0, 1)
    assert tracemalloc.get_traced_memory()[0] < 100 * values.nbytes  # the pixels themselves are not kept
    tracemalloc.stop()
    assert metrics._pixels._low.size <= 2**12


def test_per_type_metrics_set_the_type_against_the_good_images() -> None:
    maps, masks, labels = random_set(2, count=9)
    scores = [float(values.max()) for values in maps]
    types = ["good" if not label else "hole" if index % 3 == 1 else "scratch" for index, label in enumerate(labels)]
    result = anomaly_metrics(maps, masks, scores, labels, types)
    assert list(result["per_type"]) == ["hole", "scratch"]
    for name, metrics in result["per_type"].items():
        chosen = [index for index, kind in enumerate(types) if kind in ("good", name)]
        alone = anomaly_metrics(*([column[i] for i in chosen] for column in (maps, masks, scores, labels)))
        assert [metrics[key] for key in METRICS] == pytest.approx([alone[key] for key in METRICS], abs=1e-12)
        assert metrics["images"] == 3


@pytest.mark.parametrize(
    ("maps", "masks", "expected"),
    [
        # the rate steps 0, 0.25, 0.5 and never meets 0.3: from .25 to .3 half of the components are covered
        ([[9, 8, 7, 6, 5, 4]], [[0, 1, 0, 1, 0, 0]], 0.05 * 0.5 / 0.3),
        # the one component of image 1 is found at once, the three of image 2 never: the mean is not per image
        ([[9, 0, 0, 0, 0, 0], [-1, 5, -1, 0, -1, 0]], [[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]], 0.25),
    ],
)  # fmt: skip
def test_aupro_interpolates_at_the_limit_and_averages_over_all_components(
    maps: list, masks: list, expected: float
) -> None:
    maps = [np.array([values], dtype=float) for values in maps]
    masks, labels = [np.array([mask]) for mask in masks], [1] * len(masks)
    assert anomaly_metrics(maps, masks, labels, labels)["aupro"] == pytest.approx(expected)


def test_undefined_metrics_are_none_and_say_why() -> None:
    mask = np.array([[1, 0]])
    no_good = anomaly_metrics([np.array([[0.9, 0.1]])], [mask], [0.9], [1])
    only_good = anomaly_metrics([np.array([[0.9, 0.1]])], None, [0.9], [0])
    all_defective = anomaly_metrics([np.ones((2, 2))], [np.ones((2, 2))], [0.9], [1])
    nothing = AnomalyMetrics().compute()
    assert (no_good["image_auroc"], no_good["image_ap"], no_good["pixel_auroc"]) == (None, None, 1.0)
    assert no_good["reasons"] == dict.fromkeys(("image_auroc", "image_ap"), "no good image in the test part")
    assert only_good["reasons"]["image_auroc"] == "no defective image in the test part"
    assert only_good["reasons"]["aupro"] == "no defect pixel in any mask in the test part"
    assert all_defective["reasons"]["pixel_ap"] == "no defect-free pixel in the test part"
    assert set(nothing["reasons"]) == set(METRICS)
    for result in (no_good, only_good, all_defective, nothing):
        assert {name for name in METRICS if result[name] is None} == set(result["reasons"])
        json.dumps(result, allow_nan=False)


def test_what_a_missing_an_empty_and_an_unexpected_mask_count_for() -> None:
    defective = (np.array([[0.5, 0.1]]), np.array([[1, 0]]), 0.5, 1)
    for image, counter, normal, defect, image_auroc, pixel_auroc in (
        ((np.array([[0.8, 0.8]]), None, 0.8, 1), "without_mask", 1, 1, None, 1.0),
        ((np.array([[0.8, 0.8]]), None, 0.8, 0), "good", 3, 1, 0.0, 1 / 3),
        ((np.array([[0.8, 0.8]]), np.zeros((1, 2)), 0.8, 1), "empty_masks", 3, 1, None, 1 / 3),
        ((np.array([[0.8, 0.8]]), np.array([[1, 0]]), 0.8, 0), "good_with_defects", 2, 2, 0.0, 0.625),
    ):
        metrics = AnomalyMetrics()
        metrics.update(*defective)
        metrics.update(*image)
        result = metrics.compute()
        assert result["counts"][counter] == 1
        assert (result["counts"]["normal_pixels"], result["counts"]["defect_pixels"]) == (normal, defect)
        assert result["image_auroc"] == image_auroc
        assert result["pixel_auroc"] == pytest.approx(pixel_auroc)


def test_wrong_input_is_named_and_leaves_the_metrics_as_they_were() -> None:
    metrics = AnomalyMetrics()
    metrics.update(np.array([[0.9, 0.1]]), np.array([[1, 0]]), 0.9, 1, "crack")
    before = metrics.compute()
    for values, mask, score, label, message in (
        ([[np.nan, 1]], None, 1.0, 0, r"anomaly map of image 2 \(good\) holds NaN"),
        ([[np.inf, 1]], None, 1.0, 1, r"anomaly map of image 2 \(crack\) holds NaN or inf"),
        ([[0.0, 1]], None, float("nan"), 0, r"score of image 2 \(good\) is nan"),
        ([[0.0, 1]], np.zeros((2, 2)), 0.0, 1, r"mask of image 2 \(crack\) is \(2, 2\), its map \(1, 2\)"),
        (np.zeros((3, 4, 4)), None, 0.0, 0, r"shape \(3, 4, 4\)"),
        ([[0.0, 1]], None, 0.0, 2, r"label of image 2 \(crack\) is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update(values, mask, score, label, "crack")
    assert metrics.compute() == before
    for roi, score, message in (
        (np.ones((2, 2), bool), 0.0, r"region of interest of image 2 \(good\) is \(2, 2\), its map \(1, 2\)"),
        (None, None, r"score of image 2 \(good\) is None"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update([[0.0, 1]], None, score, 0, roi=roi)  # type: ignore[arg-type]
    assert metrics.compute() == before
    metrics.update([[0.0, 1]], None, 0.0, 0, roi=np.array([[True, False]]))
    assert metrics.compute()["counts"]["normal_pixels"] == before["counts"]["normal_pixels"] + 1
    with pytest.raises(ValueError, match=r"expected as many maps.*got \[2, 1, 2, 2, 2\]"):
        anomaly_metrics([np.zeros((1, 1))] * 2, None, [0.0], [0, 1])


def test_a_type_called_all_does_not_stand_for_all_images(capsys: pytest.CaptureFixture[str]) -> None:
    maps = [np.eye(4), np.eye(4), np.eye(4)]
    metrics = anomaly_metrics(maps, None, [0.2, 0.1, 0.9], [0, 1, 1], ["good", "all", "cut"])
    print_metrics(metrics, Path("out"))
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert rows == [["all", "50.00"], ["all", "0.00"], ["cut", "100.00"]]
