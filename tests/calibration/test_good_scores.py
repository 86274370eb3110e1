"""Good images judged as unseen: against a network whose memory really lacks them, and against the path that judges."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import build, good_images, good_samples

from almrr_ref.calibrate import say_alarms
from almrr_ref.calibration import good_scores, verdict
from almrr_ref.calibration.good_features import complete_memory, fit_features
from almrr_ref.calibration.good_scores import Good, calibrate, drawn_from
from almrr_ref.calibration.simulated import STRENGTHS, SimulatedDefect, damage_inside, detection_rates, simulate
from almrr_ref.calibration.verdict import set_verdict
from almrr_ref.config import TrainConfig
from almrr_ref.detector import Detector
from almrr_ref.model import ALMRR
from almrr_ref.plus.evidence import Evidence, image_peaks
from almrr_ref.report.result import outline_level


def fitted(
    count: int = 6, held_out: int = 2, size: tuple[int, int] = (64, 64), **changes: object
) -> tuple[ALMRR, torch.Tensor]:
    """A tiny network whose memory holds all patches of its images, a quarter of the room to spare."""
    images, changes = good_images(count, size=size), {"image_size": size, "memory": count * 64, **changes}
    model = build(frm_input="memory", standardise="channel", score_fraction=0.005, **changes)
    samples = good_samples(images[: count - held_out])
    fit_features(model, samples)
    complete_memory(model, images[count - held_out :], samples, torch.arange(count))
    return model, images


@pytest.mark.parametrize("regime", ["seen", "new"])
@torch.no_grad()
def test_every_image_scores_as_if_memory_balance_and_level_lacked_it(regime: str) -> None:
    model, images = fitted()
    parts = [0, 0, 1, 2, 2, 3]
    good = [Good(image, i, part, i < 4) for i, (image, part) in enumerate(zip(images / 255, parts))]
    found, _ = calibrate(model, good, 0.2, regime)
    assert model.memory is not None
    assert model.evidence is not None
    patches, ids = model.memory.patches.clone(), model.memory.patch_parts

    def lacking(number: int) -> torch.Tensor:
        gone = [number] if regime == "seen" else [i for i, part in enumerate(parts) if part == parts[number]]
        model.memory.patches.copy_(torch.where(torch.isin(ids, torch.tensor(gone))[:, None], 1e3, patches))
        return model(images[number : number + 1] / 255).evidence

    def fit(others: list[torch.Tensor]) -> None:
        kinds = model.evidence.border_evened(torch.cat(others))
        model.evidence.fit(image_peaks(kinds), model.evidence.image_levels(kinds))

    evidence = [lacking(i) for i in range(6)]
    final_mean, final_level = model.evidence.mean.clone(), model.evidence.level.clone()
    for entry, value in zip(found.good, found.scores[regime]):
        fit([e for i, e in enumerate(evidence) if i != entry.image_id])
        logits = model.evidence(evidence[entry.image_id])
        expected = model.image_scores(torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").sigmoid())
        assert value == pytest.approx(float(expected), abs=1e-4)
    fit(evidence)
    torch.testing.assert_close(final_mean, model.evidence.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(final_level, model.evidence.level, atol=1e-3, rtol=1e-3)
    assert found.scores["new"] != found.scores["seen"], "its siblings would make no difference"


def test_of_many_images_those_that_may_count_for_new_parts_are_measured() -> None:
    good = [Good(Path(), i, i, i % 4 > 0) for i in range(8000)]
    new, seen = (drawn_from(good, regime, 0) for regime in ("new", "seen"))
    assert (sum(not entry.trained for entry in new), len(new), len(seen)) == (750, 1000, 1000)
    assert 200 < sum(not entry.trained for entry in seen) < 300
    assert set(drawn_from(good[:1000], "new", 0)) == set(good[:1000])


@torch.no_grad()
def test_a_single_part_is_not_left_out_for_nothing_would_remain(caplog: pytest.LogCaptureFixture) -> None:
    model, images = fitted()
    good = [Good(image, i, 0, i < 4) for i, image in enumerate(images / 255)]
    means = []
    for regime in ("seen", "new"):
        calibrate(model, good, 0.2, regime)
        assert model.evidence is not None
        means.append(float(model.evidence.mean[-1]))
    assert means[1] == pytest.approx(means[0], abs=1), "the balance is that of distances to no patch at all"
    assert "compared with itself" not in caplog.text, "the images differ, if not the parts"
    assert model.memory is not None
    model.memory.patch_parts.fill_(-1)  # as `store` leaves those of a single image
    calibrate(model, good, 0.2, "seen")
    assert "compared with itself: the threshold is too low" in caplog.text


@torch.no_grad()
def test_the_only_image_scores_under_the_balance_that_is_deployed() -> None:
    """There are no others whose balance it could have."""
    model, images = fitted()
    found, judge = calibrate(model, [Good(images[-1] / 255, -1, 9, False)], 0.2, "seen")
    assert found.scores["seen"] == pytest.approx(judge.predict(images[-1:] / 255)[1].tolist(), abs=1e-5)


@pytest.mark.parametrize(("threshold", "extend", "said"), [
    (0.0, False, "6 of 6 of the new ones were called defective until now; .* calibrate again with others"),
    (0.0, True, "6 of 6 of the new ones were called defective until now; .* take back a copy of the checkpoint"),
    (1.0, True, "0 of 6 of the new ones were called defective until now$"),
])  # fmt: skip
def test_images_of_another_product_do_not_become_good_without_a_word(
    threshold: float, extend: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Known images do not count."""
    model, images = fitted()
    model.threshold = threshold
    good = [Good(image, image_id, 0, False) for image_id in (-1, 3) for image in images / 255]
    with caplog.at_level("INFO"):
        say_alarms(model, good, extend)
    assert re.search(said, caplog.messages[-1])


