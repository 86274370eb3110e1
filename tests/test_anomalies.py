"""Simulated anomalies: Eq. (1), their published distribution, and the texture sources."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from test_perlin import scalar_perlin

from almrr_ref.anomalies import draw_mask, perlin_mask, simulate_anomaly, textured_anomaly
from almrr_ref.data.samples import training_sample
from almrr_ref.data.textures import ImageTextures, TextureFolder
from almrr_ref.run.random import one_thread


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Many short operations: a second thread only waits, long where the cores are shared."""
    with one_thread():
        yield


class PlainTexture:
    """A source that draws nothing: one colour."""

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        return torch.full((3, 16, 16), 0.75)


def write_textures(folder, count: int, side: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"texture{index}.png")


def gray_images(n: int = 4, size: int = 48) -> torch.Tensor:
    grain = torch.randint(-20, 21, (n, size, size), generator=generator())
    waves = 110 + 40 * torch.sin(torch.arange(size) / 3.0) + grain
    return waves.to(torch.uint8)[:, None].expand(n, 3, size, size).contiguous()


# Eq. (1)


def test_equals_equation_1_for_some_alpha_inside_and_the_image_outside():
    image, texture = torch.rand(3, 37, 61, generator=generator(1)), torch.rand(3, 37, 61, generator=generator(2))
    for seed in range(10):
        augmented, mask = simulate_anomaly(image, texture, generator(seed))
        inside = (mask > 0).expand_as(image)
        difference = (texture - image)[inside].double()
        alpha = (difference @ (augmented - image)[inside].double()) / (difference @ difference)
        expected = (1 - mask) * image + (1 - alpha) * (mask * image) + alpha * (mask * texture)

        assert augmented.shape == image.shape
        assert mask.shape == (1, 37, 61)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0.2 <= alpha <= 1
        torch.testing.assert_close(augmented, expected.float(), atol=1e-6, rtol=0)
        assert torch.equal(augmented[~inside], image[~inside])


def test_stays_in_range_with_the_strongest_textures():
    image, texture = torch.rand(3, 40, 40, generator=generator(3)).round(), torch.rand(3, 40, 40).round()
    augmented = torch.stack([simulate_anomaly(image, texture, generator(seed))[0] for seed in range(30)])
    assert augmented.min() >= 0
    assert augmented.max() <= 1


def test_alpha_is_uniform_between_0_2_and_1():
    black, white, draws = torch.zeros(3, 32, 32), torch.ones(3, 32, 32), generator(4)
    alphas = [simulate_anomaly(black, white, draws)[0].max().item() for _ in range(600)]
    assert stats.kstest(alphas, stats.uniform(0.2, 0.8).cdf).pvalue > 0.01


def test_texture_of_another_size_is_resized_and_the_input_left_alone():
    image, texture = torch.zeros(3, 33, 48), torch.zeros(3, 100, 70)
    texture[:, :, 35:] = 1
    before = image.clone()
    for seed in range(20):
        augmented, mask = simulate_anomaly(image, texture, generator(seed), alpha_range=(1.0, 1.0))
        assert augmented[:, :, :23].sum() == 0
        torch.testing.assert_close(augmented[:, :, 25:], mask[:, :, 25:].expand(3, -1, -1))
    assert torch.equal(image, before)


def test_same_seed_same_result_and_the_global_generator_is_left_alone(tmp_path):
    write_textures(tmp_path, 3)
    sources = [TextureFolder(tmp_path, 48), ImageTextures(gray_images())]
    image, state = torch.rand(3, 48, 48, generator=generator(5)), torch.get_rng_state()
    for source in sources:
        runs = []
        for _ in range(2):
            draws = generator(6)
            runs.append([training_sample(image, source, draws, 0.5, textured_anomaly) for _ in range(25)])
        for (first, first_mask), (second, second_mask) in zip(*runs, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first_mask, second_mask)
        assert len({augmented.sum().item() for augmented, _ in runs[0]}) > 8
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32), torch.zeros(1, 3, 32, 32)]
)
def test_refuses_what_is_no_float_rgb_image(bad):
    good = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match="image: expected a float tensor"):
        simulate_anomaly(bad, good, generator())
    with pytest.raises(ValueError, match="texture: expected a float tensor"):
        simulate_anomaly(good, bad, generator())


