"""Odd image files: each gives the right pixels or one line that names it. Expected values are worked out by hand."""

import contextlib
import os
import struct
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_ref.data.images import (
    IMAGE_EXTENSIONS,
    ImageError,
    image_size,
    is_image_file,
    load_image,
    load_mask,
    read_image,
)
from almrr_ref.run.text import one_line

RAMP = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7  # odd sizes, all values distinct


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def assert_named(path: Path, *parts: str, read=read_image) -> None:
    """The file is refused with one line that begins with its name and contains each of `parts`."""
    with pytest.raises(ImageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(one_line(path) + ": ")
    for part in parts:
        assert part in message
    assert caught.value.path == path


@pytest.mark.parametrize("extension", [".png", ".bmp", ".tif", ".pgm", ".webp", ".gif"])
def test_grayscale_of_every_lossless_format_keeps_its_levels(tmp_path, extension):
    path = save(tmp_path / f"x{extension}", RAMP, **({"lossless": True} if extension == ".webp" else {}))
    assert torch.equal(read_image(path), torch.from_numpy(RAMP).expand(3, 5, 7))


def test_sixteen_bits_map_the_full_range_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16)  # 128.5 is where level 0.5 rounds up
    for name in ("x.png", "x.tif", "x.pgm"):
        path = tmp_path / name
        if name == "x.pgm":
            path.write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
        else:
            save(path, values)
        assert read_image(path)[0].tolist() == [[0, 0, 1, 1, 100, 255]]


def test_32_bit_integers_share_the_16_bit_scale_and_have_no_other(tmp_path):
    assert read_image(save(tmp_path / "x.tif", np.array([[0, 257, 65535]], np.int32)))[1].tolist() == [[0, 1, 255]]
    assert_named(save(tmp_path / "y.tif", np.array([[0, 65536]], np.int32)), "0 to 65536", "8 or 16 bits")
    assert_named(save(tmp_path / "z.tif", np.array([[-1, 7]], np.int32)), "-1 to 7")


def test_float_tiff_is_a_fraction_or_a_grey_level(tmp_path):
    assert read_image(save(tmp_path / "x.tif", np.array([[0, 0.2, 1]], np.float32)))[2].tolist() == [[0, 51, 255]]
    assert read_image(save(tmp_path / "y.tif", np.array([[0, 1.2, 254.6]], np.float32)))[2].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.5, 255.5])
def test_float_tiff_without_a_defined_grey_level_is_refused(tmp_path, value):
    path = save(tmp_path / "x.tif", np.array([[0, value]], np.float32))
    assert_named(path, "float" if np.isfinite(value) else "NaN or infinite")
    assert_named(path, read=lambda p: load_mask(p, 4))


