"""Training from Python, and what is chosen where nothing is named."""

import hashlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trust_cases import same, weights, write_images

from almrr_ref import calibrate, train
from almrr_ref.backbones import weights as backbone_weights
from almrr_ref.backbones.weights import choose_backbone
from almrr_ref.features import FeatureExtractor
from almrr_ref.fit import choose_preset, fold_for_training, train_detector
from almrr_ref.model import restore_model
from almrr_ref.run.checkpoint import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
CPU = torch.device("cpu")
SMALLEST: dict[str, Any] = {"image_size": 32, "blocks": (1,), "reduced_channels": 8, "d_model": 8, "depth": 1}
SMALLEST |= {"decoder_channels": (8, 8), "frm_width": 4, "memory": 20, "steps": 2, "batch_size": 2}
RANDOM: dict[str, Any] = {"backbone": "resnet18", "weights": "random", "device": "cpu", **SMALLEST}
FLAGS = [word for name, value in SMALLEST.items() for word in ("--set", f"{name}={value}".replace(" ", ""))]


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch hub, whose folder is returned, and an official site that has no file."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(backbone_weights, "OFFICIAL_URL", (tmp_path / "server").as_uri() + "/")
    return tmp_path / "hub" / "checkpoints"


def test_arrays_files_and_a_folder_train_the_same_network_in_any_thread_and_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pictures of 12 bits in 16, whose white is settled over all of them."""
    arrays = list(np.random.default_rng(0).integers(900, 4000, (5, 40, 36), dtype=np.uint16))
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    calls: list[tuple[Any, ...]] = []
    results = [train_detector(arrays, progress=lambda *call: calls.append(call), **RANDOM)]
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    thread = threading.Thread(target=lambda: results.append(train_detector(paths, **RANDOM)))
    thread.start()
    thread.join()
    results.append(train_detector(tmp_path, out=tmp_path.parent / "run", **RANDOM))
    first, *others = (detector.model for detector in results)
    assert first.config.bits == 12
    assert len(others) == 2
    for other in others:
        assert same(first.state_dict(), other.state_dict())
        assert (other.config, other.threshold) == (first.config, first.threshold)
    (step, steps, losses) = calls[-1]
    assert (step, steps, set(losses)) == (2, 2, {"rec", "focal", "dice"})
    assert read_checkpoint(tmp_path.parent / "run" / "last.pt")["threshold"] == first.threshold
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_without_network_and_flags_the_command_chooses_says_why_and_keeps_what_it_chose(
    no_network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "good", 4)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *FLAGS]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    preset, backbone = ("paper", "plus") if torch.cuda.is_available() else ("plus", "paper")
    assert f"preset {preset}: " in out
    assert f"say otherwise with --preset {backbone}" in out
    (chosen,) = [line for line in out.splitlines() if line.startswith("backbone ")]
    assert chosen.startswith(
        f"backbone efficientnet_lite0: ResNet-50's weights, resnet50-0676ba61.pth, are not in {no_network}"
    )
    assert "cannot be downloaded" in chosen
    assert "with --backbone or --weights" in chosen
    assert out.index("for 2 steps of ") < out.index("step 2/2 ")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["model_config"]["backbone"] == "efficientnet_lite0"
    no_network.mkdir(parents=True)
    (no_network / "resnet50-0676ba61.pth").touch()
    assert train.main([*flags, "--backbone", "auto", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "continuing after step 2 of 2" in out
    assert "say otherwise" not in out


def test_the_memory_alone_judges_until_training_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "good", 30)
    given = RANDOM | {"preset": "plus", "image_size": 64, "holdout": 0.4}
    caplog.set_level("INFO")
    untrained = train_detector(tmp_path / "good", out=tmp_path / "run", **given | {"steps": 0})
    first = read_checkpoint(tmp_path / "run" / "last.pt")
    assert first["training"]["step"] == 0
    assert first["threshold"] == untrained.model.threshold
    assert first["calibration"]["thresholds"][0]["images"] == 30  # nothing was trained: all of them tell
    kept_aside = {image_id for image_id, (*_, known) in enumerate(first["calibration"]["images"]) if not known}
    assert set(first["weights"]["memory.patch_parts"].tolist()) & kept_aside
    model = restore_model(first)
    assert model.evidence is not None
    assert model.evidence.by_memory_alone
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(untrained.model.predict(images)[0], model.predict(images)[0], rtol=0, atol=1e-5)
    assert "the memory alone found" not in caplog.text
    with torch.no_grad():
        for weight in [*model.mfrm.parameters(), *model.frm.parameters()]:  # type: ignore[union-attr]
            weight.mul_(1.1)  # training changes nothing of it
    torch.testing.assert_close(untrained.model.predict(images)[0], model.predict(images)[0], rtol=0, atol=1e-5)
    trained = train_detector(tmp_path / "good", **given)
    assert trained.model.evidence.weights.gt(0).all()
    assert len(trained.model.evidence.weights) == 3
    assert "the memory alone found" in caplog.text
    with pytest.raises(ValueError, match="--steps 0 judges by the memory alone, which this network has not"):
        train_detector(tmp_path / "good", **given | {"preset": "paper", "steps": 0})


def test_resnet50_is_chosen_where_its_weights_are_or_can_be_had(no_network: Path, tmp_path: Path) -> None:
    name, reason = choose_backbone("some/resnet18-f37072fd.pth")
    assert (name, reason) == ("resnet18", "for the weights some/resnet18-f37072fd.pth")
    assert choose_backbone("mine.pth")[0] == "resnet50"
    official, content = tmp_path / "server" / "resnet50-0676ba61.pth", b"of another hash"
    official.parent.mkdir()
    official.write_bytes(content)
    name, reason = choose_backbone(None)
    assert (name, "invalid hash value" in reason) == ("efficientnet_lite0", True)
    with pytest.MonkeyPatch.context() as patched:
        digest = hashlib.sha256(content).hexdigest()[:8]
        patched.setitem(backbone_weights.OFFICIAL_FILES, "resnet50", f"resnet50-{digest}.pth")
        official.rename(official.with_name(f"resnet50-{digest}.pth"))
        assert choose_backbone(None) == ("resnet50", f"its weights were downloaded to {no_network}")
        assert choose_backbone(None) == ("resnet50", f"its weights are in {no_network}")


@pytest.mark.parametrize(
    ("preset", "data", "device", "chosen"),
    [
        ("auto", "x", "cuda", "paper"),
        ("auto", "x", "cpu", "plus"),
        ("auto", "demo", "cuda", "plus"),
        ("paper", "x", "cpu", "paper"),
    ],
)
def test_the_preset_follows_the_device_unless_it_is_named(preset: str, data: str, device: str, chosen: str) -> None:
    name, reason = choose_preset(preset, data, torch.device(device))
    assert name == chosen
    assert reason.startswith(f"preset {name}: ") == (preset == "auto")


@pytest.mark.parametrize(
    ("good", "fields", "complaint"),
    [
        ([], {}, "good is empty"),
        (np.zeros((9, 8, 3), np.uint8), {}, "good is one picture"),
        (torch.zeros(3, 9, 8), {}, "good is one picture"),
        (Image.new("RGB", (8, 9)), {}, "good is one picture"),
        (b"a file's bytes", {}, "good is one picture"),
        (3, {}, "good is of type int; give a folder"),
        (None, {}, "good is of type NoneType; give a folder"),
        ({"a.png": 0}, {}, "good is of type dict; give a folder"),
        (torch.tensor(3), {}, "good is of type Tensor; give a folder"),
        (np.array(["nowhere.png"]), {}, "none of 1 images can be read; the first: .*nowhere.png"),
        ([], {"out": 3}, "out is a folder or None; got 3"),
        ([], {"out": ""}, "out is a folder or None; got ''"),
        ([], {"progress": 3}, "progress is a function or None; got 3"),
        ([], {"nosuch": 3}, "no argument 'nosuch'; beside its own it takes any field"),
        ([], {"presett": 3}, "did you mean 'preset'"),
        ([torch.zeros(3, 9, 8), torch.full((3, 9, 8), torch.nan)], {}, r"good\[1\]: .*NaN"),
        ("nowhere", {}, "nowhere does not exist"),
        (["nowhere.png"], {}, "none of 1 images can be read; the first: .*nowhere.png"),
        ([], {"batchsize": 3}, "no argument 'batchsize'; did you mean 'batch_size'"),
        ([], {"data": "x"}, "no argument 'data'"),
        ("nowhere", {"preset": "large"}, "--preset is one of"),
        ([np.zeros((9, 8), np.uint8)], {"parts": "x(.)"}, "parts"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(good: Any, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        train_detector(good, **{**RANDOM, **fields})


@pytest.mark.parametrize("at", [10, 14])
def test_ctrl_c_saves_the_run_and_reaches_the_caller_and_the_command_resumes_it(at: int, tmp_path: Path) -> None:
    """Also in the last step, after which the network must still be calibrated."""
    write_images(tmp_path / "good", 4)
    run = tmp_path / "run"

    def interrupt(step: int, _steps: int, _losses: dict[str, float]) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_detector(tmp_path / "good", out=run, progress=interrupt, **{**RANDOM, "steps": 14})
    stopped = read_checkpoint(run / "last.pt")["training"]["step"]
    assert at <= stopped <= at + 1
    assert train.main(["--out", str(run), "--resume", "--device", "cpu"]) == 0
    whole = tmp_path / "whole"
    train_detector(tmp_path / "good", out=whole, **{**RANDOM, "steps": 14})
    assert same(weights(run), weights(whole))


def test_a_run_of_arrays_knows_them_by_number_and_a_path_given_twice_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the ids of patches in its memory are those of its images, whatever calibrate adds later."""
    plus = {**RANDOM, "preset": "plus", "steps": 1}
    write_images(tmp_path / "good", 3)
    paths = sorted((tmp_path / "good").iterdir())
    buffer = np.array(Image.open(paths[0]))

    def frames() -> Iterator[np.ndarray]:
        for path in paths:  # a camera fills the same array again
            buffer[:] = np.asarray(Image.open(path))
            yield buffer

    detector = train_detector(frames(), out=tmp_path / "arrays", **plus)
    assert detector.calibration == read_checkpoint(tmp_path / "arrays/last.pt")["calibration"]
    train_detector([*paths, paths[0]], out=tmp_path / "paths", **plus)
    for run, names in (("arrays", ["picture 0", "picture 1", "picture 2"]), ("paths", [path.name for path in paths])):
        content = read_checkpoint(tmp_path / run / "last.pt")
        assert [name for _, name, _ in content["calibration"]["images"]] == names
        assert set(content["weights"]["memory.patch_parts"].tolist()) <= {0, 1, 2}
    assert same(weights(tmp_path / "arrays"), weights(tmp_path / "paths"))
    given = ["--checkpoint", str(tmp_path / "arrays/last.pt"), "--good", str(tmp_path / "good")]
    assert calibrate.main(given) == 0
    assert "3 good images, 3 of which the network knows" in capsys.readouterr().out
    assert calibrate.main([*given, "--defective", str(paths[0])]) == 2
    assert "a good image, by --good or in training" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(tmp_path / "arrays")]) == 2
    assert "was trained on pictures in memory, which only its program has" in capsys.readouterr().err


def test_training_takes_its_features_from_a_folded_backbone_that_is_no_part_of_the_network() -> None:
    extractor = FeatureExtractor("resnet18", (1, 2, 3), "random", (16, 16))
    images, names = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), list(extractor.state_dict())
    by_backbone = extractor.stages(images)
    fold_for_training(extractor, torch.device("meta"))
    assert not extractor.stand_in, "only a CPU gains by it"
    fold_for_training(extractor, CPU)
    calls: list[Any] = []
    extractor.backbone.register_forward_pre_hook(lambda *call: calls.append(call))
    for stage, expected in zip(extractor.stages(images), by_backbone, strict=True):
        torch.testing.assert_close(stage, expected, atol=1e-4, rtol=1e-4)
    assert not calls
    assert list(extractor.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16):
        extractor.stages(images)
    assert len(calls) == 1, "its weights have 32 bits; autocast means 16"
