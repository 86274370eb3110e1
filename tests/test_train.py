"""The commands end to end on small images: train, stop, resume, evaluate, predict, and what a user does wrong."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import good_samples

from almrr_ref import evaluate, predict, train
from almrr_ref.config import TrainConfig
from almrr_ref.losses import total_loss
from almrr_ref.mfrm import Decoder
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.train import calibrate, learning_rate

TINY_FLAGS = [
    *("--preset", "small", "--backbone", "resnet18", "--weights", "random", "--image-size", "32"),
    *("--batch-size", "2", "--steps", "6", "--device", "cpu"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


def write_images(folder: Path, count: int, seed: int = 0, size: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(90, 160, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    """Seven good images to train on, two good and two defective ones with masks to test."""
    root = tmp_path / "cloth"
    write_images(root / "train" / "good", 7)
    write_images(root / "test" / "good", 2, seed=1)
    write_images(root / "test" / "hole", 2, seed=2)
    (root / "ground_truth" / "hole").mkdir(parents=True)
    for i in range(2):
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[10:20, 10:25] = 255
        Image.fromarray(mask).save(root / "ground_truth" / "hole" / f"{i:03}_mask.png")
    return root


def run_train(data: Path, out: Path, *flags: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *TINY_FLAGS, *flags])


def weights(run: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = read_checkpoint(run / "last.pt")["weights"]
    return loaded


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_training_writes_all_it_promises_and_evaluates(
    mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_train(mvtec, run) == 0
    out = capsys.readouterr().out
    assert "MVTec" in out
    assert "images/s" in out
    assert "left" in out
    content = read_checkpoint(run / "last.pt")
    assert content["threshold"] is not None
    assert content["training"]["step"] == 6
    assert {"torch", "almrr_ref"} <= set(content["versions"])
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 6
    assert {"loss_rec", "loss_focal", "loss_dice", "lr"} <= set(entries[-1])
    with Image.open(run / "synthetic.png") as sheet:
        assert sheet.width > 300
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"} <= set(metrics)
    assert metrics["counts"]["images"] == 4
    page = (run / "evaluation" / "index.html").read_text()
    pictures = sorted((run / "evaluation" / "overlays").rglob("*.png"))
    assert len(pictures) == 4
    assert all(picture.name in page for picture in pictures)


def test_same_seed_same_weights_and_another_seed_others(mvtec: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run_train(mvtec, tmp_path / name, "--seed", seed)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_workers_do_not_change_the_run(mvtec: Path, tmp_path: Path) -> None:
    run_train(mvtec, tmp_path / "a")
    run_train(mvtec, tmp_path / "b", "--workers", "2")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("preset", [[], ["--preset", "plus", "--steps", "6", "--memory", "20"]], ids=["small", "plus"])
def test_a_stopped_run_saves_and_resumes_to_the_same_weights(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: signal.Signals, code: int, preset: list[str]
) -> None:
    run_train(mvtec, tmp_path / "whole", *preset)
    steps: list[int] = []

    def stop_at_third(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(which)
        return total_loss(parts)

    with monkeypatch.context() as patched:
        patched.setattr(train, "total_loss", stop_at_third)
        assert run_train(mvtec, tmp_path / "run", *preset) == code
    stopped = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (stopped["training"]["step"], stopped["threshold"]) == (3, None)
    assert run_train(mvtec, tmp_path / "run", *preset, "--resume") == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    threshold = read_checkpoint(tmp_path / "whole" / "last.pt")["threshold"]
    assert read_checkpoint(tmp_path / "run" / "last.pt")["threshold"] == threshold
    if preset:  # the balance is measured at the end, by the resumed run
        assert not torch.equal(weights(tmp_path / "run")["evidence.std"], torch.ones(2))
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == [3, 6]


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(
    mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_train(mvtec, run)
    before = (run / "last.pt").read_bytes()
    assert run_train(mvtec, run) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_train(mvtec, run, "--resume", "--lr", "0.5") == 2
    assert "lr" in capsys.readouterr().err
    assert (run / "last.pt").read_bytes() == before
    assert run_train(mvtec, run, "--overwrite", "--seed", "8") == 0


def test_a_run_begun_by_an_older_version_does_not_go_on_with_other_samples(
    mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_train(mvtec, run)
    content = read_checkpoint(run / "last.pt")
    for step, code in ((3, 2), (6, 0)):  # unfinished, finished
        torch.save({**content, "format": 3, "training": {**content["training"], "step": step}}, run / "last.pt")
        capsys.readouterr()
        assert run_train(mvtec, run, "--resume") == code
        assert ("older version" in capsys.readouterr().err) == (code == 2)


def test_a_run_without_a_u_net_resumes_although_its_preset_has_a_memory(mvtec: Path, tmp_path: Path) -> None:
    flags = ["--preset", "plus", "--steps", "2", "--frm-input", "none"]
    assert run_train(mvtec, tmp_path / "run", *flags) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pt")["model_config"]["memory"] == 0
    assert run_train(mvtec, tmp_path / "run", *flags, "--resume") == 0


def test_an_infinite_loss_stops_with_the_step_named_and_keeps_the_last_good_state(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_train(mvtec, run)
    before = (run / "last.pt").read_bytes()
    calls: list[int] = []
    honest = train.training_step

    def diverging(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(len(calls))
        parts = honest(*arguments)  # type: ignore[arg-type]
        return {k: v * float("nan") if len(calls) == 2 else v for k, v in parts.items()}

    monkeypatch.setattr(train, "training_step", diverging)
    assert run_train(mvtec, tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "not finite at step 2" in error
    assert "images number" in error
    assert not (tmp_path / "other" / "last.pt").exists()
    assert (run / "last.pt").read_bytes() == before


def test_amp_computes_in_bfloat16_but_keeps_weights_scan_and_losses_in_float32(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from almrr_ref.kernels import chunked

    seen: dict[str, set[torch.dtype]] = {"scan": set(), "decoder": set(), "loss": set()}
    scan, decode, step = chunked._Scan.forward, Decoder.forward, train.training_step

    def watched_scan(context: object, *operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen["scan"] |= {operand.dtype for operand in operands if isinstance(operand, torch.Tensor)}
        return scan(context, *operands)

    def watched_decoder(decoder: Decoder, latent: torch.Tensor) -> torch.Tensor:
        decoded = decode(decoder, latent)
        seen["decoder"].add(decoded.dtype)
        return decoded

    def watched_step(*arguments: object) -> dict[str, torch.Tensor]:
        parts = step(*arguments)  # type: ignore[arg-type]
        seen["loss"] |= {part.dtype for part in parts.values()}
        return parts

    monkeypatch.setattr(chunked._Scan, "forward", staticmethod(watched_scan))
    monkeypatch.setattr(Decoder, "forward", watched_decoder)
    monkeypatch.setattr(train, "training_step", watched_step)
    run_train(mvtec, tmp_path / "full")
    assert set().union(*seen.values()) == {torch.float32}
    seen["decoder"].clear()
    assert run_train(mvtec, tmp_path / "amp", "--amp") == 0
    monkeypatch.undo()
    assert run_train(mvtec, tmp_path / "again", "--amp") == 0
    assert seen["decoder"] == {torch.bfloat16, torch.float32}, "the threshold is found without amp"
    assert seen["scan"] == seen["loss"] == {torch.float32}
    assert {value.dtype for value in weights(tmp_path / "amp").values()} <= {torch.float32, torch.int64}
    assert equal(weights(tmp_path / "amp"), weights(tmp_path / "again"))
    rec = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss_rec"] for name in ("full", "amp")]
    assert rec[0] != rec[1] == pytest.approx(rec[0], rel=0.02)


def test_a_folder_of_good_images_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "good", 4)
    assert run_train(tmp_path / "good", tmp_path / "run") == 0
    assert read_checkpoint(tmp_path / "run" / "last.pt")["threshold"] is not None
    assert evaluate.main(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--data", str(tmp_path / "good")]) == 2
    assert "no test part" in capsys.readouterr().err


def test_tiles_of_large_images_train_and_predict(tmp_path: Path) -> None:
    write_images(tmp_path / "web", 2, size=90)
    assert run_train(tmp_path / "web", tmp_path / "run", "--tile", "32") == 0
    out = tmp_path / "out"
    assert (
        predict.main(
            ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--input", str(tmp_path / "web"), "--out", str(out)]
        )
        == 0
    )
    with Image.open(out / "maps" / "000.png.tiff") as anomaly_map:
        assert anomaly_map.size == (90, 90)


def test_predict_names_broken_files_goes_on_and_exits_with_1(
    mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_train(mvtec, tmp_path / "run")
    source = tmp_path / "in"
    write_images(source / "a", 1)
    write_images(source / "b", 1, seed=1)
    (source / "b" / "torn.png").write_bytes((source / "a" / "000.png").read_bytes()[:300])
    (source / ".hidden.png").write_bytes(b"")
    flags = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--input", str(source), "--out", str(tmp_path / "out")]
    assert predict.main(flags) == 1
    assert "torn.png" in capsys.readouterr().err
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["a/000.png", "b/000.png", "b/torn.png"]
    assert rows[2]["error"]
    assert not rows[2]["score"]
    for row in rows[:2]:
        assert (float(row["score"]) >= float(row["threshold"])) == (row["label"] == "1") == (int(row["area"]) > 0)
    written = sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*") if p.suffix != ".csv"
    )
    assert written == ["maps/a/000.png.tiff", "maps/b/000.png.tiff", "overlays/a/000.png.png", "overlays/b/000.png.png"]


def test_score_in_the_csv_is_that_of_the_python_interface(mvtec: Path, tmp_path: Path) -> None:
    from almrr_ref import load_checkpoint
    from almrr_ref.data.images import load_image

    run_train(mvtec, tmp_path / "run")
    image = mvtec / "test" / "hole" / "001.png"
    flags = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--input", str(image), "--out", str(tmp_path / "out")]
    assert predict.main(flags) == 0
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    _, scores = load_checkpoint(tmp_path / "run" / "last.pt").predict(load_image(image, 32)[None].float() / 255)
    assert float(row["score"]) == pytest.approx(float(scores[0]), abs=1e-6)


def test_wrong_use_ends_in_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken, good = tmp_path / "empty", tmp_path / "broken", tmp_path / "good"
    empty.mkdir()
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no image")
    write_images(good, 3)
    foreign = tmp_path / "foreign.pt"
    torch.save({"conv1.weight": torch.zeros(2)}, foreign)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    run = str(tmp_path / "run")
    cases = {
        "missing": lambda: run_train(tmp_path / "missing", tmp_path / "run"),
        "empty": lambda: run_train(empty, tmp_path / "run"),
        "broken": lambda: run_train(broken, tmp_path / "run"),
        "foreign.pt": lambda: run_train(good, tmp_path / "run", "--weights", str(foreign)),
        "nowhere.pth": lambda: run_train(good, tmp_path / "run", "--weights", str(tmp_path / "nowhere.pth")),
        "resnet18": lambda: train.main(["--data", str(good), "--out", run, "--backbone", "resnet1"]),
        "--blocks": lambda: run_train(good, tmp_path / "run", "--blocks", "7"),
        "textures": lambda: run_train(good, tmp_path / "run", "--anomaly-source", str(tmp_path / "textures")),
        "a file": lambda: run_train(good, blocked),
        "cannot write": lambda: run_train(good, blocked / "run"),
        "no such checkpoint": lambda: predict.main(
            ["--checkpoint", str(tmp_path / "no.pt"), "--input", run, "--out", run]
        ),
        "not a checkpoint": lambda: predict.main(["--checkpoint", str(foreign), "--input", str(good), "--out", run]),
    }
    for message, case in cases.items():
        assert case() == 2, message
        captured = capsys.readouterr()
        assert message in captured.err, captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err


def test_learning_rate_warms_up_and_ends_at_a_hundredth() -> None:
    config = TrainConfig(lr=1.0, schedule="cosine", warmup=10)
    assert learning_rate(0, 1000, config) == pytest.approx(0.1)
    assert learning_rate(500, 1000, config) == pytest.approx(0.505)
    assert learning_rate(999, 1000, config) == pytest.approx(0.01, abs=1e-3)
    assert learning_rate(700, 1000, TrainConfig(lr=2.0)) == 2.0


class _Brightness(torch.nn.Module):
    """Stands for a network whose score of an image is its brightness."""

    feature_mean = torch.zeros(1)

    def defect_maps(self, images: torch.Tensor, own: None) -> torch.Tensor:
        return images.mean(dim=1, keepdim=True)

    def image_scores(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5])
def test_threshold_is_exceeded_by_at_most_the_stated_share_of_good_images(rate: float) -> None:
    images = torch.arange(200, dtype=torch.uint8).reshape(200, 1, 1, 1).expand(200, 3, 2, 2)
    model: ALMRR = _Brightness()  # type: ignore[assignment]
    threshold = calibrate(model, images, good_samples(images, false_positive_rate=rate))
    called = (images.float().mean(dim=(1, 2, 3)) / 255 >= threshold).float().mean()
    assert rate - 0.006 <= float(called) <= rate + 1e-6


@pytest.mark.parametrize("flags", [["--steps", "abc"], ["--encoder", "lstm"], ["--no-such-flag"], ["--device", "tpu"]])
def test_an_unknown_flag_value_is_one_line_too(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert flags[0] in error
