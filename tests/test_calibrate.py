"""The threshold that training sets and the command calibrate sets anew; once, wherever a run is interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, read_scores, run, same, weights, write_images

from almrr_ref import calibrate, predict, train
from almrr_ref.calibration import of_training
from almrr_ref.calibration.thresholds import percent
from almrr_ref.model import load_checkpoint
from almrr_ref.run.checkpoint import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good images (good/) and an uninterrupted run on them (run/), whose memory is completed."""
    folder = tmp_path_factory.mktemp("calibrated")
    for seed, size in enumerate((32, 45, 100)):
        write_images(folder / "good" / str(size), 4, seed, size)
    assert run("train", train_flags(folder, folder / "run"), folder / "io").code == 0
    return folder


def train_flags(root: Path, out: Path) -> list[str]:
    flags = ["--data", str(root / "good"), "--out", str(out), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    return [*flags, "--steps", "2", "--holdout", "0.2"]


def copy_of_run(root: Path, to: Path) -> Path:
    to.mkdir()
    shutil.copy(root / "run" / "last.pt", to)
    return to / "last.pt"


def test_no_image_that_the_threshold_comes_from_is_called_defective(root: Path, tmp_path: Path) -> None:
    """The threshold lies above the highest score by more than folding and another batch size change it."""
    assert run("train", [*train_flags(root, tmp_path / "run"), "--frm-input", "mean"], tmp_path / "io").code == 0
    model, threshold = tmp_path / "run" / "last.pt", read_checkpoint(tmp_path / "run" / "last.pt")["threshold"]
    base = ["--checkpoint", str(model), "--input", str(root / "good"), "--no-overlays", "--no-maps", "--out"]
    for name, more in (("fused", []), ("one", ["--batch-size", "1"]), ("plain", ["--no-fuse"])):
        assert run("predict", [*base, str(tmp_path / name), *more], tmp_path / "io").code == 0
        scores = [float(row["score"]) for row in read_scores(tmp_path / name)]
        assert 0 < threshold - max(scores) < 1e-4
        assert len(scores) == 12


@pytest.mark.parametrize("moment", ["complete_memory", "set_verdict", "write_metrics"])
def test_a_run_that_ends_before_it_is_calibrated_is_calibrated_by_its_resumption(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same threshold, evidence and memory. Until then the memory alone judges."""
    calls, original = [], getattr(of_training, moment)  # type: list[str], Any

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(moment)
        if moment == "complete_memory" or len(calls) == 2:  # the first verdict is that of the memory
            raise KeyboardInterrupt
        return original(*arguments, **named)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(of_training, moment, interrupted)
        assert train.main(train_flags(root, out)) == 130
    unfinished = read_checkpoint(out / "last.pt")
    assert unfinished["training"]["step"] == 2
    assert "memory_alone" in unfinished["calibration"]
    if moment == "complete_memory":
        flags = ["--checkpoint", str(out / "last.pt"), "--input", str(root / "good"), "--out", str(tmp_path / "found")]
        assert predict.main(flags) == 0
        assert f"above the threshold of {unfinished['threshold']:.4f}" in capsys.readouterr().out
        rows = read_scores(tmp_path / "found")
        assert len(rows) == 12
        assert all(0 < float(row["score"]) < 1 for row in rows)
        assert all(row["label"] and not row["error"] for row in rows)
        calibration = ["--checkpoint", str(out / "last.pt"), "--good", str(root / "good")]
        assert calibrate.main(calibration) == 2
        assert "its training has not ended" in capsys.readouterr().err
    assert train.main([*train_flags(root, out), "--resume"]) == 0
    assert same(read_checkpoint(out / "last.pt"), read_checkpoint(root / "run" / "last.pt"))
    completed = weights(out)
    assert not torch.equal(completed["memory.patches"], unfinished["weights"]["memory.patches"])
    assert not torch.equal(completed["evidence.std"], torch.ones(3))


def test_a_finished_run_that_is_resumed_is_not_calibrated_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = read_checkpoint(root / "run" / "last.pt")
    monkeypatch.setattr(of_training, "set_verdict", lambda *_: pytest.fail("calibrated again"))
    assert train.main([*train_flags(root, root / "run"), "--resume"]) == 0
    assert same(read_checkpoint(root / "run" / "last.pt"), finished)


def test_calibrate_knows_the_images_of_the_training_by_content_and_gives_the_same_threshold(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under other names, too. The checkpoint keeps the earlier threshold; nothing else of the network changes."""
    path = copy_of_run(root, tmp_path / "run")
    (tmp_path / "renamed").mkdir()
    for number, file in enumerate(sorted((root / "good").rglob("*.png"))):
        shutil.copy(file, tmp_path / "renamed" / f"x{number:02}.png")
    (tmp_path / "run" / "outliers.png").write_bytes(b"of an earlier verdict")
    assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / "renamed")]) == 0
    assert not (tmp_path / "run" / "outliers.png").exists()
    assert "12 good images, 12 of which the network knows" in capsys.readouterr().out
    before, after = (read_checkpoint(p) for p in (root / "run" / "last.pt", path))
    assert after["threshold"] == pytest.approx(before["threshold"], abs=2e-5)
    thresholds = after["calibration"]["thresholds"]
    assert [entry["value"] for entry in thresholds] == [before["threshold"], after["threshold"]]
    assert (thresholds[0]["images"], thresholds[0]["asked"], thresholds[0]["more"]) == (12, 0.01, 87)
    moved = [k for k, v in after["weights"].items() if not torch.allclose(v.float(), before["weights"][k].float())]
    assert not moved
    assert json.loads((tmp_path / "run" / "calibration.json").read_text())["threshold"] == after["threshold"]


