"""Files, bytes and Pillow images -> uint8 arrays, by the rules in images.py; and the pages of a file.

A file of several pictures (pages of a TIFF, frames of a GIF, WebP, AVIF, MPO or animated PNG) cannot be read by its
plain path, which would drop all but the first: `stack.tif#5` is its fifth picture. Thumbnails and smaller levels that a
TIFF file marks as such are no pictures, nor are images of an MPO file that differ in size from its first.

Of 16-bit colour Pillow keeps the upper 8 bits of each channel; `low_bytes` brings the lower ones, for images that use
fewer than 16 bits. Without PyTorch, for decoders.py.
"""

import functools
import os
import re
import stat
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from almrr_ref.data import tiff
from almrr_ref.data.levels import Levels, ValuesError, to_bytes, upper_bytes
from almrr_ref.run.text import one_line

IMAGE_EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
# Only these decoders are let in: some of Pillow's others run external programs (EPS) or fetch further files.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_DECODER_ERRORS = (  # what decoders raise, or may raise, on broken bytes
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_TRANSPOSE = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_OPEN_LOCK = threading.Lock()  # warning filters are global, and two threads must not mix theirs up
_PAGE = re.compile(r"(.+)#([1-9][0-9]{0,8})", re.DOTALL)

AnyPath: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = AnyPath | bytes | Image.Image  # what holds an encoded picture, or a decoded one


class ImageError(ValueError):
    """A picture that cannot be read; the message is one line, with its `path` and the `reason`."""

    def __init__(self, path: AnyPath, reason: str) -> None:
        self.path = Path(path)
        self.reason = one_line(reason)
        super().__init__(f"{one_line(path)}: {self.reason}")


def is_image_file(path: AnyPath) -> bool:
    """Whether the *name* is that of an image, or of a page of one: a known extension, not hidden. Nothing is opened."""
    path = Path(path)
    suffix = Path(page.group(1)).suffix if (page := _PAGE.fullmatch(path.name)) else path.suffix
    return suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def split_page(path: AnyPath) -> tuple[Path, int | None]:
    """Path of a picture -> its file and the number of its page: "x.tif#5" -> "x.tif", 5. Without a page: None.

    A file that has the "#5" in its own name is that file.
    """
    path = Path(path)
    page = _PAGE.fullmatch(path.name)
    if page is None or os.path.lexists(path):
        return path, None
    return path.with_name(page.group(1)), int(page.group(2))


def stem_and_page(path: Path) -> tuple[str, str]:
    """Name of a picture -> its file's stem, and its page as it stands in the name: "x.tif#5" -> "x", "#5"."""
    file, page = split_page(path)
    return file.stem, f"#{page}" if page else ""


def pages(path: AnyPath) -> list[Path]:
    """File -> the paths of its pictures, in order; the file itself if it has only one, or cannot be read.

    Raises ImageError if another file has the name of one of its pages.
    """
    path = Path(path)
    try:
        with _file(path) as file:
            count = len(_frames(_header(file), file)) if _may_hold_pages(file) else 1
    except _DECODER_ERRORS:
        return [path]
    if count == 1:
        return [path]
    paths = [path.with_name(f"{path.name}#{k}") for k in range(1, count + 1)]
    for page in paths:
        if os.path.lexists(page):
            raise ImageError(path, f"holds {count} pages, and a file has the name of page {page.name}; rename it")
    return paths


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """A picture -> Pillow image with only its header read; what a decoder raises in the block becomes an ImageError."""
    name = source if isinstance(source, str | os.PathLike) else "picture"
    try:
        if isinstance(source, Image.Image):
            count = len(_frames(source))
            if count > 1:
                raise ImageError(name, f"holds {count} pages; give a copy() of each, see Pillow's ImageSequence")
            yield source
            return
        file, page = (BytesIO(source), None) if isinstance(source, bytes) else split_page(source)
        with file if isinstance(file, BytesIO) else _file(file) as stream:
            yield _picture(stream, page, name)
    except ImageError as error:
        if error.path == Path(name):
            raise
        raise ImageError(name, error.reason) from error  # name the page, not its file
    except _DECODER_ERRORS as error:
        is_link = not isinstance(source, bytes | Image.Image) and os.path.islink(source)
        raise ImageError(name, _reason(error, is_link)) from error


