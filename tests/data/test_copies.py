"""The same picture twice: exact copies count once, near copies stay on one side, and different pictures are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import encoded
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.copies import join_parts, near_copies, thumbnail
from almrr_ref.data.images import load_image
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.split import GoodImages, split_good_images


def surfaces(count: int, seed: int = 0, pattern: bool = False) -> list[np.ndarray]:
    """Pictures (96, 96) of a texture; or of one pattern, which lies alike in all of them, with a little grain."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.normal(size=(96, 96)), 1.5) for _ in range(count)]
    y, x = np.mgrid[:96, :96]
    lattice = 90 * np.sin(x / 4) * np.sin(y / 4) if pattern else 0
    return [(128 + lattice + (4 if pattern else 30) * f / f.std()).clip(0, 255).astype(np.uint8) for f in fields]


def load(pictures: list, tile: int | None = None, **settings: float) -> GoodImages:
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    return split_good_images(pictures, range(len(pictures)), ModelConfig(image_size=64, tile=tile), config)


@pytest.mark.parametrize("pattern", [False, True])
def test_different_pictures_of_one_surface_are_no_copies(pattern: bool) -> None:
    pictures = [load_image(picture, (64, 64)) for picture in surfaces(40, pattern=pattern)]
    assert near_copies(torch.stack([thumbnail(picture) for picture in pictures])) == []


@pytest.mark.parametrize("pattern", [False, True])
def test_a_picture_saved_again_is_a_near_copy(pattern: bool) -> None:
    pictures = surfaces(30, pattern=pattern)
    again = [encoded(pictures[i], "JPEG", quality=95) for i in (3, 7)]
    again += [encoded(Image.fromarray(pictures[i]).resize((192, 192), 2), "PNG") for i in (9, 11)]
    again += [(pictures[13] + 3).astype(np.uint8)]
    loaded = torch.stack([thumbnail(load_image(picture, (64, 64))) for picture in (*pictures, *again)])
    assert near_copies(loaded) == [(30, 3), (31, 7), (32, 9), (33, 11), (34, 13)]


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("seed", range(3))
def test_near_copies_stay_on_one_side_of_the_split(
    seed: int, tile: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [image for picture in surfaces(8) for image in (picture, picture + np.uint8(1))]
    good = load(pictures, tile, seed=seed, holdout=0.3)
    each = 4 if tile else 1
    assert (len(good.training), len(good.held_out)) == (10 * each, 6 * each)
    assert good.part_ids.unique(return_counts=True)[1].tolist() == [2 * each] * 5
    apart = (good.training[:, None].int() - good.held_out[None].int()).abs().amax(dim=(2, 3, 4))
    assert apart.min() > 1
    said = "note: nearly the same, on one side of the split: 8 pairs of images (first: picture 1 is"
    assert said in caplog.text


def test_exact_copies_count_once_whatever_wraps_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = surfaces(5)
    for i, picture in enumerate(pictures):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture, "PNG"))
    plain = load([sample.path for sample in find_dataset(tmp_path).train], holdout=0)
    assert "note: the" not in caplog.text
    (tmp_path / "5.bmp").write_bytes(encoded(pictures[2], "BMP"))
    (tmp_path / "6.tif").write_bytes(encoded(np.dstack([pictures[2]] * 3), "TIFF"))
    (tmp_path / "3.png").write_bytes(b"broken")
    good = load([sample.path for sample in find_dataset(tmp_path).train], holdout=0)
    assert torch.equal(good.training, plain.training[[0, 1, 2, 4]])
    copies = f"note: the same pixels, which count once: 2 repeats of images (first: {tmp_path / '5.bmp'} is"
    assert f"{copies} {tmp_path / '2.png'})" in caplog.text


def test_pictures_without_structure_are_compared_pixel_by_pixel_only() -> None:
    assert len(load([np.full((64, 64), level, np.uint8) for level in range(100, 120)], holdout=0).training) == 20


def test_parts_of_copies_become_one() -> None:
    assert join_parts([0, 0, 1, 2, 3, 3], [(2, 1), (5, 3)]) == [0, 0, 0, 1, 1, 1]
    assert join_parts([0, 1, 2], []) == [0, 1, 2]
