"""Shifts of scores, and their errors, against draws of which the truth is known."""

import numpy as np
import pytest

from almrr_ref.calibration.shifts import NO_SHIFT, as_unseen, memory_shift, shifted


def test_scores_of_trained_images_are_raised_where_the_others_show_that_the_network_knows_them() -> None:
    logits = np.random.default_rng(0).normal(size=200)
    trained = np.arange(200) < 150
    known = 1 / (1 + np.exp(-(logits - 1.5 * trained)))
    shift, error = as_unseen(known.tolist(), trained.tolist())
    assert abs(shift - 1.5) < 2 * error < 0.6
    scores = shifted(known.tolist(), trained.tolist(), shift)
    np.testing.assert_allclose(np.log(np.divide(scores, np.subtract(1, scores))), logits + (shift - 1.5) * trained)
    assert as_unseen((1 / (1 + np.exp(-logits))).tolist(), trained.tolist()) == NO_SHIFT
    assert as_unseen(known.tolist(), (np.arange(200) < 195).tolist()) == NO_SHIFT, "five kept aside tell nothing"


def test_the_error_of_a_shift_is_its_deviation_over_many_draws_of_the_images() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        never = rng.normal(size=76)
        without = never + 0.5 + 0.5 * rng.normal(size=76)
        found.append(memory_shift(*((1 / (1 + np.exp(-values))).tolist() for values in (never, without))))
    shifts, errors = np.transpose(found)
    assert np.median(errors) == pytest.approx(shifts.std(), rel=0.25)


def test_a_shift_of_the_memory_is_that_of_the_upper_half_and_never_upwards() -> None:
    rng = np.random.default_rng(0)
    never = rng.normal(size=60)
    scores = [(1 / (1 + np.exp(-values))).tolist() for values in (never, never + 0.7 + 0.2 * rng.normal(size=60))]
    assert memory_shift(*scores)[0] == pytest.approx(-0.7, abs=0.1)
    assert memory_shift(scores[1], scores[0]) == NO_SHIFT
    assert memory_shift(*(values[:9] for values in scores)) == NO_SHIFT, "nine tell nothing"
