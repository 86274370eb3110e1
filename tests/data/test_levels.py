"""More than 8 bits: what is white is settled over the training images, and no single pixel or file changes it."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import encoded
from PIL import Image
from scipy.ndimage import gaussian_filter
from test_pictures import deep_png
from trust_cases import SMALLEST_FLAGS, run

from almrr_ref.config import ModelConfig
from almrr_ref.data.images import ImageError, Levels, Remarks, read_image
from almrr_ref.data.recognise import recognise_levels
from almrr_ref.run.checkpoint import read_checkpoint


def scenes(count: int) -> list[np.ndarray]:
    """Smooth noise in [0, 1] about a half, as a camera sees a surface: the brightest value is about 0.8."""
    rng = np.random.default_rng(0)
    fields = [gaussian_filter(rng.normal(size=(32, 32)), 2) for _ in range(count)]
    return [(0.5 + 0.08 * field / field.std()).clip(0, 1) for field in fields]


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("colour", [False, True])
def test_the_same_scenes_give_the_same_tensors_at_any_depth(bits: int, colour: bool) -> None:
    fields = [np.dstack([s, s**2, s]) if colour else s for s in scenes(4)]
    deep = [(field * (2**bits - 1)).round().astype(np.uint16) for field in fields]
    files = [deep_png(values) if colour else encoded(values, "PNG") for values in deep]
    lines: list[str] = []
    levels = Levels.of(recognise_levels(files, ModelConfig(), lines.append))
    largest = max(int(values.max()) for values in deep)
    assert lines == [
        f"16-bit images hold {bits} bits (largest value {largest}): white is {2**bits - 1}; say otherwise with --bits"
    ]
    for field, values, file in zip(fields, deep, files):
        of_8_bits = read_image((field * 255).round().astype(np.uint8)).int()
        assert (read_image(file, levels).int() - of_8_bits).abs().max() <= 1
        assert torch.equal(read_image(file, levels), read_image(values, levels))


def test_the_depth_of_turned_colour_is_recognised() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = deep_png(np.full((3, 5, 3), 4095, np.uint16), exif.tobytes().removeprefix(b"Exif\0\0"))
    assert recognise_levels([turned], ModelConfig(), lambda line: None).bits == 12
    assert read_image(turned, Levels(bits=12)).shape == (3, 5, 3)


def test_bits_that_are_named_are_kept_and_eight_bits_need_none() -> None:
    twelve = np.full((4, 4), 4095, np.uint16)
    assert recognise_levels([twelve], ModelConfig(bits=14), pytest.fail) == ModelConfig(bits=14)
    assert (
        recognise_levels([twelve.astype(np.uint8), torch.ones(4, 4), b"broken"], ModelConfig(), pytest.fail).bits
        is None
    )


def floats(bright: float, hot: float | None = None) -> bytes:
    values = np.linspace(0, bright, 400, dtype=np.float32).reshape(20, 20)
    if hot is not None:
        values[7, 7] = hot
    return encoded(values, "TIFF")


@pytest.mark.parametrize(("bright", "white"), [(0.9, 1), (200, 255), (3000, 4095), (60000, 65535), (1e6, 989975)])
def test_no_single_pixel_and_no_single_file_changes_the_white_of_floats(bright: float, white: float) -> None:
    files = [floats(bright), floats(bright, hot=50 * bright), floats(900 * bright)] + [floats(bright)] * 2
    config = recognise_levels(files, ModelConfig(), lambda line: None)
    assert config.float_white == pytest.approx(white, abs=0.5)
    plain, hot = (read_image(file, Levels.of(config)).int() for file in files[:2])
    assert (plain != hot).sum() == 3
    expected = torch.linspace(0, bright * 255 / white, 400).clamp(max=255).reshape(20, 20)
    assert (plain - expected).abs().max() <= 0.51


@pytest.mark.parametrize("bright", [0.9, 200])
def test_a_hot_pixel_does_not_change_a_float_file_of_unsettled_white(bright: float) -> None:
    plain, hot = (read_image(floats(bright, value)).int() for value in (None, 50 * bright))
    assert (plain != hot).sum() == 3


def test_what_is_above_white_or_of_unknown_depth_or_transparent_is_counted() -> None:
    remarks, twelve = Remarks(), np.array([[5000, 4095]], np.uint16)
    assert read_image(twelve, Levels(bits=12), remarks).unique().tolist() == [255]
    read_image(deep_png(np.dstack([twelve] * 3)), Levels(bits=12), remarks)
    read_image(floats(1, hot=2), remarks=remarks)
    read_image(twelve, remarks=remarks)
    read_image(Image.new("RGBA", (2, 2), (1, 2, 3, 128)), remarks=remarks)
    read_image(Image.new("RGBA", (2, 2), (1, 2, 3, 255)), remarks=remarks)
    assert remarks.lines() == [
        "values above white (4095) shown as white: 2 images (first: picture)",
        "values above white (1) shown as white: 1 image (first: picture)",
        "16-bit values taken to use all 16 bits: 1 image (first: picture)",
        "alpha channel left out: 1 image (first: picture)",
    ]


def test_sixteen_bits_of_which_pillow_keeps_eight_are_refused_where_they_matter() -> None:
    with Image.open(BytesIO(deep_png(np.full((2, 2, 3), 4095, np.uint16)))) as image:
        with pytest.raises(ImageError, match="16-bit colour"):
            read_image(image, Levels(bits=12))
        assert read_image(image).unique().tolist() == [15]


def test_a_run_stores_the_bits_it_found(tmp_path: Path) -> None:
    for i, scene in enumerate(scenes(3)):
        path = tmp_path / "good" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((scene * 4095).round().astype(np.uint16)).save(path)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    assert "16-bit images hold 12 bits" in ended.out
    assert read_checkpoint(tmp_path / "run" / "last.pt")["model_config"]["bits"] == 12
