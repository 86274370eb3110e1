"""Drift, by simulation: how seldom it warns in control, how soon after a change."""

from collections.abc import Callable

import numpy as np
import pytest

from almrr_ref.calibration import drift
from almrr_ref.calibration.drift import Drift
from almrr_ref.calibration.thresholds import promise

Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=count)


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.gamma(2, size=count) / np.sqrt(2)


def warnings(rng: np.random.Generator, images: int, logits: Callable[[np.ndarray], np.ndarray], draw: Draw, count: int):  # type: ignore[no-untyped-def]
    """Numbers of the pictures at which a warning came, of a stream that a calibration with ``images`` images judges."""
    calibration = (1 / (1 + np.exp(2 - draw(rng, images)))).tolist()
    threshold = promise(calibration, 0.01).value
    charts, found, standing = Drift(calibration), [], False
    for number, score in enumerate(1 / (1 + np.exp(2 - logits(draw(rng, count)))), start=1):
        if score < threshold:
            charts.add(float(score), threshold)
            if charts.standing and not standing:
                found.append(number)
            standing = bool(charts.standing)
    return found


@pytest.mark.parametrize(("images", "draw"), [(20, normal), (100, skewed), (1000, normal)])
def test_in_control_it_warns_less_than_once_in_ten_thousand_pictures(images: int, draw: Draw) -> None:
    rng, streams = np.random.default_rng(5), 6
    false = sum(len(warnings(rng, images, lambda x: x, draw, 10_000)) for _ in range(streams))
    assert false < streams


@pytest.mark.parametrize(("scale", "shift"), [(1, 1), (1, -1), (2, 0), (0.5, 0)])
@pytest.mark.parametrize(("images", "before"), [(100, 100), (20, 300), (1000, 0)])
def test_a_shift_of_one_deviation_or_another_spread_is_found_within_200_pictures(
    scale: float, shift: float, images: int, before: int
) -> None:
    """Also where the calibration had few images, once pictures judged good have joined them."""

    def changed(logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) < before, logits, scale * logits + shift)

    rng = np.random.default_rng(6)
    for _ in range(10):
        first = warnings(rng, images, changed, normal, before + 200)
        assert first
        assert first[0] > before


def test_a_warning_stands_as_long_as_the_cause_and_another_threshold_begins_anew() -> None:
    rng = np.random.default_rng(1)
    charts, said = Drift(rng.uniform(0.1, 0.2, 200).tolist()), []
    for low in (0.1, 0.17, 0.1):
        for score in rng.uniform(low, 0.2, 300):
            said += [text] if (text := charts.add(score, 0.5)) else []
        assert bool(charts.standing) == (low > 0.1)
    assert said[0].startswith("drift: good pictures score higher than in calibration")
    assert said[-1] == "drift: good pictures score as in calibration again"
    assert len(said) <= 4, "it is said once"
    assert len(charts.reference) < 200 + 900, "what drifts is not taken for good"
    charts.add(0.15, 0.18)
    assert max(charts.reference) < 0.18
    assert not any(charts.charts[name] > 3 for name in charts.charts)


def test_the_good_score_that_set_the_threshold_is_no_part_of_the_comparison() -> None:
    """Given it, those below come from one distribution; with it, the reference would have one score too many."""
    scores = np.linspace(0.1, 0.3, 50).tolist()
    threshold = promise(scores, 0.02).value
    charts = Drift(scores)
    charts.add(0.2, threshold)
    assert len(charts.reference) == 49 + 1
    assert charts.add(threshold - 1e-6, threshold) == ""
    assert len(charts.reference) == 49 + 1


def test_the_ranks_are_standard_normal_from_the_first_picture_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few images the series is not wider than a standard normal one, so that no chart runs off."""
    monkeypatch.setattr(drift, "SLACK", 0.0)
    monkeypatch.setattr(drift, "LIMIT", 1e9)
    rng, ends = np.random.default_rng(2), []
    for _ in range(300):
        charts = Drift(rng.normal(size=5).tolist())
        total = 0.0
        for score in rng.normal(size=30):
            before = charts.charts["higher"], charts.charts["lower"]
            charts.add(score, 99.0)
            up, down = charts.charts["higher"] - before[0], charts.charts["lower"] - before[1]
            total += up if up > 0 else -down
        ends.append(total / np.sqrt(30))
    assert abs(np.mean(ends)) < 0.2
    assert 0.8 < np.std(ends) < 1.1
