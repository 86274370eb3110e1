"""Textures: the changes against Pillow and their formulas; a folder of textures; textures of the good images."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from trust_cases import write_images

from almrr_ref.data import textures as changes
from almrr_ref.data.textures import ImageTextures, MixedTextures, TextureFolder, texture_source
from almrr_ref.run.random import integer, uniform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(size: int = 24) -> torch.Tensor:
    """A smooth colour image whose values are multiples of 1/255."""
    y, x = torch.meshgrid(torch.linspace(0, 24, size), torch.linspace(0, 24, size), indexing="ij")
    levels = torch.stack([60 + 6 * x, 30 + 4 * y + 3 * x, 200 - 5 * y + (x * y) % 23])
    return levels.clamp(0, 255).round() / 255


def gray_images() -> torch.Tensor:
    grain = torch.randint(-20, 21, (4, 48, 48), generator=generator())
    waves = 110 + 40 * torch.sin(torch.arange(48) / 3.0) + grain
    return waves.to(torch.uint8)[:, None].expand(4, 3, 48, 48).contiguous()


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("seed", range(3))
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


def test_gamma_brightness_and_hue_follow_their_formulas() -> None:
    image, draws = photo(), generator(28)
    exponents = [uniform(draws, 0.5, 2) for _ in range(3)]
    expected = image.numpy() ** np.array(exponents, dtype=np.float32)[:, None, None]
    np.testing.assert_allclose(changes.gamma(image, generator(28)).numpy(), expected, rtol=1e-5)
    change = torch.stack([changes.brightness(image, draws) for _ in range(200)]) - image
    assert 0.2 < change.abs().max() < 0.2 + 30 / 255  # at the most 0.2 * 1 + 30 / 255
    assert change.mean().abs() < 0.02
    gray = image[:1].expand(3, -1, -1)
    torch.testing.assert_close(changes.turn_colour(gray, 1.0, 1.5), gray)
    torch.testing.assert_close(changes.turn_colour(image, 2 * math.pi / 3, 1.0), image[[2, 0, 1]])
    mean = image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    torch.testing.assert_close(changes.turn_colour(image, 0.3, 0.0), mean)


def test_rotation_turns_the_way_pillow_does_and_reflects_the_border() -> None:
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 49, 49, generator=generator(24)), 7, 1)[0]
    turned = changes.resample(image, 30)
    expected = from_pil(to_pil(image).rotate(30, resample=Image.Resampling.BILINEAR))
    assert (turned - expected)[:, 12:31, 12:31].abs().max() < 3 / 255
    assert turned.min() >= image.min() - 1e-6
    line = torch.zeros(3, 41, 81)  # right angles are kept where the image is not square
    line[:, 20, 30:51] = 1
    turned = changes.resample(line, 90)[0]
    assert (turned[10:31, 40].min().item(), turned.sum().item()) == pytest.approx((1, 21), abs=0.1)


@pytest.mark.parametrize("change", changes.CHANGES, ids=lambda change: change.__name__)
def test_every_change_stays_in_range_changes_something_and_leaves_its_input_alone(change: Callable) -> None:
    image, draws = photo(), generator(26)
    before = image.clone()
    results = torch.stack([change(image, draws) for _ in range(20)])
    assert torch.equal(image, before)
    assert results.shape == (20, 3, 24, 24)
    assert 0 <= results.min() <= results.max() <= 1 + 1e-6
    assert sum(not torch.equal(result, image) for result in results) >= 5
    assert all(change(flat, draws).isfinite().all() for flat in (torch.zeros(3, 9, 9), torch.ones(3, 9, 9)))


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


def test_a_folder_is_read_recursively_without_hidden_files(tmp_path: Path) -> None:
    write_images(tmp_path / "banded" / "deep", 2)
    write_images(tmp_path / ".cache", 1)
    (tmp_path / "._texture.png").write_bytes(b"fork")
    source, draws = TextureFolder(tmp_path, (32, 32), changes=0), generator(15)
    assert [path.name for path in source.paths] == ["000.png", "001.png"]
    drawn = {(source.sample(draws) * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for _ in range(40)}
    assert drawn == {np.asarray(Image.open(path)).tobytes() for path in source.paths}


def test_broken_textures_are_named_once_and_draws_do_not_depend_on_which_are_known(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "a_broken.jpg").write_bytes(b"not an image")
    fresh, used = TextureFolder(tmp_path, (16, 16)), TextureFolder(tmp_path, (16, 16))
    draws, first, second = generator(17), generator(18), generator(18)
    with pytest.warns(UserWarning, match=r"a_broken\.jpg") as caught:
        assert len([used.sample(draws) for _ in range(20)]) == 20
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"a_broken\.jpg"):
        assert all(torch.equal(fresh.sample(first), used.sample(second)) for _ in range(20))


def test_folders_without_a_readable_texture_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in this folder"):
        TextureFolder(tmp_path, (16, 16))
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"bad\.png"), pytest.raises(ValueError, match=r"none of the 1 .*bad\.png"):
        TextureFolder(tmp_path, (16, 16)).sample(generator())


def test_textures_of_images_vary_and_are_visibly_other_and_gray_nine_times_in_ten_where_these_are() -> None:
    images, draws = gray_images(), generator(21)
    source = ImageTextures(images)
    drawn = torch.stack([source.sample(draws) for _ in range(300)])
    assert drawn.shape == (300, 3, 48, 48)
    assert 0 <= drawn.min() < drawn.max() <= 1
    shifts = drawn.mean(dim=(1, 2, 3)) - images.float().mean() / 255
    assert (shifts.abs() > 0.06).float().mean() > 0.9
    assert (shifts > 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert drawn.std(dim=(2, 3)).mean(dim=1).quantile(0.05) > 0.01
    coloured = ((drawn.amax(dim=1) - drawn.amin(dim=1)).amax(dim=(1, 2)) > 0.01).sum().item()
    assert stats.binomtest(coloured, 300, 0.1).pvalue > 0.01
    flat = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 37, 61)
    drawn = torch.stack([ImageTextures(flat).sample(draws) for _ in range(30)])
    assert drawn.isfinite().all()
    assert drawn.shape == (30, 3, 37, 61)
    assert len({texture.argmax(dim=0).mode().values[0].item() for texture in drawn}) > 1, "hues that vary"


@pytest.mark.parametrize("colour", [False, True])
def test_gray_images_get_gray_textures_from_a_folder_only_where_sources_are_mixed(tmp_path: Path, colour: bool) -> None:
    write_images(tmp_path, 1)
    images = gray_images()
    images[0, 0] += 100 * colour
    mixed = texture_source(str(tmp_path), images, mixed=True)
    assert isinstance(mixed, MixedTextures)
    texture = mixed.sources[0].sample(generator())
    assert texture.shape == (3, 48, 48)
    assert 0 <= texture.min() < texture.max() <= 1
    assert torch.equal(texture, texture[:1].expand(3, -1, -1)) is not colour
    assert not texture_source(str(tmp_path), images, mixed=False).gray
    assert isinstance(texture_source(None, images, mixed=True), ImageTextures)
