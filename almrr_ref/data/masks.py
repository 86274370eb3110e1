"""Mask files -> {0, 1}: which pixels of an image are defective.

Background is 0, black, or transparent; every other class counts, whatever its number or colour:

- A palette's indices are classes, unless all its colours are gray. Background is its black, or else its index 0.
- Of a mask in one colour and partly transparent, alpha is the mask.
- The value of a coloured pixel is its brightest channel, so that red on black counts, and dark blue.
- Values between 0 and the largest are the soft edges of two classes where they lie between smaller and larger ones, and
  then half of the largest value is the border; else they are classes of their own.

What could be read in two ways is refused by name.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from almrr_ref.data.decoding import AnyPath, ImageError, deep_mode, low_bytes, opened, upright
from almrr_ref.data.folders import list_folder
from almrr_ref.data.levels import ValuesError

_LOSSY = ("JPEG", "MPO", "AVIF")  # they do not keep the exact value of a class


def load_mask(path: AnyPath, size: tuple[int, int]) -> Tensor:
    """Mask file -> uint8 tensor (1, h, w) in {0, 1}; `size` is (h, w).

    A folder of masks is one mask, their union. Resizing works on floats, how defective each pixel is: truncating to
    integers would lose thin cracks. Raises ImageError.
    """
    if os.path.isdir(path):
        masks = [load_mask(Path(path) / name, size) for name in list_folder(Path(path))[0]]
        if not masks:
            raise ImageError(path, "a folder without a mask in it")
        return torch.stack(masks).amax(dim=0)
    with opened(path) as opened_image:
        lossy, deep = opened_image.format in _LOSSY, deep_mode(opened_image)
        image = upright(opened_image)
    try:
        fraction = _defective(image, lossy, low_bytes(path, deep) if deep else None)
    except ValuesError as error:
        raise ImageError(path, f"mask {error}") from error
    resized = Image.fromarray(fraction.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(resized) > 0.5).astype(np.uint8))[None]


def _defective(image: Image.Image, lossy: bool, lower: np.ndarray | None = None) -> np.ndarray:
    """Image of any mode -> how defective each pixel is, (h, w), bool or in [0, 1]. Raises ValuesError.

    Args:
        lower: of 16-bit colour, of which Pillow keeps the upper 8 bits, the lower ones, (h, w, 3).
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if not values.min() >= 0 or values.max() == np.inf:
            raise ValuesError("holds negative, NaN or infinite values; write 0 for good and 255 for defective")
        return _of_values(values, lossy, even=values.min() == values.max())
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
    colours = np.asarray(image.convert("RGB"))
    if lower is not None:
        colours = colours.astype(np.uint16) << 8 | lower
    if image.mode == "RGBA" and (alpha := np.asarray(image.getchannel("A"))).min() < 255:
        return _of_transparent(colours, alpha, lossy)
    if image.mode == "P" and (colours != colours[..., :1]).any():
        return _of_palette(np.asarray(image), colours)
    return _of_values(colours.max(axis=2), lossy, even=bool((colours == colours[0, 0]).all()))


def _of_transparent(colours: np.ndarray, alpha: np.ndarray, lossy: bool) -> np.ndarray:
    """Colours (h, w, 3) and alpha (h, w), not all opaque -> how defective each pixel is."""
    visible = alpha > 0
    shown = colours[visible] if visible.any() else colours.reshape(-1, 3)
    if (shown != shown[0]).any():
        if not visible.any():
            raise ValuesError("is fully transparent, but its colours differ; save it without an alpha channel")
        return _of_values(np.where(visible, colours.max(axis=2), 0), lossy)
    if visible.any() and not shown.any():
        raise ValuesError("is black where it is not transparent: good or defective? Save it without an alpha channel")
    return alpha / 255


def _of_palette(index: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Indices (h, w) and their colours (h, w, 3) -> which pixels are defective."""
    black = colours.max(axis=2) == 0
    if not black.any():
        return index != 0
    if not black[index == 0].all():
        raise ValuesError("has a palette with black, but index 0 is another colour: which is good? Make index 0 black")
    return ~black


def _of_values(values: np.ndarray, lossy: bool, even: bool = False) -> np.ndarray:
    """Values (h, w), 0 or more -> how defective each pixel is. `even`: whether all pixels are alike."""
    top = values.max().item()
    if lossy:  # remove the noise about 0 and about the largest value
        values = np.where(values < top / 8, 0, np.where(values > top * 7 / 8, top, values))
    if even or top == 0:
        return values > 0
    if values.min() > 0:
        raise ValuesError("has no pixel of 0 (black), so what is good in it is not clear; write good pixels as 0")
    between = (values > 0) & (values < top)
    if not between.any() or (values.dtype.kind != "f" and top < 32):  # so few values are numbers of classes
        return values > 0
    lowest, highest = ndimage.minimum_filter(values, 3), ndimage.maximum_filter(values, 3)
    soft = ((lowest < values) & (values < highest))[between].mean()
    flat = (lowest == highest)[between].mean()
    many = len(np.unique(values[between])) > 32
    if flat <= 0.05 and (soft >= 0.5 or many or lossy):
        return values / top
    if soft > 0.5 or lossy:
        what = f"has values between 0 and {top:g} that may be classes or soft edges"
        raise ValuesError(f"{what}; write 0 for good and 255 for defective")
    return values > 0
