"""The height and width that training images give the network."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from trust_cases import write_images

from almrr_ref.config import ModelConfig, from_dict
from almrr_ref.data.shape import fitted_size, settle_size


@pytest.mark.parametrize(
    ("ratio", "pixels", "expected"),
    [
        (1.0, 256, (256, 256)),
        (0.9, 256, (256, 256)),
        (250 / 628, 256, (160, 416)),
        (628 / 250, 256, (416, 160)),
        (250 / 628, 384, (256, 608)),
        (1 / 5000, 256, (32, 2048)),  # no smaller, and no larger than the area allows
        (1.0, 33, (32, 32)),
    ],
)
def test_the_area_is_that_of_the_square_and_the_shape_that_of_the_images(
    ratio: float, pixels: int, expected: tuple[int, int]
) -> None:
    assert fitted_size(ratio, pixels) == expected


def test_auto_takes_the_median_shape_of_files_and_pictures_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "almrr_ref")
    write_images(tmp_path, 1, size=40)
    (tmp_path / "broken.png").write_bytes(b"no image")
    wide = [np.zeros((25, 63), np.uint8), torch.zeros(3, 25, 62)]
    pictures = [tmp_path / "000.png", *wide, tmp_path / "broken.png"]
    auto = ModelConfig(image_size="auto")
    assert settle_size(pictures, auto).image_size == (160, 416)
    assert "height is 0.4 to 1 of their width, mostly 0.4, are brought to 160 x 416" in caplog.text
    settle_size([np.zeros((8, 8), np.uint8), np.zeros((9, 9), np.uint8)], auto)
    assert "images of several sizes, whose height is 1 of their width, are brought to 256 x 256" in caplog.text
    assert settle_size([tmp_path / "broken.png"], auto).image_size == (256, 256)
    assert all(record.levelno == logging.INFO for record in caplog.records)
    assert settle_size(wide[:1], ModelConfig()).image_size == (256, 256)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "images of 25 x 63 pixels (height x width) are brought to 256 x 256: squashed by 2.5" in caplog.text
    assert caplog.text.rstrip().endswith("--image-size auto keeps their shape")
    settle_size([np.zeros((50, 4000), np.uint8)], ModelConfig(image_size="auto", pixels=64))
    assert caplog.text.rstrip().endswith("a larger --pixels keeps their shape")


def test_tiles_are_square_and_images_that_a_tile_exceeds_or_that_fit_already_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "almrr_ref")
    pictures = [np.zeros((64, 96), np.uint8)] * 3
    assert settle_size(pictures, ModelConfig(image_size="auto", tile=64)).image_size == (256, 256)
    assert "smaller than a tile" not in caplog.text
    settle_size([*pictures, pictures[0][1:]], ModelConfig(image_size="auto", tile=64))
    assert "note: 1 of 4 images are smaller than a tile of 64 pixels" in caplog.text
    settle_size(pictures, ModelConfig(image_size=(64, 96)))
    assert "images of 64 x 96 pixels (height x width) keep their size; say" in caplog.text


def test_one_number_is_a_square_as_in_old_checkpoints_and_both_sides_are_checked() -> None:
    for given in (64, (64,), [64], [64, 64]):
        assert from_dict(ModelConfig, {"image_size": given}).size == (64, 64)
    assert ModelConfig(image_size=(160, 416)).feature_size == (40, 104)
    with pytest.raises(ValueError, match="multiples of 32, at least 32; got 160 400; try 160 384"):
        ModelConfig(image_size=(160, 400))
    with pytest.raises(ValueError, match=r"auto, one number, or height and width; got \(32, 32, 32\)"):
        ModelConfig(image_size=(32, 32, 32))
    with pytest.raises(ValueError, match="--tile cuts squares, so --image-size must be one number, got 64x96"):
        ModelConfig(image_size=(64, 96), tile=64)
    with pytest.raises(ValueError, match="auto is settled by training images"):
        ModelConfig(image_size="auto").size  # noqa: B018
