"""How the kinds of evidence are weighed against each other, and what the image score makes of the map."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_model import TINY, good_samples

from almrr_ref.calibrate import calibrate, fit_evidence, fit_features
from almrr_ref.deploy.inference import Prediction, found_region
from almrr_ref.model import ALMRR
from almrr_ref.plus.evidence import LEAST_STD, Evidence, image_peaks

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")

SMALL = dataclasses.replace(
    TINY, frm_input="projection", standardise="channel", distance_weight=0.5, memory=5, balance=True, score_share=0.005
)


def fitted(**changes: object) -> tuple[ALMRR, torch.Tensor]:
    """A network with statistics, memory and evidence of twelve random images, and the images, uint8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 64, 64), generator=generator, dtype=torch.uint8)
    model = ALMRR(dataclasses.replace(SMALL, **changes)).eval()  # type: ignore[arg-type]
    fit_features(model, good_samples(images))
    fit_evidence(model, images, good_samples(images[:2]))
    return model, images


def test_unbalanced_evidence_is_the_weighted_mean() -> None:
    evidence = Evidence(dataclasses.replace(SMALL, balance=False, memory_weight=2.0))
    kinds = torch.tensor([8.0, -2.0, 4.0])[None, :, None, None].expand(1, 3, 2, 2)
    torch.testing.assert_close(evidence(kinds), torch.full((1, 1, 2, 2), (8 - 0.5 * 2 + 2 * 4) / 3.5))
    assert Evidence(dataclasses.replace(SMALL, memory=0, distance_weight=0.0)).weights == [1.0]


