"""The height and width of the network's images: settled once, by the training images, and stored with the network.

An image twice as wide as high, squashed to a square, loses every second column, and with it a thin upright crack. So
``--image-size auto`` keeps the images' shape at the area of a square; the cost is the same.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from almrr_ref.config import ModelConfig, nearest_side
from almrr_ref.data.folders import size_of
from almrr_ref.data.images import Picture
from almrr_ref.run.text import LOGGER

MOST = 2000  # pictures that are looked at
MARGIN = 1.25  # beyond the shapes of the training images, by which a picture is called one of another shape
SQUASHED = 1.5  # the change of shape that calls for a warning


def settle_size(pictures: Sequence[Picture], config: ModelConfig, flag: str = "--image-size") -> ModelConfig:
    """Training images -> the configuration with `image_size` as numbers; logs what becomes of the images' shape.

    "auto": the median of height / width over the images, at the area of ``pixels`` x ``pixels``; for tiles a square.

    Args:
        flag: the option of the caller's command that sets another size; the message names it.
    """
    sizes = sizes_of(pictures)
    ratio = math.exp(statistics.median([math.log(h / w) for h, w in sizes])) if sizes else 1.0
    remedy = "--image-size auto keeps their shape"
    shapes = sorted(h / w for h, w in sizes)
    config = dataclasses.replace(config, shapes=(shapes[0], shapes[-1]) if shapes else ())
    if config.image_size == "auto":
        remedy = "a larger --pixels keeps their shape"  # a side is at least 32 pixels
        fitted = fitted_size(1.0 if config.tile else ratio, config.pixels)
        config = dataclasses.replace(config, image_size=fitted)
    height, width = config.size
    if config.tile:
        LOGGER.info(f"{_describe(sizes)} are cut into tiles, which are brought to {height} x {width}")
        if small := sum(min(size) < config.tile for size in sizes):
            which = f"{small} of {len(sizes)} images are smaller than a tile of {config.tile} pixels"
            LOGGER.warning(f"note: {which}, and are filled up with their mirror image; a smaller --tile avoids that")
        return config
    squashed = max(ratio * width / height, height / width / ratio)
    becomes = "keep their size" if set(sizes) == {config.size} else f"are brought to {height} x {width}"
    line = f"{_describe(sizes)} {becomes}"
    if squashed <= SQUASHED:
        LOGGER.info(f"{line}; say otherwise with {flag}")
    else:
        LOGGER.warning(f"note: {line}: squashed by {squashed:.1f}, so thin lines may vanish; {remedy}")
    return config


def of_another_shape(ratio: float, config: ModelConfig) -> str:
    """Height / width of a picture -> what is to be said of it, where no training image had such a shape, or ""."""
    if not config.shapes or config.shapes[0] / MARGIN <= ratio <= config.shapes[1] * MARGIN:
        return ""
    return "of another shape than the training images, and so squashed in another way: scores may be wrong"


def fitted_size(ratio: float, pixels: int) -> tuple[int, int]:
    """Height / width -> the height and width, multiples of 32, nearest to that shape at the area of `pixels` squared.

    The shorter side is at least 32 pixels; the longer one then is as long as the area allows.
    """
    longest = max(pixels, pixels**2 / 32)
    height, width = (min(pixels * factor, longest) for factor in (math.sqrt(ratio), 1 / math.sqrt(ratio)))
    return nearest_side(height), nearest_side(width)


def sizes_of(pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    """(height, width) of at most MOST of the pictures, evenly spread; what is no picture is left out."""
    return [size for picture in pictures[:: 1 + len(pictures) // MOST] if (size := _size_of(picture))]


def _size_of(picture: Picture) -> tuple[int, int] | None:
    """(height, width); None for what is no picture, which loading will name."""
    if isinstance(picture, np.ndarray | Tensor):
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.shape[-2:]
        return (height, width) if height and width else None
    size = size_of(picture)
    return (size[1], size[0]) if size else None


def _describe(sizes: Sequence[tuple[int, int]]) -> str:
    """Sizes -> "images of ..." with their one size, or the range of their shapes."""
    if not sizes:
        return "images"
    if len(set(sizes)) == 1:
        return "images of {} x {} pixels (height x width)".format(*sizes[0])
    ratios = sorted(height / width for height, width in sizes)
    middle, (low, high) = statistics.median(ratios), (f"{ratio:.2g}" for ratio in (ratios[0], ratios[-1]))
    if low == high:
        return f"images of several sizes, whose height is {low} of their width,"
    return f"images whose height is {low} to {high} of their width, mostly {middle:.2g},"
