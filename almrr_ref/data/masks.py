"""Mask files -> {0, 1}: which pixels of an image are defective."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from almrr_ref.data.decoding import AnyPath, ImageError, opened, upright
from almrr_ref.data.levels import Levels, ValuesError, to_bytes


def load_mask(path: AnyPath, size: int | tuple[int, int]) -> Tensor:
    """Mask file -> uint8 tensor (1, h, w) in {0, 1}: 1 where it exceeds half of the full range. `size` is (h, w) or h.

    It is resized as fractions of that range: truncating to integers would lose thin cracks. The value of a coloured
    mask is its brightest channel, so that red on black counts. A mask without a value above 1 holds class numbers 0 and
    1. Any other without a value above half of the range is refused: it would come out empty without being so.
    Raises ImageError.
    """
    with opened(path) as opened_image:
        image = upright(opened_image)
        try:
            if image.mode == "F" or image.mode.startswith("I"):
                values = np.asarray(image)
                small = values.dtype.kind != "f" and int(values.max()) <= 1
                image = Image.fromarray(values.astype(np.uint8) if small else to_bytes(values, Levels())[0])
        except ValuesError as error:
            raise ImageError(path, str(error)) from error
        levels = np.asarray(image.convert("RGB")).max(axis=2)
    brightest = int(levels.max())
    if 1 < brightest < 128:
        raise ImageError(path, f"mask values reach only {brightest} of 255; write 0 for good and 255 for defective")
    fraction = levels.astype(np.float32) / (1 if brightest == 1 else 255)
    height, width = size if isinstance(size, tuple) else (size, size)
    resized = Image.fromarray(fraction).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(resized) > 0.5).astype(np.uint8))[None]
