"""Standardised features against moments taken by hand."""

import torch
from tiny_network import build, good_images, good_samples

from almrr_ref.good_features import fit_features


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
