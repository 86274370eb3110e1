"""One rule for every picture: the way it comes by does not show in the tensor, and what is none is refused by name."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_files import PIXELS, encoded
from PIL import Image, ImageSequence
from torch import Tensor

from almrr_ref.data.folders import find_inputs
from almrr_ref.data.images import (
    ImageError,
    Levels,
    image_size,
    is_image_file,
    load_image,
    pages,
    read_image,
    resize_image,
    split_page,
)
from almrr_ref.data.layouts import find_dataset
from almrr_ref.run.files import output_name

GREY = PIXELS[..., 0]
DEEP = np.random.default_rng(1).integers(0, 4096, (5, 7, 3)).astype(np.uint16)  # 12 bits


def deep_png(values: np.ndarray, exif: bytes = b"") -> bytes:
    """16-bit colour (h, w, 3) as PNG, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, *([b"eXIf" + exif] if exif else []), b"IDAT" + zlib.compress(rows), b"IEND"]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def opened(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content))


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).movedim(-1, 0) if pixels.ndim == 3 else torch.from_numpy(pixels)


@pytest.mark.parametrize("pixels", [PIXELS, GREY], ids=["colour", "grey"])
def test_eight_bits_are_the_same_by_every_way(pixels: np.ndarray, tmp_path: Path) -> None:
    expected = torch.from_numpy(np.broadcast_to(pixels.reshape(40, 48, -1), PIXELS.shape).copy()).movedim(-1, 0)
    png = encoded(pixels, "PNG")
    (tmp_path / "x.png").write_bytes(png)
    ways = [tmp_path / "x.png", str(tmp_path / "x.png"), png, opened(png), Image.fromarray(pixels), pixels]
    ways += [tensor(pixels), tensor(pixels).float() / 255, tensor(pixels).double() / 255, pixels[::-1][::-1]]
    for way in ways:
        assert torch.equal(read_image(way), expected)
        assert torch.equal(load_image(way, (9, 9)), resize_image(expected, (9, 9)))


@pytest.mark.parametrize("bits", [12, 16])
def test_sixteen_bits_are_the_same_by_every_way(bits: int) -> None:
    grey, levels = DEEP[..., 0], Levels(bits=bits)
    for way in (encoded(grey, "PNG"), encoded(grey, "TIFF"), encoded(grey, "JPEG2000"), opened(encoded(grey, "PNG"))):
        assert torch.equal(read_image(way, levels), read_image(grey, levels))
    assert torch.equal(read_image(grey.astype(">u2")[..., None], levels), read_image(grey, levels))
    assert torch.equal(read_image(deep_png(DEEP), levels), read_image(DEEP, levels))
    assert int(read_image(DEEP, levels).max()) == DEEP.max() >> (bits - 8)


def test_float_files_and_float_tensors_are_the_same() -> None:
    values = np.random.default_rng(2).random((5, 7)).astype(np.float32)
    assert torch.equal(read_image(encoded(values, "TIFF")), read_image(torch.from_numpy(values)))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((2, 2)), "array (2, 2) of float64; expected uint8 or uint16; give floats"),
        (np.zeros((2, 2), bool), "array (2, 2) of bool; expected uint8 or uint16"),
        (np.zeros((3, 4, 4), np.uint8), "array (3, 4, 4) of uint8; expected (h, w), (h, w, 1) or (h, w, 3)"),
        (np.zeros((0, 4), np.uint8), "is empty"),
        pytest.param(Image.new("RGB", (0, 20)), "Pillow image of 0 x 20 is empty", id="empty image"),
        (torch.zeros(4, 4, 3), "tensor (4, 4, 3) of float32; expected (3, h, w)"),
        (torch.zeros(1, 3, 4, 4), "tensor (1, 3, 4, 4) of float32; expected (3, h, w)"),
        (torch.zeros(3, 0, 4), "is empty"),
        (torch.zeros(4, 4, dtype=torch.int64), "expected floats in [0, 1], or uint8"),
        (torch.full((3, 4, 4), 1.002), "values 1.002 to 1.002; expected [0, 1]"),
        (torch.full((3, 4, 4), 254.0), "values 254 to 254; expected [0, 1]: divide by 255"),
        (torch.full((3, 4, 4), -1.5), "values -1.5 to -1.5; expected [0, 1]: undo a normalisation"),
        (torch.tensor([[0.5, torch.nan]]), "NaN or infinite"),
        (torch.tensor([[0.5, torch.inf]]), "NaN or infinite"),
        (b"", "not an image"),
        (7, "int is no picture"),
    ],
    ids=repr,
)
def test_what_is_no_picture_is_refused_with_what_came_and_what_is_expected(picture: Any, message: str) -> None:
    with pytest.raises(ImageError, match=r"^picture: ") as caught:
        read_image(picture)
    assert message in str(caught.value)


