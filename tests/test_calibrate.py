"""What is measured after training: threshold and completed memory; once, wherever a run is interrupted."""

from pathlib import Path

import pytest
import torch
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, read_scores, run, same, weights, write_images

from almrr_ref import calibrate, fit, predict, train
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


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5])
def test_threshold_is_exceeded_by_at_most_the_stated_fraction_of_good_images(rate: float) -> None:
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0))
    called = (scores >= calibrate.threshold(scores, rate)).float().mean()
    assert rate - 0.006 <= float(called) <= rate + 1e-6


@pytest.mark.parametrize("holdout", ["0", "0.2"])
def test_no_image_that_the_threshold_comes_from_is_called_defective(root: Path, tmp_path: Path, holdout: str) -> None:
    """The threshold lies above the highest score by more than folding and another batch size change it."""
    flags = [*train_flags(root, tmp_path / "run"), "--frm-input", "mean", "--holdout", holdout]
    assert run("train", flags, tmp_path / "io").code == 0
    model, threshold = tmp_path / "run" / "last.pt", read_checkpoint(tmp_path / "run" / "last.pt")["threshold"]
    base = ["--checkpoint", str(model), "--input", str(root / "good"), "--no-overlays", "--no-maps", "--out"]
    for name, more in (("fused", []), ("one", ["--batch-size", "1"]), ("plain", ["--no-fuse"])):
        assert run("predict", [*base, str(tmp_path / name), *more], tmp_path / "io").code == 0
        scores = [float(row["score"]) for row in read_scores(tmp_path / name)]
        below = sorted(score for score in scores if score < threshold)
        assert threshold - below[-1] < 1e-4, "some image lies right below"
        assert len(below) == 12 if holdout == "0" else len(below) >= 2


@pytest.mark.parametrize("moment", ["calibrate", "threshold", "complete_memory"])
def test_a_run_that_ends_before_it_is_calibrated_is_calibrated_by_its_resumption(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same threshold, evidence and memory. Until then it predicts without a threshold."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(fit if moment == "calibrate" else calibrate, moment, interrupted)
        assert train.main(train_flags(root, out)) == 130
    unfinished = read_checkpoint(out / "last.pt")
    assert (unfinished["training"]["step"], unfinished["threshold"]) == (2, None)
    if moment == "calibrate":
        flags = ["--checkpoint", str(out / "last.pt"), "--input", str(root / "good"), "--out", str(tmp_path / "found")]
        assert predict.main(flags) == 0
        assert "0 above the threshold of none" in capsys.readouterr().out
        rows = read_scores(tmp_path / "found")
        assert len(rows) == 12
        assert all(0 < float(row["score"]) < 1 for row in rows)
        assert {(row["threshold"], row["label"], row["error"]) for row in rows} == {("", "", "")}
    assert train.main([*train_flags(root, out), "--resume"]) == 0
    assert same(read_checkpoint(out / "last.pt"), read_checkpoint(root / "run" / "last.pt"))
    completed = weights(out)
    assert not torch.equal(completed["memory.patches"], unfinished["weights"]["memory.patches"])
    assert len(completed["memory.patch_parts"].unique()) > len(unfinished["weights"]["memory.patch_parts"].unique())
    assert not torch.equal(completed["evidence.std"], torch.ones(3))


def test_a_finished_run_that_is_resumed_is_not_calibrated_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its completed memory would measure the held-out images as known ones."""
    finished = read_checkpoint(root / "run" / "last.pt")
    monkeypatch.setattr(fit, "calibrate", lambda *_: pytest.fail("calibrated again"))
    assert train.main([*train_flags(root, root / "run"), "--resume"]) == 0
    assert same(read_checkpoint(root / "run" / "last.pt"), finished)