def test_refuses_images_too_small_for_a_mask_and_impossible_ranges():
    image = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match="too small"):
        simulate_anomaly(image[:, :7], image, generator())
    with pytest.raises(ValueError, match="alpha_range"):
        simulate_anomaly(image, image, generator(), alpha_range=(0.5, 1.2))
    with pytest.raises(ValueError, match="threshold"):
        perlin_mask((32, 32), generator(), threshold=1.0)


# The distribution of masks


@pytest.fixture(scope="module")
def drawn_masks() -> torch.Tensor:
    draws = generator(7)
    return torch.cat([draw_mask((256, 256), draws, threshold=0.5, max_exponent=5) for _ in range(1500)])


def test_one_mask_in_twenty_is_empty_and_the_others_cover_five_percent(drawn_masks):
    cover = drawn_masks.float().mean(dim=(1, 2))
    assert (cover == 0).float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert cover[cover > 0].mean().item() == pytest.approx(0.0525, abs=0.003)


def test_simulated_anomalies_come_from_the_same_masks():
    image, draws = torch.zeros(3, 256, 256), generator(30)
    cover = [simulate_anomaly(image, image, draws)[1].mean().item() for _ in range(300)]
    assert np.mean(cover) == pytest.approx(0.0525, abs=0.006)


def test_masks_cover_as_those_of_scipys_rotation_of_scalar_noise():
    """At 32x32, where a scalar version is quick enough; the rotation and its zeros come from scipy."""
    rng, draws = np.random.default_rng(8), generator(8)
    ours = torch.cat([draw_mask((32, 32), draws, threshold=0.5, max_exponent=3) for _ in range(800)])
    theirs = np.zeros((250, 32, 32), dtype=bool)
    for index in range(len(theirs)):
        cells = 2 ** rng.integers(0, 4, 2)
        noise = scalar_perlin((32, 32), rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1)))
        theirs[index] = ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1) > 0.5

    assert stats.ks_2samp(ours.float().mean(dim=(1, 2)).numpy(), theirs.mean(axis=(1, 2))).pvalue > 0.01
    counts = [[ndimage.label(mask)[1] for mask in masks] for masks in (ours.numpy(), theirs)]
    assert stats.ks_2samp(*counts).pvalue > 0.01


def test_rotation_clears_the_corners(drawn_masks):
    corners = torch.stack([drawn_masks[:, y, x] for y in (0, -1) for x in (0, -1)]).float().mean()
    middle = drawn_masks[:, 64:192, 64:192].float().mean()
    assert corners < 0.3 * middle


def test_grids_from_one_cell_to_thirty_two_occur(drawn_masks):
    parts = np.array([ndimage.label(mask)[1] for mask in drawn_masks[:300].numpy()])
    assert (parts > 120).any()
    assert ((parts >= 1) & (parts <= 2)).mean() > 0.1


def test_masks_are_never_empty_even_where_most_draws_are():
    draws = generator(9)
    assert all(perlin_mask((8, 9), draws).any() for _ in range(100))


# Samples for training


def test_half_of_the_samples_stay_clean():
    image, draws = torch.rand(3, 16, 16, generator=generator(10)), generator(11)
    clean = 0
    for _ in range(1000):
        augmented, mask = training_sample(image, PlainTexture(), draws, 0.5, textured_anomaly)
        assert mask.any() != torch.equal(augmented, image)
        clean += not mask.any()
    assert stats.binomtest(clean, 1000, 0.5).pvalue > 0.01


def test_samples_are_made_on_one_thread_and_the_number_of_threads_is_given_back():
    class Asking(PlainTexture):
        def sample(self, generator: torch.Generator) -> torch.Tensor:
            threads.append(torch.get_num_threads())
            return torch.zeros(3, 16, 16) if len(threads) == 1 else torch.zeros(0)

    threads: list[int] = []
    before, image = torch.get_num_threads(), torch.ones(3, 16, 16)
    torch.set_num_threads(3)
    try:
        training_sample(image, Asking(), generator(), 0.0, textured_anomaly)
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="texture"):
            training_sample(image, Asking(), generator(), 0.0, textured_anomaly)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 30)])
