"""Odd and broken image files, for the tests of reading one file and for those of whole commands."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)


def encoded(values: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(edge: int) -> bytes:
    """A PNG header that promises edge x edge pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_odd_files(folder: Path) -> dict[str, str | None]:
    """Write the files -> name of each picture: what its error must say, None for one that can be read."""
    folder.mkdir(parents=True)
    for name, (content, _) in _odd_files().items():
        content(folder / name) if callable(content) else (folder / name).write_bytes(content)
    errors = {name: error for name, (_, error) in _odd_files().items()}
    paged = [(name, errors.pop(name)) for name in ("animated.gif", "pages.tif")]
    return errors | {f"{name}#{k}": error for name, error in paged for k in (1, 2, 3)}


def _odd_files() -> dict[str, tuple[bytes | Callable[[Path], object], str | None]]:
    """Name -> content, or what makes it; and what its error must say."""
    grey, alpha = PIXELS[..., 0], np.dstack([PIXELS, PIXELS[..., 0]])
    floats, turned = grey.astype(np.float32) / 255, Image.Exif()
    nan, inf = floats.copy(), floats.copy()
    nan[3, 3], inf[0, 0], turned[0x0112] = np.nan, np.inf, 6
    palette = Image.fromarray(PIXELS).quantize(16)
    frames = [Image.fromarray(np.roll(grey, i)) for i in range(3)]
    png, jpeg = encoded(PIXELS, "PNG"), encoded(PIXELS, "JPEG")
    tiff, gif, bmp, webp = (encoded(PIXELS, kind) for kind in ("TIFF", "GIF", "BMP", "WEBP"))
    files: dict[str, tuple[bytes | Callable[[Path], object], str | None]] = {
        "png.png": (png, None), "jpeg.jpg": (jpeg, None), "tiff.tif": (tiff, None), "gif.gif": (gif, None),
        "bmp.bmp": (bmp, None), "webp.webp": (webp, None), "ppm.ppm": (encoded(PIXELS, "PPM"), None),
        "upper.PNG": (png, None), "progressive.jpeg": (encoded(PIXELS, "JPEG", progressive=True), None),
        "jpeg in disguise.png": (jpeg, None), "png in disguise.tiff": (png, None),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "pages.tif": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), None),
        "cmyk.jpg": (encoded(Image.new("CMYK", (20, 20), (0, 99, 255, 9)), "JPEG"), None),
        "bit.png": (encoded(grey > 99, "PNG"), None), "grey.png": (encoded(grey, "PNG"), None),
        "grey alpha.png": (encoded(np.dstack([grey, grey]), "PNG"), None), "rgba.png": (encoded(alpha, "PNG"), None),
        "16 bit.png": (encoded(grey.astype(np.uint16) * 257, "PNG"), None),
        "16 bit.tif": (encoded(grey.astype(np.uint16) * 257, "TIFF"), None),
        "float.tif": (encoded(floats, "TIFF"), None), "nan.tif": (encoded(nan, "TIFF"), "NaN"),
        "inf.tif": (encoded(inf, "TIFF"), "infinite"), "negative.tif": (encoded(-floats, "TIFF"), "range"),
        "huge values.tif": (encoded(floats * 4000, "TIFF"), "range"), "palette.png": (encoded(palette, "PNG"), None),
        "palette alpha.png": (encoded(palette, "PNG", transparency=bytes(range(16))), None),
        "invisible.png": (encoded(alpha * np.uint8([1, 1, 1, 0]), "PNG"), "transparent"),
        "turned.jpg": (encoded(PIXELS, "JPEG", exif=turned), None), "black.png": (encoded(PIXELS * 0, "PNG"), None),
        "white.png": (encoded(PIXELS * 0 + 255, "PNG"), None), "1x1.png": (encoded(PIXELS[:1, :1], "PNG"), None),
        "1x5000.png": (encoded(np.tile(PIXELS[:1, :1], (5000, 1, 1)), "PNG"), None),
        "5000x1.png": (encoded(np.tile(PIXELS[:1, :1], (1, 5000, 1)), "PNG"), None),
        "zero bytes.png": (b"", "empty"), "one byte.jpg": (b"\xff", "not an image"),
        "zeros.png": (bytes(5000), "not an image"), "html.jpg": (b"<html>404</html>", "not an image"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "bomb.png": (bomb(15_000), "bomb"), "great bomb.png": (bomb(2**31 - 1), "bomb"),
        "no pixels.png": (bomb(8), "truncated"), "cut.png": (png[:999], "truncated"),
        "cut jpeg.jpg": (jpeg[:999], "truncated"), "cut webp.webp": (webp[:999], "broken"),
        "folder.png": (Path.mkdir, "folder"),
        "dangling.png": (lambda path: path.symlink_to("nowhere"), "points to nothing"),
        "circle.png": (lambda path: path.symlink_to(path), "cannot be read"),
        "linked.png": (lambda path: path.symlink_to("png.png"), None),
        "forbidden.png": (lambda path: (path.write_bytes(png), path.chmod(0)), "Permission denied"),
        "ünï 漢字.png": (png, None), "new\nline.png": (png, None), "bro\nken\x1b[31m.png": (b"?", "not an image"),
        os.fsdecode(b"undecodable \xff.png"): (png, None), "=cmd'!A0.png": (png, None),
        "-flag.png": (png, None), "x" * 251 + ".png": (png, None), "<b>&amp;.png": (png, None),
        ".hidden.png": (b"?", "is not read at all"),
    }  # fmt: skip
    if hasattr(os, "mkfifo"):
        files["pipe.png"] = (os.mkfifo, "not a regular file")  # reading it would hang
    return files
