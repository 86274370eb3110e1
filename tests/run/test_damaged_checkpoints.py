"""Damaged and foreign checkpoints: refused in one line, or read as they were written."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trust_cases import SMALLEST_FLAGS, run, same, write_images

from almrr_ref import predict, train
from almrr_ref.model import load_checkpoint
from almrr_ref.run.checkpoint import CheckpointError, read_checkpoint


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    write_images(folder / "good", 2)
    flags = ["--data", str(folder / "good"), "--out", str(folder / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", flags, folder / "io").code == 0
    return (folder / "run" / "last.pt").read_bytes()


def test_no_flipped_bit_gives_another_network(tmp_path: Path, content: bytes) -> None:
    """Ten bits in the weights, fifty in the structure of the file: its ends."""
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    whole = read_checkpoint(path)
    choose = random.Random(0)
    places = [choose.randrange(len(content)) for _ in range(10)]
    places += [choose.randrange(3000) for _ in range(20)]
    places += [len(content) - 1 - choose.randrange(12000) for _ in range(30)]
    refused: list[str] = []
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read_checkpoint(path), whole), f"bit {place} of {len(content)} changed what is read"
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) >= 30
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "1"}, "format"),
        ({"weights": ...}, "lacks weights"),
        ({"model_config": {"backbone": 7}}, "cannot be rebuilt"),
        ({"model_config": {"blocks": [9]}}, "cannot be rebuilt"),
        ({"weights": {}}, "cannot be rebuilt"),
    ],
)
def test_a_file_with_other_content_than_ours_is_refused(
    tmp_path: Path, content: bytes, change: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    changed = {**read_checkpoint(path), **change}
    torch.save({key: value for key, value in changed.items() if value is not ...}, path)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_commands_refuse_a_damaged_checkpoint_in_one_line_and_leave_it(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder, last = str(tmp_path / "good"), tmp_path / "run", tmp_path / "run" / "last.pt"
    write_images(tmp_path / "good", 2)
    folder.mkdir()
    last.write_bytes(content[:-100])
    for main, flags in (
        (train.main, ["--data", data, "--out", str(folder), *SMALLEST_FLAGS, "--resume"]),
        (predict.main, ["--checkpoint", str(last), "--input", data, "--out", str(tmp_path / "out")]),
    ):
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{last} is" in error
    assert last.read_bytes() == content[:-100]
    assert not (tmp_path / "out").exists()
