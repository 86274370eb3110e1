"""Predictions in a stream, and the region that a picture outlines and scores.csv measures."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_network import TINY

from almrr_ref.deploy.inference import THREADS, Prediction, defect_region, mapped_ahead
from almrr_ref.deploy.predictor import Predictor


def test_results_keep_the_order_of_the_items_though_a_later_one_is_done_first() -> None:
    """The first item waits for the second: it would wait for ever if they did not run side by side."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            second_done.set()
        assert item or second_done.wait(60)
        return item

    assert list(mapped_ahead(work, range(50), ahead=4)) == list(range(50))


@pytest.mark.parametrize("ahead", [1, THREADS, 4 * THREADS])
def test_no_item_is_taken_further_ahead_and_an_error_comes_out_in_its_place_and_ends_everything(ahead: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        if item == 7:
            raise KeyError(item)
        return item

    before = threading.active_count()
    results = mapped_ahead(work, items(), ahead)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(KeyError, match="7"):
        next(results)
    assert len(taken) <= 7 + ahead
    assert threading.active_count() == before


def test_the_region_is_where_the_map_reaches_the_threshold_but_nothing_if_the_score_does_not() -> None:
    """And what lies in the margin alone is no part of it. Area and half-open box are in pixels of the file."""
    # Smoothing is off; the score is the mean of the highest 20 pixels (of 64 x 64) within the margin.
    config = dataclasses.replace(TINY, score_kernel=1, score_margin=8, score_fraction=0.005)
    model, anomaly_map = Predictor(config, threshold=0.5), torch.zeros(1, 64, 96)

    def measured(scale: int = 1) -> tuple[int, int, tuple[int, ...] | None]:
        score, image = float(model.image_scores(anomaly_map[None])), torch.zeros(3, 64, 96, dtype=torch.uint8)
        prediction = Prediction(Path("x"), image, anomaly_map, score, (scale * 64, scale * 96))
        region, area, box = defect_region(model, prediction)
        return int(region.sum()), area, box

    anomaly_map[0, :4, 20:30] = 0.9  # in the margin alone
    anomaly_map[0, 20, 4:14] = 1.0  # reaches into it; 6 pixels count, which is too few for the score
    anomaly_map[0, 40, 50] = 0.49
    assert measured() == (0, 0, None)
    anomaly_map[0, 30, 20:28] = 0.5
    assert measured() == (18, 18, (4, 20, 28, 31))
    assert measured(scale=3) == (18, 9 * 18, (12, 60, 84, 93))
    model.threshold = None
    assert measured() == (0, 0, None)
