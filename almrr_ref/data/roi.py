"""The region of interest: a mask of the pixels that are judged, white on black (``--roi``).

Outside, the network sees the mean colour that its backbone was trained with, which equals the zeros that a convolution
pads with: to the network the region's edge is an image border. So what lies outside changes no score, bit for bit, and
does not enter simulated anomalies, statistics, memory, threshold or regions.

The mask is read once, before training, brought to the network's size (a pixel belongs to the region if only white ones
of the mask make it when an image of the mask's size is resized), and stored in the configuration as a PNG in base64:
checkpoints and exported files need no other file. Source: ours; the paper judges whole images.

A region can also be drawn after training, as polygons (``judged_png`` beside ``roi_png``). The network's input does not
change, so pixels just outside still influence those inside; but only pixels inside both regions are scored, used for
calibration and outlined.
"""

import base64
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from almrr_ref.config import ModelConfig
from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, read_image
from almrr_ref.data.shape import sizes_of
from almrr_ref.data.textures import Draw, TextureSource
from almrr_ref.run.text import LOGGER, one_line

LEAST = 64  # smallest area of the region, in pixels at the network's size
SHAPE = 0.02  # largest difference of the logs of height / width between mask and images
SOFT = 0.05  # largest fraction of a mask's pixels that are neither black nor white: the soft edge of a brush
MOST_CORNERS = 500  # of all polygons of a drawn region together
DRAWS = 50  # of an anomaly, until one lies inside
FEWEST_PIXELS = 8  # of an anomaly; fewer cannot be seen

Polygon = Sequence[Sequence[float]]  # its corners, x and y in 0..1 of the picture's width and height


def settle_roi(path: str | None, pictures: Sequence[Picture], config: ModelConfig) -> ModelConfig:
    """The mask file of --roi, or None -> the configuration with ``roi_png``; logs the fraction that is judged.

    Args:
        pictures: the training images; most of them must have the mask's shape.
    Raises:
        ImageError: a ValueError; if the file is no picture or no mask, or has another shape or too few white pixels.
        ValueError: if the network sees tiles.
    """
    if path is None:
        return config
    if config.tile:
        raise ValueError(f"--roi {one_line(path)}: a network that sees tiles has no region of interest; drop --tile")
    left_out = Remarks()
    brightness = read_image(path, Levels(bits=16), left_out).amax(dim=0)  # (h, w)
    if left_out.counts:
        raise ImageError(path, "is no mask: it has transparent pixels; save it without alpha, white on black")
    if int(brightness.max()) == 1:  # a mask of 0 and 1
        brightness = brightness * 255
    soft = float(((brightness >= 32) & (brightness < 224)).float().mean())
    if soft > SOFT:
        raise ImageError(path, f"is no mask: {soft:.0%} of it is neither black nor white; paint white what is judged")
    (height, width), sizes = brightness.shape, Counter(sizes_of(pictures)).most_common(1)
    h, w = sizes[0][0] if sizes else (height, width)
    if abs(math.log(height / width * w / h)) > SHAPE:
        shown = f"is {height} x {width} pixels (height x width), the images {h} x {w}"
        raise ImageError(path, f"the mask {shown}; draw it over one of them")
    white = (brightness >= 128)[None, None].float()
    roi = F.interpolate(white, config.size, mode="bilinear", antialias=True)[0, 0] > 1 - 1e-6
    if reason := _too_small(roi):
        raise ImageError(path, f"the mask has {reason}")
    LOGGER.info(f"region of interest: {float(roi.float().mean()):.0%} of the image, by {one_line(path)}")
    return dataclasses.replace(config, roi_png=encode_roi(roi))


def _too_small(roi: Tensor) -> str:
    """Why a region, bool (h, w), is too small; "" if it is large enough."""
    area, (h, w) = int(roi.sum()), roi.shape
    return f"{area} white pixels at {h} x {w} pixels; at least {LEAST} are judged" if area < LEAST else ""


def roi_of(config: ModelConfig) -> Tensor | None:
    """Which pixels a network sees, bool (h, w) of its size; None: all. Raises ValueError if the region is damaged."""
    return None if config.roi_png is None else _decode_roi("roi_png", config.roi_png, config)


