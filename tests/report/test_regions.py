"""Regions of a defective picture (report/result.py): which there are, and where they end."""

import math

import numpy as np
import torch
from tiny_network import build
from torch import Tensor

from almrr_ref.report.result import Region, find_regions


def regions_of(anomaly_map: Tensor, offset: float = 0.0, threshold: float = 0.5) -> list[Region]:
    """Of a picture whose map, (64, 64), is not smoothed."""
    model = build(score_kernel=1)
    model.outline_offset = offset
    mask, regions = find_regions(model, anomaly_map[None], threshold, (64, 64))
    assert int(mask.sum()) == sum(region.area for region in regions)
    return regions


def hill(peak: float, slope: float) -> tuple[Tensor, np.ndarray]:
    """A map whose logit falls from a peak in its middle, to -3 at least, and that logit without the limit."""
    y, x = np.mgrid[:64, :64]
    logit = peak - slope * np.hypot(x - 32, y - 32)
    return torch.from_numpy(1 / (1 + np.exp(-logit.clip(-3)))).float(), logit


def test_the_peak_of_a_region_has_a_level_of_its_own_which_moves_with_the_threshold() -> None:
    anomaly_map = torch.full((64, 64), 0.02)
    anomaly_map[40:48, 40:48] = 0.6
    anomaly_map[20:30, 20:30] = 0.6
    anomaly_map[22:24, 22:24] = 0.95
    nine_tenths = math.log(0.9 / 0.1)  # in logits above a half
    assert [region.area for region in regions_of(anomaly_map)] == [100, 64]
    assert [region.area for region in regions_of(anomaly_map, nine_tenths)] == [100]
    assert [region.area for region in regions_of(anomaly_map, nine_tenths, threshold=0.1)] == [100, 64]
    above_all = math.log(0.99 / 0.01)
    assert [region.area for region in regions_of(anomaly_map, above_all)] == [100], "the highest is one"


def test_a_region_ends_halfway_to_the_median_in_logits_or_at_the_level_of_peaks_if_that_is_lower() -> None:
    for peak, end in ((3.2, 0.1), (8.0, 1.0)):  # halfway to -3 are 0.1 and 2.5; the level is 1
        anomaly_map, logit = hill(peak, 0.5)
        [region] = regions_of(anomaly_map, offset=1.0)
        assert region.area == (logit >= end).sum()


def test_regions_move_little_where_the_map_moves_little() -> None:
    """Also where the highest value passes the level of peaks, 0.4 here."""
    areas = [regions_of(hill(peak, 0.1)[0], offset=0.4)[0].area for peak in np.linspace(0.1, 0.9, 300)]
    assert min(areas) > 300
    assert np.abs(np.diff(areas)).max() <= 0.03 * min(areas)


def test_a_score_that_reaches_the_threshold_by_rounding_has_a_region() -> None:
    even = torch.full((64, 64), 0.3)
    [region] = regions_of(even, threshold=float(np.nextafter(np.float32(0.3), 1)))
    assert region.area == 64 * 64
