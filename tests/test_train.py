"""The command that trains, end to end on small images: what it writes, what it repeats, and what a user does wrong."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, Ended, read_scores, run, same, weights, write_images

from almrr_ref import calibrate, evaluate, load_checkpoint, predict, train
from almrr_ref.calibration.by_hand import set_region
from almrr_ref.config import DEMO, TrainConfig, make_configs
from almrr_ref.data.images import load_image
from almrr_ref.data.roi import draw_region
from almrr_ref.run.checkpoint import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


class Trained(NamedTuple):
    data: Path
    folder: Path
    ended: Ended


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Seven good images to train on, two good and two defective ones with masks to test, and a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "cloth"
    write_images(data / "train" / "good", 7, size=40)
    write_images(data / "test" / "good", 2, seed=1, size=45)
    write_images(data / "test" / "hole", 2, seed=2, size=100)
    (data / "ground_truth" / "hole").mkdir(parents=True)
    for i in range(2):
        mask = np.zeros((100, 100), dtype=np.uint8)
        mask[10:40, 10:50] = 255
        Image.fromarray(mask).save(data / "ground_truth" / "hole" / f"{i:03}_mask.png")
    ended = run("train", train_flags(data, folder / "run"), folder / "io")
    assert ended.code == 0, ended
    return Trained(data, folder / "run", ended)


def train_flags(data: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--out", str(out), *SMALLEST_FLAGS, *MEMORY_FLAGS, "--steps", "6"]


def run_train(data: Path, out: Path, *flags: str) -> int:
    return train.main([*train_flags(data, out), *flags])


def test_training_writes_all_it_promises_and_evaluates(trained: Trained) -> None:
    assert all(word in trained.ended.out for word in ("MVTec", "images/s", "left", "threshold"))
    content = read_checkpoint(trained.folder / "last.pt")
    assert content["threshold"] is not None
    assert {"torch", "almrr_ref"} <= set(content["versions"])
    (entry,) = [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]
    assert entry["step"] == content["training"]["step"] == 6
    assert {"loss_rec", "loss_focal", "loss_dice", "lr"} <= set(entry)
    with Image.open(trained.folder / "synthetic.png") as sheet:
        assert sheet.width > 300
    metrics = json.loads((trained.folder / "evaluation" / "metrics.json").read_text())
    assert {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"} <= set(metrics)
    assert metrics["counts"]["images"] == 4
    page = (trained.folder / "evaluation" / "index.html").read_text()
    pictures = sorted((trained.folder / "evaluation" / "overlays").rglob("*.png"))
    assert len(pictures) == 4
    assert all(picture.stem in page for picture in pictures)


def test_what_evaluate_cannot_read_is_the_reason_for_metrics_that_are_undefined(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.data, tmp_path / "cloth")
    for file in (tmp_path / "cloth" / "test" / "good").iterdir():
        file.write_bytes(b"no image")
    flags = ["--checkpoint", str(trained.folder / "last.pt"), "--data", str(tmp_path / "cloth"), "--no-overlays"]
    assert evaluate.main([*flags, "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "image auroc is undefined: no good image in the test part that could be read\n" in out
    assert f"images, worst first: {tmp_path / 'out' / 'index.html'}" in out


@pytest.mark.parametrize("workers", ["0", "3"])
def test_another_process_on_a_copy_trains_the_same_weights_bit_for_bit(
    trained: Trained, tmp_path: Path, workers: str
) -> None:
    """The files are created in the opposite order, so that the file system lists them in another one."""
    for file in sorted(trained.data.rglob("*.png"), reverse=True):
        copy = tmp_path / "cloth" / file.relative_to(trained.data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    flags = train_flags(tmp_path / "cloth", tmp_path / "run")
    assert run("train", [*flags, "--workers", workers], tmp_path / "io").code == 0
    a, b = (read_checkpoint(folder / "last.pt") for folder in (trained.folder, tmp_path / "run"))
    assert a["threshold"] == b["threshold"]
    assert same(a["weights"], b["weights"])


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    before = (folder / "last.pt").read_bytes()
    for flags, complaint in (
        ([], "--resume"),
        (["--resume", "--lr", "0.5"], "has lr 0.0001, not 0.5"),
        (["--resume", "--set", "warmup=7"], "has warmup 0, not 7"),
        (["--overwrite", "--steps", "0", "--frm-input", "mean"], "--steps 0 judges by the memory alone"),
    ):
        assert run_train(trained.data, folder, *flags) == 2
        assert complaint in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before
    assert run_train(trained.data, folder, "--overwrite", "--seed", "8") == 0
    assert not same(weights(trained.folder), weights(folder))
    capsys.readouterr()
    assert train.main(["--out", str(folder), "--resume", "--device", "cpu"]) == 0
    assert "continuing after step 6 of 6" in capsys.readouterr().out


def test_a_finished_run_that_is_resumed_shows_no_figures_of_another_region(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    shown = '"calibration":{"good_scores"'
    assert shown in (folder / "evaluation" / "index.html").read_text()
    set_region(folder / "last.pt", draw_region([[(0, 0), (1, 0), (1, 1)]], (32, 32)))
    assert train.main(["--out", str(folder), "--resume", "--device", "cpu"]) == 0
    assert "whose figures are of another region" in capsys.readouterr().err
    assert shown not in (folder / "evaluation" / "index.html").read_text()


def test_a_named_preset_must_be_that_of_the_run_which_may_be_of_the_demo(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's preset names its values too, and the demo shortens that of `plus`."""
    model_config, config = make_configs("plus", {"data": "demo"}, DEMO["plus"])
    configs = {"model_config": dataclasses.asdict(model_config), "train_config": dataclasses.asdict(config)}
    write_checkpoint(tmp_path / "last.pt", {**read_checkpoint(trained.folder / "last.pt"), **configs})
    resumed: list[TrainConfig] = []
    monkeypatch.setattr(train, "train", lambda _, config, *__: resumed.append(config) or 0)
    again = ["--out", str(tmp_path), "--resume", "--device", "cpu", "--preset"]
    assert train.main([*again, "paper"]) == 2
    assert "has image-size auto, not (256, 256)" in capsys.readouterr().err
    assert train.main([*again, "plus"]) == 0
    assert resumed == [config]