def upright(image: Image.Image) -> Image.Image:
    """Decode an image and turn it upright, in the mode of the file."""
    image.load()
    turn = orientation(image)  # after load(): Pillow turns TIFF files itself and then drops the tag
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image.copy()


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where none is stated."""
    try:
        # the base method: the one of PNG files would decode the whole image to look for a late EXIF block
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return value if value in _TRANSPOSE else 1


def decoded(source: Source, levels: Levels) -> tuple[np.ndarray, list[str]]:
    """An encoded or Pillow image -> uint8 (h, w, 3), and what was left out. Raises ImageError, ValuesError."""
    with opened(source) as opened_image:
        deep = deep_mode(opened_image)
        lower = low_bytes(source, deep) if deep and levels.white < 65535 else np.uint16(0)
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


def low_bytes(source: Source, mode: str) -> np.ndarray:
    """The lower 8 bits (h, w, 3) of 16-bit colour of a `deep_mode`, of which Pillow keeps the upper.

    The file is decoded as if its bytes had the other order. Raises ImageError where that cannot be done.
    """
    swapped = mode[:-1] + ("B" if mode[-1] == "L" or (mode[-1] == "N" and sys.byteorder == "little") else "L")
    name = source if isinstance(source, str | os.PathLike) else "picture"
    if isinstance(source, Image.Image) or mode.startswith("LA"):
        what = "16-bit colour or alpha, of which Pillow keeps 8 bits"
        raise ImageError(name, f"{what}; save it as 8 bits, or without alpha")
    with opened(source) as image:
        tiles = image.tile  # type: ignore[attr-defined]
        tiles[:] = [tile._replace(args=swapped if tile.args == mode else (swapped, *tile.args[1:])) for tile in tiles]
        return np.array(upright(image).convert("RGB"))


def deep_mode(image: Image.Image) -> str | None:
    """The raw mode, such as RGB;16B, of 16-bit colour, or gray with alpha, not yet decoded; None for other images."""
    for tile in getattr(image, "tile", []):
        mode = tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0]
        if isinstance(mode, str) and re.fullmatch(r"(RGB|LA).?;16[BLN]", mode):
            return mode
    return None


def _picture(file: BinaryIO, page: int | None, name: AnyPath) -> Image.Image:
    """Open the only picture of a file, or the one of number ``page``. Raises ImageError."""
    try:
        image = _header(file)
    except UnidentifiedImageError as error:
        directories = tiff.read_directories(file)
        if not directories:
            raise
        raise ImageError(name, f"a TIFF file of {tiff.describe(directories[0])}, which Pillow does not read") from error
    frames = _frames(image, file)
    if page is None and len(frames) > 1:
        shown, last = Path(os.fspath(name)).name, len(frames)
        remedy = "give one of them alone" if isinstance(file, BytesIO) else f"name one: {shown}#1 ... {shown}#{last}"
        raise ImageError(name, f"holds {last} pages; {remedy}")
    if page is not None and page > len(frames):
        raise ImageError(name, f"there is no page {page}; the file holds {len(frames)}")
    image.seek(frames[(page or 1) - 1])
    if reason := tiff.settle(image):
        raise ImageError(name, reason)
    _refuse_bomb(image)
    return image


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular, non-empty file. Raises ImageError, OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device could hang
        raise ImageError(path, "is not a regular file but a folder, pipe or device")
    if os.path.getsize(path) == 0:
        raise ImageError(path, "the file is empty (0 bytes)")
    # Pillow does not get the name: version 13 maps named files into memory, and garbles rotated uncompressed TIFF files
    with open(path, "rb") as file:
        yield file


def _header(file: BinaryIO) -> Image.Image:
    """Read the header of an encoded image, by those of `_FORMATS` that this Pillow has."""
    with _OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(file, formats=_formats())
    _refuse_bomb(image)
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _may_hold_pages(file: BinaryIO) -> bool:
    """Whether a file may hold several pictures, by its first bytes; to ask Pillow takes ten times as long."""
    head = file.read(2**16)
    for start, mark in ((b"\x89PNG", b"acTL"), (b"\xff\xd8", b"MPF\0")):
        if head.startswith(start):
            return mark in head
    if head.startswith((b"II", b"MM")):
        return len(tiff.read_directories(file)) > 1
    return head[:4] in (b"GIF8", b"RIFF") or head[4:8] == b"ftyp"


def _frames(image: Image.Image, file: BinaryIO | None = None) -> list[int]:
    """Image -> the numbers of its frames that are pictures of their own; the first if none is."""
    if image.format == "TIFF" and (file := file or getattr(image, "fp", None)):
        at = file.tell()
        directories = tiff.read_directories(file)
        file.seek(at)
        return [k for k, directory in enumerate(directories) if tiff.is_picture(directory)] or [0]
    count = getattr(image, "n_frames", 1)
    if image.format != "MPO":
        return list(range(count))
    sizes = []
    for k in range(count):
        image.seek(k)
        sizes.append(image.size)
    image.seek(0)
    return [k for k in range(count) if sizes[k] == sizes[0]]


def _refuse_bomb(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError


def _reason(error: BaseException, is_link: bool) -> str:
    """Exception of a decoder -> a reason that a user can act on."""
    if isinstance(error, FileNotFoundError):
        return "a link that points to nothing" if is_link else "no such file"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format ({', '.join(_formats())})"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?); --max-pixels raises the limit"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"broken or truncated image ({str(error) or type(error).__name__})"
