"""Images in memory and in a file: the same, grown and arranged in place, and a full disk by name."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_network import build, good_images, good_samples
from trust_cases import write_images

from almrr_ref.calibration import good_features
from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data import loading as module
from almrr_ref.data.folders import DataError
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import ImageRows
from almrr_ref.data.split import split_good_images


@pytest.fixture(params=[2**30, 100], ids=["memory", "file"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(module, "IN_MEMORY", request.param)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_rows_grow_and_are_arranged_in_place(budget: Path) -> None:
    images = torch.randint(256, (9, 3, 4, 6), dtype=torch.uint8)
    rows = ImageRows((4, 6))
    rows.reserve(5)
    rows.images[:5] = images[:5]
    rows.reserve(9)
    rows.images[5:] = images[5:]
    assert torch.equal(rows.images, images)
    place = rows.images.data_ptr()
    for numbers in ([3, 1, 8, 0], [8, 7, 6, 5, 4, 3, 2, 1, 0], [], [5]):
        before = rows.images.clone()
        assert torch.equal(rows.arrange(numbers), before[numbers])
        assert sorted(map(tuple, rows.images.flatten(1).tolist())) == sorted(map(tuple, images.flatten(1).tolist()))
    assert rows.images.data_ptr() == place
    assert not list(budget.iterdir()), "no file is left behind"


def test_good_images_are_the_same_from_a_file(budget: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    write_images(folder, 7, size=80)
    paths = [sample.path for sample in find_dataset(folder).train]
    for tile in (None, 32):
        config = ModelConfig(image_size=32, tile=tile)
        good = split_good_images(paths, range(7), config, TrainConfig(holdout=0.3))
        monkeypatch.setattr(module, "IN_MEMORY", 2**30)
        same = split_good_images(paths, range(7), config, TrainConfig(holdout=0.3))
        assert torch.equal(good.training, same.training)
        assert torch.equal(good.held_out, same.held_out)
        assert len(good.training) + len(good.held_out) == 7 * (9 if tile else 1) > len(good.training)
        monkeypatch.setattr(module, "IN_MEMORY", 100)


def test_a_full_disk_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "IN_MEMORY", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = set(Path(tempfile.gettempdir()).glob("almrr-*"))
    with pytest.raises(DataError, match=r"take 0.0 GB, for which .* has no room \(No space.*TMPDIR"):
        ImageRows((8, 8)).reserve(10)
    assert set(Path(tempfile.gettempdir()).glob("almrr-*")) == before


def test_on_windows_which_keeps_a_file_in_use_the_next_run_removes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "win32")
    (tmp_path / "almrr-earlier.images").touch()
    (tmp_path / "other.images").touch()
    ImageRows((8, 8)).reserve(10)
    assert [path.name for path in tmp_path.iterdir()] == ["other.images"]


def test_of_very_many_images_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert good_features.looked_at(good_features.MOST) == range(good_features.MOST)
    assert list(good_features.looked_at(0)) == []
    monkeypatch.setattr(good_features, "MOST", 4)
    assert list(good_features.looked_at(9)) == [0, 3, 6]
    assert [list(batch) for batch in good_features.batches(9, 2, "looking")] == [[0, 3], [6]]


def test_patches_of_the_images_looked_at_carry_these_images_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(good_features, "MOST", 4)
    images = good_images(12)
    samples = good_samples(images[:7])
    model = build(frm_input="memory", standardise="channel", memory=4 * 8**2)
    good_features.fit_features(model, samples)
    assert model.memory is not None
    assert set(model.memory.patch_parts.tolist()) == {0, 2, 4, 6}
    good_features.complete_memory(model, images[7:], samples, 20 + torch.arange(12))
    assert set(model.memory.patch_parts.tolist()) == {20, 22, 24, 26, 27, 29, 31}
