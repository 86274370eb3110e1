"""Which good images train and which are kept aside, and which part each of them shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_train import run_train, weights

from almrr_ref import train
from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.pairing import DataError
from almrr_ref.data.split import GoodImages, load_good_images, read_part_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")

MODEL = ModelConfig(image_size=32)


def write_parts(folder: Path, parts: int, shots: int, side: int = 32) -> None:
    """Images of ``parts`` parts, ``shots`` of each; every image of a part has the part's number as its brightness."""
    for part in range(parts):
        for shot in range(shots):
            pixels = np.full((side, side, 3), 10 * part, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"shot{shot}_part{part}.png")


def brightnesses(images: GoodImages) -> tuple[set[int], set[int]]:
    """Parts among those trained on, and among those kept aside."""
    parts = [{int(image[0, 0, 0]) // 10 for image in some} for some in (images.training, images.held_out)]
    return parts[0], parts[1]


@pytest.mark.parametrize("seed", range(5))
def test_whole_parts_are_kept_aside(tmp_path: Path, seed: int) -> None:
    write_parts(tmp_path, parts=8, shots=3)
    data = find_dataset(tmp_path)
    good = load_good_images(data, MODEL, TrainConfig(seed=seed, holdout=0.2, parts="part([0-9]+)"))
    kept, aside = brightnesses(good)
    assert not kept & aside
    assert len(good.held_out) == 6  # a fifth of 24 is 5, and a part has three
    assert len(good.part_ids.unique()) == len(kept) == 6
    for image, part in zip(good.training, good.part_ids):
        same = good.training[good.part_ids == part]
        assert (same == image).all()


def test_without_a_pattern_every_image_is_its_own_part(tmp_path: Path) -> None:
    write_parts(tmp_path, parts=8, shots=3)
    good = load_good_images(find_dataset(tmp_path), MODEL, TrainConfig(holdout=0.2))
    assert (len(good.training), len(good.held_out), len(good.part_ids.unique())) == (19, 5, 19)


@pytest.mark.parametrize("parts", [1, 2])
def test_one_part_at_least_is_left_to_train_on(tmp_path: Path, parts: int) -> None:
    write_parts(tmp_path, parts, shots=4)
    good = load_good_images(find_dataset(tmp_path), MODEL, TrainConfig(holdout=0.9, parts="part([0-9]+)"))
    assert (len(good.training), len(good.held_out)) == (4, 4 * (parts - 1))


def test_tiles_of_one_image_are_one_part(tmp_path: Path) -> None:
    write_parts(tmp_path, parts=3, shots=1, side=80)
    good = load_good_images(find_dataset(tmp_path), ModelConfig(image_size=32, tile=32), TrainConfig(holdout=0))
    assert len(good.training) == 3 * len(good.training[good.part_ids == good.part_ids[0]]) > 3
    assert len(good.part_ids.unique()) == 3


def test_the_memory_of_a_trained_network_knows_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    write_parts(tmp_path / "images", parts=5, shots=2)
    given: list[set[int]] = []
    honest = train.training_step

    def watched(*arguments: Any) -> dict[str, Any]:
        given.append(set(arguments[5].tolist()))
        return honest(*arguments)

    monkeypatch.setattr(train, "training_step", watched)
    flags = ["--frm-input", "memory", "--memory", "40", "--parts", "part([0-9]+)", "--steps", "3"]
    assert run_train(tmp_path / "images", tmp_path / "run", *flags) == 0
    assert "8 images of 4 parts to train on, 2 good ones kept aside" in capsys.readouterr().out
    stored = set(weights(tmp_path / "run")["memory.source"].tolist())
    assert len(stored) == 6, "four parts that were trained on, and in the end two images that were kept aside"
    assert set.union(*given) <= stored


def test_a_path_without_a_part_is_named(tmp_path: Path) -> None:
    write_parts(tmp_path, parts=2, shots=2)
    data = find_dataset(tmp_path)
    with pytest.raises(DataError, match=r"shot0_part0.png: --parts 'tile\(\\d\+\)' is not found in this path"):
        read_part_ids(data, r"tile(\d+)")


@pytest.mark.parametrize(("pattern", "message"), [("part(", "no regular expression"), ("part", "group in parentheses")])
def test_a_pattern_that_cannot_work_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(parts=pattern)
