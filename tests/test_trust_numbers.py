"""Numbers that go wrong: a gradient that is no number, constant images, a test part of one class or of nothing."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import SMALLEST_FLAGS, run, write_images

from almrr_ref import train, training
from almrr_ref.losses import total_loss
from almrr_ref.model import load_checkpoint
from almrr_ref.run.checkpoint import read_checkpoint


def assert_finite(run_folder: Path) -> None:
    weights = read_checkpoint(run_folder / "last.pt")["weights"]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values() if weight.is_floating_point())
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is finite while its gradient is not: the update of step 3 ruins the weights, not yet the loss."""
    write_images(tmp_path / "good", 4)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "3"]
    flags += ["--set", "save_minutes=0"]
    calls = itertools.count(1)

    def ruinous(losses: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = total_loss(losses)
        return loss + (loss - loss.detach()).sqrt() if next(calls) == 3 else loss

    monkeypatch.setattr(training, "total_loss", ruinous)
    monkeypatch.setattr(training, "REPORT_EVERY", 1)
    with pytest.warns(UserWarning, match="random"):
        assert train.main(flags) == 2
    assert read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == 2
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("levels", [(0,), (90, 91)])
def test_constant_images_train_and_predict_to_finite_numbers(tmp_path: Path, levels: tuple[int, ...]) -> None:
    (tmp_path / "good").mkdir()
    for i in range(5):
        Image.new("L", (32, 32), levels[i % len(levels)]).save(tmp_path / "good" / f"{i}.png")
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "6"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    assert_finite(tmp_path / "run")
    model = load_checkpoint(tmp_path / "run" / "last.pt")
    assert 0 <= float(model.threshold) <= 1
    odd = torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.rand(2, 3, 32, 32).round()])
    for network, dtype in ((model, None), (model.fuse(), None), (model, torch.bfloat16), (model.fuse(), torch.float16)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            maps, scores = network.predict(odd)
        assert bool(torch.isfinite(maps).all())
        assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize(("good", "bad", "defined"), [(2, 0, ()), (0, 2, ("pixel_auroc", "aupro"))])
def test_a_test_part_of_one_class_says_which_metrics_are_undefined_and_why(
    tmp_path: Path, good: int, bad: int, defined: tuple[str, ...]
) -> None:
    root = tmp_path / "set"
    write_images(root / "train" / "good", 3)
    write_images(root / "test" / "good", good, seed=1)
    write_images(root / "test" / "bad", bad, seed=2)
    (root / "ground_truth" / "bad").mkdir(parents=True)
    for i in range(bad):
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[3:9, 3:9] = 255
        Image.fromarray(mask).save(root / "ground_truth" / "bad" / f"{i:03}.png")
    flags = ["--data", str(root), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "2"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert (metrics[name] is not None) == (name in defined)
        assert (name in metrics["reasons"]) == (name not in defined)
    assert "image auroc is undefined: " in ended.out


def test_a_test_part_of_nothing_but_broken_files_is_named_and_ends_with_code_1(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_images(root / "train" / "good", 3)
    for kind in ("good", "bad"):
        (root / "test" / kind).mkdir(parents=True)
        (root / "test" / kind / "x.png").write_bytes(b"?")
    flags = ["--data", str(root), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 1, ended
    assert ended.err.count("not read: ") == 2
    assert "Traceback" not in ended.err
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert len(metrics["unreadable"]) == 2
    assert metrics["image_auroc"] is None