def test_images_whose_stages_are_known_are_judged_the_same_without_being_read(tmp_path: Path) -> None:
    model, images = fitted()
    good = [Good(image, i, i, True) for i, image in enumerate(images / 255)]
    expected, _ = calibrate(model, good, 0.2, "seen")
    known = {i: model.stages(images[i : i + 1] / 255) for i in range(1, 6)}
    unread = [good[0], *(Good(tmp_path / "gone.png", i, i, True) for i in range(1, 6))]
    found, judge = calibrate(model, unread, 0.2, "seen", known=known)
    np.testing.assert_allclose(found.scores["seen"], expected.scores["seen"], atol=2e-5)
    assert 0 < len(simulate(model, judge, found, draws=1)) < 11 * len(STRENGTHS), "none where there is no image now"


@pytest.mark.parametrize("tile", [None, 48])
def test_scores_are_those_of_the_path_that_judges_new_images(tile: int | None, tmp_path: Path) -> None:
    """An image that the memory does not have: whole, and by tiles of which the image has several."""
    model, _ = fitted(tile=tile, balance=False)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(256, size=(90, 110, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    found, _ = calibrate(model, [Good(path, -1, i, False) for i, path in enumerate(paths)], 0.3, "seen")
    expected = {result.path: result.score for result in Detector(model).batch(paths)}
    for entry, value in zip(found.good, found.scores["seen"]):
        assert value == pytest.approx(expected[entry.picture], abs=2e-5)
    assert found.promises["seen"].images == 3, "one score for each image, not each tile"


def test_as_few_good_images_have_a_pixel_at_the_outlines_level_as_have_a_score_at_the_threshold() -> None:
    model, _ = fitted(balance=False)
    strangers = good_images(20, seed=7)
    calibrate(model, [Good(image, -1, i, False) for i, image in enumerate(strangers / 255)], 0.25, "seen")
    maps, scores = model.predict(strangers / 255)
    level = outline_level(model.threshold, model.outline_offset)
    peaks = model.smooth(maps).amax(dim=(1, 2, 3))
    assert model.outline_offset > 0
    assert int((peaks >= level).sum()) == int((scores >= model.threshold).sum()) > 0
    assert int((peaks >= model.threshold).sum()) > int((peaks >= level).sum())


def test_more_false_alarms_are_allowed_where_fewer_find_less_than_half_and_nobody_asked_for_a_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = fitted(balance=False)
    good = [Good(image, -1, i, False) for i, image in enumerate(good_images(30, seed=7) / 255)]
    found, _ = calibrate(model, good, 0.01, "seen")
    highest = sorted(found.scores["seen"], reverse=True)
    caplog.set_level("INFO")

    def threshold(rate: float | None, *simulated: float) -> float:
        drawn = [SimulatedDefect("hole", 1.0, value) for value in simulated]
        monkeypatch.setattr(verdict, "simulate", lambda *_: drawn)
        config = TrainConfig(false_positive_rate=rate, calibrate_for="seen")
        assert set_verdict(model, good, config).content["threshold"] == model.threshold
        return model.threshold

    between = (highest[0] + highest[2]) / 2
    assert threshold(None, 1.0, between, 0.0) == pytest.approx(highest[2], abs=1e-4), "one of three at 1%, two at 10%"
    assert "at 1% false alarms 33% of the simulated defects would be found, at 10% 67%: that is allowed" in caplog.text
    level = model.outline_offset
    calibrate(model, good, 0.1, "seen")
    assert model.outline_offset == level, "the level of the outlines goes with it"
    for rate, simulated in ((0.01, (1.0, between, 0.0)), (None, (1.0, 1.0, 0.0)), (None, (0.0, 0.0, 0.0)), (None, ())):
        assert threshold(rate, *simulated) == pytest.approx(highest[0], abs=1e-4)


def test_simulated_defects_are_drawn_at_every_strength_and_judged_alike_each_time() -> None:
    model, images = fitted(count=4, held_out=1, size=(64, 96))
    good = [Good(image, i, i, True) for i, image in enumerate(images / 255)]
    found, judge = calibrate(model, good, 0.2, "seen")
    simulated = simulate(model, judge, found, draws=1)
    assert simulated == simulate(model, judge, found, draws=1)
    found_new, judge_new = calibrate(model, good, 0.2, "new")
    assert simulated == simulate(model, judge_new, found_new, draws=1), "of parts with one image both regimes are one"
    assert len(simulated) == 11 * len(STRENGTHS)
    strong, weak = ([d.score for d in simulated if d.strength == s] for s in (1.0, 0.25))
    assert sum(a != b for a, b in zip(strong, weak)) == 11
    middle = sorted(d.score for d in simulated)[16]
    shares = detection_rates(simulated, middle)
    assert shares["all"] == pytest.approx(17 / 33)
    assert np.mean([shares["25%"], shares["50%"], shares["100%"]]) == pytest.approx(shares["all"])


def test_simulated_defects_lie_in_the_region_of_interest_or_are_left_out() -> None:
    clean, rng = np.full((64, 96, 3), 0.5), np.random.default_rng(0)
    roi = torch.zeros(64, 96, dtype=torch.bool)
    roi[:, :40] = True
    for kind in ("hole", "scratch", "chip"):
        damaged = damage_inside(clean, kind, rng, roi)
        assert damaged is not None
        assert (damaged[:, 40:] == clean[:, 40:]).all()
        assert (damaged[:, :40] != clean[:, :40]).any(axis=2).sum() > 10
    roi[:, 1:] = False
    assert damage_inside(clean, "hole", rng, roi) is None


def test_what_the_network_has_learned_is_added_where_it_was_trained_and_widens_the_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, images = fitted(count=12, held_out=4)
    good = [Good(image, i, i // 2, i < 8) for i, image in enumerate(images / 255)]
    plain, _ = calibrate(model, good, 0.1, "seen")
    told = []
    monkeypatch.setattr(good_scores, "training_shift", lambda *known: told.append(known[1:]) or (0.5, 0.2))
    found, _ = calibrate(model, good, 0.1, "seen")
    parts, trained = [entry.part_id for entry in found.good], [entry.trained for entry in found.good]
    assert told == [(trained, parts)] * 3, "of every image in either regime"
    for entry, score, raw in zip(found.good, found.scores["seen"], plain.scores["seen"]):
        added = np.log(score / (1 - score)) - np.log(raw / (1 - raw))
        assert added == pytest.approx(0.5 if entry.trained else 0, abs=1e-4)
    assert found.errors["seen"] == [0.2 if entry.trained else 0.0 for entry in found.good]
    wide, narrow = ((p.high - p.low) for p in (found.promises["seen"], plain.promises["seen"]))
    assert wide > narrow
    fitted_by, fit = [], Evidence.fit
    monkeypatch.setattr(
        Evidence, "fit", lambda self, peaks, levels: fitted_by.append(len(peaks)) or fit(self, peaks, levels)
    )
    found, _ = calibrate(model, good, 0.1, "new")
    aside = [i for i, entry in enumerate(found.good) if not entry.trained]
    basis = found.basis()
    assert basis["scores"] == tuple(found.scores["new"][i] for i in aside), "of new parts those kept aside alone tell"
    assert (basis["parts"], basis["errors"]) == (tuple(found.good[i].part_id for i in aside), (0.0,) * len(aside))
    assert basis["new_parts"]
    assert fitted_by[13:] == [3 if i in aside else 4 for i in range(12)] + [4], "the balance is theirs, too"
    assert (found.promises["new"].images, found.promises["seen"].images) == (len(aside), 12)
    caplog.set_level("INFO")
    stored = set_verdict(model, good, TrainConfig(false_positive_rate=0.1, calibrate_for="new")).scores
    assert "the 4 images of 2 parts kept aside count" in caplog.text
    assert len(stored["good_scores"]) == len(stored["intervals"]) == 4
    monkeypatch.setattr(good_scores, "training_shift", lambda *known: (0.0, 0.0))
    assert calibrate(model, good, 0.1, "new")[0].promises["new"].images == 12, "nothing learned: all of them tell"
