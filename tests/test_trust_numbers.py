"""Numbers that go wrong: defined behaviour for a diverging loss, constant images, one class, nothing to measure."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import SMALLEST_FLAGS, run, write_images

from almrr_ref import train
from almrr_ref.config import PRESETS
from almrr_ref.data.images import load_image
from almrr_ref.losses import total_loss
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import load_checkpoint, read_checkpoint


def write_constant(folder: Path, count: int, *levels: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        level = levels[i % len(levels)]
        Image.fromarray(np.full((32, 32), level, dtype=np.uint8)).save(folder / f"{i}.png")


def assert_finite(run_folder: Path) -> None:
    assert_finite_weights(run_folder)
    assert 0 <= read_checkpoint(run_folder / "last.pt")["threshold"] <= 1
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def assert_finite_weights(run_folder: Path) -> None:
    weights = read_checkpoint(run_folder / "last.pt")["weights"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())


def test_a_loss_that_diverges_ends_with_one_line_that_names_step_and_batch(tmp_path: Path) -> None:
    write_images(tmp_path / "good", 4)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "30"]
    ended = run("train", [*flags, "--lr", "1e30"], tmp_path / "io")
    assert "not finite at step" in ended.error_line
    assert "images number [" in ended.error_line
    assert not (tmp_path / "run" / "last.pt").exists()


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is finite while its gradient is not: the update of step 3 ruins the weights, not yet the loss."""
    write_images(tmp_path / "good", 4)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "3"]
    calls: list[int] = []

    def ruinous(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        loss = total_loss(parts)
        return loss + (loss - loss.detach()).sqrt() if len(calls) == 3 else loss

    monkeypatch.setattr(train, "total_loss", ruinous)
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    monkeypatch.setitem(PRESETS["small"], "save_minutes", 0.0)
    with pytest.warns(UserWarning, match="random"):
        assert train.main(flags) == 2
    assert read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == 2
    assert_finite_weights(tmp_path / "run")


@pytest.mark.parametrize("levels", [(0,), (255,), (0, 255), (90, 91)])
def test_constant_images_train_and_predict_to_finite_numbers(tmp_path: Path, levels: tuple[int, ...]) -> None:
    write_constant(tmp_path / "good", 5, *levels)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "6"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    assert_finite(tmp_path / "run")
    model = load_checkpoint(tmp_path / "run" / "last.pt")
    odd = torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.rand(2, 3, 32, 32)])
    maps, scores = model.predict(odd)
    assert bool(torch.isfinite(maps).all())
    assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize(
    ("good", "bad", "undefined"),
    [(3, 0, "image_auroc"), (0, 3, "image_auroc"), (1, 1, None)],
)
def test_a_test_part_of_one_class_says_which_metrics_are_undefined_and_why(
    tmp_path: Path, good: int, bad: int, undefined: str | None
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
    assert (metrics["image_auroc"] is None) == (undefined is not None)
    assert all(
        metrics[name] is not None or metrics["reasons"][name] for name in ("image_auroc", "pixel_auroc", "aupro")
    )
    if undefined:
        assert "undefined" in ended.out
        assert f"{undefined.replace('_', ' ')} is undefined: " in ended.out


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


@pytest.fixture(scope="module")
def real_tiles(tmp_path_factory: pytest.TempPathFactory, shared_dir: Path) -> tuple[ALMRR, torch.Tensor]:
    """A network of the widths of `small`, trained in bfloat16 (--amp) on four real tiles, and those tiles."""
    tiles = sorted((shared_dir / "data" / "mt_defect").rglob("MT_Free/Imgs/*.jpg"))[:4]
    if not tiles:
        pytest.skip("the magnetic tiles are absent from ../shared")
    root = tmp_path_factory.mktemp("real")
    (root / "good").mkdir()
    for tile in tiles:
        (root / "good" / tile.name).symlink_to(tile.resolve())
    weights = ["--backbone", "resnet18", "--weights", str(shared_dir / "weights" / "resnet18_stem_layer1-3.pth")]
    flags = ["--preset", "small", *weights, "--image-size", "64", "--steps", "4", "--amp", "--device", "cpu"]
    assert train.main(["--data", str(root / "good"), "--out", str(root / "run"), *flags]) == 0
    assert_finite(root / "run")
    images = torch.stack([load_image(tile, 64) for tile in tiles]).float() / 255
    return load_checkpoint(root / "run" / "last.pt"), images


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.bfloat16, "plain"),
        (torch.bfloat16, "fused"),
        (torch.float16, "plain"),
        (torch.float16, "fused"),
    ],
    ids=str,
)
def test_half_precision_stays_finite_and_near_on_the_real_tiles(
    real_tiles: tuple[ALMRR, torch.Tensor], dtype: torch.dtype, form: str
) -> None:
    """Also where the surface is far from all that was trained on: black, white, noise of full contrast."""
    model, images = real_tiles
    odd = torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.rand(1, 3, 64, 64).round()])
    images = torch.cat([images, odd])
    used = model.fuse() if form == "fused" else model
    with torch.autocast("cpu", dtype):
        maps, scores = used.predict(images)
    assert bool(torch.isfinite(maps).all())
    torch.testing.assert_close(scores.float(), model.predict(images)[1], atol=0.05, rtol=0)