def test_balanced_evidence_counts_in_deviations_of_the_peaks() -> None:
    """Whatever unit a kind has, it says the same: peaks of good images have mean 0 and deviation 1 in each."""
    peaks = np.random.default_rng(0).normal(size=(40, 3)) * (0.3, 5, 40) + (1, -7, 300)
    evidence = Evidence(SMALL)
    evidence.fit(torch.from_numpy(peaks).float())
    kinds = np.random.default_rng(1).normal(size=(2, 3, 4, 4)) * 10
    scaled = (kinds - peaks.mean(axis=0)[:, None, None]) / peaks.std(axis=0)[:, None, None]
    expected = np.average(scaled, axis=1, weights=[1, 0.5, 1])[:, None]
    np.testing.assert_allclose(evidence(torch.from_numpy(kinds).float()).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_equal_peaks_do_not_drown_the_other_kinds() -> None:
    evidence = Evidence(SMALL)
    evidence.fit(torch.ones(1, 3))
    assert evidence.std.tolist() == pytest.approx([LEAST_STD] * 3)


def test_a_peak_is_the_mean_of_the_highest_half_percent() -> None:
    kinds = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    expected = np.sort(kinds.flatten(2).numpy(), axis=2)[:, :, -4:].mean(axis=2)  # 0.5% of 900, rounded to even
    np.testing.assert_allclose(image_peaks(kinds).numpy(), expected, rtol=1e-6)
    assert image_peaks(kinds[:, :, :3, :3]).equal(kinds[:, :, :3, :3].amax((2, 3)))


def test_fitting_uses_images_kept_aside_unless_they_are_few() -> None:
    model, images = fitted()
    fit_evidence(model, images[:10], good_samples(images))
    kept_aside = model.evidence.mean.clone()
    fit_evidence(model, images[:9], good_samples(images))  # nine are too few: the training images tell
    few = model.evidence.mean.clone()
    assert not torch.allclose(few, kept_aside)
    assert model.memory is not None
    model.memory.source.fill_(-1)  # now the images' own patches count
    fit_evidence(model, images[:9], good_samples(images))
    assert float(model.evidence.mean[2]) < float(few[2])  # third: the memory


def test_a_threshold_from_training_images_does_not_count_their_own_patches() -> None:
    model, images = fitted(memory=12 * 64)  # all patches: with its own, every image is at a distance of 0
    samples = good_samples(images, false_positive_rate=0.0)
    known, without = calibrate(model, images, samples), calibrate(model, images[:0], samples)
    assert without > known + 0.01


def test_peaks_of_the_fitted_images_are_balanced_in_the_whole_network() -> None:
    model, images = fitted()
    stages = model.standardised(model.extractor.stages(images.float() / 255))
    features = model.extractor.join(stages)
    with torch.no_grad():
        kinds = model.evidence_maps(model.frm_view(features, model.mfrm(features)), model.nearest(stages))
    peaks = image_peaks((kinds - model.evidence.mean[:, None, None]) / model.evidence.std[:, None, None])
    torch.testing.assert_close(peaks.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
    free = model.evidence.std > LEAST_STD
    torch.testing.assert_close(peaks.std(dim=0, correction=0)[free], torch.ones(int(free.sum())), atol=1e-3, rtol=0)
    assert free.any()


def test_the_deployed_form_weighs_alike() -> None:
    model, images = fitted()
    batch = images[:4].float() / 255
    for plain, fused in zip(model.predict(batch), model.fuse().predict(batch)):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)


def test_the_score_is_the_mean_of_the_highest_pixels() -> None:
    model = ALMRR(dataclasses.replace(SMALL, score_kernel=1))
    maps = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = np.sort(maps.flatten(1).numpy(), axis=1)[:, -20:].mean(axis=1)  # 0.5% of 4,096
    np.testing.assert_allclose(model.image_scores(maps).numpy(), expected, rtol=1e-6)
    tiled = torch.rand(1, 1, 200, 300, generator=torch.Generator().manual_seed(1))  # as many pixels as of one tile
    expected = np.sort(tiled.flatten().numpy())[-20:].mean()
    assert float(model.image_scores(tiled)) == pytest.approx(expected, rel=1e-6)
    assert float(model.image_scores(maps[:, :, :3, :3])[0]) == pytest.approx(float(maps[0, :, :3, :3].mean()))


def test_the_mean_filter_comes_before_the_highest_pixels() -> None:
    model = ALMRR(SMALL)
    maps = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    total, count = (
        ndimage.uniform_filter(values, 9, mode="constant")
        for values in (maps[0, 0].double().numpy(), np.ones((64, 64)))
    )
    expected = np.sort((total / count).ravel())[-20:].mean()
    assert float(model.image_scores(maps)) == pytest.approx(expected, rel=1e-5)


def test_the_score_leaves_out_the_margin_of_the_smoothed_map() -> None:
    model = ALMRR(dataclasses.replace(SMALL, score_margin=12))
    maps = torch.zeros(3, 1, 64, 96)
    maps[0, 0, :6], maps[1, 0, 20:40, 90:], maps[2, 0, 12:24, 12:24] = 1.0, 1.0, 1.0
    scores = model.image_scores(maps)  # the filter of 9 pixels reaches 4 pixels inward
    assert scores[:2].tolist() == [0, 0]
    assert float(scores[2]) > 0.9
    whole = model.smooth(maps)[:, 0, 12:-12, 12:-12].flatten(1).numpy()
    np.testing.assert_allclose(scores.numpy(), np.sort(whole, axis=1)[:, -20:].mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="score-margin"):
        dataclasses.replace(SMALL, score_margin=32)


def test_a_region_is_outlined_only_where_the_score_says_defective() -> None:
    """A mean of the highest pixels can lie below the threshold while a few of them lie above."""
    model = ALMRR(dataclasses.replace(SMALL, score_kernel=1))
    model.threshold = 0.5
    anomaly_map = torch.zeros(1, 64, 64)
    anomaly_map[0, 3, 4:8] = 0.9
    for pixels, found in ((4, 0), (16, 16)):
        anomaly_map[0, 10 : 10 + (pixels - 4) // 4, 4:8] = 0.9
        score = float(model.image_scores(anomaly_map[None]))
        prediction = Prediction(Path("x.png"), torch.zeros(3, 64, 64, dtype=torch.uint8), anomaly_map, score, (64, 64))
        region, area, box = found_region(model, prediction)
        assert (score >= 0.5, area, int(region.sum())) == (found > 0, found, found)
        assert (box is None) == (found == 0)


def test_a_region_in_the_margin_alone_is_not_outlined() -> None:
    model = ALMRR(dataclasses.replace(SMALL, score_kernel=1, score_margin=8, score_share=0.0))
    model.threshold = 0.5
    anomaly_map = torch.zeros(1, 64, 96)
    anomaly_map[0, :4, 20:30] = 0.9  # in the margin alone
    anomaly_map[0, 56:, 40:44] = 0.9  # in it as well,
    anomaly_map[0, 50:56, 44:46] = 0.9  # but from the inside, over a corner
    score = float(model.image_scores(anomaly_map[None]))
    region, area, box = found_region(
        model, Prediction(Path("x.png"), torch.zeros(3, 64, 96, dtype=torch.uint8), anomaly_map, score, (64, 96))
    )
    assert (area, box) == (8 * 4 + 6 * 2, (40, 50, 46, 64))
    assert region.dtype == torch.bool
    assert int(region.sum()) == area
    anomaly_map[0, 50:56, 44:46] = 0.0
    score = float(model.image_scores(anomaly_map[None]))
    prediction = Prediction(Path("x.png"), torch.zeros(3, 64, 96, dtype=torch.uint8), anomaly_map, score, (64, 96))
    assert (score, *found_region(model, prediction)[1:]) == (0, 0, None)
