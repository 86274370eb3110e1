"""Pictures of results: image | mask | map | overlay on one scale for a whole set, and contact sheets.

Source: the paper's Figs. 3 and 5-7. Every map is drawn on the scale from 0 to 1: stretched to its maximum, the map of a
good image would look defective. The lightness of the colour map rises evenly in OKLab (Ottosson 2020).
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from almrr_ref.run.files import atomic_path

Colour = tuple[int, int, int]
Region = npt.NDArray[np.bool_]  # (h, w)

_POINTS = {  # of the colour map: 0 (normal) to 255 (defective) -> RGB
    0: "0b0a26", 11: "150e36", 51: "3a1a78", 72: "62237f", 93: "8b2385", 95: "8f2385",
    108: "a4307c", 115: "b03676", 138: "d8435f", 146: "df525b", 162: "eb6b52", 173: "f47c48",
    183: "fb8a3c", 219: "fdc855", 220: "fdc957", 224: "fdcf68", 233: "fedb89", 255: "fdf8cf",
}  # fmt: skip
_CHANNELS = zip(*map(bytes.fromhex, _POINTS.values()), strict=True)
COLOURS = np.stack([np.interp(range(256), list(_POINTS), channel) for channel in _CHANNELS], 1).round().astype("u1")
_MAP_CONTOUR, _MASK_CONTOUR = (0, 229, 255), (255, 72, 208)
_PAPER, _INK, _FAINT = (255, 255, 255), (38, 42, 51), (120, 126, 138)
_GAP, _STRIP = 8, 20  # between panels; height of a line of captions, in pixels
_SMALLEST, _LARGEST, _SHEET_PANEL = 224, 640, 192  # longer side of a panel, in pixels


def overlay_row(
    image: Tensor,
    anomaly_map: Tensor,
    threshold: float | None,
    mask: Tensor | None = None,
    *,
    region: Tensor,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw image | mask (if any) | map | overlay side by side, or one above the other if the image is wide.

    Args:
        image: (3, h', w') or (1, h', w'), uint8 or float in [0, 1].
        anomaly_map: (h, w) or (1, h, w), in [0, 1].
        threshold: where the scale has a tick; None: no tick.
        mask: ground truth, (h, w) or (1, h, w), defective where > 0.5.
        region: the pixels called defective, (h, w) or (1, h, w); the overlay shows their contour.
        size: (height, width) of the picture, whose shape the panels get; None: the map's.
    """
    values = _plane(anomaly_map)
    truth = None if mask is None else _plane(mask) > 0.5
    panel = _panel_size(*(size or values.shape))
    picture = _as_picture(image).resize(panel, Image.Resampling.LANCZOS)
    heat = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).resize(panel, Image.Resampling.BILINEAR)
    panels = {"image": picture}
    if truth is not None:
        truth = _resized_region(truth, panel)
        panels["mask"] = Image.fromarray(truth.astype(np.uint8) * np.uint8(255))
    panels["anomaly map"] = _coloured(heat)
    panels["overlay"] = _overlay(picture, heat, _resized_region(_plane(region) > 0.5, panel), truth)
    columns = len(panels) if panel[0] <= 2 * panel[1] else 1
    cell = max(panel[0], _SMALLEST), panel[1]
    sheet, corners = _lay_out(list(panels.values()), list(panels), columns, cell)
    (map_x, map_y), (overlay_x, overlay_y) = corners[-2:]
    _draw_scale(sheet, map_x + cell[0], map_y, threshold)
    _draw_legend(sheet, overlay_x + cell[0], overlay_y, truth is not None)
    return sheet


def contact_sheet(rows: Sequence[Sequence[Tensor]], captions: Sequence[str], columns: int) -> Image.Image:
    """Lay out rows of pictures below their captions, with `columns` rows side by side.

    Args:
        rows: n rows of k pictures, each (3, h, w) or (1, h, w), uint8 or float in [0, 1], of one size.
        captions: of the k pictures of a row.
    """
    height, width = rows[0][0].shape[1:] if rows else (1, 1)
    side = _SHEET_PANEL / math.sqrt(height * width)
    size = round(side * width), round(side * height)
    panels = [_as_picture(picture).resize(size) for row in rows for picture in row]
    return _lay_out(panels, [*captions] * len(rows), columns * len(captions), size)[0]


