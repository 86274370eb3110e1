"""The region that is outlined as a defect: where the smoothed map reaches the threshold, if the score does."""

import dataclasses
from pathlib import Path

import pytest
import torch
from almrr_ref.predictor import Predictor
from tiny_network import TINY
from torch import Tensor

from almrr_ref.deploy.inference import Box, Prediction, defect_region


def outlined(model: Predictor, anomaly_map: Tensor, size: tuple[int, int]) -> tuple[float, int, Box | None]:
    """Score, area and bounding box of a map (1, h, w) of an image of that size."""
    score = float(model.image_scores(anomaly_map[None]))
    image = torch.zeros(3, *anomaly_map.shape[1:], dtype=torch.uint8)
    region, area, box = defect_region(model, Prediction(Path("x.png"), image, anomaly_map, score, size))
    assert region.dtype == torch.bool
    assert int(region.sum()) * size[0] * size[1] == area * region.numel()
    return score, area, box


def test_a_region_is_outlined_only_where_the_score_says_defective() -> None:
    """A mean of the highest pixels can lie below the threshold while a few of them lie above."""
    model = Predictor(dataclasses.replace(TINY, score_kernel=1, score_fraction=0.005), threshold=0.5)
    anomaly_map = torch.zeros(1, 64, 64)
    anomaly_map[0, 3, 4:8] = 0.9
    assert outlined(model, anomaly_map, (64, 64)) == (pytest.approx(4 * 0.9 / 20), 0, None)
    anomaly_map[0, 10:13, 4:8] = 0.9
    assert outlined(model, anomaly_map, (128, 192)) == (pytest.approx(16 * 0.9 / 20), 16 * 2 * 3, (12, 6, 24, 26))
    model.threshold = None
    assert outlined(model, anomaly_map, (64, 64))[1:] == (0, None)


def test_a_region_in_the_margin_alone_is_not_outlined() -> None:
    model = Predictor(dataclasses.replace(TINY, score_kernel=1, score_margin=8), threshold=0.5)
    anomaly_map = torch.zeros(1, 64, 96)
    anomaly_map[0, :4, 20:30] = 0.9  # in the margin alone
    anomaly_map[0, 56:, 40:44] = 0.9  # in it as well,
    anomaly_map[0, 50:56, 44:46] = 0.9  # but from the inside, over a corner
    assert outlined(model, anomaly_map, (64, 96))[1:] == (8 * 4 + 6 * 2, (40, 50, 46, 64))
    anomaly_map[0, 50:56, 44:46] = 0.0
    assert outlined(model, anomaly_map, (64, 96)) == (0, 0, None)
