"""Pictures of results: image | mask | map | overlay in one scale for a whole set, and contact sheets.

Source: the paper's Figs. 3 and 5-7. A map normalised per image makes a good part look defective (field-notes.md), hence
one scale for all. Drawn with Pillow alone. The colour map is our own: anchors from night blue over purple and orange to
pale yellow, interpolated in OKLab (Ottosson 2020) with evenly rising lightness, so that equal steps of the map look
equally large, in grey print too.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from almrr_ref.run.files import atomic_path

Picture = Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.floating] | torch.Tensor

_ANCHORS = ("0b0a26", "3a1a78", "8e2385", "d8435f", "fb8a3c", "fdc956", "fdf8cf")
_MAP_CONTOUR = (0, 229, 255)
_MASK_CONTOUR = (255, 72, 208)
_PAPER, _INK, _FAINT = (255, 255, 255), (38, 42, 51), (120, 126, 138)
_GAP, _STRIP = 8, 20  # between panels; height of the line of captions, in pixels
_SMALLEST, _LARGEST = 224, 640  # longer side of a panel, in pixels


@lru_cache(maxsize=1)
def colour_table() -> npt.NDArray[np.uint8]:
    """The colour map as a table: index 0 (normal) to 255 (defective) -> RGB, (256, 3)."""
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _ANCHORS]) / 255
    to_cone = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                        [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    to_lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                       [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    linear = np.where(anchors <= 0.04045, anchors / 12.92, ((anchors + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ to_cone.T) @ to_lab.T
    lightness = np.linspace(lab[0, 0], lab[-1, 0], 256)
    lab = np.stack([np.interp(lightness, lab[:, 0], lab[:, i]) for i in range(3)], axis=1)
    linear = np.clip((lab @ np.linalg.inv(to_lab).T) ** 3 @ np.linalg.inv(to_cone).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)


def overlay_row(
    image: Picture,
    anomaly_map: npt.ArrayLike | torch.Tensor,
    threshold: float | None,
    mask: npt.ArrayLike | torch.Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    region: npt.ArrayLike | torch.Tensor | None = None,
) -> Image.Image:
    """Draw image | mask (if any) | map | overlay side by side, or one above the other if the image is wide.

    Args:
        image: Pillow image, or (3, h, w), uint8 or float in [0, 1]; it is resized to the map's size if it differs.
        anomaly_map: (h, w) or (1, h, w).
        threshold: the contour is drawn around anomaly_map >= threshold; None: no contour, no tick on the scale.
        mask: ground truth, defective where > 0.5, (h, w) or (1, h, w).
        region: what the contour surrounds in place of anomaly_map >= threshold, (h, w) or (1, h, w), true inside.
        low, high: ends of the colour scale, the same for a whole set; values beyond take the end's colour.
    Raises:
        ValueError: if the mask's size is not the map's, or low >= high.
    """
    if not low < high:
        raise ValueError(f"the colour scale runs from {low} to {high}; expected low < high")
    values = _plane(anomaly_map)
    truth = None if mask is None else _plane(mask) > 0.5
    found = values >= (np.inf if threshold is None else threshold) if region is None else _plane(region) > 0.5
    if truth is not None and truth.shape != values.shape:
        raise ValueError(f"the mask is {truth.shape}, the anomaly map {values.shape}; resize the mask first")
    size = _panel_size(*values.shape)
    picture = as_picture(image).resize(size, Image.Resampling.LANCZOS)
    heat = _grey(values, low, high).resize(size, Image.Resampling.BILINEAR)
    truth = None if truth is None else _resized_region(truth, size)
    panels = [("image", picture), ("anomaly map", _coloured(heat))]
    panels.append(("overlay", _overlay(picture, heat, _resized_region(found, size), truth)))
    if truth is not None:
        panels.insert(1, ("mask", Image.fromarray(truth.astype(np.uint8) * np.uint8(255))))
    across = size[0] <= 2 * size[1]
    cells = [panel for _, panel in panels]
    sheet, corners = _lay_out(cells, len(panels) if across else 1, _STRIP, narrowest=_SMALLEST)
    draw, right = ImageDraw.Draw(sheet), max(size[0], _SMALLEST)
    for (name, _), (x, y) in zip(panels, corners, strict=True):
        draw.text((x, y - 5), name, _INK, font=_font(), anchor="ls")
        if name == "anomaly map":
            _draw_scale(sheet, x + right, y, low, high, threshold)
        elif name == "overlay":
            _draw_legend(draw, x + right, y, truth is not None)
    return sheet


def map_picture(anomaly_map: npt.ArrayLike | torch.Tensor, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """Draw a map, (h, w) or (1, h, w), in the colours of the overlays; low and high are the ends of the scale."""
    return _coloured(_grey(_plane(anomaly_map), low, high))


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    captions: Sequence[str] = (),
    columns: int = 1,
    row_captions: Sequence[str] = (),
    panel: int = 192,
) -> Image.Image:
    """Lay out rows of panels, all of one size: `columns` rows side by side, then further down.

    Args:
        rows: n rows of k pictures each (Pillow, (3, h, w), or (1, h, w) grey; uint8, or float in [0, 1]).
        captions: k headings, drawn above each column of panels on the first line; may be empty.
        columns: how many rows stand side by side.
        row_captions: n captions, drawn above each row, e.g. a file name; may be empty.
        panel: longer side of a panel in pixels.
    Raises:
        ValueError: if there is no row, or the numbers disagree.
    """
    width = len(rows[0]) if rows else 0
    if not width or any(len(row) != width for row in rows):
        raise ValueError(f"expected rows of one length, came lengths {sorted({len(row) for row in rows})}")
    if (captions and len(captions) != width) or (row_captions and len(row_captions) != len(rows)) or columns < 1:
        raise ValueError(
            f"{len(rows)} rows of {width} panels need {width} captions and {len(rows)} row captions, or none, and "
            f"columns >= 1; came {len(captions)}, {len(row_captions)} and {columns}"
        )
    pictures = [[as_picture(picture) for picture in row] for row in rows]
    factor = panel / max(pictures[0][0].size)
    size = (max(1, round(pictures[0][0].width * factor)), max(1, round(pictures[0][0].height * factor)))
    strips = []
    for index, row in enumerate(pictures):
        heading = captions if index < columns else ()
        strip, corners = _lay_out([picture.resize(size) for picture in row], width, _STRIP if heading else 0, margin=0)
        if row_captions:
            strip = _headed(strip, row_captions[index])
        for caption, (x, y) in zip(heading, corners, strict=False):
            down = y - 5 + (_STRIP if row_captions else 0)
            ImageDraw.Draw(strip).text((x, down), _shortened(caption, size[0]), _INK, font=_font(), anchor="ls")
        strips.append(strip)
    return _lay_out(strips, min(columns, len(strips)), 0, gap=2 * _GAP)[0]


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, at once, with the fastest compression: the next level costs half as much time again for 6% of size.

    Raises:
        OutputError: if the file cannot be written.
    """
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def as_picture(image: Picture) -> Image.Image:
    """Turn a Pillow image, or (3, h, w) or (1, h, w) values, uint8 or float in [0, 1], into an RGB Pillow image."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = image.detach().to("cpu").numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"a picture has shape {array.shape}; expected (3, h, w) or (1, h, w)")
    if array.dtype != np.uint8:
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0)))


def _plane(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.float64]:
    """Return a map or mask, (h, w) or (1, h, w), as (h, w)."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or not array.size:
        raise ValueError(f"a map or mask has shape {array.shape}; expected (h, w) or (1, h, w)")
    return array


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Choose a panel's width and height in pixels: captions must fit, and a page of rows must stay small."""
    factor = min(max(1.0, _SMALLEST / width), _LARGEST * (1 if width <= 2 * height else 1.6) / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized_region(region: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Resize a region (h, w) to (width, height); a single pixel survives any reduction."""
    picture = Image.fromarray(region.astype(np.float32))
    grown = size[0] * size[1] >= region.size
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST if grown else Image.Resampling.BOX)) > 0


def _grey(values: npt.NDArray[np.float64], low: float, high: float) -> Image.Image:
    """A map (h, w) in 256 steps, 0 at low and below, 255 at high and above."""
    return Image.fromarray(np.clip(np.round((values - low) / (high - low) * 255), 0, 255).astype(np.uint8))


def _coloured(heat: Image.Image) -> Image.Image:
    """Give a grey image the colours of the colour map."""
    return Image.fromarray(colour_table()[np.asarray(heat)])


def _overlay(
    picture: Image.Image, heat: Image.Image, found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_] | None
) -> Image.Image:
    """Blend the map over the greyed image, more where it is higher, and draw both contours."""
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    share = 0.6 * np.sqrt(np.asarray(heat, dtype=np.float32)[..., None] / 255)
    blend = (1 - share) * grey + share * np.asarray(_coloured(heat), dtype=np.float32)
    # The truth's contour lies outside its region and the prediction's inside: both stay visible where they agree.
    if truth is not None:
        blend[ndimage.binary_dilation(truth) & ~truth] = _MASK_CONTOUR
    blend[found & ~ndimage.binary_erosion(found, iterations=1 + (found.sum() > 64))] = _MAP_CONTOUR
    return Image.fromarray(np.round(blend).astype(np.uint8))


def _lay_out(
    panels: Sequence[Image.Image], columns: int, strip: int, gap: int = _GAP, margin: int = _GAP, narrowest: int = 1
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Put panels on white paper, `strip` pixels free above each; return it and each panel's left upper corner."""
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(narrowest, *(panel.width for panel in panels))
    heights = [max(panel.height for panel in line) + strip for line in lines]
    total = (2 * margin + columns * (width + gap) - gap, 2 * margin + sum(heights) + gap * (len(lines) - 1))
    sheet = Image.new("RGB", total, _PAPER)
    corners = []
    for number, line in enumerate(lines):
        for column, panel in enumerate(line):
            corners.append((margin + column * (width + gap), margin + sum(heights[:number]) + number * gap + strip))
            sheet.paste(panel, corners[-1])
    return sheet, corners


def _headed(strip: Image.Image, caption: str) -> Image.Image:
    """Put a caption above a picture."""
    sheet = Image.new("RGB", (strip.width, strip.height + _STRIP), _PAPER)
    sheet.paste(strip, (0, _STRIP))
    ImageDraw.Draw(sheet).text((0, _STRIP - 5), _shortened(caption, strip.width), _FAINT, font=_font(), anchor="ls")
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _shortened(text: str, width: int) -> str:
    """Cut a caption to one line of `width` pixels; control characters become spaces."""
    text = "".join(char if char.isprintable() else " " for char in text)
    while text and _font().getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text


def _draw_scale(sheet: Image.Image, right: int, top: int, low: float, high: float, threshold: float | None) -> None:
    """Draw the colour scale with its ends and a tick at the threshold, right-aligned above a panel."""
    draw, width = ImageDraw.Draw(sheet), 64
    last = f"{high:.3g}"
    left = right - round(_font().getlength(last)) - width - 4
    bar = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (9, 1)))
    sheet.paste(_coloured(bar), (left, top - 14))
    draw.text((right, top - 5), last, _FAINT, font=_font(), anchor="rs")
    draw.text((left - 4, top - 5), f"{low:.3g}", _FAINT, font=_font(), anchor="rs")
    if threshold is None:
        return
    tick = left + round((min(max(threshold, low), high) - low) / (high - low) * (width - 1))
    draw.line([(tick, top - 16), (tick, top - 4)], _INK, 3)
    draw.line([(tick, top - 16), (tick, top - 4)], _MAP_CONTOUR, 1)


def _draw_legend(draw: ImageDraw.ImageDraw, right: int, top: int, with_mask: bool) -> None:
    """Name the contours' colours, right-aligned above a panel."""
    for name, colour in (("mask", _MASK_CONTOUR), ("found", _MAP_CONTOUR)):
        if name == "found" or with_mask:
            draw.text((right, top - 5), name, _FAINT, font=_font(), anchor="rs")
            right -= round(_font().getlength(name)) + 14
            draw.rectangle([(right, top - 14), (right + 9, top - 5)], colour, _INK)
            right -= 8
