"""Texture sources: a folder of textures, and the good images themselves."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from almrr_ref.data.textures import ImageTextures, MixedTextures, TextureFolder, texture_source


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_textures(folder, count: int, side: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"texture{index}.png")


def gray_images(n: int = 4, size: int = 48) -> torch.Tensor:
    grain = torch.randint(-20, 21, (n, size, size), generator=generator())
    waves = 110 + 40 * torch.sin(torch.arange(size) / 3.0) + grain
    return waves.to(torch.uint8)[:, None].expand(n, 3, size, size).contiguous()


def test_folder_is_read_recursively_without_hidden_files(tmp_path):
    write_textures(tmp_path / "banded" / "deep", 2)
    write_textures(tmp_path / ".cache", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._texture.png").write_bytes(b"fork")
    source, draws = TextureFolder(tmp_path, 20, changes=0), generator(15)
    assert [path.name for path in source.paths] == ["texture0.png", "texture1.png"]
    drawn = {(source.sample(draws) * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for _ in range(40)}
    assert drawn == {np.asarray(Image.open(path)).tobytes() for path in source.paths}


def test_textures_are_changed_floats_of_the_size_asked_for_and_gray_if_asked(tmp_path):
    write_textures(tmp_path, 2)
    texture, gray = (TextureFolder(tmp_path, 24, gray=gray).sample(generator()) for gray in (False, True))
    assert texture.shape == gray.shape == (3, 24, 24)
    assert texture.dtype == torch.float32
    assert 0 <= texture.min() < texture.max() <= 1
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    assert not torch.equal(texture[0], texture[1])


def test_broken_textures_are_named_once_and_draws_do_not_depend_on_which_are_known(tmp_path):
    write_textures(tmp_path, 2)
    broken = tmp_path / "a_broken.jpg"
    broken.write_bytes(b"not an image")
    fresh, used = TextureFolder(tmp_path, 16), TextureFolder(tmp_path, 16)
    draws, first, second = generator(17), generator(18), generator(18)
    with pytest.warns(UserWarning, match=r"a_broken\.jpg") as caught:
        assert len([used.sample(draws) for _ in range(20)]) == 20
    assert len(caught) == 1
    assert list(used.broken) == [broken]
    with pytest.warns(UserWarning, match=r"a_broken\.jpg"):
        assert all(torch.equal(fresh.sample(first), used.sample(second)) for _ in range(20))


def test_folders_without_a_readable_texture_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        TextureFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="no image in this folder"):
        TextureFolder(tmp_path, 16)
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"bad\.png"), pytest.raises(ValueError, match=r"none of the 1 .*bad\.png"):
        TextureFolder(tmp_path, 16).sample(generator())


def test_cache_is_bounded_and_used(tmp_path):
    write_textures(tmp_path, 5)
    source, draws = TextureFolder(tmp_path, 16, cache_bytes=2 * 3 * 16 * 16 + 1), generator(19)
    for _ in range(40):
        source.sample(draws)
    assert len(source._cache) == 2
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="texture left out"):
        assert len([source.sample(draws) for _ in range(40)]) == 40
    assert len(source.broken) == 3


def test_image_textures_of_gray_images_are_gray_nine_times_in_ten():
    source, draws = ImageTextures(gray_images()), generator(20)
    drawn = [source.sample(draws) for _ in range(300)]
    coloured = sum((texture.amax(dim=0) - texture.amin(dim=0)).max().item() > 0.01 for texture in drawn)
    assert stats.binomtest(coloured, 300, 0.1).pvalue > 0.01


def test_image_textures_differ_visibly_and_vary():
    images = gray_images()
    level, source, draws = images.float().mean().item() / 255, ImageTextures(images), generator(21)
    drawn = torch.stack([source.sample(draws) for _ in range(200)])

    assert drawn.shape == (200, 3, 48, 48)
    assert 0 <= drawn.min() < drawn.max() <= 1
    shifts = drawn.mean(dim=(1, 2, 3)) - level
    assert (shifts.abs() > 0.06).float().mean() > 0.9
    assert (shifts > 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert drawn.std(dim=(2, 3)).mean(dim=1).quantile(0.05) > 0.01


def test_image_textures_work_on_flat_colour_and_odd_images():
    flat = torch.zeros(1, 3, 37, 61, dtype=torch.uint8)
    flat[:, 0] = 200
    draws = generator(22)
    drawn = torch.stack([ImageTextures(flat).sample(draws) for _ in range(30)])
    assert drawn.isfinite().all()
    assert drawn.shape == (30, 3, 37, 61)
    assert len({texture.argmax(dim=0).mode().values[0].item() for texture in drawn}) > 1


@pytest.mark.parametrize(
    "bad", [torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8).byte()]
)
def test_image_textures_refuse_anything_but_uint8_batches(bad):
    with pytest.raises(ValueError, match="uint8"):
        ImageTextures(bad)


@pytest.mark.parametrize("colour", [False, True])
def test_gray_images_get_gray_textures_from_a_folder_only_where_sources_are_mixed(tmp_path, colour):
    write_textures(tmp_path, 1)
    images = gray_images()
    images[0, 0] += 100 * colour
    mixed = texture_source(str(tmp_path), images, 64, mixed=True)
    assert isinstance(mixed, MixedTextures)
    assert mixed.sources[0].gray is not colour
    assert isinstance(mixed.sources[1], ImageTextures)
    assert not texture_source(str(tmp_path), images, 64, mixed=False).gray
    assert isinstance(texture_source(None, images, 64, mixed=True), ImageTextures)
