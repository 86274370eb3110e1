"""Checkpoints: the same network comes back, damage and foreign files are refused, nothing in a file is run."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from test_model import TINY

from almrr_ref.config import TrainConfig
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import (
    FORMAT,
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    restore_model,
    save_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ALMRR]:
    model = ALMRR(TINY, seed=5)
    model.threshold = 0.25
    path = tmp_path / "last.pt"
    save_checkpoint(path, model, TrainConfig(seed=5), {"step": 3, "steps": 9})
    return path, model


def test_the_same_network_comes_back_with_its_threshold(saved: tuple[Path, ALMRR]) -> None:
    path, model = saved
    loaded = load_checkpoint(path)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.predict(images)[0], model.predict(images)[0])
    assert (loaded.config, loaded.threshold, loaded.training) == (model.config, 0.25, False)


def test_it_needs_no_file_of_backbone_weights(saved: tuple[Path, ALMRR], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    loaded = load_checkpoint(saved[0])
    assert not any(bool(torch.isnan(p).any()) for p in loaded.parameters())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(saved: tuple[Path, ALMRR], share: float) -> None:
    path = saved[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        read_checkpoint(path)


def test_a_flipped_bit_in_a_weight_is_noticed(saved: tuple[Path, ALMRR]) -> None:
    path = saved[0]
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path(os.environ["TRAP"])),)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "evil.pt"
    monkeypatch.setenv("TRAP", str(trap))
    if container == "torch":
        torch.save({"program": "almrr-ref", "format": 1, "weights": _Trap()}, path)
    else:
        path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        read_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if container == "torch" else pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap itself does not work, so the test above proves nothing"


def test_foreign_and_newer_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of almrr-ref"):
        read_checkpoint(path)
    torch.save({"program": "almrr-ref", "format": FORMAT + 1}, path)
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}.*update"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("older", [1, 4])
def test_a_memory_of_an_older_format_is_refused(saved: tuple[Path, ALMRR], older: int) -> None:
    content = read_checkpoint(saved[0])
    old = {**content, "format": older}
    restore_model(old)  # one without a memory is still read
    with pytest.raises(CheckpointError, match=rf"memory is of format {older}.*train again"):
        restore_model({**old, "model_config": {**content["model_config"], "frm_input": "error", "memory": 5}})


def test_a_failing_write_keeps_the_old_file(saved: tuple[Path, ALMRR], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="disk is full"):
        save_checkpoint(path, model, TrainConfig(), {"step": 4})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
