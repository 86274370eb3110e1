"""The memory's greedy k-center against the textbook's loop."""

import numpy as np
import pytest
import torch

from almrr_ref.plus import memory


def plain_k_center(points: np.ndarray, count: int, first: int) -> list[int]:
    chosen = [first]
    nearest = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


@pytest.mark.parametrize("candidates", [1, 100, 5000])
def test_k_center_is_the_plain_greedy_selection(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    points = np.random.default_rng(0).normal(size=(1100, 9)) * np.logspace(0, -2, 9) + 5
    monkeypatch.setattr(memory, "CANDIDATES", candidates)
    assert memory.k_center(torch.from_numpy(points), 150, 17).tolist() == plain_k_center(points, 150, 17)


def test_k_center_takes_every_point_once_even_if_all_are_equal() -> None:
    assert sorted(memory.k_center(torch.ones(12, 3), 12, 4).tolist()) == list(range(12))