def stack(folder: Path, name: str, **options: Any) -> Path:
    """A file of three pages, the k-th of level 60 k, one of them turned into colour."""
    levels = [Image.new("L", (20, 10), 60 * k) for k in (1, 2, 3)]
    levels[0].save(folder / name, save_all=True, append_images=levels[1:], **options)
    return folder / name


@pytest.mark.parametrize("name", ["x.tif", "x.gif", "x.webp", "x.png", "x.avif"])
def test_every_page_is_a_picture_and_the_file_none(tmp_path: Path, name: str) -> None:
    path = stack(tmp_path, name, **({"lossless": True} if name == "x.webp" else {}))
    expected = [tmp_path / f"{name}#{k}" for k in (1, 2, 3)]
    assert pages(path) == list(find_inputs(path)) == list(find_inputs(tmp_path)) == expected
    assert [sample.path for sample in find_dataset(tmp_path).train] == expected
    assert [int(read_image(page).float().mean().round()) for page in expected] == pytest.approx([60, 120, 180], abs=1)
    assert all(image_size(page) == (20, 10) and is_image_file(page) for page in expected)
    assert len({output_name(page.name, ".png") for page in [path, *expected]}) == 4
    ways = {
        "name one: .+#1 ... .+#3": path,
        "give one of them alone": path.read_bytes(),
        "give a copy": Image.open(path),
    }
    for remedy, way in ways.items():
        with pytest.raises(ImageError, match=f"holds 3 pages; {remedy}"):
            read_image(way)
    with pytest.raises(ImageError, match=r"x\.\w+#4: there is no page 4; the file holds 3"):
        read_image(f"{path}#4")


def test_the_frames_of_a_pillow_image_are_pictures_when_copied(tmp_path: Path) -> None:
    with Image.open(stack(tmp_path, "x.tif")) as image:
        levels = [int(read_image(page.copy()).max()) for page in ImageSequence.Iterator(image)]
    assert levels == [60, 120, 180]


