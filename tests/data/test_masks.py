"""Masks: every class counts, soft edges end at a half, and what can be read in two ways is refused by name."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_files import encoded
from PIL import Image, ImageDraw
from scipy import ndimage
from test_pictures import deep_png

from almrr_ref.data.images import ImageError
from almrr_ref.data.masks import load_mask


def mask_of(folder: Path, values: np.ndarray | Image.Image | bytes, kind: str = "PNG", size: int = 64) -> np.ndarray:
    (folder / "x.png").write_bytes(values if isinstance(values, bytes) else encoded(values, kind))
    mask = load_mask(folder / "x.png", (size, size))
    assert (mask.dtype, mask.shape) == (torch.uint8, (1, size, size))
    return mask[0].numpy().astype(bool)


def bars(*values: float, kind: Any = np.uint8) -> np.ndarray:
    """Bars of 672 pixels, one of each value, on 0."""
    drawn = np.zeros((64, 64), kind)
    for i, value in enumerate(values):
        drawn[4 + 16 * i : 16 + 16 * i, 4:60] = value
    return drawn


def colours(values: np.ndarray, table: dict[int, tuple[int, ...]]) -> np.ndarray:
    return np.array([table.get(i, (0,) * len(table[1])) for i in range(256)], np.uint8)[values]


RED_BLUE = {1: (255, 0, 0), 2: (0, 0, 100)}


def palette(values: np.ndarray, *entries: int) -> Image.Image:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(list(entries))
    return image


@pytest.mark.parametrize(
    "values",
    [
        *(bars(*classes) for classes in ((85, 170, 255), (60, 120, 255), (1, 100, 200), (1, 2, 3), (40, 40, 40))),
        bars(255, 255, 255) > 0, bars(1, 1, 1, kind=np.uint16), bars(300, 7, 65535, kind=np.uint16),
        bars(0.2, 0.5, 1, kind=np.float32), colours(bars(1, 2, 2), RED_BLUE),
        palette(bars(1, 2, 2), 0, 0, 0, 255, 0, 0, 0, 0, 100), palette(bars(1, 2, 2), 9, 8, 7, 255, 0, 0, 0, 0, 100),
        palette(255 - bars(254, 253, 253), *[80, 20, 0] * 255, 0, 0, 0), palette(bars(1, 1, 1), 0, 0, 0, 9, 9, 9),
        colours(bars(1, 1, 1), {1: (255, 255, 255, 255), 0: (255, 255, 255, 0)}),
        colours(bars(1, 2, 2), {1: (255, 0, 0, 255), 2: (0, 0, 90, 255), 0: (255, 255, 255, 0)}),
        np.dstack([bars(90, 90, 90), bars(255, 255, 255)]),
        bars(1, 1, 1) + (ndimage.minimum_filter(bars(1, 1, 1), 3)),  # class 1 is the rim of class 2
    ],
)  # fmt: skip
def test_every_class_that_is_not_background_counts(tmp_path: Path, values: np.ndarray | Image.Image) -> None:
    kind = "TIFF" if getattr(values, "dtype", None) == np.float32 else "PNG"
    assert (mask_of(tmp_path, values, kind) == (bars(1, 1, 1) > 0)).all()


@pytest.mark.parametrize("reduction", [2, 8])
@pytest.mark.parametrize("top", [255, 130])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90})])
def test_soft_edges_end_at_a_half(tmp_path: Path, reduction: int, top: int, kind: str, options: dict[str, int]) -> None:
    large = Image.new("L", (64 * reduction,) * 2)
    draw = ImageDraw.Draw(large)
    draw.ellipse([reduction * x for x in (9, 7, 50, 41)], fill=top)
    draw.line([reduction * x for x in (3, 60, 61, 45)], fill=top, width=2 * reduction)
    encoded_mask = encoded(large.resize((64, 64), Image.Resampling.BOX), kind, **options)
    soft = np.asarray(Image.open(BytesIO(encoded_mask)))  # with the noise of JPEG
    assert (mask_of(tmp_path, encoded_mask) == (soft > soft.max() / 2)).all()


@pytest.mark.parametrize("values", [bars(1, 2, 3), bars(255, 255, 255), bars(300, 7, 65535, kind=np.uint16)])
def test_sixteen_bits_of_colour_count_whole(tmp_path: Path, values: np.ndarray) -> None:
    """Pillow keeps the upper 8, so a class of up to 255 would be background."""
    assert (mask_of(tmp_path, deep_png(np.dstack([values, values * 0, values]))) == (values > 0)).all()


def test_alpha_may_be_soft(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).repeat(64).reshape(64, 64)
    assert (mask_of(tmp_path, np.dstack([np.full_like(ramp, 200), ramp])) == (ramp > 127)).all()


def test_it_is_resized_before_it_is_cut(tmp_path: Path) -> None:
    values = np.zeros((8, 8), np.uint8)
    values[:, 2:5] = 255  # three of eight columns; halving covers column 1 whole and column 2 half
    expected = np.asarray(Image.fromarray(values / np.float32(255)).resize((4, 4), 2)) > 0.5
    for written in (values, values // 255, values // 3):
        assert (mask_of(tmp_path, written, size=4) == expected).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [(bars(0), 0), (bars(0) + np.uint8(255), 1), (bars(0) + np.uint8(9), 1), (bars(0)[..., None].repeat(4, 2), 0)],
)
def test_an_even_mask_is_all_good_or_all_defective(tmp_path: Path, values: np.ndarray, expected: int) -> None:
    assert mask_of(tmp_path, values).mean() == expected


WHITE_BELOW = {1: (255, 0, 0), 0: (255, 255, 255)}


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (colours(bars(1), WHITE_BELOW), "PNG", "no pixel of 0"),
        (255 - bars(127, 127), "PNG", "no pixel of 0"),
        (palette(bars(1), 9, 200, 9, 0, 0, 0), "PNG", "index 0 is another colour"),
        (np.dstack([bars(0), bars(255)]), "PNG", "black where it is not transparent"),
        (np.dstack([bars(255), bars(0)]), "PNG", "fully transparent, but its colours differ"),
        (bars(85, 170, 255), "JPEG", "may be classes or soft edges"),
        (bars(-1, kind=np.float32), "TIFF", "negative, NaN or infinite"),
        (bars(np.nan, kind=np.float32), "TIFF", "negative, NaN or infinite"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, values: Any, kind: str, message: str) -> None:
    with pytest.raises(ImageError, match=rf"x\.png: mask .*{message}"):
        mask_of(tmp_path, values, kind)
