"""Odd image files: each gives the right pixels or one line that names it. Expected values are worked out by hand.

What a folder can hold is in odd_files.py, and goes through whole commands in test_trust_images.py.
"""

import contextlib
import io
import struct
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import PIXELS, bomb, encoded
from PIL import Image

from almrr_ref.data import tiff
from almrr_ref.data.images import ImageError, image_size, load_image, read_image
from almrr_ref.data.masks import load_mask
from almrr_ref.run.text import one_line

RAMP = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7  # odd sizes, all values distinct


def save(path: Path, values: np.ndarray, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def assert_named(path: Path, *texts: str, read: Any = read_image) -> None:
    """The file is refused with one line that begins with its name and contains each of `texts`."""
    with pytest.raises(ImageError) as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(one_line(path) + ": ")
    assert all(text in caught.value.reason for text in texts)
    assert caught.value.path == path


EIGHT = [0, 1, 2, 77, 128, 254, 255]
SIXTEEN = ([0, 128, 129, 257, 25700, 65535], [0, 0, 1, 1, 100, 255])  # 128.5 is where level 0.5 rounds up


@pytest.mark.parametrize(
    ("name", "kind", "values", "expected"),
    [
        *((f"x{extension}", "uint8", EIGHT, EIGHT) for extension in (".png", ".bmp", ".tif", ".pgm", ".webp", ".gif")),
        ("x.png", "uint16", *SIXTEEN),
        ("x.tif", "uint16", *SIXTEEN),
        ("x.pgm", ">u2", *SIXTEEN),
        ("x.tif", "int32", [0, 257, 65535], [0, 1, 255]),
        ("x.tif", "float32", [0, 0.2, 1], [0, 51, 255]),
        ("x.tif", "float32", [0, 1.2, 254.6], [0, 1, 255]),
        ("x.tif", "int32", [0, 65536], "integer values 0 to 65536"),
        ("x.tif", "int32", [-1, 7], "integer values -1 to 7"),
        ("x.tif", "float32", [0, 255.5], "float values 0 to 255.5"),
    ],
)
def test_the_type_decides_the_range(tmp_path: Path, name: str, kind: str, values: list, expected: list | str) -> None:
    path, array = tmp_path / name, np.array([values], kind)
    if kind == ">u2":
        path.write_bytes(b"P5 %d 1 65535\n" % len(values) + array.tobytes())
    else:
        save(path, array, **({"lossless": True} if name.endswith(".webp") else {}))
    if isinstance(expected, str):
        assert_named(path, expected)
    else:
        assert read_image(path).tolist() == [[expected]] * 3


def test_alpha_is_dropped_and_total_transparency_refused(tmp_path: Path) -> None:
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], axis=2)
    colours[0, 0, 3] = 1
    expected = torch.from_numpy(colours[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(read_image(save(tmp_path / "x.png", colours)), expected)
    colours[..., 3] = 0
    assert_named(save(tmp_path / "y.png", colours), "transparent")
    assert torch.equal(read_image(save(tmp_path / "z.png", np.stack([RAMP, RAMP], 2)))[1], torch.from_numpy(RAMP))
    palette = Image.frombytes("P", (3, 1), bytes([2, 0, 1]))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff\x80")
    assert read_image(tmp_path / "p.png")[:, 0].T.tolist() == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    bits = read_image(save(tmp_path / "bit.png", RAMP > 100))[0]
    assert torch.equal(bits, torch.from_numpy((RAMP > 100) * np.uint8(255)))
    Image.new("CMYK", (9, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = read_image(tmp_path / "cmyk.jpg").float().mean(dim=(1, 2)).tolist()
    assert red == pytest.approx([255, 0, 0], abs=15)


@pytest.mark.parametrize("extension", [".png", ".tif", ".jpg"])
def test_orientation_is_applied_and_seen_in_the_header(tmp_path: Path, extension: str) -> None:
    upright, exif = np.zeros((16, 24), np.uint8), Image.Exif()
    upright[:8, :8] = 250  # bright top left
    mirrored, turned = upright[:, ::-1], upright[::-1, ::-1]
    stored = (upright, mirrored, turned, upright[::-1], upright.T, np.rot90(upright), turned.T, np.rot90(upright, -1))
    for orientation, pixels in enumerate(stored, 1):
        exif[0x0112] = orientation
        path = save(tmp_path / f"{orientation}{extension}", np.ascontiguousarray(pixels), exif=exif)
        np.testing.assert_allclose(read_image(path)[0].int(), upright, atol=12)
        assert image_size(path) == (24, 16)


def test_resize_is_antialiased_and_ignores_the_aspect_ratio(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 200], np.uint8), (1, 2500))
    small = load_image(save(tmp_path / "x.png", stripes), (8, 8))
    assert (small.shape, small.dtype) == ((3, 8, 8), torch.uint8)
    assert (small.int() - 100).abs().max() <= 1  # point sampling would give 0 and 200
    assert load_image(save(tmp_path / "y.png", np.full((1, 1), 77, np.uint8)), (5, 5)).unique().tolist() == [77]


def test_decompression_bombs_are_named_in_every_thread_and_warning_filters_survive(tmp_path: Path) -> None:
    filters, paths = list(warnings.filters), [tmp_path / "warned.png", tmp_path / "refused.png"]
    for path, edge in zip(paths, (10_000, 60_000)):  # beyond Pillow's warning, beyond its error
        path.write_bytes(bomb(edge))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: assert_named(path, "decompression bomb"), paths * 20))
    assert warnings.filters == filters


