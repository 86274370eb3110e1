"""plus/k_center.py against the plain greedy selection."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from almrr_ref.plus.k_center import k_center


@pytest.mark.parametrize("candidates", [1, 7, 5000])
def test_the_stored_patches_are_those_of_the_plain_greedy_selection(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("almrr_ref.plus.k_center.CANDIDATES", candidates)
    points = (
        torch.randn(1100, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(0, -2, 9)
        + 5
    )
    chosen, nearest = [17], np.full(1100, np.inf)
    while len(chosen) < 150:
        nearest = np.minimum(nearest, cdist(points, points[chosen[-1:]])[:, 0])
        chosen.append(int(nearest.argmax()))
    progress: list[tuple[int, int]] = []
    assert k_center(points, 150, first=17, progress=lambda *counts: progress.append(counts)).tolist() == chosen
    assert progress[-1] == (150, 150)
    assert sorted(k_center(torch.ones(12, 3), 12, first=4).tolist()) == list(range(12)), "all are equal"