def test_palette_with_transparency_gives_its_colours(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    image.save(tmp_path / "x.png", transparency=b"\x00\xff\x80")
    assert read_image(tmp_path / "x.png")[:, 0].T.tolist() == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


def test_alpha_is_dropped_and_total_transparency_refused(tmp_path):
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], axis=2)
    colours[0, 0, 3] = 1
    expected = torch.from_numpy(colours[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(read_image(save(tmp_path / "x.png", colours)), expected)
    colours[..., 3] = 0
    assert_named(save(tmp_path / "y.png", colours), "transparent")
    assert torch.equal(read_image(save(tmp_path / "z.png", np.stack([RAMP, RAMP], 2)))[1], torch.from_numpy(RAMP))


def test_one_bit_cmyk_and_an_animation(tmp_path):
    save(tmp_path / "bit.png", RAMP > 100)
    assert torch.equal(read_image(tmp_path / "bit.png")[0], torch.from_numpy((RAMP > 100) * np.uint8(255)))
    Image.new("CMYK", (9, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = read_image(tmp_path / "cmyk.jpg").float().mean(dim=(1, 2))
    assert red[0] > 240
    assert red[1:].max() < 15
    frames = [Image.new("L", (4, 3), level) for level in (10, 200)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    for name in ("film.gif", "pages.tif"):
        assert read_image(tmp_path / name).unique().tolist() == [10]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", [".png", ".tif", ".jpg"])
def test_orientation_is_applied_and_seen_in_the_header(tmp_path, orientation, extension):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 250  # bright top left
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x{extension}", np.ascontiguousarray(stored), exif=exif)
    image = read_image(path)[0]
    assert image.shape == (16, 24)
    assert np.abs(image.numpy().astype(int) - upright).max() < 12
    assert image_size(path) == (24, 16)


def test_resize_is_antialiased_and_ignores_the_aspect_ratio(tmp_path):
    stripes = np.tile(np.array([0, 200], np.uint8), (1, 2500))
    small = load_image(save(tmp_path / "x.png", stripes), 8)
    assert small.shape == (3, 8, 8)
    assert small.dtype == torch.uint8
    assert (small.int() - 100).abs().max() <= 1  # point sampling would give 0 and 200
    assert load_image(save(tmp_path / "y.png", np.full((1, 1), 77, np.uint8)), 5).unique().tolist() == [77]
    with pytest.raises(ValueError, match="image size 0"):
        load_image(tmp_path / "x.png", 0)


def test_mask_is_binarised_after_the_resize(tmp_path):
    values = np.zeros((8, 8), np.uint8)
    values[:, 2:5] = 255  # three of eight columns; halving covers column 1 whole and column 2 half
    mask = load_mask(save(tmp_path / "x.png", values), 4)
    expected = (np.asarray(Image.fromarray(values / np.float32(255)).resize((4, 4), 2)) > 0.5).astype(np.uint8)
    assert mask.shape == (1, 4, 4)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask[0], torch.from_numpy(expected))
    grey = np.full((4, 4), 127, np.uint8)
    grey[0] = 128
    assert load_mask(save(tmp_path / "y.png", grey), 4)[0].sum(dim=1).tolist() == [4, 0, 0, 0]


def test_masks_of_class_numbers_colours_and_16_bits_count(tmp_path):
    shape = (RAMP > 100).astype(np.uint8)
    square = np.pad(shape, ((0, 2), (0, 0)))
    expected = torch.from_numpy(square)[None]
    red = np.zeros((7, 7, 3), np.uint8)
    red[..., 0] = square * 255
    for name, values in {"0-1": square, "bit": square > 0, "16": square.astype(np.uint16) * 65535, "red": red,
                         "16-0-1": square.astype(np.uint16)}.items():  # fmt: skip
        assert torch.equal(load_mask(save(tmp_path / f"{name}.png", values), 7), expected), name
    assert load_mask(save(tmp_path / "empty.png", np.zeros((3, 5), np.uint8)), 7).sum() == 0
    assert_named(save(tmp_path / "3.png", square * 3), "reach only 3 of 255", read=lambda p: load_mask(p, 7))


def test_names_decide_what_is_listed():
    for name in ("x.png", "x.PNG", "a b.Tiff", "ümläut\n.jpeg"):
        assert is_image_file(name)
    for name in (".x.png", "._x.jpg", "x.txt", "png", "x.png.txt", ".png"):
        assert not is_image_file(name)
    assert ".png" in IMAGE_EXTENSIONS


def test_what_is_no_regular_file_is_named_without_hanging(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert_named(tmp_path / "folder.png", "is a folder")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert_named(tmp_path / "link.png", "link that points to nothing")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert_named(tmp_path / "loop.png")
    assert_named(tmp_path / "none.png", "no such file")
    os.mkfifo(tmp_path / "pipe.png")
    assert_named(tmp_path / "pipe.png", "not a regular file")
    (tmp_path / "zero.png").touch()
    assert_named(tmp_path / "zero.png", "empty (0 bytes)")
    (tmp_path / "text.png").write_text("no image at all")
    assert_named(tmp_path / "text.png", "not an image in a known format")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert_named(tmp_path / "x.png", "not an image in a known format")  # would start an external program
    assert_named(Path("nul\0.png"))


def test_a_file_without_permission_is_named():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = save(Path(folder) / "x.png", RAMP)
        path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # the superuser may read everything
        try:
            assert_named(path, "no permission")
        finally:
            if root:
                os.seteuid(0)


def test_odd_names_and_wrong_extensions_are_read(tmp_path):
    for name in ("ünï 漢.png", "new\nline.png", "jpeg in disguise.png", "-x;$(y).png"):
        path = tmp_path / name
        Image.fromarray(RAMP).save(path, format="JPEG" if "jpeg" in name else "PNG", quality=100)
        assert read_image(path).shape == (3, 5, 7)
    broken = tmp_path / "two\nlines\x1b.png"
    broken.write_bytes(b"?")
    assert_named(broken, r"two\nlines\x1b.png")
    assert_named(Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png")), r"\udcff")


def png_of(width: int, height: int) -> bytes:
    """A PNG header that promises any size, with hardly any data behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("edge", [10_000, 60_000])  # beyond Pillow's warning, beyond its error
def test_decompression_bombs_are_named_and_warning_filters_survive(tmp_path, edge):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(edge, edge))
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: assert_named(path, "decompression bomb"), range(40)):
            pass
    assert warnings.filters == filters


FORMATS = {
    "x.png": {}, "x.jpg": {}, "p.jpg": {"progressive": True}, "x.gif": {}, "x.bmp": {}, "x.tif": {}, "x.webp": {},
    "lzw.tif": {"compression": "tiff_lzw"}, "jpeg.tif": {"compression": "jpeg"}, "x.ppm": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    pixels = np.random.default_rng(0).integers(0, 256, (33, 45, 3)).astype(np.uint8)
    return {name: save(folder / name, pixels, **options).read_bytes() for name, options in FORMATS.items()}


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files_end_as_named_errors_or_whole(tmp_path, whole_files, name):
    data, path = whole_files[name], tmp_path / name
    path.write_bytes(data)
    whole = read_image(path)
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        assert_named(path)
        with contextlib.suppress(ImageError):  # the header may be whole
            assert image_size(path) == (45, 33)
    for missing in (1, 2, 5, 11):
        path.write_bytes(data[:-missing])
        with contextlib.suppress(ImageError):
            assert torch.equal(read_image(path), whole)  # only the end marker was lost


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_exception(whole_files, data):
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content) - 1, 400)) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in (lambda p: load_image(p, 6), lambda p: load_mask(p, 6), image_size):
            with warnings.catch_warnings(), contextlib.suppress(ImageError):
                warnings.simplefilter("ignore")
                read(path)