def test_new_good_images_defective_ones_and_an_outlier(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good, bad = copy_of_run(root, tmp_path / "run"), tmp_path / "good", tmp_path / "bad"
    write_images(good, 14, seed=8)
    write_images(bad, 3, seed=9)
    for grey, file in ((0, bad / "0.png"), (255, bad / "1.png"), (254, good / "odd.png")):  # black or white
        Image.fromarray(np.full((32, 32, 3), grey, dtype=np.uint8)).save(file)
    flags = ["--checkpoint", str(path), "--good", str(good), "--false-positive-rate", "0.3", "--extend-memory"]
    assert calibrate.main([*flags, "--defective", str(bad), "--drop-outliers"]) == 0
    out = capsys.readouterr().out
    assert "15 good images, 0 of which" in out
    assert "look at 1 good image scoring far outside the others" in out
    assert "odd.png" in out
    assert (tmp_path / "run" / "outliers.png").exists()
    content = read_checkpoint(path)
    kept = set(content["weights"]["memory.patch_parts"].tolist())
    assert [name for _, name, _ in content["calibration"]["images"]].index("odd.png") not in kept
    assert kept & set(range(12, 27)), "new images are in the memory"
    found = [bool(load_checkpoint(path).predict(_flat(grey))[1] >= content["threshold"]) for grey in (0.0, 1.0)]
    assert found == [True, True]


def test_a_copy_of_a_good_image_is_not_compared_with_that_image(root: Path, tmp_path: Path) -> None:
    """It has no patches in the memory, where the training left it out: the image would pass for one kept aside."""
    good, paths = tmp_path / "good", [copy_of_run(root, tmp_path / name) for name in ("with", "without")]
    shutil.copytree(root / "good", good)
    content = read_checkpoint(paths[0])
    images = content["calibration"]["images"]
    content["calibration"]["images"] = [*images, [images[0][0], "z-copy.png", False]]
    torch.save(content, paths[0])
    shutil.copy(good / images[0][1], good / "z-copy.png")
    assert calibrate.main(["--checkpoint", str(paths[0]), "--good", str(good)]) == 0
    assert calibrate.main(["--checkpoint", str(paths[1]), "--good", str(root / "good")]) == 0
    scores = [read_checkpoint(path)["calibration"]["good_scores"] for path in paths]
    assert len(scores[0]) == 12
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("parts", [[], ["--parts", "([0-9]+)/"]])
def test_a_detector_of_the_memory_alone_is_calibrated_to_the_same_threshold(
    root: Path, tmp_path: Path, parts: list[str]
) -> None:
    """Also where images are copies of each other, or show the same part: no patch of an image is another's."""
    good, out = tmp_path / "good", tmp_path / "run"
    shutil.copytree(root / "good", good)
    shutil.copy(next((good / "45").iterdir()), good / "45" / "copy.png")
    flags = ["--data", str(good), "--out", str(out), *SMALLEST_FLAGS, *MEMORY_FLAGS, *parts, "--steps", "0"]
    assert run("train", flags, tmp_path / "io").code == 0
    trained = read_checkpoint(out / "last.pt")
    assert calibrate.main(["--checkpoint", str(out / "last.pt"), "--good", str(good)]) == 0
    again = read_checkpoint(out / "last.pt")
    assert again["threshold"] == pytest.approx(trained["threshold"], abs=1e-6)
    scores = [content["calibration"]["good_scores"] for content in (trained, again)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_new_images_share_no_part_with_those_of_the_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, part_ids = copy_of_run(root, tmp_path / "run"), {}  # type: Path, dict[int, int]
    write_images(tmp_path / "new", 4, seed=8)
    original = calibrate.set_verdict

    def watched(model: Any, good: Any, *others: Any, **named: Any) -> Any:
        part_ids.update(others[-1])
        assert not {entry.part_id for entry in good} & set(part_ids.values())
        return original(model, good, *others, **named)

    monkeypatch.setattr(calibrate, "set_verdict", watched)
    assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / "new")]) == 0
    assert len(set(part_ids.values())) == 12


