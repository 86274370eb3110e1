"""Pictures -> uint8 tensors: one rule for files, bytes, Pillow images, arrays and float tensors.

The same picture gives the same tensor in every form.

- Colour: everything becomes RGB. Alpha is dropped: the colours stay as stored. Wholly transparent images are refused.
- Range: by the type of the values and the `Levels` of the network (levels.py), never by the picture's extremes.
- The EXIF orientation is applied; an EXIF block that cannot be read states none.
- A file of several pages is refused; its pages have paths of their own (decoding.py).
- Resizing is Pillow's bilinear filter, which is antialiased: its support grows with the reduction.
"""

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor

from almrr_ref.data.decoding import (
    IMAGE_EXTENSIONS,
    ImageError,
    Source,
    decoded,
    deep_mode,
    is_image_file,
    low_bytes,
    opened,
    orientation,
    pages,
    split_page,
    three_channels,
    upright,
)
from almrr_ref.data.levels import Levels, Remarks, ValuesError, to_bytes, upper_bytes

__all__ = [
    "IMAGE_EXTENSIONS", "ImageError", "Levels", "Picture", "Remarks", "image_size", "is_image_file", "load_image",
    "pages", "read_image", "resize_image", "split_page",
]  # fmt: skip

ROUNDING = 1e-3  # how far floats may leave [0, 1], as by a resize; less than half a level of 8 bits
Picture: TypeAlias = Source | np.ndarray | Tensor


def image_size(source: Source) -> tuple[int, int]:
    """File -> (width, height) with its orientation applied; reads the header only. Raises ImageError."""
    with opened(source) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # by its version, Pillow gives the stored or the upright size here
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return (height, width) if orientation(image) >= 5 else (width, height)


def read_image(picture: Picture, levels: Levels = Levels(), remarks: Remarks | None = None) -> Tensor:  # noqa: B008
    """A picture at full size -> uint8 RGB tensor (3, h, w).

    Args:
        picture: a path (`stack.tif#5` is the fifth page of a file), an encoded file as bytes, a Pillow image, an array
            uint8 or uint16 of (h, w), (h, w, 1) or (h, w, 3), RGB; or a tensor of (h, w), (1, h, w) or (3, h, w), float
            in [0, 1] or uint8.
        levels: which value is white in 16-bit integers and float files.
        remarks: collects what is left out (alpha, values above white).
    Raises:
        ImageError: a ValueError; it names the file, or "picture", what came and what is expected.
    """
    return torch.from_numpy(_pixels(picture, levels, remarks)).permute(2, 0, 1).contiguous()