def test_clean_probability_is_obeyed_at_its_ends(probability, expected):
    image, draws = torch.zeros(3, 16, 16), generator(12)
    masks = [training_sample(image, PlainTexture(), draws, probability, textured_anomaly)[1] for _ in range(30)]
    assert sum(not mask.any() for mask in masks) == expected


# Texture sources


def test_folder_is_read_recursively_without_hidden_files(tmp_path):
    write_textures(tmp_path / "banded" / "deep", 2)
    write_textures(tmp_path / ".cache", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._texture.png").write_bytes(b"fork")
    source = TextureFolder(tmp_path, 24)

    assert [path.name for path in source.paths] == ["texture0.png", "texture1.png"]
    texture = source.sample(generator())
    assert texture.shape == (3, 24, 24)
    assert texture.dtype == torch.float32
    assert 0 <= texture.min() < texture.max() <= 1


def test_unchanged_textures_are_those_of_the_files(tmp_path):
    write_textures(tmp_path, 3)
    expected = {np.asarray(Image.open(path)).tobytes() for path in tmp_path.iterdir()}
    source, draws = TextureFolder(tmp_path, 20, changes=0), generator(15)
    drawn = {(source.sample(draws) * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for _ in range(40)}
    assert drawn == expected


def test_broken_textures_are_named_and_others_drawn(tmp_path):
    write_textures(tmp_path, 2)
    broken = tmp_path / "a_broken.jpg"
    broken.write_bytes(b"not an image")
    source, draws = TextureFolder(tmp_path, 16), generator(16)
    with pytest.warns(UserWarning, match=r"a_broken\.jpg") as caught:
        drawn = [source.sample(draws) for _ in range(20)]

    assert len(drawn) == 20
    assert len(caught) == 1
    assert list(source.broken) == [broken]


def test_draws_do_not_depend_on_which_broken_files_are_known(tmp_path):
    write_textures(tmp_path, 2)
    (tmp_path / "a_broken.jpg").write_bytes(b"not an image")
    fresh, used = TextureFolder(tmp_path, 16), TextureFolder(tmp_path, 16)
    draws, first, second = generator(17), generator(18), generator(18)
    with pytest.warns(UserWarning, match=r"a_broken\.jpg"):
        assert len([used.sample(draws) for _ in range(20)]) == 20
    assert used.broken
    with pytest.warns(UserWarning, match=r"a_broken\.jpg"):
        pairs = [(fresh.sample(first), used.sample(second)) for _ in range(20)]
    assert all(torch.equal(one, other) for one, other in pairs)


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


def test_gray_folder_textures_have_equal_channels(tmp_path):
    write_textures(tmp_path, 2)
    texture = TextureFolder(tmp_path, 16, gray=True).sample(generator())
    assert torch.equal(texture[0], texture[1])
    assert torch.equal(texture[0], texture[2])


def test_own_textures_of_gray_images_are_gray_nine_times_in_ten():
    source, draws = ImageTextures(gray_images()), generator(20)
    drawn = [source.sample(draws) for _ in range(300)]
    coloured = sum((texture.amax(dim=0) - texture.amin(dim=0)).max().item() > 0.01 for texture in drawn)
    assert stats.binomtest(coloured, 300, 0.1).pvalue > 0.01


def test_own_textures_differ_visibly_and_vary():
    images = gray_images()
    level, source, draws = images.float().mean().item() / 255, ImageTextures(images), generator(21)
    drawn = torch.stack([source.sample(draws) for _ in range(200)])

    assert drawn.shape == (200, 3, 48, 48)
    assert 0 <= drawn.min() < drawn.max() <= 1
    shifts = drawn.mean(dim=(1, 2, 3)) - level
    assert (shifts.abs() > 0.06).float().mean() > 0.9
    assert (shifts > 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert drawn.std(dim=(2, 3)).mean(dim=1).quantile(0.05) > 0.01


def test_own_textures_work_on_flat_colour_and_odd_images():
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
def test_own_textures_refuse_anything_but_uint8_batches(bad):
    with pytest.raises(ValueError, match="uint8"):
        ImageTextures(bad)
