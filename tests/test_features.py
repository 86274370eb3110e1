"""The feature extractor: normalisation, brightness, resize by hand-written weights."""

import dataclasses

import numpy as np
import pytest
import torch

from almrr_ref.calibration.good_features import settle_brightness
from almrr_ref.config import ModelConfig
from almrr_ref.features import FeatureCache, FeatureExtractor, brightness, cells_inside, resize


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    with pytest.warns(UserWarning, match="random weights"):
        return FeatureExtractor("resnet18", (1, 2, 3), "random", (7, 7))


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Bilinear weights of one axis by definition: centre (i + 1/2) n_in / n_out - 1/2, clamped at the border."""
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(int(centre), n_in - 1)
        high = min(low + 1, n_in - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, high] += centre - low
    return matrix


@pytest.mark.parametrize("shape", [(3, 5), (5, 7), (7, 5), (9, 20)])
def test_resize_is_bilinear_without_aligned_corners(shape: tuple[int, int]) -> None:
    x = torch.rand(1, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows, columns = (resize_matrix(side, 7) for side in shape)
    np.testing.assert_allclose(resize(x, (7, 7)).numpy(), np.einsum("yh,bchw,xw->bcyx", rows, x.numpy(), columns))


def test_features_are_the_stages_of_the_normalised_image_resized_and_concatenated(
    extractor: FeatureExtractor,
) -> None:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0)).requires_grad_()
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = torch.stack([(images[:, c] - means[c]) / deviations[c] for c in range(3)], dim=1)
    stages = extractor.stages(images)
    for stage, expected in zip(stages, extractor.backbone(normalised), strict=True):
        torch.testing.assert_close(stage, expected, rtol=1e-5, atol=1e-5)
    assert extractor.channels == (64, 128, 256)
    assert torch.equal(extractor(images), torch.cat([resize(stage, (7, 7)) for stage in stages], dim=1))
    assert not extractor(images).requires_grad


def test_unusable_input_is_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"floating-point images in \[0, 1\], got torch.uint8; divide by 255 first"):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(b, 3, h, w\), got \(1, 1, 32, 32\); convert them to RGB"):
        extractor(torch.zeros(1, 1, 32, 32))


@pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
def test_the_cache_gives_the_same_stages_kept_computed_anew_and_beyond_its_budget() -> None:
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor, passes = FeatureExtractor("resnet18", (1, 2), "random", (16, 16)), []
    extractor.backbone.register_forward_hook(lambda _m, inputs, _o: passes.append(len(inputs[0])))
    one = sum(stage.nbytes for stage in extractor.stages(torch.zeros(1, 3, 64, 64)))
    passes.clear()
    cache = FeatureCache(images, torch.device("cpu"), budget=2 * one)
    first, again = (cache.stages([2, 0, 3], extractor.stages) for _ in range(2))
    assert passes == [1, 1, 1, 1]  # the third image finds no room
    expected = [extractor.stages(images[i : i + 1].float() / 255) for i in (2, 0, 3)]
    for a, b, *singles in zip(first, again, *expected):
        assert torch.equal(a, b)
        assert torch.equal(a, torch.cat(singles))
    cache.change(lambda stages: [-stage for stage in stages])
    changed = cache.stages([0], extractor.stages)
    assert torch.equal(changed[0], -first[0][1:2])


def test_brightness_is_the_median_over_a_grid_of_32_cells_a_side_of_what_lies_in_the_region() -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    cells = images.numpy().mean(axis=1).reshape(2, 32, 2, 32, 3)
    expected = np.sort(cells.mean(axis=(2, 4)).reshape(2, -1))[:, 512]
    np.testing.assert_allclose(brightness(images).numpy(), expected, rtol=1e-5)
    roi = torch.zeros(64, 96, dtype=torch.bool)
    roi[3:40, 5:50] = True
    inside = np.where(roi.numpy().reshape(32, 2, 32, 3), cells, np.nan)[:, 1:20, :, 1:17]  # 19 x 16 cells
    expected = np.sort(np.nanmean(inside, axis=(2, 4)).reshape(2, -1))[:, 152]
    np.testing.assert_allclose(brightness(images, roi).numpy(), expected, rtol=1e-5)
    assert len(cells_inside(roi)[0]) == 19 * 16
    stained = images.clone()
    stained[:, :, :30, :60] = 0  # three tenths
    assert float((brightness(stained) / brightness(images)).min()) > 0.9


@pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
def test_images_are_brought_to_one_brightness_but_dark_ones_are_not_blown_up() -> None:
    plain, levelled = (FeatureExtractor("resnet18", (1,), "random", (16, 16), None, level) for level in (None, 0.4))
    levelled.backbone.load_state_dict(plain.backbone.state_dict())
    images = 0.3 + 0.5 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1] *= 0.8  # a weaker lamp
    images[2] *= 0.01
    scale = [0.45 / (float(brightness(image[None])) + 0.05) for image in images]
    expected = plain.stages(images * torch.tensor(scale)[:, None, None, None])
    torch.testing.assert_close(levelled.stages(images), expected)
    after = [float(brightness(image[None])) * factor for image, factor in zip(images, scale)]
    assert after[:2] == [pytest.approx(0.4, abs=0.02)] * 2
    assert after[2] < 0.06


def test_the_training_images_say_which_brightness(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.stack([torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (51, 102, 204)])
    config = ModelConfig(image_size=32, level_brightness=True)
    with caplog.at_level("INFO", "almrr_ref"):
        assert settle_brightness(config, images).brightness == 0.4
    assert "brightness 0.4, the middle of good images (0.2 to 0.8)" in caplog.text
    for other in (ModelConfig(), dataclasses.replace(config, tile=64), dataclasses.replace(config, brightness=0.3)):
        assert settle_brightness(other, images) is other
