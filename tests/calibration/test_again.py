"""The command calibrate after a training: what it takes over from it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, write_images

from almrr_ref import calibrate, train, train_detector
from almrr_ref.data.images import load_image
from almrr_ref.run.checkpoint import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


@pytest.mark.parametrize("asked", ["seen", "new"])
def test_a_regime_that_training_was_told_holds_until_another_is_named(asked: str, tmp_path: Path) -> None:
    write_images(tmp_path / "good", 14, size=32)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    assert train.main([*flags, "--steps", "1", "--calibrate-for", asked, "--holdout", "0.4"]) == 0
    again = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--good", str(tmp_path / "good")]
    for more, regime in (([], asked), (["--calibrate-for", "seen"], "seen")):
        assert calibrate.main([*again, *more]) == 0
        assert json.loads((tmp_path / "run" / "calibration.json").read_text())["regime"] == regime


@pytest.mark.parametrize("limit", [[], ["--max-pixels", "100"]])
def test_pictures_may_be_as_large_as_in_training(limit: list[str], tmp_path: Path) -> None:
    write_images(tmp_path / "good", 3, size=32)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    assert train.main([*flags, "--steps", "1"]) == 0
    again = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--good", str(tmp_path / "good"), *limit]
    assert calibrate.main(again) == (2 if limit else 0)


def test_the_same_images_are_told_the_same_share_of_simulated_defects(tmp_path: Path) -> None:
    """Though training has those kept aside last, and the command all by their names."""
    write_images(tmp_path / "good", 10, size=64)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    assert train.main([*flags, "--steps", "1", "--holdout", "0.3", "--image-size", "64"]) == 0
    path = tmp_path / "run" / "last.pt"
    before = read_checkpoint(path)["calibration"]["simulated_scores"]
    assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / "good")]) == 0
    after = read_checkpoint(path)["calibration"]["simulated_scores"]
    assert len(before) > 50
    assert np.array(after) == pytest.approx(np.array(before), abs=2e-5)


def test_an_outlier_is_shown_whole_where_the_network_sees_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "good", 3, size=64)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    assert train.main([*flags, "--steps", "1", "--tile", "32"]) == 0
    shown: list[list[Tensor]] = []
    monkeypatch.setattr("almrr_ref.calibration.verdict.outliers", lambda _: [0])
    monkeypatch.setattr(calibrate, "contact_sheet", lambda rows, *_, **__: shown.extend(rows) or Image.new("L", (1, 1)))
    assert calibrate.main(["--checkpoint", str(tmp_path / "run/last.pt"), "--good", str(tmp_path / "good")]) == 0
    [[picture]] = shown
    wholes = [load_image(path, (32, 32)) for path in (tmp_path / "good").iterdir()]
    assert any(picture.equal(whole) for whole in wholes)


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_pages_of_a_file_are_the_images_that_were_trained_on(
    in_memory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good").mkdir()
    frames = [Image.fromarray(values) for values in np.random.default_rng(0).integers(0, 256, (12, 32, 32), np.uint8)]
    frames[0].save(tmp_path / "good" / "stack.tif", save_all=True, append_images=frames[1:])
    path, folder = tmp_path / "run" / "last.pt", str(tmp_path / "good")
    fields = {"preset": "plus", "backbone": "resnet18", "weights": "random", "image_size": 32, "memory": 200}
    train_detector(frames if in_memory else folder, out=path.parent, steps=1, batch_size=2, **fields)
    before = read_checkpoint(path)["threshold"]
    assert calibrate.main(["--checkpoint", str(path), "--good", folder]) == 0
    assert "12 good images, 12 of which the network knows" in capsys.readouterr().out
    assert read_checkpoint(path)["threshold"] == pytest.approx(before, abs=2e-5)
    frames[3].save(tmp_path / "other.tif", save_all=True, append_images=frames[5:6])
    more = ["--defective", folder] if not in_memory else ["--defective", str(tmp_path / "other.tif")]
    assert calibrate.main(["--checkpoint", str(path), "--good", folder, *more]) == 2
    assert "#1: a good image, by --good or in training" in capsys.readouterr().err


def test_a_copy_in_another_format_is_the_image_that_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own file is another one, and the memory has its patches under the image's id."""
    write_images(tmp_path / "good" / "a", 12, size=32)
    (tmp_path / "good" / "b").mkdir()
    for path in (tmp_path / "good" / "a").iterdir():
        Image.open(path).save(tmp_path / "good" / "b" / f"{path.stem}.bmp")
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    assert train.main([*flags, "--steps", "1"]) == 0
    path = tmp_path / "run" / "last.pt"
    before = read_checkpoint(path)["threshold"]
    for folder in ("good", "good/b", "good"):  # the second calibration has the first one's record
        assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / folder)]) == 0
        assert "12 good images, 12 of which the network knows" in capsys.readouterr().out
        assert read_checkpoint(path)["threshold"] == pytest.approx(before, abs=2e-5)
