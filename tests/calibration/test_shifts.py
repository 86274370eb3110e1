"""Shifts of scores, and their errors, against draws of which the truth is known."""

import numpy as np
import pytest

from almrr_ref.calibration.shifts import NO_SHIFT, shifted, training_shift


def test_scores_of_trained_images_are_raised_where_the_others_show_that_the_network_knows_them() -> None:
    logits = np.random.default_rng(0).normal(size=200)
    trained = np.arange(200) < 150
    known = 1 / (1 + np.exp(-(logits - 1.5 * trained)))
    shift, error = training_shift(known.tolist(), trained.tolist())
    assert abs(shift - 1.5) < 2 * error < 0.6
    scores = shifted(known.tolist(), trained.tolist(), shift)
    np.testing.assert_allclose(np.log(np.divide(scores, np.subtract(1, scores))), logits + (shift - 1.5) * trained)
    assert training_shift((1 / (1 + np.exp(-logits))).tolist(), trained.tolist()) == NO_SHIFT
    assert training_shift(known.tolist(), (np.arange(200) < 195).tolist()) == NO_SHIFT, "five kept aside tell nothing"


def test_the_error_of_a_shift_is_its_deviation_over_many_draws_of_the_images() -> None:
    rng, trained = np.random.default_rng(0), np.arange(400) < 320
    found = [training_shift((1 / (1 + np.exp(-rng.normal(size=400) + trained))).tolist(), trained) for _ in range(100)]
    shifts, errors = np.transpose(found)
    assert np.median(shifts) == pytest.approx(1, abs=0.05)
    assert np.median(errors) == pytest.approx(shifts.std(), rel=0.25)


def test_the_error_of_a_shift_counts_parts_where_images_of_one_part_are_alike() -> None:
    rng, parts = np.random.default_rng(0), np.arange(400) // 8
    trained = parts < 40
    found, alone = [], []
    for _ in range(60):
        logits = rng.normal(size=50)[parts] + 0.1 * rng.normal(size=400) - 2 * trained
        scores = (1 / (1 + np.exp(-logits))).tolist()
        found.append(training_shift(scores, trained.tolist(), parts.tolist()))
        alone.append(training_shift(scores, trained.tolist())[1])
    shifts, errors = np.transpose(found)
    assert np.median(errors) == pytest.approx(shifts.std(), rel=0.35)
    assert np.median(alone) < 0.5 * shifts.std(), "images alone say too much"