WHOLE = {
    "x.png": encoded(PIXELS, "PNG"), "x.gif": encoded(PIXELS, "GIF"), "x.bmp": encoded(PIXELS, "BMP"),
    "x.ppm": encoded(PIXELS, "PPM"), "x.webp": encoded(PIXELS, "WEBP"), "x.jpg": encoded(PIXELS, "JPEG"),
    "p.jpg": encoded(PIXELS, "JPEG", progressive=True), "lzw.tif": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "jpeg.tif": encoded(PIXELS, "TIFF", compression="jpeg"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", WHOLE)
def test_truncated_files_end_as_named_errors_or_whole(tmp_path: Path, name: str) -> None:
    data, path = WHOLE[name], tmp_path / name
    path.write_bytes(data)
    whole = read_image(path)
    for size in (*range(0, len(data), len(data) // 10 + 1), *(len(data) - missing for missing in (1, 2, 5, 11))):
        path.write_bytes(data[:size])
        if size < 0.95 * len(data):
            assert_named(path)
        with contextlib.suppress(ImageError):  # the header may be whole, and only the end marker lost
            assert image_size(path) == (48, 40)
            assert torch.equal(read_image(path), whole)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_exception(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content) - 1, 400)) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in (lambda p: load_image(p, (6, 6)), lambda p: load_mask(p, (6, 6)), image_size):
            with contextlib.suppress(ImageError):
                read(path)


def test_a_chain_of_tiff_directories_ends_at_what_can_be_none_and_is_refused_beyond_10000() -> None:
    empty = b"".join(struct.pack("<HI", 0, 8 + 6 * (k + 1)) for k in range(10_001))
    with pytest.raises(EOFError, match="more than 10,000 pages; split it"):
        tiff.read_directories(io.BytesIO(b"II*\0" + struct.pack("<I", 8) + empty))
    one = struct.pack("<HHHII", 1, 258, 3, 1, 8) + struct.pack("<I", 26)  # one entry: 8 bits
    assert tiff.read_directories(io.BytesIO(b"II*\0" + struct.pack("<I", 8) + one[:-4])) == [{258: 8}], "no last offset"
    huge = struct.pack("<H", 65_535) + bytes(12 * 65_535 + 4)
    assert tiff.read_directories(io.BytesIO(b"II*\0" + struct.pack("<I", 8) + one + huge)) == [{258: 8}]
