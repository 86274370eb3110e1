"""Image files -> uint8 tensors: one rule for every file, so that a grey level means the same in every image.

- Colour: everything becomes RGB. Alpha is dropped: the colours stay as stored. Wholly transparent images are refused.
- Range: scaled by the *type* of the file, never by its content. 16-bit: 0..65535 -> 0..255. 32-bit integers: the same,
  values outside 0..65535 are refused. Float: [0, 1] when no value is above 1, else [0, 255]; NaN, infinite, negative
  or larger values are refused. (12-bit data in a 16-bit file therefore looks dark: scale it before.)
- The EXIF orientation is applied; an EXIF block that cannot be read states none. Of several frames the first counts.
- Resizing is Pillow's bilinear filter, which is antialiased: its support grows with the reduction.
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
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor

from almrr_ref.run.text import one_line

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# Only these decoders are let in: some of Pillow's others run external programs (EPS) or fetch further files.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_DECODER_ERRORS = (  # on broken bytes; seen were OSError, SyntaxError, ValueError and the bombs
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
_TRANSPOSE = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_OPEN_LOCK = threading.Lock()  # warning filters are global: it keeps two loading threads from mixing theirs up


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
    with _open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # by its version, Pillow gives the stored or the upright size here
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """File -> uint8 RGB tensor (3, h, w) at full size. Raises ImageError."""
    with _open(path) as image:
        pixels = np.array(_to_rgb(_upright(image), path))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """File -> uint8 RGB tensor (3, size, size), its aspect ratio not kept (paper, section 4.2). Raises ImageError."""
    with _open(path) as image:
        pixels = np.array(_to_rgb(_upright(image), path).resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_mask(path: str | os.PathLike[str], size: int | tuple[int, int]) -> Tensor:
    """Mask file -> uint8 tensor (1, h, w) in {0, 1}: 1 where it exceeds half of the full range. `size` is (h, w) or h.

    It is resized as fractions of that range: truncating to integers would lose thin cracks. The value of a coloured
    mask is its brightest channel, so that red on black counts. A mask without a value above 1 holds class numbers 0 and
    1. Any other without a value above half of the range is refused: it would come out empty without being so.
    Raises ImageError.
    """
    with _open(path) as opened:
        image = _upright(opened)
        if image.mode.startswith("I") and int(np.asarray(image).max()) <= 1:
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        levels = np.asarray(_to_rgb(image, path)).max(axis=2)
    brightest = int(levels.max())
    if 1 < brightest < 128:
        raise ImageError(path, f"mask values reach only {brightest} of 255; write 0 for good and 255 for defective")
    fraction = levels.astype(np.float32) / (1 if brightest == 1 else 255)
    height, width = size if isinstance(size, tuple) else (size, size)
    resized = Image.fromarray(fraction).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(resized) > 0.5).astype(np.uint8))[None]


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """File -> Pillow image with only its header read; what a decoder raises in the block becomes an ImageError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device could hang
            raise ImageError(path, "is not a regular file but a folder, pipe or device")
        if os.path.getsize(path) == 0:
            raise ImageError(path, "the file is empty (0 bytes)")
        # not by its name: Pillow 13 maps named files into memory and then garbles turned uncompressed TIFF files
        with open(path, "rb") as file:
            with _OPEN_LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=_FORMATS)
            yield image
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(path, _reason(error, os.path.islink(path))) from error


def _upright(image: Image.Image) -> Image.Image:
    """Decode the first frame and turn it upright, in the mode of the file."""
    image.load()
    orientation = _orientation(image)  # after load(): Pillow turns TIFF files itself and then drops the tag
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image.copy()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where none is stated."""
    try:
        # the base method: the one of PNG files would decode the whole image to look for a late EXIF block
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return value if value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """Image of any mode -> mode RGB by the rules of the module."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_levels(np.asarray(image), path))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] == 0:
            raise ImageError(path, "every pixel is fully transparent; save it without an alpha channel")
    return image.convert("RGB")


def _grey_levels(values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """16-bit, 32-bit or float values (h, w) -> uint8 (h, w), scaled by type."""
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not np.isfinite([low, high]).all():  # a NaN is the least and the greatest value
            raise ImageError(path, "holds NaN or infinite values; replace them")
        if low < 0 or high > 255:
            raise ImageError(path, f"float values {low:g} to {high:g} have no defined range; scale them to [0, 1]")
        return np.rint(values.astype(np.float64) * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageError(path, f"integer values {low} to {high} have no defined range; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _reason(error: BaseException, is_link: bool) -> str:
    """Exception of a decoder -> what a user can act on."""
    if isinstance(error, FileNotFoundError):
        return "a link that points to nothing" if is_link else "no such file"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format ({', '.join(_FORMATS)})"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?); cut it into parts"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"broken or truncated image ({str(error) or type(error).__name__})"
