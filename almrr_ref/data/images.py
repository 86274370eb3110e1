"""Image files -> uint8 tensors: one rule for every file, so that a grey level means the same in every image.

- Colour: everything becomes RGB. Pillow converts grayscale, 1-bit, palette, CMYK and YCbCr files.
- Range: scaled by the *type* of the file, never by its content. 16-bit: 0..65535 -> 0..255. 32-bit integers: the same,
  values outside 0..65535 are refused. Float: [0, 1] when no value is above 1, else [0, 255]; NaN, infinite, negative
  or larger values are refused. (12-bit data in a 16-bit file therefore looks dark: scale it before.)
- Alpha is dropped: the colours stay as they are stored. An image that is transparent everywhere is refused.
- The EXIF orientation is applied; an EXIF block that cannot be read states no orientation.
- Of an animation or a multi-page file the first frame counts.
- Resizing is Pillow's bilinear filter, which is antialiased: its support grows with the reduction.
- Masks: resized as fractions of the full range, then `> 0.5`; truncating to integers would lose thin cracks.
"""

import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from almrr_ref.run.text import one_line

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

# Only these decoders are let in: some of Pillow's others run external programs (EPS) or fetch further files.
# The one for JPEG also takes MPO, the several-image JPEG of some cameras.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow's decoders raise on broken bytes: OSError, SyntaxError, ValueError and the bombs were seen; the others are
# a margin for other versions of it.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_WIDTH_TAG, _HEIGHT_TAG = 0x0100, 0x0101  # of TIFF

# Warning filters are global to the process; the lock keeps two loading threads from mixing theirs up.
_OPEN_LOCK = threading.Lock()


class ImageError(ValueError):
    """A file that gives no image; the message is one line with its `path` and the `reason`."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = Path(path)
        self.reason = one_line(reason)
        super().__init__(f"{one_line(path)}: {self.reason}")


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Whether the *name* is that of an image: a known extension, not hidden. Nothing is opened."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """File -> (width, height) with its orientation applied; reads the header only. Raises ImageError."""
    with _named_errors(path), _open(Path(path)) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # by its version, Pillow gives the stored or the upright size here
            width, height = image.tag_v2[_WIDTH_TAG], image.tag_v2[_HEIGHT_TAG]
        return (height, width) if _orientation(image) >= 5 else (width, height)


def check_image(image: Tensor, name: str = "images", batched: bool = True, as_bytes: bool = False) -> None:
    """Refuse a tensor that is no RGB image.

    Args:
        image: expected (b, 3, h, w) with b >= 1, or (3, h, w) if not `batched`; uint8 `as_bytes`, else floating.
        name: of the argument, for the message.
    Raises:
        ValueError: naming what came and what was expected.
    """
    typed = image.dtype == torch.uint8 if as_bytes else image.is_floating_point()
    if not typed or image.ndim != 3 + batched or image.shape[-3] != 3 or len(image) == 0:
        shape = "(b, 3, h, w), b >= 1," if batched else "(3, h, w)"
        wanted = (
            f"a uint8 tensor {shape}" if as_bytes else f"a float tensor {shape} in [0, 1]; from uint8: x.float() / 255"
        )
        raise ValueError(f"{name}: expected {wanted}; got {tuple(image.shape)} {image.dtype}")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """File -> uint8 RGB tensor (3, h, w) at full size. Raises ImageError."""
    return _to_tensor(_read_rgb(path))


def load_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """File -> uint8 RGB tensor (3, size, size), its aspect ratio not kept (paper, section 4.2). Raises ImageError."""
    _check_size(size)
    return _to_tensor(_read_rgb(path).resize((size, size), Image.Resampling.BILINEAR))


def load_mask(path: str | os.PathLike[str], size: int | tuple[int, int]) -> Tensor:
    """Mask file -> uint8 tensor (1, h, w) in {0, 1}; 1 where the resized mask exceeds half of the full range.

    The value of a coloured mask is its brightest channel, so that red on black counts. A mask without a value above 1
    holds class numbers 0 and 1. Any other mask without a value above half of the range is refused: it would come out
    empty without being so.

    Args:
        path: the mask file.
        size: edge of the result, or its (height, width), pixels, >= 1.
    Raises:
        ImageError: if the file gives no image, or has values that are neither 0/255 nor 0/1.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    _check_size(min(height, width))
    with _named_errors(path):
        image = _decode(Path(path))
        if image.mode.startswith("I") and int(np.asarray(image).max()) <= 1:
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        levels = np.asarray(_to_rgb(image, Path(path))).max(axis=2)
    brightest = int(levels.max())
    if 1 < brightest < 128:
        raise ImageError(path, f"mask values reach only {brightest} of 255; write 0 for good and 255 for defective")
    fraction = levels.astype(np.float32) / (1 if brightest == 1 else 255)
    resized = Image.fromarray(fraction).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(resized) > 0.5).astype(np.uint8))[None]


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"image size {size} is not positive; give the edge in pixels, such as 256")


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))  # (h, w, 3)
    return pixels.permute(2, 0, 1).contiguous()


def _read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    with _named_errors(path):
        return _to_rgb(_decode(Path(path)), Path(path))


def _decode(path: Path) -> Image.Image:
    """File -> its first frame, decoded and upright, in the mode of the file."""
    with _open(path) as image:
        image.load()
        orientation = _orientation(image)  # after load(): Pillow turns TIFF files itself and then drops the tag
        return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image.copy()


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """File -> Pillow image with only its header read. Pipes and devices are refused: reading them could hang."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "is a folder, not an image file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "is not a regular file")
    if status.st_size == 0:
        raise ImageError(path, "the file is empty (0 bytes)")
    # Not by its name: Pillow 13 maps named files into memory and then garbles turned uncompressed TIFF files.
    with path.open("rb") as file:
        with _OPEN_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_FORMATS)
        yield image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where none is stated."""
    try:
        # The base method: the one of PNG files would decode the whole image to look for a late EXIF block.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return value if value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Image of any mode -> mode RGB by the rules of the module."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_levels(np.asarray(image), path))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] == 0:
            raise ImageError(path, "every pixel is fully transparent; save it without an alpha channel")
    return image.convert("RGB")


def _grey_levels(values: np.ndarray, path: Path) -> np.ndarray:
    """16-bit, 32-bit or float values (h, w) -> uint8 (h, w), scaled by type."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ImageError(path, "holds NaN or infinite values; replace them")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255:
            raise ImageError(path, f"float values {low:g} to {high:g} have no defined range; scale them to [0, 1]")
        scaled = values.astype(np.float64) * (255 if high <= 1 else 1)
        return np.rint(scaled).astype(np.uint8)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        raise ImageError(path, f"integer values {least} to {most} have no defined range; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


@contextmanager
def _named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a decoder raises inside becomes an ImageError that names `path`."""
    try:
        yield
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(path, _reason(error, os.path.islink(path))) from error


def _reason(error: BaseException, is_link: bool) -> str:
    """Exception of a decoder -> what a user can act on."""
    if isinstance(error, FileNotFoundError):
        return "a link that points to nothing" if is_link else "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format ({', '.join(_FORMATS)})"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?); cut it into parts"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"broken or truncated image ({str(error) or type(error).__name__})"
