"""Standardised features against moments taken by hand."""

import dataclasses
import logging

import pytest
import torch
from tiny_network import TINY, build, good_images, good_samples

from almrr_ref.calibration.good_features import fit_features, settle_standardise
from almrr_ref.data.split import GoodImages
from almrr_ref.features import FeatureCache
from almrr_ref.plus.standardise import FeatureSums, Standardise, position_share


def test_per_channel_the_features_of_the_good_images_have_mean_0_and_deviation_1() -> None:
    model, images = build(standardise="channel"), good_images(5)
    fit_features(model, good_samples(images, batch_size=2))
    features = model(images / 255).features.transpose(0, 1).flatten(1)
    assert model.standardise is not None
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(448), atol=1e-4, rtol=0)
    alive = model.standardise.std > 2e-3 * model.standardise.std.max()
    torch.testing.assert_close(features.std(dim=1, correction=0)[alive], torch.ones(448)[alive], atol=1e-3, rtol=0)
    assert alive.any()


def test_per_position_mean_and_deviation_are_those_of_a_3x3_neighbourhood() -> None:
    model, images = build(standardise="position"), good_images(7)
    fit_features(model, good_samples(images, batch_size=3))
    assert model.standardise is not None
    stage = model.extractor.stages(images / 255)[1].double()  # 8x8, the second of three
    mean, deviation = model.standardise.by_stage()[1]
    channel = stage.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    floor = (0.3 * channel).clamp(min=1e-3 * float(model.standardise.std.max()))
    for row, column in ((3, 4), (0, 7)):  # at the border: the cells inside
        nearby = stage[:, :, max(0, row - 1) : row + 2, column - 1 : column + 2].transpose(0, 1).flatten(1)
        spread = nearby.std(dim=1, correction=0)
        assert (spread > floor).any()
        torch.testing.assert_close(mean[:, row, column].double(), nearby.mean(dim=1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(deviation[:, row, column].double(), spread.maximum(floor), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_the_share_of_a_position_is_that_of_the_pattern_that_all_images_have_and_not_the_borders(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern, halves = torch.randn(1, 40, 10, 18, generator=generator), (FeatureSums(), FeatureSums())
    for number in range(10):
        noise = torch.randn(1, 40, 10, 18, generator=generator)
        stage = share**0.5 * pattern + (1 - share) ** 0.5 * noise
        stage[:, :, 0] += 100  # what the padding does
        halves[number % 2].add([stage])
    assert position_share(halves) == pytest.approx(share, abs=0.03)
    roi = torch.ones(40, 72, dtype=torch.bool)
    roi[:, 36:] = False
    for half in halves:
        half.totals[0][:, :, :, 9:] = 50  # what hides the outside
        half.totals[0][:, :, :, 8] *= 30  # what its edge does
    assert position_share(halves, roi) == pytest.approx(share, abs=0.06)
    even = FeatureSums()
    even.add([torch.ones(1, 4, 5, 5)])
    assert position_share((even, even)) == 0


@pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
@pytest.mark.parametrize(
    ("contrast", "parts", "choice"),
    [(0.5, "own", "position"), (0.0, "own", "channel"), (0.5, "one", "channel"), (0.0, "pairs", "channel")],
)
def test_auto_standardises_per_position_where_positions_repeat_between_parts(
    contrast: float, parts: str, choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Twins are one part: that they are alike says nothing of the others."""
    caplog.set_level(logging.INFO, "almrr_ref")
    coarse = good_images(7, size=(8, 12))  # the last is what all have in common
    if parts == "pairs":
        coarse[:6] = coarse[:3].repeat_interleave(2, dim=0)
    mixed = coarse[:6] * (1 - contrast) + contrast * coarse[6:]
    images = torch.nn.functional.interpolate(mixed, (64, 96)).byte()
    ids = {"own": torch.arange(6), "one": torch.zeros(6, dtype=torch.long), "pairs": torch.arange(6) // 2}[parts]
    config = dataclasses.replace(TINY, image_size=(64, 96), standardise="auto")
    extractor, cache = build(image_size=(64, 96)).extractor, FeatureCache(images, torch.device("cpu"))
    settled = settle_standardise(config, GoodImages(images, ids, images[:0], ids, [], 0), extractor, cache)
    assert settled == dataclasses.replace(config, standardise=choice)
    assert f"standardise {choice}: " in caplog.text
    assert len(cache.cached) == 6  # the set-up pass looks at none of them again
    with pytest.raises(ValueError, match="--standardise auto is settled by training images"):
        build(standardise="auto")


def test_channels_are_standardised_by_what_lies_in_the_region() -> None:
    stage, roi, sums = torch.rand(6, 3, 4, 6), torch.zeros(16, 24, dtype=torch.bool), FeatureSums()
    roi[:, :12] = True
    sums.add([stage])
    standardise = Standardise([3], [(1, 1)])
    standardise.fit(sums, roi)
    inside = standardise([stage])[0][:, :, :, :3].transpose(0, 1).flatten(1)
    torch.testing.assert_close(inside.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std(dim=1, correction=0), torch.ones(3))
