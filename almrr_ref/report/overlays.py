"""Pictures of results: image | mask | map | overlay on one scale for a whole set, and contact sheets.

Source: the paper's Figs. 3 and 5-7. Every map is drawn on the scale from 0 to 1: stretched to its own maximum, the map
of a good image would look defective. The colour map is our own, night blue over purple and orange to pale yellow, with
evenly rising lightness in OKLab (Ottosson 2020): equal steps look equal, in grey print too.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from almrr_ref.run.files import atomic_path

Picture = Image.Image | Tensor  # a tensor is (3, h, w) or (1, h, w), uint8 or float in [0, 1]
Colour = tuple[int, int, int]
Region = npt.NDArray[np.bool_]  # (h, w)

_POINTS = {  # of the colour map: 0 (normal) to 255 (defective) -> RGB
    0: "0b0a26", 11: "150e36", 51: "3a1a78", 72: "62237f", 93: "8b2385", 95: "8f2385",
    108: "a4307c", 115: "b03676", 138: "d8435f", 146: "df525b", 162: "eb6b52", 173: "f47c48",
    183: "fb8a3c", 219: "fdc855", 220: "fdc957", 224: "fdcf68", 233: "fedb89", 255: "fdf8cf",
}  # fmt: skip
_CHANNELS = zip(*map(bytes.fromhex, _POINTS.values()), strict=True)
COLOURS = np.stack([np.interp(range(256), list(_POINTS), channel) for channel in _CHANNELS], 1).round().astype("u1")
_MAP_CONTOUR = (0, 229, 255)
_MASK_CONTOUR = (255, 72, 208)
_PAPER, _INK, _FAINT = (255, 255, 255), (38, 42, 51), (120, 126, 138)
_GAP, _STRIP = 8, 20  # between panels; height of a line of captions, in pixels
_SMALLEST, _LARGEST, _SHEET_PANEL = 224, 640, 192  # longer side of a panel, in pixels


def overlay_row(
    image: Picture,
    anomaly_map: Tensor,
    threshold: float | None,
    mask: Tensor | None = None,
    region: Tensor | None = None,
) -> Image.Image:
    """Draw image | mask (if any) | map | overlay side by side, or one above the other if the image is wide.

    Args:
        image: it is resized to the map.
        anomaly_map: (h, w) or (1, h, w), in [0, 1].
        threshold: a tick on the scale, and a contour around anomaly_map >= threshold; None: neither.
        mask: ground truth, (h, w) or (1, h, w), defective where > 0.5.
        region: where the contour goes instead, (h, w) or (1, h, w), true inside.
    Raises:
        ValueError: if the mask is not of the map's size.
    """
    values = _plane(anomaly_map)
    truth = None if mask is None else _plane(mask) > 0.5
    if truth is not None and truth.shape != values.shape:
        raise ValueError(f"the mask is {truth.shape}, the anomaly map {values.shape}; resize the mask first")
    flagged = values >= (np.inf if threshold is None else threshold) if region is None else _plane(region) > 0.5
    size = _panel_size(*values.shape)
    picture = as_picture(image).resize(size, Image.Resampling.LANCZOS)
    heat = _grey(values, 0, 1).resize(size, Image.Resampling.BILINEAR)
    panels = {"image": picture}
    if truth is not None:
        truth = _resized_region(truth, size)
        panels["mask"] = Image.fromarray(truth.astype(np.uint8) * np.uint8(255))
    panels["anomaly map"] = _coloured(heat)
    panels["overlay"] = _overlay(picture, heat, _resized_region(flagged, size), truth)
    columns = len(panels) if size[0] <= 2 * size[1] else 1
    sheet, corners = _lay_out(list(panels.values()), columns, list(panels), narrowest=_SMALLEST)
    (map_x, map_y), (overlay_x, overlay_y) = corners[-2:]
    width = max(size[0], _SMALLEST)
    _draw_scale(sheet, map_x + width, map_y, threshold)
    _draw_legend(sheet, overlay_x + width, overlay_y, truth is not None)
    return sheet


def map_picture(anomaly_map: Tensor, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """Draw a map, (h, w) or (1, h, w), in the colours of the overlays; low and high are the ends of the scale."""
    return _coloured(_grey(_plane(anomaly_map), low, high))


def contact_sheet(
    rows: Sequence[Sequence[Picture]], captions: Sequence[str] = (), columns: int = 1, row_captions: Sequence[str] = ()
) -> Image.Image:
    """Lay out rows of panels, all of one size: `columns` rows side by side, then further down.

    Args:
        rows: n rows of k pictures each.
        captions: k headings, drawn above each column of panels on the first line; may be empty.
        columns: how many rows stand side by side.
        row_captions: n captions, drawn above each row, e.g. a file name; may be empty.
    Raises:
        ValueError: if there is no row, or the numbers disagree.
    """
    lengths = sorted({len(row) for row in (*rows, *([captions] if captions else []))})
    if len(lengths) != 1 or len(row_captions) not in (0, len(rows)):
        counts = f"{len(row_captions)} row captions for {len(rows)} rows"
        raise ValueError(f"expected rows and captions of one length, came {lengths}, and {counts}")
    pictures = [[as_picture(picture) for picture in row] for row in rows]
    width, height = pictures[0][0].size
    factor = _SHEET_PANEL / max(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    strips = []
    for index, row in enumerate(pictures):
        headings = captions if index < columns else ()
        strip, _ = _lay_out([picture.resize(size) for picture in row], len(row), headings, margin=0)
        if row_captions:
            strip, _ = _lay_out([strip], 1, [row_captions[index]], margin=0, colour=_FAINT)
        strips.append(strip)
    return _lay_out(strips, min(columns, len(strips)), gap=2 * _GAP)[0]


def save_picture(path: Path, picture: Image.Image | npt.NDArray[np.uint8]) -> None:
    """Write a PNG at once, from a Pillow image or from uint8 (h, w) or (h, w, 3); OutputError if that fails.

    The compression is the fastest: the next level takes half as long again and saves 6%.
    """
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def as_picture(image: Picture) -> Image.Image:
    """Turn a picture into an RGB Pillow image."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    values = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy())


