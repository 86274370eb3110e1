"""The region of interest: a mask of the pixels that are judged, white on black (``--roi``).

Outside, the network sees the mean colour that its backbone was trained with, which is what a convolution's zeros beyond
the border are: the region's edge is to it what the image's border is. So what lies outside changes no score, bit for
bit, and stays out of simulated anomalies, statistics, memory, threshold and regions.

The mask is read once, before training, brought to the network's size, and kept in its configuration as a PNG in base64:
checkpoints and exported files need nothing beside them. Source: ours; the paper judges whole images.
"""

import base64
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from almrr_ref.config import ModelConfig
from almrr_ref.data.images import ImageError, Picture, read_image
from almrr_ref.data.shape import sizes_of
from almrr_ref.data.textures import TextureSource
from almrr_ref.run.text import LOGGER, one_line

LEAST = 64  # pixels of the region at the network's size, inside the score's margin; fewer hold no defect to learn from
SHAPE = 0.02  # by how much the mask's height / width may differ from the images'
SOFT = 0.05  # of a mask's pixels may be neither black nor white: the soft edge of a brush
DRAWS = 50  # of an anomaly, until one lies inside
VISIBLE = 8  # pixels of an anomaly inside, at least, as in plus/varied.py

Draw = Callable[[Tensor, TextureSource, torch.Generator], tuple[Tensor, Tensor]]


def settle_roi(path: str | None, pictures: Sequence[Picture], config: ModelConfig) -> ModelConfig:
    """The mask file of --roi, if there is one, -> the configuration with ``roi_png``; says how much is judged.

    Args:
        pictures: the training images, which the mask must lie over.
    Raises:
        ImageError: a ValueError; if the file is no picture, is no mask, has another shape than most of the images, or
            leaves too little.
        ValueError: if the network is to see tiles.
    """
    if path is None:
        return config
    if config.tile:
        raise ValueError(f"--roi {one_line(path)}: a network that sees tiles has no region of interest; drop --tile")
    brightness = read_image(path).amax(dim=0)  # (h, w)
    soft = float(((brightness >= 32) & (brightness < 224)).float().mean())
    if soft > SOFT:
        raise ImageError(path, f"is no mask: {soft:.0%} of it is neither black nor white; paint white what is judged")
    (height, width), sizes = brightness.shape, Counter(sizes_of(pictures)).most_common(1)
    h, w = sizes[0][0] if sizes else (height, width)
    if abs(math.log(height / width * w / h)) > SHAPE:
        shown = f"is {height} x {width} pixels (height x width), the images {h} x {w}"
        raise ImageError(path, f"the mask {shown}; draw it over one of them")
    white = (brightness >= 128)[None, None].float()
    roi = F.interpolate(white, config.size, mode="nearest-exact")[0, 0] > 0
    m, (h, w) = config.score_margin, config.size
    if (left := int(roi[m : h - m, m : w - m].sum())) < LEAST:
        where = f"at {h} x {w} pixels" + (f", {m} from the border" if m else "")
        raise ImageError(path, f"the mask has {left} white pixels {where}; at least {LEAST} are judged")
    LOGGER.info(f"region of interest: {float(roi.float().mean()):.0%} of the image, by {one_line(path)}")
    return dataclasses.replace(config, roi_png=encode_roi(roi))


def roi_of(config: ModelConfig) -> Tensor | None:
    """Which pixels a network judges, bool (h, w) of its size; None: all of them. Raises ValueError if it is damaged."""
    if config.roi_png is None:
        return None
    roi = read_image(base64.b64decode(config.roi_png))[0] > 0
    if roi.shape != config.size:
        raise ValueError(f"roi_png is {tuple(roi.shape)}, the network's images {config.size}; set it by --roi")
    return roi


def encode_roi(roi: Tensor) -> str:
    """What a configuration holds of a region, bool (h, w): a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(roi.numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def roi_cells(roi: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of a coarser grid in which a pixel is true: bool (h, w) -> bool ``size``."""
    return F.adaptive_max_pool2d(roi[None].float(), size)[0] > 0


def draw_inside(
    draw: Draw, roi: Tensor, image: Tensor, source: TextureSource, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An anomaly cut to the region: image (3, h, w) -> augmented (3, h, w), mask (1, h, w), empty if none hit it."""
    for _ in range(DRAWS):
        augmented, mask = draw(image, source, generator)
        if (mask := mask * roi).sum() >= VISIBLE:
            return torch.where(roi, augmented, image), mask
    return image, torch.zeros_like(image[:1])
