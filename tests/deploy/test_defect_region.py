"""The region that a picture outlines and scores.csv measures."""

import torch

from almrr_ref.deploy.inference import defect_region


def test_defect_region_is_half_open_and_includes_the_threshold() -> None:
    anomaly_map = torch.zeros(5, 7)
    anomaly_map[2, 3], anomaly_map[4, 6], anomaly_map[0, 0] = 0.5, 0.9, 0.49
    assert defect_region(anomaly_map, 0.5) == (2, (3, 2, 7, 5))
    assert defect_region(anomaly_map, 0.91) == (0, None)