def _plane(values: Tensor) -> npt.NDArray[np.float64]:
    """Return a map, mask or region, (h, w) or (1, h, w), as (h, w)."""
    array: npt.NDArray[np.float64] = values.cpu().double().reshape(values.shape[-2:]).numpy()
    return array


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Choose a panel's width and height in pixels: captions must fit, and a page of rows must stay small."""
    factor = min(max(1.0, _SMALLEST / width), _LARGEST * (1 if width <= 2 * height else 1.6) / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized_region(region: Region, size: tuple[int, int]) -> Region:
    """Resize a region (h, w) to (width, height); a single pixel survives any reduction."""
    enlarged = size[0] * size[1] >= region.size
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
    return np.asarray(Image.fromarray(region.astype(np.float32)).resize(size, method)) > 0


def _grey(values: npt.NDArray[np.float64], low: float, high: float) -> Image.Image:
    """A map (h, w) in 256 steps, 0 at low and below, 255 at high and above."""
    return Image.fromarray(np.clip(np.round((values - low) / (high - low) * 255), 0, 255).astype(np.uint8))


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
    panels: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] = (),
    colour: Colour = _INK,
    gap: int = _GAP,
    margin: int = _GAP,
    narrowest: int = 1,
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Put panels on white paper, with captions above them if any; return it and each panel's left upper corner."""
    strip, width = _STRIP if captions else 0, max(narrowest, *(panel.width for panel in panels))
    corners, bottom = [], margin - gap
    for start in range(0, len(panels), columns):
        line = panels[start : start + columns]
        corners += [(margin + column * (width + gap), bottom + gap + strip) for column in range(len(line))]
        bottom += gap + strip + max(panel.height for panel in line)
    sheet = Image.new("RGB", (2 * margin + columns * (width + gap) - gap, bottom + margin), _PAPER)
    for panel, corner in zip(panels, corners, strict=True):
        sheet.paste(panel, corner)
    for caption, (x, y) in zip(captions, corners):
        _write(sheet, x, y, caption, colour, width=width)
    return sheet, corners


def _write(
    sheet: Image.Image, x: int, top: int, text: str, colour: Colour = _FAINT, anchor: str = "ls", width: int = _LARGEST
) -> int:
    """Write a caption, cut to `width` pixels, above a panel: from x on, or (anchor "rs") up to x; return its width."""
    font = ImageFont.load_default(12)
    text = "".join(char if char.isprintable() else " " for char in text)
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    ImageDraw.Draw(sheet).text((x, top - 5), text, colour, font=font, anchor=anchor)
    return round(font.getlength(text))


def _draw_scale(sheet: Image.Image, right: int, top: int, threshold: float | None) -> None:
    """Draw the colour scale from 0 to 1 with a tick at the threshold, right-aligned above a panel."""
    width = 64
    left = right - _write(sheet, right, top, "1", anchor="rs") - width - 4
    _write(sheet, left - 4, top, "0", anchor="rs")
    bar = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (9, 1)))
    sheet.paste(_coloured(bar), (left, top - 14))
    if threshold is not None:
        tick = left + round(min(max(threshold, 0), 1) * (width - 1))
        for colour, thickness in ((_INK, 3), (_MAP_CONTOUR, 1)):
            ImageDraw.Draw(sheet).line([(tick, top - 16), (tick, top - 4)], colour, thickness)


def _draw_legend(sheet: Image.Image, right: int, top: int, with_mask: bool) -> None:
    """Name the contours' colours, right-aligned above a panel."""
    for name, colour in [("mask", _MASK_CONTOUR)] * with_mask + [("found", _MAP_CONTOUR)]:
        right -= _write(sheet, right, top, name, anchor="rs") + 14
        ImageDraw.Draw(sheet).rectangle([(right, top - 14), (right + 9, top - 5)], colour, _INK)
        right -= 8
