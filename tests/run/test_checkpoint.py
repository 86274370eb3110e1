"""Checkpoints: the same network comes back, damage and foreign files are refused, nothing in a file is run."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import build_random
from trust_cases import SMALLEST_FLAGS, same, write_images

from almrr_ref import predict, train
from almrr_ref.config import TrainConfig
from almrr_ref.model import ALMRR, load_checkpoint
from almrr_ref.run.checkpoint import FORMAT, CheckpointError, read_checkpoint, save_checkpoint
from almrr_ref.run.folder import open_run


@pytest.fixture(scope="module")
def model() -> ALMRR:
    return build_random(frm_input="memory", standardise="position", threshold=0.25)


@pytest.fixture
def path(model: ALMRR, tmp_path: Path) -> Path:
    """A whole checkpoint."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, (model.config, TrainConfig(seed=5)), model.state_dict(), 0.25, {"step": 3})
    return path


def test_the_same_network_comes_back_without_a_file_of_backbone_weights(
    path: Path, model: ALMRR, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded, content = load_checkpoint(path), read_checkpoint(path)
    assert torch.equal(loaded.predict(images)[0], model.predict(images)[0])
    assert (loaded.config, loaded.threshold, loaded.training) == (model.config, 0.25, False)
    assert (content["train_config"]["seed"], content["training"]) == (5, {"step": 3})


def test_no_flipped_bit_and_no_lost_end_gives_another_network(path: Path) -> None:
    """Ten bits in the weights, fifty in the structure of the file: its ends."""
    content, whole, choose = path.read_bytes(), read_checkpoint(path), random.Random(0)
    places = [choose.randrange(len(content)) for _ in range(10)]
    places += [choose.randrange(3000) for _ in range(20)]
    places += [len(content) - 1 - choose.randrange(12000) for _ in range(30)]
    cases = [content[: int(fraction * len(content))] for fraction in (0, 0.1, 0.5, 0.9, 0.999)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << choose.randrange(8)
        cases.append(bytes(damaged))
    refused: list[str] = []
    for number, case in enumerate(cases):
        path.write_bytes(case)
        try:
            assert same(read_checkpoint(path), whole), f"damage {number} changed what is read"
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) >= 35
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["TRAP"],)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "evil.pt"
    monkeypatch.setenv("TRAP", str(trap))
    torch.save({"program": "almrr-ref", "format": FORMAT, "weights": _Trap()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        read_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap itself does not work, so the test above proves nothing"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"program": ...}, r"last\.pt is not a checkpoint of almrr-ref"),
        ({"format": "1"}, r"last\.pt is not a whole checkpoint.*format"),
        ({"format": FORMAT + 1}, rf"last\.pt has format {FORMAT + 1}.*update"),
        ({"format": 5}, r"last\.pt has format 5, .*train again"),
        ({"model_config": {"score_margin": 12}}, "made with score_margin=12 by another version"),
        ({"format": 6, "weights": {}}, "of an earlier version: .*train again"),
        ({"model_config": ..., "weights": ...}, r"last\.pt.*lacks model_config, weights"),
        ({"model_config": {"backbone": 7}}, "cannot be rebuilt"),
        ({"model_config": {"blocks": [9]}}, "cannot be rebuilt"),
        ({"weights": {}}, "cannot be rebuilt"),
        ({"threshold": [1]}, "threshold is no number"),
        ({"calibration": {"outline_offset": "x"}}, "threshold is no number"),
    ],
)
def test_a_file_with_other_content_than_ours_is_refused(path: Path, change: dict[str, Any], complaint: str) -> None:
    content = {**read_checkpoint(path), **change}
    torch.save({key: value for key, value in content.items() if value is not ...}, path)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_earlier_version_has_the_defaults_of_what_that_version_lacked(path: Path) -> None:
    content = read_checkpoint(path)
    del content["model_config"]["level_brightness"]
    torch.save({**content, "model_config": {**content["model_config"], "score_margin": 0}}, path)
    with open_run(path.parent, "data", {"level_brightness": False, "seed": 5}, resume=True) as (_, stored):
        assert stored is not None
    with pytest.raises(ValueError, match="level-brightness False, not True"):
        open_run(path.parent, "data", {"level_brightness": True}, resume=True).__enter__()
    torch.save({**content, "train_config": {"rotate_probability": 0.5}}, path)
    with pytest.raises(ValueError, match=r"with rotate_probability=0\.5"):
        open_run(path.parent, "data", {}, resume=True).__enter__()


def test_commands_refuse_a_damaged_checkpoint_in_one_line_and_leave_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, damaged = tmp_path / "good", tmp_path / "out", path.read_bytes()[:-100]
    write_images(data, 2)
    path.write_bytes(damaged)
    resume = ["--data", str(data), "--out", str(path.parent), *SMALLEST_FLAGS, "--resume"]
    for main, flags in (
        (train.main, resume),
        (predict.main, ["--checkpoint", str(path), "--input", str(data), "--out", str(out)]),
    ):
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{path} is" in error
    assert path.read_bytes() == damaged
    assert not out.exists()
