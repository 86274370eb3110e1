"""Checkpoints: the same network comes back, damage and foreign files are refused, nothing in a file is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny_network import build_random

from almrr_ref.config import TrainConfig
from almrr_ref.model import ALMRR, load_checkpoint
from almrr_ref.run.checkpoint import FORMAT, CheckpointError, read_checkpoint, save_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ALMRR]:
    model, path = build_random(frm_input="memory", standardise="position", threshold=0.25), tmp_path / "last.pt"
    save_checkpoint(path, (model.config, TrainConfig(seed=5)), model.state_dict(), 0.25, {"step": 3})
    return path, model


def test_the_same_network_comes_back_without_a_file_of_backbone_weights(
    saved: tuple[Path, ALMRR], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    (path, model), images = saved, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded, content = load_checkpoint(path), read_checkpoint(path)
    assert torch.equal(loaded.predict(images)[0], model.predict(images)[0])
    assert (loaded.config, loaded.threshold, loaded.training) == (model.config, 0.25, False)
    assert (content["train_config"]["seed"], content["training"]) == (5, {"step": 3})


def test_a_truncated_file_is_refused_by_name(saved: tuple[Path, ALMRR]) -> None:
    path, content = saved[0], saved[0].read_bytes()
    for fraction in (0, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            read_checkpoint(path)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "evil.pt"
    monkeypatch.setenv("TRAP", str(trap))
    if container == "torch":
        torch.save({"program": "almrr-ref", "format": FORMAT, "weights": _Trap()}, path)
    else:
        path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        read_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if container == "torch" else pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap itself does not work, so the test above proves nothing"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"model": {}}, "not a checkpoint of almrr-ref"),
        ({"program": "almrr-ref", "format": FORMAT + 1}, f"format {FORMAT + 1}.*update"),
        ({"program": "almrr-ref", "format": FORMAT}, "lacks model_config, train_config, weights"),
        (None, "no such checkpoint"),
    ],
)
def test_foreign_newer_and_missing_files_are_refused_by_name(
    tmp_path: Path, content: dict[str, object] | None, complaint: str
) -> None:
    path = tmp_path / "other.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"other\.pt.*{complaint}"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path)
