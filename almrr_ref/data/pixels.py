"""Encoded and Pillow images -> uint8 arrays, by the rules in images.py. Without PyTorch, for decoders.py."""

import numpy as np

from almrr_ref.data.decoding import Source, opened, upright
from almrr_ref.data.deep_colour import is_deep_colour, low_bytes
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
