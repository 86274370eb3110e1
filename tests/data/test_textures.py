"""Texture changes and resampling against Pillow and against their formulas."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from almrr_ref.data import texture_changes as changes
from almrr_ref.run.random import integer, uniform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(size: int = 24) -> torch.Tensor:
    """A smooth colour image whose values are multiples of 1/255."""
    y, x = torch.meshgrid(torch.linspace(0, 24, size), torch.linspace(0, 24, size), indexing="ij")
    levels = torch.stack([60 + 6 * x, 30 + 4 * y + 3 * x, 200 - 5 * y + (x * y) % 23])
    return levels.clamp(0, 255).round() / 255


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("seed", range(4))
def test_changes_agree_with_pillow(seed: int) -> None:
    image, level = photo(128), 1 / 255
    factor, cutoff = uniform(generator(seed), 0, 2), uniform(generator(seed), 0, 20)
    cases = [
        (changes.sharpness, ImageEnhance.Sharpness(to_pil(image)).enhance(factor), 2 * level),
        (changes.posterize, ImageOps.posterize(to_pil(image), integer(generator(seed), 1, 9)), level / 2),
        (changes.invert, ImageOps.invert(to_pil(image)), level / 2),
        (changes.autocontrast, ImageOps.autocontrast(to_pil(image), cutoff), 2 * level),
        (changes.equalize, ImageOps.equalize(to_pil(image)), 4 * level),  # Pillow rounds its step down
    ]
    for change, expected, tolerance in cases:
        result = change(image, generator(seed))[:, 1:-1, 1:-1]  # Pillow's filters leave the rim alone
        error = (result - from_pil(expected)[:, 1:-1, 1:-1]).abs().max()
        assert error <= tolerance, f"{change.__name__} is {error * 255:.1f} levels off"


def test_solarize_agrees_with_pillow_and_is_skipped_half_the_time() -> None:
    results = [changes.solarize(photo(), generator(seed)) for seed in range(60)]
    solarized = [seed for seed in range(60) if not torch.equal(results[seed], photo())]
    assert len(solarized) == pytest.approx(30, abs=10)
    for seed in solarized:
        threshold = math.floor(uniform(generator(seed), 32, 128)) + 1  # Pillow inverts from its threshold on
        torch.testing.assert_close(results[seed], from_pil(ImageOps.solarize(to_pil(photo()), threshold)))


def test_gamma_and_brightness_follow_their_formulas() -> None:
    image, draws = photo(), generator(28)
    exponents = [uniform(draws, 0.5, 2) for _ in range(3)]
    expected = image.numpy() ** np.array(exponents, dtype=np.float32)[:, None, None]
    np.testing.assert_allclose(changes.gamma(image, generator(28)).numpy(), expected, rtol=1e-5)

    change = torch.stack([changes.brightness(image, draws) for _ in range(200)]) - image
    assert 0.2 < change.abs().max() < 0.2 + 30 / 255  # at the most 0.2 * 1 + 30 / 255
    assert change.mean().abs() < 0.02


def test_rotation_turns_the_way_pillow_does_and_reflects_the_border() -> None:
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 49, 49, generator=generator(24)), 7, 1)[0]
    turned = changes.resample(image, 30)
    expected = from_pil(to_pil(image).rotate(30, resample=Image.Resampling.BILINEAR))
    centre = slice(12, 31)
    assert (turned - expected)[:, centre, centre].abs().max() < 3 / 255
    assert turned.min() >= image.min() - 1e-6
    torch.testing.assert_close(changes.resample(image, 90), image.rot90(1, (1, 2)), atol=1e-5, rtol=0)
    line = torch.zeros(3, 41, 81)  # right angles are kept where the image is not square
    line[:, 20, 30:51] = 1
    turned = changes.resample(line, 90)[0]
    assert (turned[10:31, 40].min().item(), turned.sum().item()) == pytest.approx((1, 21), abs=0.1)


def test_turning_the_hue_keeps_gray_gray_and_a_third_of_a_circle_permutes_the_channels() -> None:
    gray, colour = torch.rand(1, 5, 5, generator=generator(25)).expand(3, 5, 5), photo()
    torch.testing.assert_close(changes.turn_colour(gray, 1.0, 1.5), gray)
    torch.testing.assert_close(changes.turn_colour(colour, 2 * math.pi / 3, 1.0), colour[[2, 0, 1]])
    mean = colour.mean(dim=0, keepdim=True).expand(3, -1, -1)
    torch.testing.assert_close(changes.turn_colour(colour, 0.3, 0.0), mean)


@pytest.mark.parametrize("change", changes.CHANGES, ids=lambda change: change.__name__)
def test_every_change_stays_in_range_changes_something_and_leaves_its_input_alone(change: Callable) -> None:
    image, draws = photo(), generator(26)
    before = image.clone()
    results = torch.stack([change(image, draws) for _ in range(20)])
    assert torch.equal(image, before)
    assert results.shape == (20, 3, 24, 24)
    assert 0 <= results.min() <= results.max() <= 1 + 1e-6
    assert sum(not torch.equal(result, image) for result in results) >= 5
    for flat in (torch.zeros(3, 9, 9), torch.ones(3, 9, 9)):
        assert change(flat, draws).isfinite().all()


def test_three_different_changes_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    recorders = tuple(lambda texture, _, index=index: calls.append(index) or texture for index in range(10))
    monkeypatch.setattr(changes, "CHANGES", recorders)
    draws = generator(27)
    for _ in range(200):
        changes.change_texture(photo(), draws)
    triples = np.array(calls).reshape(200, 3)
    assert all(len(set(triple)) == 3 for triple in triples)
    assert stats.chisquare(np.bincount(triples.ravel(), minlength=10)).pvalue > 0.01
