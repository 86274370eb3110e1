"""How the kinds of evidence are weighed against each other, and what calibration reads of the forward pass."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny_network import TINY, build, good_images, good_samples, leave_only

from almrr_ref.calibrate import ROUNDING, calibrate, fit_features
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


@pytest.mark.parametrize("count", [10, 9, 0])
@torch.no_grad()
def test_calibration_measures_images_kept_aside_or_where_they_are_few_the_trained_ones_without_their_own_part(
    count: int,
) -> None:
    """Evidence takes ten, the threshold one; both read the forward pass."""
    good, held_out = good_images(12), good_images(count, seed=1)
    model = build(frm_input="memory", standardise="channel", memory=12 * 64, score_fraction=0.005)  # all patches
    samples = good_samples(good, batch_size=5, false_positive_rate=0.0)
    fit_features(model, samples)
    expected, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    trained, aside = (good / 255, torch.arange(12)), (held_out / 255, None)
    assert expected.evidence is not None
    expected.evidence.fit(image_peaks(expected(*(aside if count == 10 else trained)).evidence))
    threshold = float(expected.image_scores(expected(*(aside if count else trained)).anomaly_map).max())
    leave_only(calibrated, "evidence", "anomaly_map")
    calibrate(calibrated, held_out, samples)
    assert calibrated.evidence is not None
    torch.testing.assert_close(calibrated.evidence.mean, expected.evidence.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(calibrated.evidence.std, expected.evidence.std, atol=1e-4, rtol=1e-3)
    assert calibrated.threshold == pytest.approx(threshold + ROUNDING, abs=1e-5)
    if not count:
        assert threshold > float(expected.predict(good / 255)[1].max()) + 0.01, "own parts would make no difference"
