"""Simulated anomalies: Eq. (1) and the published distribution of the masks."""

import math

import numpy as np
import pytest
import torch
from perlin_oracle import scalar_perlin
from scipy import ndimage, stats

from almrr_ref.anomalies import draw_mask, perlin_mask, simulate_anomaly


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_equals_equation_1_for_some_alpha_inside_and_the_image_outside() -> None:
    image, texture = torch.rand(3, 37, 61, generator=generator(1)), torch.rand(3, 37, 61, generator=generator(2))
    for seed in range(10):
        augmented, mask = simulate_anomaly(image, texture, generator(seed))
        inside = (mask > 0).expand_as(image)
        difference = (texture - image)[inside].double()
        alpha = (difference @ (augmented - image)[inside].double()) / (difference @ difference)
        expected = (1 - mask) * image + (1 - alpha) * (mask * image) + alpha * (mask * texture)
        assert mask.shape == (1, 37, 61)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(augmented, expected.float(), atol=1e-6, rtol=0)
        assert torch.equal(augmented[~inside], image[~inside])


def test_alpha_is_uniform_between_0_2_and_1() -> None:
    black, white, draws = torch.zeros(3, 32, 32), torch.ones(3, 32, 32), generator(4)
    alphas = [simulate_anomaly(black, white, draws)[0].max().item() for _ in range(600)]
    assert max(alphas) <= 1
    assert stats.kstest(alphas, stats.uniform(0.2, 0.8).cdf).pvalue > 0.01


def test_texture_of_another_size_is_resized_and_the_input_left_alone() -> None:
    image, texture = torch.zeros(3, 33, 48), torch.zeros(3, 100, 70)
    texture[:, :, 35:] = 1
    for seed in range(20):
        augmented, mask = simulate_anomaly(image, texture, generator(seed), alpha_range=(1.0, 1.0))
        assert augmented[:, :, :23].sum() == image.sum() == 0
        torch.testing.assert_close(augmented[:, :, 25:], mask[:, :, 25:].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "image: expected a float tensor"),
        ({"texture": torch.zeros(1, 32, 32)}, "texture: expected a float tensor"),
        ({"image": torch.zeros(3, 7, 32)}, "too small"),
        ({"alpha_range": (0.5, 1.2)}, "alpha_range"),
        ({"threshold": 1.0}, "threshold"),
    ],
)
def test_unusable_images_and_impossible_ranges_are_refused(changes: dict, complaint: str) -> None:
    good = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match=complaint):
        simulate_anomaly(**{"image": good, "texture": good, "generator": generator(), **changes})


def test_one_mask_in_twenty_is_empty_and_drawn_again_and_the_others_cover_five_percent() -> None:
    draws = generator(7)
    masks = torch.cat([draw_mask((256, 256), draws, threshold=0.5, max_exponent=5) for _ in range(1200)])
    cover = masks.float().mean(dim=(1, 2))
    assert (cover == 0).float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert cover[cover > 0].mean().item() == pytest.approx(0.0525, abs=0.003)
    assert all(perlin_mask((8, 9), draws).any() for _ in range(100))
    shown = [simulate_anomaly(torch.zeros(3, 256, 256), torch.zeros(3, 8, 8), draws)[1].mean() for _ in range(200)]
    assert np.mean(shown) == pytest.approx(0.0525, abs=0.008)


def test_masks_cover_as_those_of_scipys_rotation_of_scalar_noise() -> None:
    """At 32x32, where a scalar version is quick enough; the rotation and its zeros come from scipy."""
    rng, draws = np.random.default_rng(8), generator(8)
    ours = torch.cat([draw_mask((32, 32), draws, threshold=0.5, max_exponent=3) for _ in range(600)]).numpy()
    theirs = np.zeros((200, 32, 32), dtype=bool)
    for index in range(len(theirs)):
        cells = 2 ** rng.integers(0, 4, 2)
        noise = scalar_perlin((32, 32), rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1)))
        theirs[index] = ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1) > 0.5
    assert stats.ks_2samp(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2))).pvalue > 0.01
    assert stats.ks_2samp(*([ndimage.label(mask)[1] for mask in drawn] for drawn in (ours, theirs))).pvalue > 0.01
