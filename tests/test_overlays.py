"""Pictures: one scale for a set, contours where they belong, any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from almrr_ref.report.overlays import colour_table
from almrr_ref.report.scores import (
    contact_sheet,
    overlay_row,
)


def lightness(colour: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB in 0..255, (n, 3) -> (n,)."""
    value = colour / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_the_colour_map_rises_evenly_in_lightness() -> None:
    steps = np.diff(lightness(colour_table().astype(float))[::15])
    assert steps.min() > 0
    assert steps.max() < 1.7 * np.median(steps)


def panel(sheet: Image.Image, index: int, size: int = 224) -> np.ndarray:
    return np.asarray(sheet)[28 : 28 + size, 8 + index * (size + 8) : 8 + index * (size + 8) + size].astype(int)


def test_one_scale_for_the_whole_set() -> None:
    image = torch.full((3, 224, 224), 0.5)
    low, high = np.full((224, 224), 0.2), np.full((224, 224), 0.2)
    high[50:60, 50:60] = 1.0
    quiet, loud = overlay_row(image, low, 0.5), overlay_row(image, high, 0.5)
    assert (panel(quiet, 1)[100, 100] == panel(loud, 1)[100, 100]).all()
    assert (panel(quiet, 1)[100, 100] == colour_table()[51]).all()
    assert (panel(loud, 1)[55, 55] == colour_table()[255]).all()


def test_row_shows_image_mask_map_and_both_contours() -> None:
    image = np.zeros((3, 224, 224), np.uint8)
    image[0] = 200
    values, mask = np.zeros((1, 224, 224)), np.zeros((224, 224))
    values[0, 20:60, 30:90], mask[120:160, 100:140] = 0.9, 1
    row = overlay_row(image, values, 0.5, mask)
    assert row.size == (4 * 224 + 3 * 8 + 16, 224 + 20 + 16)
    assert (panel(row, 0)[5, 5] == [200, 0, 0]).all()
    assert (panel(row, 1) > 0).all(axis=-1).sum() == 1600
    found = (panel(row, 3) == [0, 229, 255]).all(axis=-1)
    truth = (panel(row, 3) == [255, 72, 208]).all(axis=-1)
    assert np.argwhere(found).min(axis=0).tolist() == [20, 30]
    assert np.argwhere(found).max(axis=0).tolist() == [59, 89]
    assert not found[25:55, 35:85].any()
    assert np.argwhere(truth).min(axis=0).tolist() == [119, 99]
    assert np.argwhere(truth).max(axis=0).tolist() == [160, 140]
    assert overlay_row(image, values, 0.5).width == 3 * 224 + 2 * 8 + 16


def test_a_region_replaces_the_thresholded_map_and_no_threshold_means_no_contour() -> None:
    image, values, region = np.zeros((3, 224, 224), np.uint8), np.full((224, 224), 0.9), np.zeros((224, 224), bool)
    region[10:50, 20:60] = True
    found = (panel(overlay_row(image, values, 0.5, region=region), 2) == [0, 229, 255]).all(axis=-1)
    assert np.argwhere(found).max(axis=0).tolist() == [49, 59]
    assert not (panel(overlay_row(image, values, None), 2) == [0, 229, 255]).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (60, 700), (1024, 3696), (2000, 40)])
def test_any_size_gives_a_picture_of_bearable_size_on_which_one_pixel_shows(shape: tuple[int, int]) -> None:
    values = np.zeros(shape)
    values[shape[0] // 2, shape[1] // 2] = 1
    row = overlay_row(Image.new("L", (50, 40), 90), values, 0.5)
    assert max(row.size) < 2200
    contour = [(np.asarray(picture) == [0, 229, 255]).all(axis=-1).sum()
               for picture in (row, overlay_row(Image.new("L", (50, 40), 90), 0 * values, 0.5))]  # fmt: skip
    assert contour[0] > contour[1]  # the rest is the legend


def test_sizes_and_scales_that_do_not_fit_are_refused() -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"mask is \(4, 4\), the anomaly map \(8, 8\)"):
        overlay_row(image, np.zeros((8, 8)), 0.5, np.zeros((4, 4)))
    with pytest.raises(ValueError, match="low < high"):
        overlay_row(image, np.zeros((8, 8)), 0.5, low=1, high=1)
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\)"):
        overlay_row(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)), 0.5)
    with pytest.raises(ValueError, match="one length"):
        contact_sheet([[image], [image, image]])


def test_contact_sheet_lays_out_rows_in_columns() -> None:
    colours = [torch.tensor([value, 0.0, 1 - value]).view(3, 1, 1).expand(3, 6, 6) for value in (0.0, 0.4, 1.0)]
    mask = torch.ones(1, 6, 6)
    rows = [[colour, mask] for colour in colours]
    sheet = contact_sheet(rows, ("image", "mask"), 2, ["a", "b\nc", "ü" * 300], panel=60)
    pixels = np.asarray(sheet)
    strip = 2 * 60 + 8
    assert sheet.width == 8 + strip + 16 + strip + 8
    left, right = 8 + 30, 8 + strip + 16 + 30
    assert pixels[8 + 40 + 30, left].tolist() == [0, 0, 255]
    assert pixels[8 + 40 + 30, right].tolist() == [102, 0, 153]
    assert pixels[8 + 40 + 60 + 16 + 20 + 30, left].tolist() == [255, 0, 0]
    assert (pixels[8 + 40 + 30, left + 68] == 255).all()
