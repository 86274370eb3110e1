"""The region that a picture outlines and scores.csv measures."""

from pathlib import Path

import torch

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.inference import Prediction, defect_region
from almrr_ref.deploy.predictor import Predictor


def measured(anomaly_map: torch.Tensor, threshold: float | None, margin: int = 0, scale: int = 1):
    model = Predictor(ModelConfig(score_kernel=1, score_margin=margin), threshold)
    h, w = anomaly_map.shape
    score = float(model.image_scores(anomaly_map[None, None]))
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    region, area, box = defect_region(
        model, Prediction(Path("x"), image, anomaly_map[None], score, (scale * h, scale * w))
    )
    return int(region.sum()), area, box


def test_the_region_is_half_open_and_includes_the_threshold() -> None:
    anomaly_map = torch.zeros(5, 7)
    anomaly_map[2, 3], anomaly_map[4, 6], anomaly_map[0, 0] = 0.5, 0.9, 0.49
    assert measured(anomaly_map, 0.5) == (2, 2, (3, 2, 7, 5))
    assert measured(anomaly_map, 0.5, scale=3) == (2, 18, (9, 6, 21, 15))
    assert measured(anomaly_map, 0.91) == measured(anomaly_map, None) == (0, 0, None)


def test_what_lies_in_the_margin_alone_is_no_part_of_it() -> None:
    anomaly_map = torch.zeros(9, 9)
    anomaly_map[0, 0] = anomaly_map[1, 4] = anomaly_map[2, 4] = anomaly_map[3, 4] = 0.8
    assert measured(anomaly_map, 0.5, margin=2) == (3, 3, (4, 1, 5, 4))
    assert measured(anomaly_map, 0.5) == (4, 4, (0, 0, 5, 4))