def test_ctrl_c_after_the_last_step_says_how_to_go_on(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert train.main(["--out", str(trained.folder), "--resume"]) == 130
    assert "continue with --resume\n" in capsys.readouterr().err


def test_tiles_of_large_images_train_and_predict(tmp_path: Path) -> None:
    write_images(tmp_path / "web", 2, size=90)
    assert run_train(tmp_path / "web", tmp_path / "run", "--tile", "32") == 0
    checkpoint, out = tmp_path / "run" / "last.pt", tmp_path / "out"
    assert predict.main(["--checkpoint", str(checkpoint), "--input", str(tmp_path / "web"), "--out", str(out)]) == 0
    with Image.open(out / "maps" / "000.png.tiff") as anomaly_map:
        assert anomaly_map.size == (90, 90)


def test_wrong_use_ends_in_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, good = tmp_path / "empty", tmp_path / "good"
    empty.mkdir()
    write_images(good, 3)
    foreign, blocked, exported = tmp_path / "foreign.pt", tmp_path / "file", tmp_path / "model.onnx"
    out = tmp_path / "run"
    torch.save({"conv1.weight": torch.zeros(2)}, foreign)
    blocked.write_text("in the way")
    exported.write_text("a graph")
    predicted = ["--input", str(good), "--out", str(out), "--checkpoint"]
    cases = {
        "missing": lambda: run_train(tmp_path / "missing", out),
        "empty": lambda: run_train(empty, out),
        "foreign.pt": lambda: run_train(good, out, "--weights", str(foreign)),
        "nowhere.pth": lambda: run_train(good, out, "--weights", str(tmp_path / "nowhere.pth")),
        "resnet18": lambda: train.main(["--data", str(good), "--out", str(out), "--backbone", "resnet1"]),
        "--blocks": lambda: run_train(good, out, "--blocks", "7"),
        "textures": lambda: run_train(good, out, "--anomaly-source", str(tmp_path / "textures")),
        "a file": lambda: run_train(good, blocked),
        "no such checkpoint": lambda: predict.main([*predicted, str(tmp_path / "no.pt")]),
        "an exported network": lambda: calibrate.main(["--checkpoint", str(exported), "--threshold", "0.5"]),
        "not a checkpoint": lambda: predict.main([*predicted, str(foreign)]),
    }
    for message, case in cases.items():
        assert case() == 2, message
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    ["--steps abc", "--encoder lstm", "--no-such-flag", "--d-model 64", "--set d_model=wide", "--resume --overwrite"],
)
def test_an_unknown_flag_value_is_one_line_too(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert flags.split()[0] in error
    assert ("perhaps --set d_model=VALUE" in error) == ("--d-model" in flags)


def test_long_images_keep_their_shape_through_every_command(tmp_path: Path) -> None:
    data, out, io = tmp_path / "strips", tmp_path / "run", tmp_path / "io"
    write_images(data / "train" / "good", 6, size=(40, 100))
    write_images(data / "test" / "good", 2, seed=1, size=(40, 100))
    write_images(data / "test" / "hole", 2, seed=2, size=(40, 100))
    (data / "ground_truth" / "hole").mkdir(parents=True)
    for i in range(2):
        mask = np.zeros((40, 100), dtype=np.uint8)
        mask[10:30, 70:90] = 255
        Image.fromarray(mask).save(data / "ground_truth" / "hole" / f"{i:03}_mask.png")
    shape = ["--image-size", "auto", "--pixels", "64", "--standardise", "auto", "--set", "anomaly_style=varied"]
    ended = run("train", [*train_flags(data, out), *shape], io)
    assert ended.code == 0, ended
    assert "images of 40 x 100 pixels (height x width) are brought to 32 x 96" in ended.out
    content = read_checkpoint(out / "last.pt")
    assert content["model_config"]["image_size"] == (32, 96)
    assert f"standardise {content['model_config']['standardise']}: a position explains" in ended.out
    assert json.loads((out / "evaluation" / "metrics.json").read_text())["pixel_auroc"] is not None
    with Image.open(out / "evaluation" / "overlays" / "test" / "hole" / "000.png.png") as overlay:
        assert overlay.height > overlay.width  # wide panels, one above the other
    assert run("train", [*train_flags(data, out), *shape, "--resume"], io).code == 0
    good = ["--checkpoint", str(out / "last.pt"), "--good", str(data / "train")]
    assert run("calibrate", good, io).code == 0
    files = ["--checkpoint", str(out / "last.pt"), "--input", str(data / "test"), "--out", str(tmp_path / "found")]
    assert run("predict", files, io).code == 0
    model = load_checkpoint(out / "last.pt")
    for row in read_scores(tmp_path / "found"):
        picture = load_image(data / "test" / row["path"], (32, 96))[None].float() / 255
        assert float(row["score"]) == pytest.approx(float(model.predict(picture)[1]), abs=1e-5)
        with Image.open(tmp_path / "found" / "maps" / f"{row['path']}.tiff") as stored:
            assert stored.size == (96, 32)


def test_a_wrong_path_leaves_no_folder(tmp_path: Path) -> None:
    assert calibrate.main(["--checkpoint", str(tmp_path / "mistyped" / "last.pt"), "--threshold", "0.4"]) == 2
    assert train.main(["--out", str(tmp_path / "mistyped"), "--resume", "--device", "cpu"]) == 2
    assert not list(tmp_path.iterdir())