def save_picture(path: Path, picture: Image.Image | npt.NDArray[np.uint8]) -> None:
    """Write a PNG atomically, from Pillow or uint8 (h, w) or (h, w, 3); OutputError if that fails.

    The next level of compression takes half as long again and saves 6%.
    """
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    """A picture -> the content of a file; kind ("PNG", "JPEG", "TIFF") and options are Pillow's."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def data_url(picture: Image.Image, kind: str, **options: int) -> str:
    """A picture -> a data URL for HTML, by `encoded`."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(picture, kind, **options)).decode()}"


def _as_picture(image: Tensor) -> Image.Image:
    """Turn (3, h, w) or (1, h, w), uint8 or float in [0, 1], into an RGB picture."""
    values = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy())


def _plane(values: Tensor) -> npt.NDArray[np.float64]:
    """Return a map, mask or region, (h, w) or (1, h, w), as (h, w)."""
    return np.asarray(values.cpu().double().reshape(values.shape[-2:]))


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Choose a panel's width and height in pixels: captions must fit, and a page of rows must stay small."""
    factor = min(max(1.0, _SMALLEST / width), _LARGEST * (1 if width <= 2 * height else 1.6) / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized_region(region: Region, size: tuple[int, int]) -> Region:
    """Resize a region (h, w) to (width, height); a single pixel survives any reduction."""
    enlarged = size[0] >= region.shape[1] and size[1] >= region.shape[0]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
    return np.asarray(Image.fromarray(region.astype(np.float32)).resize(size, method)) > 0


def _coloured(heat: Image.Image) -> Image.Image:
    """Give a grey image the colours of the colour map."""
    return Image.fromarray(COLOURS[np.asarray(heat)])


def _overlay(picture: Image.Image, heat: Image.Image, flagged: Region, truth: Region | None) -> Image.Image:
    """Blend the map over the greyed image, more where it is higher, and draw both contours."""
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    opacity = 0.6 * np.sqrt(np.asarray(heat, dtype=np.float32)[..., None] / 255)
    blend = (1 - opacity) * grey + opacity * np.asarray(_coloured(heat), dtype=np.float32)
    # The truth's contour lies outside its region and the prediction's inside: both stay visible where they agree.
    if truth is not None:
        blend[ndimage.binary_dilation(truth) & ~truth] = _MASK_CONTOUR
    blend[flagged & ~ndimage.binary_erosion(flagged, iterations=1 + (flagged.sum() > 64))] = _MAP_CONTOUR
    return Image.fromarray(np.round(blend).astype(np.uint8))


def _lay_out(
    panels: Sequence[Image.Image], captions: Sequence[str], columns: int, cell: tuple[int, int]
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Put panels on white paper in cells (width, height), each below its caption; return it and the panels' corners."""
    width, height = cell[0] + _GAP, cell[1] + _GAP + _STRIP
    corners = [(_GAP + i % columns * width, _GAP + _STRIP + i // columns * height) for i in range(len(panels))]
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + -(-len(panels) // columns) * height), _PAPER)
    for panel, caption, (x, y) in zip(panels, captions, corners):
        sheet.paste(panel, (x, y))
        _write(sheet, x, y, caption, _INK, "ls")
    return sheet, corners


def _write(sheet: Image.Image, x: int, top: int, text: str, colour: Colour = _FAINT, anchor: str = "rs") -> int:
    """Write a text above a panel, up to x, or (anchor "ls") from x on; return its width in pixels."""
    font = ImageFont.load_default(12)
    ImageDraw.Draw(sheet).text((x, top - 5), text, colour, font=font, anchor=anchor)
    return round(font.getlength(text))


def _draw_scale(sheet: Image.Image, right: int, top: int, threshold: float | None) -> None:
    """Draw the colour scale from 0 to 1, 64 pixels wide, with a tick at the threshold, right-aligned above a panel."""
    left = right - _write(sheet, right, top, "1") - 68
    _write(sheet, left - 4, top, "0")
    bar = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (9, 1)))
    sheet.paste(_coloured(bar), (left, top - 14))
    if threshold is not None:
        tick = left + round(min(max(threshold, 0), 1) * 63)
        for colour, thickness in ((_INK, 3), (_MAP_CONTOUR, 1)):
            ImageDraw.Draw(sheet).line([(tick, top - 16), (tick, top - 4)], colour, thickness)


def _draw_legend(sheet: Image.Image, right: int, top: int, with_mask: bool) -> None:
    """Name the contours' colours, right-aligned above a panel."""
    for name, colour in [("mask", _MASK_CONTOUR)] * with_mask + [("found", _MAP_CONTOUR)]:
        right -= _write(sheet, right, top, name) + 14
        ImageDraw.Draw(sheet).rectangle([(right, top - 14), (right + 9, top - 5)], colour, _INK)
        right -= 8
