"""Metrics against scikit-learn on pooled pixels, AUPRO against a brute-force loop over thresholds and components."""

import itertools
import json
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from almrr_ref.histogram import RankHistogram
from almrr_ref.metrics import METRICS, AnomalyMetrics, anomaly_metrics

Arrays = list[np.ndarray]


def components_of(mask: np.ndarray) -> Arrays:
    """Find 8-connected components by flood fill, as boolean masks."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        stack, component = [left.pop()], np.zeros(mask.shape, bool)
        while stack:
            y, x = stack.pop()
            component[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
        found.append(component)
    return found


def brute_force_aupro(maps: Arrays, masks: Arrays, limit: float = 0.3) -> float:
    """Walk over all distinct thresholds; threshold every map at each; integrate to the limit and divide by it."""
    regions = [(values, region) for values, mask in zip(maps, masks, strict=True) for region in components_of(mask)]
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


def expect_close(result: dict, maps: Arrays, masks: Arrays, tolerance: float) -> None:
    truth = np.concatenate([mask.ravel() for mask in masks])
    values = np.concatenate([values.ravel() for values in maps])
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=tolerance)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(truth, values), abs=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_small_sets_agree_exactly_with_the_oracles(seed: int) -> None:
    maps, masks, labels = random_set(seed)
    maps = [np.round(values * 8) / 8 for values in maps] if seed % 2 else maps  # odd seeds: heavy ties
    scores = [float(np.round(values.max(), 1)) for values in maps]
    result = anomaly_metrics(maps, masks, scores, labels)
    expect_close(result, maps, masks, 1e-12)
    assert result["aupro"] == pytest.approx(brute_force_aupro(maps, masks), abs=1e-12)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert result["reasons"] == {}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


DISTRIBUTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saturated near 0 and 1": lambda z: sigmoid(8 * z),
    "near 1": lambda z: sigmoid(3 * z + 12),
    "near 0": lambda z: sigmoid(3 * z - 12),
    "around 0.5": lambda z: 0.5 + 1e-4 * z,
    "distances up to 1e6": lambda z: np.minimum(np.exp(3 * z), 1e6),
    "negative": lambda z: -np.exp(z),
    "heavy ties": lambda z: np.round(2 * z) / 2,
    "constant": lambda z: np.full_like(z, 0.5),
    "clipped": lambda z: np.clip(z / 3, 0, 1),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_values_than_bins_stay_within_1e_4(kind: str, dtype: type) -> None:
    generator = np.random.default_rng(7)
    masks = [np.zeros((64, 72), np.uint8) for _ in range(12)]
    for mask in masks[::2]:
        y, x = generator.integers(0, 50, 2)
        mask[y : y + 11, x : x + 14] = 1
    masks[1][5, 9] = 1  # a defect of one pixel
    maps = [DISTRIBUTIONS[kind](generator.normal(size=mask.shape) + 1.5 * mask).astype(dtype) for mask in masks]
    coarse, exact = AnomalyMetrics(capacity=2**13), AnomalyMetrics()
    for values, mask in zip(maps, masks, strict=True):
        for metrics in (coarse, exact):
            metrics.update(values, mask, 0.0, int(mask.any()))
            metrics._pixels._flush()  # sort in after every image: the hardest case for the bins
    expect_close(exact.compute(), maps, masks, 1e-9)
    expect_close(coarse.compute(), maps, masks, 1e-4)
    assert coarse.compute()["aupro"] == pytest.approx(exact.compute()["aupro"], abs=1e-4)


def test_one_defect_pixel_among_many_dense_ones_keeps_its_rank() -> None:
    generator = np.random.default_rng(3)
    masks = [np.zeros((256, 256), np.uint8) for _ in range(5)]
    maps = [(0.7 * generator.random((256, 256))).astype(np.float32) for _ in masks]
    masks[4][10, 20] = 1
    maps[4][10, 20] = np.sort(np.concatenate([values.ravel() for values in maps]))[-4]
    metrics = AnomalyMetrics(capacity=2**13)
    for values, mask in zip(maps, masks, strict=True):
        metrics.update(values, mask, 0.0, int(mask.any()))
    expect_close(metrics.compute(), maps, masks, 1e-6)


def test_a_stream_that_narrows_after_the_bins_were_made_keeps_its_accuracy() -> None:
    generator = np.random.default_rng(1)
    masks = [(generator.random((64, 64)) < 0.02).astype(np.uint8) for _ in range(12)]
    narrow = [0.5 + 1e-5 * (generator.normal(size=mask.shape) + mask) for mask in masks]
    maps = [10 ** generator.uniform(-7, 0, mask.shape) if i < 3 else narrow[i] for i, mask in enumerate(masks)]
    metrics = AnomalyMetrics(capacity=2**12)
    for index, (values, mask) in enumerate(zip(maps, masks, strict=True)):
        metrics.update(values, mask, 0.0, 1)
        if index % 3 == 2:
            metrics._pixels._flush()
    expect_close(metrics.compute(), maps, masks, 1e-4)


def test_memory_is_bounded_however_many_images_come() -> None:
    generator = np.random.default_rng(0)
    metrics = AnomalyMetrics(capacity=2**12)
    sizes = []
    for index in range(30):
        values = generator.normal(size=(150, 150))
        metrics.update(values, values > 2.5, float(values.max()), 1, "a" if index % 2 else "b")
        metrics._pixels._flush()
        histogram = metrics._pixels
        sizes.append(sum(sys.getsizeof(column.copy()) for column in (histogram._low, *histogram._columns.values())))
    assert max(sizes) <= 8 * 2**12 * 7 + 2000
    tracemalloc.start()
    for _ in range(200):
        metrics.update(values, values > 2.5, 0.0, 1, "a")
    assert tracemalloc.get_traced_memory()[0] < 100 * values.nbytes  # pending pixels are sorted in and freed
    tracemalloc.stop()


def test_histogram_counts_nothing_twice_and_loses_nothing() -> None:
    generator = np.random.default_rng(5)
    histogram = RankHistogram(capacity=64)
    total = 0.0
    for size in (1, 50, 400, 3, 1000):
        weights = generator.random(size)
        total += weights.sum()
        histogram.add(generator.normal(size=size), {"ones": None, "weights": weights})
        histogram._flush()
        assert histogram._low.size <= 64
        assert (histogram._low[1:] > histogram._high[:-1]).all()  # bins stay disjoint
    assert histogram.counts()["ones"].sum() == 1454
    assert histogram.counts()["weights"].sum() == pytest.approx(total)


def test_order_of_the_images_does_not_matter() -> None:
    maps, masks, labels = random_set(11, count=9)
    scores = [float(values.max()) for values in maps]
    forward = anomaly_metrics(maps, masks, scores, labels)
    backward = anomaly_metrics(maps[::-1], masks[::-1], scores[::-1], labels[::-1])
    assert backward["counts"] == forward["counts"]
    for name in METRICS:
        assert backward[name] == pytest.approx(forward[name], abs=1e-12)


def test_per_type_metrics_set_the_type_against_the_good_images() -> None:
    maps, masks, labels = random_set(2, count=9)
    scores = [float(values.max()) for values in maps]
    types = ["good" if not label else "hole" if index % 3 == 1 else "scratch" for index, label in enumerate(labels)]
    result = anomaly_metrics(maps, masks, scores, labels, types)
    assert list(result["per_type"]) == ["hole", "scratch"]
    for name, part in result["per_type"].items():
        chosen = [index for index, kind in enumerate(types) if kind in ("good", name)]
        some_maps, some_masks = [maps[i] for i in chosen], [masks[i] for i in chosen]
        expect_close(part, some_maps, some_masks, 1e-12)
        assert part["aupro"] == pytest.approx(brute_force_aupro(some_maps, some_masks), abs=1e-12)
        expected = roc_auc_score([labels[i] for i in chosen], [scores[i] for i in chosen])
        assert part["image_auroc"] == pytest.approx(expected, abs=1e-12)
        assert part["images"] == 3


def test_aupro_interpolates_at_the_limit_instead_of_rescaling_by_the_last_rate_below() -> None:
    # 4 normal pixels: the false-positive rate steps 0, 0.25, 0.5 and never meets 0.3.
    values = np.array([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]])
    mask = np.array([[0, 1, 0, 1, 0, 0]])
    # curve: (0, 0) (.25, 0) (.25, .5) (.5, .5) (.5, 1) ...: the area from .25 to .3 at .5
    result = anomaly_metrics([values], [mask], [1.0], [1])
    assert result["aupro"] == pytest.approx(0.05 * 0.5 / 0.3)


def test_aupro_averages_over_all_components_and_not_per_image() -> None:
    # Image 1 has one component, image 2 three; only image 1's is found before the first false positive.
    first, second = np.zeros((1, 8)), np.zeros((1, 8))
    first[0, 0], second[0, 1] = 9, 5
    masks = [np.array([[1, 0, 0, 0, 0, 0, 0, 0]]), np.array([[1, 0, 1, 0, 1, 0, 0, 0]])]
    second[0, [0, 2, 4]] = -1  # below all normal pixels
    result = anomaly_metrics([first, second], masks, [1.0, 1.0], [1, 1])
    # false-positive rates: 0 after 9, 1/12 after 5, then 12/12: 1 of 4 components found throughout
    assert result["aupro"] == pytest.approx(0.25)


def test_diagonal_neighbours_are_one_component() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    assert anomaly_metrics([np.zeros((3, 3))], [mask], [0.0], [1])["counts"]["components"] == 1


def test_aupro_does_not_widen_the_prediction() -> None:
    # The pixel beside the defect is found, the defect is not: a prediction dilated by one pixel would cover it.
    values = np.array([[0.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert anomaly_metrics([values], [mask], [1.0], [1])["aupro"] == 0.0


def test_false_positives_of_good_images_count_for_aupro() -> None:
    mask = np.array([[1, 0]])
    alone = anomaly_metrics([np.array([[0.5, 0.9]])], [mask], [0.0], [1])["aupro"]
    diluted = anomaly_metrics([np.array([[0.5, 0.9]]), np.zeros((1, 99))], [mask, None], [0.0, 0.0], [1, 0])["aupro"]
    assert alone == 0.0
    assert diluted > 0.9


def test_undefined_metrics_are_none_and_say_why() -> None:
    mask = np.array([[1, 0]])
    no_good = anomaly_metrics([np.array([[0.9, 0.1]])], [mask], [0.9], [1])
    assert (no_good["image_auroc"], no_good["image_ap"], no_good["pixel_auroc"]) == (None, None, 1.0)
    assert no_good["reasons"] == dict.fromkeys(("image_auroc", "image_ap"), "no good image in the test part")
    only_good = anomaly_metrics([np.array([[0.9, 0.1]])], None, [0.9], [0])
    assert only_good["reasons"]["image_auroc"] == "no defective image in the test part"
    assert only_good["aupro"] is None
    assert "no defect pixel" in only_good["reasons"]["aupro"]
    all_defective = anomaly_metrics([np.ones((2, 2))], [np.ones((2, 2))], [0.9], [1])
    assert all_defective["pixel_ap"] is None
    assert "no defect-free pixel" in all_defective["reasons"]["pixel_ap"]
    nothing = AnomalyMetrics().compute()
    assert set(nothing["reasons"]) == {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"}
    json.dumps([no_good, only_good, all_defective, nothing], allow_nan=False)


def test_a_defective_image_without_a_mask_counts_for_the_image_metrics_only() -> None:
    maps = [np.array([[0.9, 0.1]]), np.array([[0.2, 0.3]]), np.array([[0.0, 1.0]])]
    with_it = anomaly_metrics(maps, [np.array([[1, 0]]), None, None], [0.9, 0.3, 0.1], [1, 0, 1])
    without = anomaly_metrics(maps[:2], [np.array([[1, 0]]), None], [0.9, 0.3], [1, 0])
    assert with_it["pixel_auroc"] == without["pixel_auroc"]
    assert with_it["image_auroc"] == 0.5
    assert with_it["counts"]["without_mask"] == 1


def test_an_empty_mask_of_a_defective_image_makes_its_pixels_defect_free() -> None:
    maps = [np.array([[0.5, 0.1]]), np.array([[0.8, 0.8]])]
    result = anomaly_metrics(maps, [np.array([[1, 0]]), np.zeros((1, 2))], [0.5, 0.8], [1, 1])
    assert result["counts"]["empty_masks"] == 1
    assert result["counts"]["normal_pixels"] == 3
    assert result["pixel_auroc"] == pytest.approx(1 / 3)


def test_tensors_extra_axis_and_byte_masks_are_accepted() -> None:
    maps, masks, labels = random_set(4, count=3)
    scores = [1.0, 2.0, 3.0]
    expected = anomaly_metrics(maps, masks, scores, labels)
    stacked = torch.tensor(np.stack(maps)[:, None]).requires_grad_()
    given = anomaly_metrics(stacked, 255 * np.stack(masks)[:, None], torch.tensor(scores), torch.tensor(labels))
    assert given == expected


@pytest.mark.parametrize(
    ("values", "mask", "score", "label", "message"),
    [
        (np.array([[np.nan, 1]]), None, 1.0, 0, r"anomaly map of image 2 \(good\) holds NaN"),
        (np.array([[np.inf, 1]]), None, 1.0, 1, r"anomaly map of image 2 \(crack\) holds NaN or inf"),
        (np.array([[0.0, 1]]), None, float("nan"), 0, r"score of image 2 \(good\) is nan"),
        (np.array([[0.0, 1]]), np.zeros((2, 2)), 0.0, 1, r"mask of image 2 \(crack\) is \(2, 2\), its map \(1, 2\)"),
        (np.zeros((3, 4, 4)), None, 0.0, 0, r"shape \(3, 4, 4\)"),
        (np.array([[0.0, 1]]), None, 0.0, 2, "label of image 2 is 2"),
    ],
)
def test_wrong_input_is_named_and_leaves_the_metrics_as_they_were(
    values: np.ndarray, mask: np.ndarray | None, score: float, label: int, message: str
) -> None:
    metrics = AnomalyMetrics()
    metrics.update(np.array([[0.9, 0.1]]), np.array([[1, 0]]), 0.9, 1, "crack")
    before = metrics.compute()
    with pytest.raises(ValueError, match=message):
        metrics.update(values, mask, score, label, "crack")
    assert metrics.compute() == before


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 maps, 1 scores, 2 labels"):
        anomaly_metrics([np.zeros((1, 1))] * 2, None, [0.0], [0, 1])
