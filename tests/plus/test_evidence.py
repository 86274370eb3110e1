"""How the kinds of evidence are weighed against each other."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_network import TINY

from almrr_ref.plus.evidence import LEAST_STD, Evidence, image_peaks

WEIGHTS = {"distance_weight": 0.5, "memory_weight": 2.0}


def evidence(**changes: object) -> Evidence:
    return Evidence(dataclasses.replace(TINY, **{**WEIGHTS, **changes}))  # type: ignore[arg-type]


def test_unbalanced_evidence_is_the_weighted_mean_and_a_weight_of_0_leaves_a_kind_out() -> None:
    kinds = torch.tensor([8.0, -2.0, 4.0])[None, :, None, None].expand(1, 3, 2, 2)
    expected = torch.full((1, 1, 2, 2), (8 - 0.5 * 2 + 2 * 4) / 3.5)
    torch.testing.assert_close(evidence(balance=False)(kinds), expected)
    logits, errors, nearest = torch.zeros(1, 2, 2, 2), torch.ones(1, 3, 2, 2), torch.full((1, 1, 2, 2), 7.0)
    without_distance = evidence(distance_weight=0.0)
    torch.testing.assert_close(without_distance.kinds(logits, errors, nearest)[0, :, 0, 0], torch.tensor([0.0, 7.0]))
    assert without_distance.weights == [1 / 3, 2 / 3]


def test_balanced_evidence_counts_in_deviations_of_the_peaks() -> None:
    """Whatever unit a kind has, it says the same: peaks of good images have mean 0 and deviation 1 in each."""
    peaks = np.random.default_rng(0).normal(size=(40, 3)) * (0.3, 5, 40) + (1, -7, 300)
    balanced = evidence()
    balanced.fit(torch.from_numpy(peaks).float())
    kinds = np.random.default_rng(1).normal(size=(2, 3, 4, 4)) * 10
    scaled = (kinds - peaks.mean(axis=0)[:, None, None]) / peaks.std(axis=0)[:, None, None]
    expected = np.average(scaled, axis=1, weights=[1, 0.5, 2])[:, None]
    np.testing.assert_allclose(balanced(torch.from_numpy(kinds).float()).numpy(), expected, rtol=1e-4, atol=1e-4)
    balanced.fit(torch.ones(1, 3))
    assert balanced.std.tolist() == pytest.approx([LEAST_STD] * 3), "equal peaks would drown the other kinds"


def test_a_peak_is_the_mean_of_the_highest_half_percent() -> None:
    kinds = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    expected = np.sort(kinds.flatten(2).numpy(), axis=2)[:, :, -4:].mean(axis=2)  # 0.5% of 900, rounded to even
    np.testing.assert_allclose(image_peaks(kinds).numpy(), expected, rtol=1e-6)
    assert image_peaks(kinds[:, :, :3, :3]).equal(kinds[:, :, :3, :3].amax((2, 3)))
    roi = torch.zeros(120, 120, dtype=torch.bool)
    roi[:17, 3:12] = True  # cells of 4 x 4 pixels that a region touches
    assert image_peaks(kinds, roi).equal(kinds[:, :, :5, :3].amax((2, 3)))
