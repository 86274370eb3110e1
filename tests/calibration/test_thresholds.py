"""What a threshold promises, against simulation: thousands of calibrations of which the true rate is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm

from almrr_ref.calibration.thresholds import (
    best_point,
    cross_validated,
    design_effect,
    effect_of_parts,
    intervals,
    outliers,
    percent,
    promise,
)
from almrr_ref.calibration.verdict import choose_point
from almrr_ref.run.text import decimals


@pytest.mark.parametrize(("images", "rate"), [(30, 0.1), (200, 0.01), (761, 0.05)])
def test_the_rate_is_kept_on_average_and_lies_in_its_interval_19_times_of_20(images: int, rate: float) -> None:
    """Scores are uniform, so the true rate of a threshold is 1 less it."""
    rng = np.random.default_rng(0)
    promises = [promise(rng.random(images).tolist(), rate) for _ in range(500)]
    true = np.array([1 - p.value for p in promises])
    assert rate - 1.2 / images < true.mean() < rate * 1.06
    inside = np.mean([p.low <= r <= p.high for p, r in zip(promises, true)])
    assert 0.92 < inside < 0.98
    alarms = rng.binomial(100, true)
    assert np.mean([p.of_next[0] <= a <= p.of_next[1] for p, a in zip(promises, alarms)]) > 0.94


def test_scores_that_are_all_off_together_widen_the_interval_as_far_as_the_rate_moves() -> None:
    """Logits of good images are normal, and off by an error that differs from calibration to calibration."""
    rng = np.random.default_rng(4)
    inside, without = [], []
    for _ in range(300):
        logits = rng.normal(size=761) + 0.1 * rng.normal()
        scores = (1 / (1 + np.exp(-logits))).tolist()
        value = promise(scores, 0.05).value
        true = norm.sf(np.log(value / (1 - value)))
        for kept, errors in ((inside, 0.1), (without, 0.0)):
            stated = promise(scores, 0.05, errors=errors)
            assert stated.value == value
            kept.append(stated.low <= true <= stated.high)
    assert 0.92 < np.mean(inside) < 0.985
    assert np.mean(without) < 0.85


def test_too_few_images_promise_what_they_allow_and_say_how_many_are_missing() -> None:
    few = promise([0.1, 0.3, 0.2], 0.01)
    assert few.value == pytest.approx(0.3, abs=1e-4)
    assert few.value > 0.3
    assert (few.rate, few.images, few.more) == (0.25, 3, 96)
    assert "1% would take 96 good images more" in str(few)
    shown = {6e-10: "0%", 0.0037: "0.37%", 0.01: "1%", 0.123: "12%", 0.996: "99%", 1.0: "100%"}
    assert [percent(rate) for rate in shown] == list(shown.values())
    enough = promise(np.linspace(0, 0.9, 99).tolist(), 0.01)
    assert (enough.rate, enough.more) == (0.01, 0)


def test_the_rate_is_that_of_the_threshold_whatever_was_asked() -> None:
    """As the page says it."""
    asked = {rate: promise(np.linspace(0, 0.9, 16).tolist(), rate) for rate in (0.0, 0.06, 0.1)}
    assert {(entry.value, entry.rate) for entry in asked.values()} == {(asked[0.0].value, 1 / 17)}
    assert [entry.asked for entry in asked.values()] == list(asked)


def test_no_threshold_lies_above_the_highest_score_and_good_images_that_have_it_are_alarms() -> None:
    saturated = promise([1.0, 0.3, 0.2], 0.01)
    assert (saturated.value, saturated.rate) == (1.0, 0.5)
    assert saturated.low == intervals([1.0, 0.3, 0.2])[1][0]
    assert promise([0.999999, 0.3, 0.2], 0.01).value == best_point([1.0], [[1.0]], None) == 1.0
    assert str(promise([0.99994, 0.3, 0.2], 0.01)).startswith("threshold 0.999960 for")
    assert [decimals(value) for value in (0, 0.05, 2e-5, 1)] == ["0.0000", "0.0500", "0.000020", "1.0000"]
    assert 0 < promise([1.0] * 3, 0.01).low < promise([1.0] * 3, 0.01).high <= 1


def test_images_of_one_part_that_alarm_together_count_as_fewer() -> None:
    rng = np.random.default_rng(1)
    parts = np.arange(600) // 6
    of_part = rng.random(100)
    together, apart = of_part[parts] + 1e-6 * rng.random(600), rng.random(600)
    assert (
        promise(together.tolist(), 0.1, parts.tolist()).high > promise(apart.tolist(), 0.1, parts.tolist()).high + 0.02
    )
    assert design_effect(together > 0.9, parts) == pytest.approx(6, rel=0.1)
    assert design_effect(apart > 0.9, parts) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("parts", "rate"), [(20, 0.01), (20, 0.05), (60, 0.01)])
def test_new_parts_lie_in_the_interval_19_times_of_20_also_where_no_alarm_shows_the_parts(
    parts: int, rate: float
) -> None:
    """Six images of a part have three quarters of their variance in common."""
    rng, part_of = np.random.default_rng(2), np.arange(parts * 6) // 6
    inside: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(200):
        logits = np.sqrt(0.75) * rng.normal(size=parts)[part_of] + 0.5 * rng.normal(size=parts * 6)
        scores = (1 / (1 + np.exp(-logits))).tolist()
        for new, kept in inside.items():
            stated = promise(scores, rate, part_of.tolist(), new_parts=new)
            kept.append(stated.low <= norm.sf(np.log(stated.value / (1 - stated.value))) <= stated.high)
    assert np.mean(inside[True]) > 0.94
    assert np.mean(inside[False]) < 0.9, "the alarms alone tell enough"
    assert effect_of_parts(rng.normal(size=120), np.arange(120) // 6) < 1.5
    assert effect_of_parts(np.arange(20)[np.arange(120) // 6], np.arange(120) // 6) == pytest.approx(6)
    assert effect_of_parts(rng.normal(size=9), np.arange(9)) == 1
    assert effect_of_parts(rng.normal(size=9), np.zeros(9)) == 9, "one part says as much as one image"


def test_every_number_of_alarms_has_the_interval_that_a_promise_of_it_states() -> None:
    rng = np.random.default_rng(3)
    parts = (np.arange(99) // 3).tolist()
    scores = (rng.random(33)[parts] + 0.01 * rng.random(99)).tolist()  # images of one part alarm together
    rates = [(alarms + 1) / 100 for alarms in range(99)]
    stated = [(p.low, p.high) for p in (promise(scores, rate, parts) for rate in rates)]
    assert np.allclose(intervals(scores, parts), stated)
    assert np.all(np.diff([high for _, high in intervals(scores)]) > 0)


def test_the_best_point_lies_between_good_and_defective_and_never_below_the_least() -> None:
    good, defective = [0.1, 0.2, 0.3, 0.6], [0.7, 0.8, 0.25]
    assert best_point(good, [defective], None) == pytest.approx(0.6, abs=1e-4)
    assert best_point(good, [[0.25, 0.26, 0.4]], None) == pytest.approx(0.2, abs=1e-4)
    assert best_point(good, [[0.25, 0.26, 0.4]], 0.35) == 0.35
    assert best_point(good, [defective, [0.5] * 9], None) == pytest.approx(0.3, abs=1e-4), "both groups count alike"
    assert best_point([*good, *[0.0] * 16], [[0.8] * 9], 0.3) == 0.3, "one alarm in 20 is less than one of 9"
    assert best_point([*good, *[0.0] * 4], [[0.8] * 9], 0.3) == pytest.approx(0.6, abs=1e-4)
    assert best_point(good, [[0.5]], None) == pytest.approx(0.3, abs=1e-4), "one defective image is not all"
    assert cross_validated(good, [0.9, 0.8, 0.7], [], 0.0, lower=True) == (1.0, 0.25)
    assert cross_validated(good[:1], [0.9, 0.2], [], 0.5, lower=True) == (0.5, 0.0), "nothing to choose it by"


def test_a_threshold_that_defective_images_do_not_raise_is_expected_to_find_what_it_finds() -> None:
    """Of the ten, whichever is left out, the others would raise the threshold above the lowest."""
    good, defective = np.linspace(0, 0.6, 100).tolist(), [0.55, *np.linspace(0.8, 0.9, 9)]
    basis = {"scores": good}
    promised = promise(good, 0.2)
    assert cross_validated(good, defective, [], promised.value, lower=False)[0] == 0.9
    value, expected = choose_point(SimpleNamespace(basis=lambda: basis), [], defective, promised, "fpr")  # type: ignore[arg-type]
    assert value == promised.value
    assert expected["cross_validated_found"] == expected["found_at_threshold"] == 1
    assert expected["cross_validated_false_alarms"] == pytest.approx(0.19)


def test_one_odd_image_is_an_outlier_whatever_its_size_and_chance_makes_none() -> None:
    rng = np.random.default_rng(2)
    normal = rng.normal(size=(200, 41))
    assert np.mean([len(outliers(row)) > 0 for row in normal]) < 0.02
    for size in (9.0, 1e6):
        assert outliers(np.append(normal[0], size)) == [41]
    assert outliers(np.zeros(3)) == []