def test_defective_images_that_cannot_be_read_are_named_and_the_others_serve(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bad = copy_of_run(root, tmp_path / "run"), tmp_path / "bad"
    flags = ["--checkpoint", str(path), "--good", str(root / "good"), "--defective", str(bad)]
    assert calibrate.main(flags) == 2
    assert f"--defective {bad}: no such" in capsys.readouterr().err
    bad.mkdir()
    (bad / "cut.png").write_bytes(b"no picture")
    assert calibrate.main(flags) == 2
    assert "no image that can be read" in capsys.readouterr().err
    same = shutil.copy(next((root / "good").rglob("*.png")), bad)
    assert calibrate.main(flags) == 2
    assert f"--defective {same}: a good image" in capsys.readouterr().err
    Path(same).unlink()
    write_images(bad, 3, seed=9)
    assert calibrate.main(flags) == 1
    assert "cut.png" in "".join(capsys.readouterr())
    red, blue = (Image.new("RGB", (64, 64), shade) for shade in ("red", "blue"))
    red.save(tmp_path / "two.tif", save_all=True, append_images=[blue])
    assert calibrate.main([*flags[:-1], f"{tmp_path / 'two.tif'}#2"]) == 0, "a page of a file, as in predict"
    history = read_checkpoint(path)["calibration"]["thresholds"]
    assert [entry["defective"]["images"] for entry in history[-2:]] == [3, 1]


def test_a_network_without_a_memory_has_none_to_extend(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [*train_flags(root, tmp_path / "run"), "--frm-input", "mean"], tmp_path / "io").code == 0
    flags = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--good", str(root / "good"), "--extend-memory"]
    assert calibrate.main(flags) == 2
    assert "--extend-memory: this network has no memory" in capsys.readouterr().err


def test_a_threshold_set_by_hand_is_the_one_that_predicts_and_the_earlier_stays_in_the_history(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = copy_of_run(root, tmp_path / "run"), read_checkpoint(root / "run" / "last.pt")
    shutil.copy(root / "run" / "calibration.json", path.parent)
    scores = before["calibration"]["good_scores"]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len(before["calibration"]["intervals"]) == 12
    with pytest.raises(ValueError, match="lies within 0 and 1"):
        calibrate.set_threshold(path, float("nan"))
    assert calibrate.main(["--checkpoint", str(path), "--threshold", "0.125"]) == 0
    after = read_checkpoint(path)
    assert [entry["value"] for entry in after["calibration"]["thresholds"]] == [before["threshold"], 0.125]
    assert load_checkpoint(path).threshold == after["threshold"] == 0.125
    report = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert (report["threshold"], report["operating_point"]) == (0.125, "by hand")
    for name in ("threshold", "calibration"):
        after[name] = before[name]
    assert same(after, before), "nothing else changes"


def _flat(grey: float) -> torch.Tensor:
    return torch.full((1, 3, 32, 32), grey)


def test_each_image_that_cannot_be_read_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = copy_of_run(root, tmp_path / "run"), tmp_path / "good"
    shutil.copytree(root / "good", good)
    for name in ("a.png", "b.png"):
        (good / name).symlink_to(good / f"gone-{name}")
    assert calibrate.main(["--checkpoint", str(path), "--good", str(good)]) == 1
    error = capsys.readouterr().err
    assert "a.png" in error
    assert "b.png" in error


def test_a_balanced_threshold_says_its_own_false_alarms(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bad = copy_of_run(root, tmp_path / "run"), tmp_path / "bad"
    write_images(bad, 3, seed=9)
    flags = ["--checkpoint", str(path), "--good", str(root / "good"), "--defective", str(bad)]
    assert calibrate.main([*flags, "--operating-point", "balanced"]) == 0
    content = read_checkpoint(path)
    value, good = content["threshold"], content["calibration"]["good_scores"]
    rate = (sum(score >= value for score in good) + 1) / (len(good) + 1)  # as the pages state it
    assert f"is set, by --operating-point balanced and --defective: {percent(rate)} false al" in capsys.readouterr().out
    assert content["calibration"]["thresholds"][-1]["rate"] == rate


def test_deep_images_for_a_network_of_8_bits_are_said(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of_run(root, tmp_path / "run")
    (tmp_path / "deep").mkdir()
    for k in range(3):
        values = np.random.default_rng(k).integers(0, 4096, (64, 64)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "deep" / f"{k}.tif")
    assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / "deep")]) == 0
    assert "note: 16-bit values taken to use all 16 bits: 3 images" in capsys.readouterr().err


def test_a_threshold_lies_where_scores_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("50.0", "-1.0"):
        assert calibrate.main(["--checkpoint", str(root / "run" / "last.pt"), f"--threshold={value}"]) == 2
        assert f"a threshold lies within 0 and 1, as scores do; got {value}" in capsys.readouterr().err