def test_a_file_with_the_name_of_a_page_is_that_file_and_named_where_it_hides_one(tmp_path: Path) -> None:
    one = tmp_path / "one.png"
    one.write_bytes(encoded(GREY, "PNG"))
    (tmp_path / "one.png#1").write_bytes(encoded(GREY // 2, "PNG"))
    assert split_page(tmp_path / "one.png#1") == (tmp_path / "one.png#1", None)
    assert int(read_image(tmp_path / "one.png#1").max()) < 128 < int(read_image(one).max())
    (tmp_path / "one.png#1").rename(tmp_path / "x.tif#2")
    with pytest.raises(ImageError, match=r"holds 3 pages, and a file has the name of page x\.tif#2"):
        pages(stack(tmp_path, "x.tif"))


def test_levels_of_a_pyramid_are_no_pages(tmp_path: Path) -> None:
    whole, half = Image.fromarray(GREY), Image.fromarray(GREY).resize((24, 20))
    whole.save(tmp_path / "x.tif", save_all=True, append_images=[half])
    content = (tmp_path / "x.tif").read_bytes()
    assert len(pages(tmp_path / "x.tif")) == 2
    half.encoderinfo = {"tiffinfo": {254: 1}}
    whole.save(tmp_path / "x.tif", save_all=True, append_images=[half])
    assert (tmp_path / "x.tif").read_bytes() != content
    assert pages(tmp_path / "x.tif") == [tmp_path / "x.tif"]
    assert torch.equal(read_image(tmp_path / "x.tif"), read_image(GREY))


def test_the_second_page_may_be_turned_and_of_another_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    second = Image.fromarray(PIXELS)
    second.encoderinfo = {"exif": exif}
    Image.fromarray(GREY[:10]).save(tmp_path / "x.tif", save_all=True, append_images=[second])
    assert image_size(tmp_path / "x.tif#1") == (48, 10)
    assert image_size(tmp_path / "x.tif#2") == tuple(read_image(tmp_path / "x.tif#2").shape[:0:-1])


def odd_tiff(bits: int, kind: int, channels: int) -> bytes:
    """A TIFF file of 4x4 pixels of zeros."""
    size, byte = 4 * 4 * channels * bits // 8, struct.pack("<H", bits)
    tags = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, channels, bits if channels == 1 else 400), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 1), (273, 4, 1, 500), (277, 3, 1, channels), (278, 3, 1, 4), (279, 4, 1, size)]
    tags += [(339, 3, 1, kind)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    content = (b"II*\0\x08\0\0\0" + directory).ljust(400, b"\0") + byte * channels
    return content.ljust(500, b"\0") + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (odd_tiff(8, 1, 5), "a TIFF file of 5 channels of 8-bit unsigned integers"),
        (odd_tiff(16, 3, 1), "a TIFF file of 1 channel of 16-bit floats"),
        (odd_tiff(64, 3, 1), "a TIFF file of 1 channel of 64-bit floats"),
    ],
)
def test_tiff_files_of_other_kinds_are_called_what_they_are(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(content)
    assert read_image(odd_tiff(32, 3, 1)).shape == (3, 4, 4)


def big_endian_tiff(values: np.ndarray, planes: int = 1, grey: bool = False) -> bytes:
    """Numbers (h, w, c) as a deflated TIFF file, the channels of a pixel side by side or (2) in planes.

    Three channels are a colour, or if ``grey`` one gray channel and two more of no stated meaning.
    """
    (h, w, c), bits = values.shape, 8 * values.dtype.itemsize
    swapped = values.astype(values.dtype.newbyteorder(">"))
    strips = [zlib.compress(part.tobytes()) for part in (np.moveaxis(swapped, 2, 0) if planes == 2 else [swapped])]
    starts = [8 + sum(map(len, strips[:k])) for k in range(len(strips))]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {
        256: [w],
        257: [h],
        258: [bits] * c,
        259: [8],
        262: [1 if c == 1 or grey else 2],
        273: starts,
        277: [c],
        278: [h],
    }
    tags |= {279: list(map(len, strips)), 284: [planes], **({338: [0] * (c - 1)} if grey else {}), 339: [kind] * c}
    at, behind, entries = starts[-1] + len(strips[-1]), b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f">{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, behind = struct.pack(">I", at + 6 + 12 * len(tags) + len(behind)), behind + packed
        entries += struct.pack(">HHI", tag, 4, len(numbers)) + packed
    directory = struct.pack(">H", len(tags)) + entries + bytes(4) + behind
    return struct.pack(">2sHI", b"MM", 42, at) + b"".join(strips) + directory


@pytest.mark.parametrize("kind", [np.float32, np.int16, np.int32])
def test_bytes_of_packed_big_endian_files_are_swapped_once(kind: type) -> None:
    values = GREY.astype(kind)  # as floats, swapped twice they are nearly 0: a black picture
    read = read_image(big_endian_tiff(values[..., None]), Levels(bits=8))
    assert torch.equal(read, read_image(GREY))


def test_deep_colour_in_planes_is_refused_and_shallow_colour_is_read() -> None:
    with pytest.raises(ImageError, match="16-bit colour in separate planes"):
        read_image(big_endian_tiff(DEEP, planes=2), Levels(bits=12))
    assert torch.equal(read_image(big_endian_tiff(PIXELS, planes=2)), read_image(PIXELS))
    assert torch.equal(read_image(big_endian_tiff(DEEP), Levels(bits=12)), read_image(DEEP, Levels(bits=12)))


def test_planes_that_are_no_colour_are_refused() -> None:
    with pytest.raises(ImageError, match="a TIFF file of 3 channels, of which Pillow reads the first"):
        read_image(big_endian_tiff(PIXELS, planes=2, grey=True))


def test_grey_in_which_0_is_white_is_turned_where_pillow_does_and_else_refused() -> None:
    entries = [struct.pack("<HHIH", 262, 3, 1, is_black) for is_black in (1, 0)]
    shallow, deep = (encoded(grey, "TIFF").replace(*entries) for grey in (255 - GREY, GREY.astype(np.uint16)))
    assert torch.equal(read_image(shallow), read_image(GREY))
    with pytest.raises(ImageError, match="16 bits in which 0 is white; save it with 0 for black"):
        read_image(deep, Levels(bits=16))


FORMATS: dict[str, Callable[[], bytes]] = {
    "x.jp2": lambda: encoded(GREY, "JPEG2000"),
    "x.avif": lambda: encoded(GREY, "AVIF", quality=100),
    "x.jfif": lambda: encoded(GREY, "JPEG", quality=100),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_pillow_reads_is_read(name: str, tmp_path: Path) -> None:
    Image.init()
    if {"x.jp2": "JPEG2000", "x.avif": "AVIF"}.get(name, "JPEG") not in Image.SAVE:
        pytest.skip("this Pillow lacks the format")
    (tmp_path / name).write_bytes(FORMATS[name]())
    assert is_image_file(name)
    assert (read_image(tmp_path / name).float() - tensor(GREY)).abs().max() <= 8


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_of_a_stack_that_is_cut_off_no_page_is_missed_in_silence(tmp_path: Path, share: float) -> None:
    path = tmp_path / "stack.tif"
    frames = [Image.fromarray(np.full((40, 30), k, np.uint8)) for k in range(5)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert len(pages(path)) == 5
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert pages(path) == [path]
    with pytest.raises(ImageError, match="broken or truncated image"):
        read_image(path)
