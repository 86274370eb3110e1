"""A generated corpus of odd and broken files through `predict` and `train`: a right result or a named error for each.

How a single file is read is tested in test_images.py. Here the commands must name every file exactly once, give the
others the same score as without their company, and end with code 1.
"""

import csv
import os
import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trust_cases import OTHER_USER, SMALLEST_FLAGS, Ended, open_to_all, run, write_images

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


def corpus() -> dict[str, tuple[bytes | Callable[[Path], object], str | None]]:
    """Name -> content, or what makes it; and what its error must say, None for a file that can be read."""
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
        "text.png": (b"hello\n", "not an image"), "html.jpg": (b"<html>404</html>", "not an image"),
        "zeros.png": (bytes(5000), "not an image"), "svg.png": (b"<svg/>", "not an image"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "bomb.png": (bomb(15_000), "bomb"), "great bomb.png": (bomb(2**31 - 1), "bomb"),
        "no pixels.png": (bomb(8), "truncated"), "folder.png": (Path.mkdir, "folder"),
        "dangling.png": (lambda path: path.symlink_to("nowhere"), "points to nothing"),
        "circle.png": (lambda path: path.symlink_to(path), "cannot be read"),
        "linked.png": (lambda path: path.symlink_to("png.png"), None),
        "forbidden.png": (lambda path: (path.write_bytes(png), path.chmod(0)), "no permission"),
        "ünï 漢字.png": (png, None), "new\nline.png": (png, None), "bro\nken\x1b[31m.png": (b"?", "not an image"),
        os.fsdecode(b"undecodable \xff.png"): (png, None), "=cmd'!A0.png": (png, None),
        "-flag.png": (png, None), "x" * 251 + ".png": (png, None), "<b>&amp;.png": (png, None),
        ".hidden.png": (b"?", "is not read at all"),
    }  # fmt: skip
    if hasattr(os, "mkfifo"):
        files["pipe.png"] = (os.mkfifo, "not a regular file")  # reading it would hang
    for tenth in range(1, 10):
        for suffix, data in ((".png", png), (".jpg", jpeg), (".tif", tiff), (".webp", webp)):
            files[f"cut at {tenth}{suffix}{suffix}"] = (data[: len(data) * tenth // 10], "")
    return files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that everybody may read, with the corpus in odd/ and a network in run/."""
    folder = tmp_path_factory.mktemp("trust_images")
    open_to_all(folder)
    (folder / "odd").mkdir()
    for name, (content, _) in corpus().items():
        path = folder / "odd" / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    write_images(folder / "good", 3)
    flags = ["--data", str(folder / "good"), "--out", str(folder / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", flags, folder / "io").code == 0
    for name in ("out", "trained"):
        (folder / name).mkdir()
        if os.geteuid() == 0:
            os.chown(folder / name, OTHER_USER, -1)
    return folder


def readable(name: str) -> str:
    """A file name as messages show it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def assert_every_broken_file_is_named_once(ended: Ended, folder: Path) -> None:
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    named = [line for line in ended.err.splitlines() if line.startswith("not read: ")]
    visible = {name: error for name, (_, error) in corpus().items() if not name.startswith(".")}
    assert len(named) == sum(error is not None for error in visible.values())
    for name, error in visible.items():
        lines = [line for line in named if line.startswith(f"not read: {folder / readable(name)}: ")]
        assert len(lines) == (error is not None), (name, lines)
        assert all((error or "") in line for line in lines)


def test_predict_gives_every_file_of_the_corpus_a_result_or_a_named_error(root: Path) -> None:
    assert len(corpus()) >= 60
    out = root / "out"
    flags = ["--checkpoint", str(root / "run" / "last.pt"), "--input", str(root / "odd"), "--out", str(out)]
    assert_every_broken_file_is_named_once(run("predict", flags, root / "io", user=OTHER_USER), root / "odd")
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    expected = {name: error for name, (_, error) in corpus().items() if not name.startswith(".")}
    cells = {("'" if name[0] in "=-" else "") + name.encode("utf-8", "backslashreplace").decode() for name in expected}
    assert set(rows) == cells
    for cell, row in rows.items():
        assert bool(row["error"]) != bool(row["score"]), cell
    whole = [name for name, error in expected.items() if error is None]
    assert len(list((out / "overlays").rglob("*.png"))) == len(list((out / "maps").rglob("*.tiff"))) == len(whole)
    alike = (
        "png.png",
        "upper.PNG",
        "bmp.bmp",
        "tiff.tif",
        "ppm.ppm",
        "png in disguise.tiff",
        "linked.png",
        "new\nline.png",
    )
    assert len({round(float(rows[name]["score"]), 6) for name in alike}) == 1, "the same picture in other wrappings"


def test_train_names_every_broken_file_of_the_corpus_and_trains_on_the_others(root: Path) -> None:
    """Two files of the corpus have one stem ("16 bit"), which a training folder may not hold: one moves away."""
    os.rename(root / "odd" / "16 bit.tif", root / "odd" / "16 bits.tif")
    flags = ["--data", str(root / "odd"), "--out", str(root / "trained"), *SMALLEST_FLAGS, "--steps", "2"]
    try:
        ended = run("train", flags, root / "io", user=OTHER_USER)
    finally:
        os.rename(root / "odd" / "16 bits.tif", root / "odd" / "16 bit.tif")
    assert_every_broken_file_is_named_once(ended, root / "odd")
    whole = sum(error is None for _, error in corpus().values())
    counts = re.search(r"^(\d+) images to train on, (\d+) good ones kept aside", ended.out, re.MULTILINE)
    assert counts
    assert int(counts[1]) + int(counts[2]) == whole


@pytest.mark.parametrize(("count", "broken"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_broken_image_does_not_stop_the_training_whichever_part_it_falls_into(
    tmp_path: Path, count: int, broken: int
) -> None:
    """Of two or three files one is kept aside for the threshold; the broken one may be that one, or all the rest."""
    write_images(tmp_path / "good", count)
    (tmp_path / "good" / f"{broken:03}.png").write_bytes(b"?")
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 1, ended
    assert f"{broken:03}.png" in ended.err


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("extra", [[], ["--holdout", "0"], ["--tile", "32"]])
def test_one_image_or_two_are_enough(tmp_path: Path, count: int, extra: list[str]) -> None:
    write_images(tmp_path / "good", count, size=48)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "1", *extra]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    assert ("training images themselves" in ended.out) == (count == 1 or "--holdout" in extra)