def judged_of(config: ModelConfig) -> Tensor | None:
    """Which pixels are judged: those in the region of training and in the region drawn later, where there are any.

    bool (h, w) of the network's size; None: all pixels. Raises ValueError if one of the two is damaged.
    """
    roi = roi_of(config)
    if config.judged_png is None:
        return roi
    judged = _decode_roi("judged_png", config.judged_png, config)
    return judged if roi is None else judged & roi


def _decode_roi(name: str, png: str, config: ModelConfig) -> Tensor:
    roi = read_image(base64.b64decode(png))[0] > 0
    if roi.shape != config.size:
        remedy = "set it by --roi" if name == "roi_png" else "draw it anew"
        raise ValueError(f"{name} is {tuple(roi.shape)}, the network's images {config.size}; {remedy}")
    return roi


def require_region(config: ModelConfig, png: str | None) -> None:
    """Check a region drawn after training, as `draw_region` returns it, against a network.

    Raises:
        ValueError: if the network sees tiles, or the region has another size than its images or too few pixels.
    """
    if config.tile:
        raise ValueError(f"this network sees tiles of {config.tile} pixels, and has no region of interest")
    config = dataclasses.replace(config, judged_png=png)
    judged = judged_of(config)
    if judged is not None and (reason := _too_small(judged)):
        inside = "" if config.roi_png is None else " inside the mask of the training (--roi)"
        raise ValueError(f"the region has {reason}{inside}; draw a larger one")


def draw_region(polygons: Sequence[Polygon], size: tuple[int, int]) -> str | None:
    """Polygons -> the mask of their union at ``size`` (h, w), as a configuration stores it; None: no restriction.

    A pixel lies inside a polygon if its middle does, by the even-odd rule.

    Raises:
        ValueError: if there are too many corners, fewer than three in a polygon, or one is not a number within 0 and 1.
    """
    _check_polygons(polygons)
    y, x = (((np.arange(side) + 0.5) / side) for side in size)
    region = np.zeros(size, dtype=bool)
    for corners in polygons:
        inside = np.zeros(size, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
            rows = (y0 <= y) != (y1 <= y)  # rows that the edge crosses
            if rows.any():
                inside[rows] ^= x < x0 + (y[rows, None] - y0) * ((x1 - x0) / (y1 - y0))
        region |= inside
    return None if not polygons or region.all() else encode_roi(torch.from_numpy(region))


def _check_polygons(polygons: Sequence[Polygon]) -> None:
    corners = 0
    for number, polygon in enumerate(polygons, start=1):
        if not isinstance(polygon, list | tuple) or len(polygon) < 3:
            raise ValueError(f"polygon {number} is no list of 3 or more corners [x, y]; draw one with three, or none")
        if (corners := corners + len(polygon)) > MOST_CORNERS:
            raise ValueError(f"a region has at most {MOST_CORNERS} corners in all; draw a simpler one")
        for place, corner in enumerate(polygon, start=1):
            pair = isinstance(corner, list | tuple) and len(corner) == 2
            if not pair or not all(type(value) in (int, float) and 0 <= value <= 1 for value in corner):
                shown = repr(corner)[:60]
                raise ValueError(f"polygon {number}, corner {place}: expected [x, y], each within 0 and 1; got {shown}")


def encode_roi(roi: Tensor) -> str:
    """A region, bool (h, w) -> a PNG in base64, as a configuration stores it."""
    buffer = io.BytesIO()
    Image.fromarray(roi.numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def roi_cells(roi: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of a coarser grid that hold a true pixel: bool (h, w) -> bool ``size``."""
    return F.adaptive_max_pool2d(roi[None].float(), size)[0] > 0


def draw_inside(
    draw: Draw, roi: Tensor, image: Tensor, source: TextureSource, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw an anomaly and cut it to the region: (3, h, w) -> augmented (3, h, w), mask (1, h, w), empty if none hit."""
    for _ in range(DRAWS):
        augmented, mask = draw(image, source, generator)
        if (mask := mask * roi).sum() >= FEWEST_PIXELS:
            return torch.where(roi, augmented, image), mask
    return image, torch.zeros_like(image[:1])