def load_image(
    picture: Picture,
    size: tuple[int, int],
    levels: Levels = Levels(),  # noqa: B008
    remarks: Remarks | None = None,
) -> Tensor:
    """`read_image`, then resized to `size`, (height, width), its aspect ratio not kept: uint8 RGB (3, *size)."""
    return _resized(_pixels(picture, levels, remarks), size)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by Pillow's bilinear filter, the one way into a network's size: uint8 (3, h, w) -> (3, *size)."""
    return _resized(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), size)


def is_one_picture(pictures: object) -> bool:
    """Whether what should be many pictures is one, whose rows or channels might pass as pictures of their own."""
    if not isinstance(pictures, np.ndarray | Tensor):
        return isinstance(pictures, str | os.PathLike | bytes | Image.Image)
    channels = pictures.shape[0 if isinstance(pictures, Tensor) else -1] if pictures.ndim == 3 else None
    return pictures.ndim == 2 or channels in (1, 3)


def copied_picture(picture: Any) -> Any:
    """A copy of an array or tensor: cameras fill the same one again. Everything else as it is."""
    if isinstance(picture, np.ndarray):
        return picture.copy()
    return picture.clone() if isinstance(picture, Tensor) else picture


def unscaled_values(picture: Picture) -> np.ndarray | None:
    """The integers of a picture of more than 8 bits, or the floats of a file; None for others. Raises ImageError."""
    if isinstance(picture, np.ndarray):
        return picture if picture.dtype.itemsize > 1 and picture.size else None
    if not isinstance(picture, str | os.PathLike | bytes | Image.Image):
        return None
    with opened(picture) as image:
        if deep := deep_mode(image):
            lower = low_bytes(picture, deep)
            return np.array(upright(image).convert("RGB")).astype(np.uint16) << 8 | lower  # which are upright, too
        return np.asarray(image) if image.mode == "F" or image.mode.startswith("I") else None


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    height, width = size
    resized = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized).permute(2, 0, 1).contiguous()


def _pixels(picture: Picture, levels: Levels, remarks: Remarks | None) -> np.ndarray:
    """A picture -> a new array, uint8 (h, w, 3)."""
    name = picture if isinstance(picture, str | os.PathLike) else "picture"
    try:
        if isinstance(picture, np.ndarray):
            pixels, left_out = _of_array(picture, levels)
        elif isinstance(picture, Tensor):
            pixels, left_out = _of_tensor(picture), []
        elif isinstance(picture, str | os.PathLike | bytes | Image.Image):
            if isinstance(picture, Image.Image):
                _check_shape("Pillow image of {} x {}".format(*picture.size), picture.size, True, "an image")
            pixels, left_out = decoded(picture, levels)
        else:
            raise ValuesError(f"{type(picture).__name__} is no picture; give a path, bytes, Pillow image or array")
    except ValuesError as error:
        raise ImageError(name, str(error)) from error
    if remarks:
        for kind in left_out:
            remarks.add(kind, name)
    return pixels


def _of_array(array: np.ndarray, levels: Levels) -> tuple[np.ndarray, list[str]]:
    """uint8 or uint16 (h, w), (h, w, 1) or (h, w, 3) -> uint8 (h, w, 3), and what was left out."""
    came = f"array {array.shape} of {array.dtype}"
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        floats = "; give floats in [0, 1] as a tensor (3, h, w)" if array.dtype.kind == "f" else ""
        raise ValuesError(f"{came}; expected uint8 or uint16{floats}")
    right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    _check_shape(came, array.shape, right, "(h, w), (h, w, 1) or (h, w, 3)")
    array, above = array[..., 0] if array.shape[2:] == (1,) else array, None
    if array.dtype.itemsize == 2:
        array, above = (to_bytes if array.ndim == 2 else upper_bytes)(array.astype(np.uint16), levels)
    return three_channels(array), [above] if above else []


def _of_tensor(tensor: Tensor) -> np.ndarray:
    """Float tensor in [0, 1] or uint8, (h, w), (1, h, w) or (3, h, w) -> uint8 (h, w, 3)."""
    shape, kind = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    came, wanted = f"tensor {shape} of {kind}", "(3, h, w), (1, h, w) or (h, w)"
    if not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        raise ValuesError(f"{came}; expected floats in [0, 1], or uint8")
    _check_shape(came, shape, len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)), wanted)
    values: Any = tensor.detach().cpu()
    values = values.numpy() if tensor.dtype == torch.uint8 else _unit_to_bytes(values.double().numpy(), came)
    return three_channels(values if values.ndim == 2 else values.transpose(1, 2, 0))


def _unit_to_bytes(values: np.ndarray, came: str) -> np.ndarray:
    low, high = values.min().item(), values.max().item()
    if not np.isfinite([low, high]).all():
        raise ValuesError(f"{came} holds NaN or infinite values; replace them")
    if low < -ROUNDING or high > 1 + ROUNDING:
        remedy = "divide by 255" if low >= 0 and high <= 255 else "undo a normalisation by mean and deviation"
        raise ValuesError(f"{came} with values {low:g} to {high:g}; expected [0, 1]: {remedy}")
    return to_bytes(values.clip(0, 1), Levels(float_white=1.0))[0]


def _check_shape(came: str, shape: tuple[int, ...], right: bool, wanted: str) -> None:
    if not right:
        raise ValuesError(f"{came}; expected {wanted}")
    if 0 in shape:
        raise ValuesError(f"{came} is empty; expected {wanted} with h, w >= 1")
