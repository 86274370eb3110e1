"""Pictures: one scale for a set, contours where they belong, any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from almrr_ref.report.overlays import COLOURS, contact_sheet, overlay_row

IMAGE = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 224, 224)


def panel(sheet: Image.Image, index: int, size: int = 224) -> np.ndarray:
    return np.asarray(sheet)[28 : 28 + size, 8 + index * (size + 8) : 8 + index * (size + 8) + size].astype(int)


def extent(picture: np.ndarray, colour: tuple[int, int, int]) -> list[int]:
    """First and last row and column of a colour."""
    places = np.argwhere((picture == colour).all(axis=-1))
    return [*places.min(axis=0).tolist(), *places.max(axis=0).tolist()] if len(places) else []


def test_row_shows_image_mask_map_on_one_scale_and_both_contours() -> None:
    values, mask = torch.full((1, 224, 224), 0.2), torch.zeros(224, 224)
    values[0, 20:60, 30:90], mask[120:160, 100:140] = 1, 1
    row = overlay_row(IMAGE, values, 1.0, mask, region=values == 1)
    assert row.size == (4 * 224 + 3 * 8 + 16, 224 + 20 + 16)
    assert (panel(row, 0)[5, 5] == [200, 0, 0]).all()
    assert (panel(row, 1) > 0).all(axis=-1).sum() == 1600
    assert (panel(row, 2)[100, 100] == COLOURS[51]).all(), "the scale follows the map"
    assert (panel(row, 2)[40, 60] == COLOURS[255]).all()
    assert extent(panel(row, 3), (0, 229, 255)) == [20, 30, 59, 89]
    assert not (panel(row, 3)[25:55, 35:85] == [0, 229, 255]).all(axis=-1).any()
    assert extent(panel(row, 3), (255, 72, 208)) == [119, 99, 160, 140]
    assert overlay_row(IMAGE, values, 0.5, region=values == 1).width == 3 * 224 + 2 * 8 + 16


@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (60, 700), (1024, 3696), (2000, 40)])
def test_any_size_gives_a_picture_of_bearable_size_on_which_one_pixel_shows(shape: tuple[int, int]) -> None:
    values = torch.zeros(shape)
    values[shape[0] // 2, shape[1] // 2] = 1
    image = torch.full((1, 40, 50), 0.3)
    rows = [np.asarray(overlay_row(image, one, None, region=one > 0.5)) for one in (values, 0 * values)]
    assert max(rows[0].shape) < 2200
    contours = [(row == [0, 229, 255]).all(axis=-1).sum() for row in rows]
    assert contours[0] > contours[1]  # the rest is the legend


def test_contact_sheet_lays_out_rows_in_columns() -> None:
    colours = [torch.tensor([value, 0.0, 1 - value]).view(3, 1, 1).expand(3, 6, 6) for value in (0.0, 0.4, 1.0)]
    rows = [[colour, torch.ones(1, 6, 6)] for colour in colours]
    pixels = np.asarray(contact_sheet(rows, ("image", "mask"), 2))
    assert pixels.shape == (8 + 2 * (20 + 192 + 8), 8 + 4 * (192 + 8), 3)
    first, mask, second, third = pixels[124, 104], pixels[124, 304], pixels[124, 504], pixels[344, 104]
    assert [first.tolist(), second.tolist(), third.tolist()] == [[0, 0, 255], [102, 0, 153], [255, 0, 0]]
    assert (mask == 255).all()


def test_panels_have_the_shape_of_the_picture_also_where_the_network_sees_another() -> None:
    values = torch.zeros(64, 64)
    values[32, 32] = 1
    shapes = {(300, 300): (3 * 300 + 32, 300 + 36), (50, 1000): (1000 + 16, 3 * (50 + 28) + 8), (640, 32): (704, 676)}
    for size, expected in shapes.items():
        row = overlay_row(IMAGE, values, None, region=values > 0.5, size=size)
        assert row.size == expected
        assert (np.asarray(row) == [0, 229, 255]).all(axis=-1).sum() > 64, "more than the legend's"
