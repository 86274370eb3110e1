"""Loading the good images, and which of them train, are held out, and show which part."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import SMALLEST_FLAGS, run, write_images

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.folders import DataError
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import load_images
from almrr_ref.data.split import Files, GoodImages, read_part_ids, refuse_other_files, split_good_images, training_files
from almrr_ref.data.textures import ImageTextures, TextureFolder
from almrr_ref.run.checkpoint import read_checkpoint

PARTS = "part([0-9]+)"


def write_parts(folder: Path, parts: int, shots: int, side: int = 32) -> Path:
    """Images of ``parts`` parts, ``shots`` of each, as bright as ten times the part's number but for a pixel a shot."""
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        for shot in range(shots):
            image = Image.new("RGB", (side, side), (10 * part,) * 3)
            image.putpixel((5, 5), (10 * part + shot,) * 3)
            image.save(folder / f"shot{shot}_part{part}.png")
    return folder


def load(folder: Path, tile: int | None = None, **settings: Any) -> GoodImages:
    data, config = find_dataset(folder), TrainConfig(**settings)
    part_ids = read_part_ids(data, config.parts)
    pictures = [sample.path for sample in data.train]
    return split_good_images(pictures, part_ids, ModelConfig(image_size=32, tile=tile), config)


@pytest.mark.parametrize("seed", range(3))
def test_whole_parts_are_held_out(tmp_path: Path, seed: int) -> None:
    good = load(write_parts(tmp_path, parts=8, shots=3), seed=seed, holdout=0.2, parts=PARTS)
    trained, held_out = good.training[:, 0, 0, 0], good.held_out[:, 0, 0, 0]
    assert not set(trained.tolist()) & set(held_out.tolist())
    assert len(held_out) == 6  # a fifth of 24 is 5, and a part has three
    assert len(good.part_ids.unique()) == len(trained.unique()) == 6
    for part_id in good.part_ids.unique():
        assert len(trained[good.part_ids == part_id].unique()) == 1


def test_without_a_pattern_every_image_is_a_part_and_another_seed_holds_others_out(tmp_path: Path) -> None:
    write_parts(tmp_path, 8, 3)
    good, other = (load(tmp_path, seed=seed, holdout=0.2) for seed in (0, 1))
    assert (len(good.training), len(good.held_out), len(good.part_ids.unique())) == (19, 5, 19)
    assert not torch.equal(good.held_out, other.held_out)


def test_a_tenth_of_the_images_is_held_out_and_a_quarter_where_parts_are_told_apart(tmp_path: Path) -> None:
    write_parts(tmp_path, parts=8, shots=5)
    assert len(load(tmp_path).held_out) == 4
    assert len(load(tmp_path, parts=PARTS).held_out) == 10
    assert len(load(tmp_path, parts=PARTS, holdout=0).held_out) == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_one_part_at_least_is_left_to_train_on(tmp_path: Path, parts: int) -> None:
    good = load(write_parts(tmp_path, parts, shots=4), holdout=0.9, parts=PARTS)
    assert (len(good.training), len(good.held_out)) == (4, 4 * (parts - 1))


def test_one_image_is_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "almrr_ref"):
        load(write_parts(tmp_path, parts=2, shots=1), holdout=0.5, parts=PARTS)
    assert "1 image of 1 part to train on, 1 good one kept aside for the threshold" in caplog.text


def test_tiles_of_one_image_are_one_part(tmp_path: Path) -> None:
    good = load(write_parts(tmp_path, parts=3, shots=1, side=80), tile=32, holdout=0)
    assert good.part_ids.bincount().tolist() == [9, 9, 9]
    assert torch.equal(good.training[:, 0, 0, 0], (10 * good.part_ids).byte())


def test_the_memory_of_a_trained_network_knows_its_images(tmp_path: Path) -> None:
    images, out = write_parts(tmp_path / "images", parts=5, shots=2), tmp_path / "run"
    flags = ["--frm-input", "memory", "--set", "memory=40", "--parts", PARTS, "--steps", "3"]
    ended = run("train", ["--data", str(images), "--out", str(out), *SMALLEST_FLAGS, *flags], tmp_path / "io")
    assert ended.code == 0, ended
    assert "8 images of 4 parts to train on, 2 good ones kept aside" in ended.out
    stored = set(read_checkpoint(out / "last.pt")["weights"]["memory.patch_parts"].tolist())
    assert stored <= set(range(10)), "in the end a stored patch has the id of its image"
    assert len(stored) > 8, "also of images that were held out"


def test_loading_keeps_the_order_and_names_the_broken(tmp_path: Path) -> None:
    for i in range(23):
        Image.fromarray(np.full((3, 5), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "04.png").write_bytes(b"broken")
    calls: list[tuple[int, int]] = []
    images, failures = load_images(find_dataset(tmp_path).train, (7, 7), progress=lambda *call: calls.append(call))
    assert (images.shape, images.dtype) == ((22, 3, 7, 7), torch.uint8)
    assert images[:, 0, 0, 0].tolist() == [i for i in range(23) if i != 4]
    assert [(path.name, bool(reason)) for path, reason in failures] == [("04.png", True)]
    assert calls == [(i, 23) for i in range(1, 24)]


@pytest.mark.parametrize("broken", ["shot0_part0.png", "shot0_part1.png"])
@pytest.mark.parametrize("tile", [None, 32])
def test_one_readable_image_trains_whether_it_was_to_be_held_out_or_not_but_none_is_an_error(
    tmp_path: Path, broken: str, tile: int | None
) -> None:
    (write_parts(tmp_path, parts=2, shots=1) / broken).write_bytes(b"?")
    good = load(tmp_path, tile)
    assert (len(good.training), len(good.part_ids), len(good.held_out), good.unreadable) == (1, 1, 0, 1)
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of 2 images can be read; the first: .*\.png: not an image"):
        load(tmp_path, tile)


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed images: 1 (first: a/002.png)": lambda root: shutil.copy(root / "good/a/000.png", root / "good/a/002.png"),
    "new images: 3 (first: b/000.png); gone images: 3": lambda root: (root / "good/a").rename(root / "good/b"),
    "gone textures: 1 (first: 001.png)": lambda root: (root / "textures/001.png").unlink(),
    "changed masks: 1 (first: mask.png)": lambda root: shutil.copy(root / "good/a/001.png", root / "mask.png"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_files_other_than_those_a_run_began_with_are_named(tmp_path: Path, message: str) -> None:
    good, textures = tmp_path / "good", tmp_path / "textures"
    write_images(good / "a", 3)
    write_images(textures, 2, seed=1)
    mask = shutil.copy(good / "a/000.png", tmp_path / "mask.png")

    def files() -> Files:
        return training_files(find_dataset(good), TextureFolder(textures, (32, 32)), str(mask))

    before = files()
    refuse_other_files({kind: before[kind] for kind in ("images", "textures")}, before, tmp_path)  # by earlier code
    CHANGES[message](tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_other_files(before, files(), tmp_path)


def test_the_pages_of_a_file_are_files_of_a_run(tmp_path: Path) -> None:
    first, second = (Image.new("L", (32, 32), level) for level in (10, 20))
    first.save(tmp_path / "x.tif", save_all=True, append_images=[second])
    files = training_files(find_dataset(tmp_path), ImageTextures(load(tmp_path).training))["images"]
    assert list(files) == ["x.tif#1", "x.tif#2"]
    assert len(files["x.tif#1"]) == 16
