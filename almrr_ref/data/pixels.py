"""Encoded and Pillow images -> uint8 arrays, by the rules in images.py. Without PyTorch, for decoders.py.

Of 16-bit colour Pillow keeps the upper 8 bits of each channel; `low_bytes` brings the lower ones, for images that use
fewer than 16 bits.
"""

import os
import re
import sys

import numpy as np
from PIL import Image

from almrr_ref.data.decoding import ImageError, Source, opened, upright
from almrr_ref.data.levels import Levels, ValuesError, to_bytes, upper_bytes


def decoded(source: Source, levels: Levels) -> tuple[np.ndarray, list[str]]:
    """An encoded or Pillow image -> uint8 (h, w, 3), and what was left out. Raises ImageError, ValuesError."""
    with opened(source) as opened_image:
        deep = is_deep_colour(opened_image)
        lower = low_bytes(source, opened_image) if deep and levels.white < 65535 else np.uint16(0)
        image = upright(opened_image)
        if image.mode != "F" and not image.mode.startswith("I"):
            image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    values, left_out, above = np.array(image), [], None
    if values.ndim == 2:
        grey, above = to_bytes(values, levels)
        values = three_channels(grey)
    if values.shape[2] == 4:
        if not values[..., 3].any():
            raise ValuesError("every pixel is fully transparent; save it without an alpha channel")
        if values[..., 3].min() < 255:
            left_out.append("alpha channel left out")
        values = np.ascontiguousarray(values[..., :3])
    if deep:
        values, above = upper_bytes(values.astype(np.uint16) << 8 | lower, levels)
    return values, [*left_out, *([above] if above else [])]


def three_channels(values: np.ndarray) -> np.ndarray:
    """(h, w), (h, w, 1) or (h, w, 3) -> a new array (h, w, 3)."""
    values = values[..., None] if values.ndim == 2 else values
    return np.array(np.broadcast_to(values, (*values.shape[:2], 3)))


def is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow is about to decode 16-bit colour, or gray with alpha, of which it keeps the upper 8 bits."""
    return _deep_mode(image) is not None


def low_bytes(source: Source, image: Image.Image) -> np.ndarray:
    """The lower 8 bits (h, w, 3) of an encoded 16-bit colour image, of which Pillow keeps the upper.

    The file is decoded as if its bytes had the other order. Raises ImageError where that cannot be done.
    """
    mode = _deep_mode(image)
    assert mode is not None
    swapped = mode[:-1] + ("B" if mode[-1] == "L" or (mode[-1] == "N" and sys.byteorder == "little") else "L")
    name = source if isinstance(source, str | os.PathLike) else "picture"
    if isinstance(source, Image.Image) or mode.startswith("LA"):
        what = "16-bit colour or alpha, of which Pillow keeps 8 bits"
        raise ImageError(name, f"{what}; save it as 8 bits, or without alpha")
    with opened(source) as image:
        tiles = image.tile  # type: ignore[attr-defined]
        tiles[:] = [tile._replace(args=swapped if tile.args == mode else (swapped, *tile.args[1:])) for tile in tiles]
        return np.array(upright(image).convert("RGB"))


def _deep_mode(image: Image.Image) -> str | None:
    """The raw mode, such as RGB;16B, of an image with 16 bits a channel that is not yet decoded; None for others."""
    for tile in getattr(image, "tile", []):
        mode = tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0]
        if isinstance(mode, str) and re.fullmatch(r"(RGB|LA).?;16[BLN]", mode):
            return mode
    return None
