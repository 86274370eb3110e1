"""Exported files against the plain network, with every parameter away from its start (test_fused.randomise)."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_fused import build
from test_model import TINY, good_samples
from torch.torch_version import TorchVersion

from almrr_ref.calibrate import fit_evidence, fit_features
from almrr_ref.config import TrainConfig
from almrr_ref.deploy import onnx as onnx_model
from almrr_ref.deploy.onnx import INPUT, OUTPUTS, load_onnx, open_onnx, run_onnx
from almrr_ref.export import WRITERS, check_export, export, main, metadata, to_onnx
from almrr_ref.model import ALMRR
from almrr_ref.predict import main as predict
from almrr_ref.run.checkpoint import save_checkpoint

onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra export)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra export)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra export)")
pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning", "ignore::DeprecationWarning")

SMALL = dataclasses.replace(TINY, image_size=32, blocks=(1, 2), depth=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "mamba", "frm_input": "mean", "d_conv": 3, "average_directions": False},
        {"encoder": "transformer", "frm_input": "none", "backbone": "vgg19", "blocks": (2, 3)},
        {"encoder": "cnn1x1", "frm_input": "error", "distance_weight": 0.3, "blocks": (1, 2, 3, 4), "patch_size": 2},
        {"encoder": "cnn3x3", "backbone": "efficientnet_lite0", "standardise": "channel"},
        {
            "backbone": "resnet34",
            "blocks": (2,),
            "frm_input": "memory",
            "standardise": "position",
            "distance_weight": 0.3,
            "memory": 5,
            "balance": True,
            "score_share": 0.005,
            "score_margin": 3,
        },
        {"backbone": "resnet50", "blocks": (1,), "reduced_channels": 2000},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_onnx_file_has_the_maps_scores_and_decisions_of_the_network(changes: dict[str, Any]) -> None:
    model = build(**{**dataclasses.asdict(SMALL), **changes}).eval()
    batch = torch.rand(6, 3, *(model.config.image_size,) * 2, generator=torch.Generator().manual_seed(3))
    batch, good = batch.split(3)
    if model.memory is not None:
        images = (255 * good).byte()
        fit_features(model, good_samples(images))
        fit_evidence(model, images[:0], good_samples(images))
    expected_maps, expected_scores = model.predict(batch)
    if model.frm is not None:  # else without a threshold
        model.threshold = float(expected_scores.sort().values[:2].mean())  # one image below, two above
    session = open_onnx(to_onnx(model))
    for images in (batch, batch[:1]):
        maps, scores, *defective = run_onnx(session, images)
        torch.testing.assert_close(maps, expected_maps[: len(images)], atol=1e-5, rtol=0)
        torch.testing.assert_close(scores, expected_scores[: len(images)], atol=1e-5, rtol=0)
        expected = [] if model.threshold is None else [(expected_scores[: len(images)] >= model.threshold).tolist()]
        assert [decision.tolist() for decision in defective] == expected
    assert float(expected_maps.max() - expected_maps.min()) > 1e-3


@pytest.fixture(scope="module")
def model() -> ALMRR:
    with pytest.warns(UserWarning, match="random"):
        model = build(**dataclasses.asdict(SMALL)).eval()
    model.threshold = 0.5
    return model


@pytest.fixture(scope="module")
def exported(model: ALMRR) -> bytes:
    return to_onnx(model)


@pytest.fixture
def checkpoint(model: ALMRR, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.pt", model, TrainConfig(), {})
    return tmp_path / "last.pt"


def test_an_onnx_file_holds_published_operators_alone_and_names_what_goes_in_and_out(exported: bytes) -> None:
    content = onnx.load_from_string(exported)
    onnx.checker.check_model(content, full_check=True)
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    assert not content.functions
    assert {node.domain for node in content.graph.node} == {""}
    assert "Scan" in {node.op_type for node in content.graph.node}
    assert [value.name for value in content.graph.input] == [INPUT]
    assert [value.name for value in content.graph.output] == list(OUTPUTS)
    sizes = [
        dimension.dim_param or dimension.dim_value for dimension in content.graph.input[0].type.tensor_type.shape.dim
    ]
    assert sizes == ["batch", 3, 32, 32]


def test_metadata_tell_the_threshold_and_what_the_images_must_be(model: ALMRR, exported: bytes) -> None:
    told = {entry.key: entry.value for entry in onnx.load_from_string(exported).metadata_props}
    assert told == metadata(model)
    assert {name: told[name] for name in ("threshold", "image_size", "tile", "score_kernel", "backbone")} == {
        "threshold": "0.5",
        "image_size": "32",
        "tile": "",
        "score_kernel": str(SMALL.score_kernel),
        "backbone": "resnet18",
    }
    assert "weights" not in json.loads(told["model_config"])  # a path on the machine that trained


def test_a_torch_export_program_has_the_maps_of_the_network(model: ALMRR, tmp_path: Path) -> None:
    export(model, tmp_path / "model.pt2", check=True)
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    batch = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    maps, scores = model.predict(batch)
    found = program(batch)
    torch.testing.assert_close(found[0], maps, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], scores, atol=1e-5, rtol=0)
    assert found[2].tolist() == (scores >= 0.5).tolist()
    assert json.loads(extra["metadata.json"]) == metadata(model)


def photographs(folder: Path) -> Path:
    folder.mkdir()
    for i, (height, width) in enumerate([(40, 40), (32, 50), (70, 33)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("flags", [[], ["--tile", "32"]])
def test_predict_writes_the_same_with_an_onnx_file_as_with_the_checkpoint(
    checkpoint: Path, exported: bytes, tmp_path: Path, flags: list[str]
) -> None:
    images = photographs(tmp_path / "images")
    (tmp_path / "model.onnx").write_bytes(exported)
    for network in (checkpoint, tmp_path / "model.onnx"):
        arguments = ["--checkpoint", str(network), "--input", str(images), "--out", str(tmp_path / network.suffix)]
        assert predict([*arguments, "--batch-size", "2", *flags]) == 1  # for the broken file
    torch_rows, onnx_rows = (
        list(csv.DictReader((tmp_path / suffix / "scores.csv").open())) for suffix in (".pt", ".onnx")
    )
    assert len(onnx_rows) == len(torch_rows) == 4
    for ours, theirs in zip(onnx_rows, torch_rows):
        assert abs(float(ours.pop("score") or 0) - float(theirs.pop("score") or 0)) < 1e-5
        assert ours == theirs
    written = sorted(path.relative_to(tmp_path / ".pt") for path in (tmp_path / ".pt").rglob("*.*"))
    assert written == sorted(path.relative_to(tmp_path / ".onnx") for path in (tmp_path / ".onnx").rglob("*.*"))
    assert len(written) == 7
    for path in (path for path in written if path.suffix == ".tiff"):
        ours, theirs = (np.asarray(Image.open(tmp_path / suffix / path)) for suffix in (".onnx", ".pt"))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def different() -> ALMRR:
    """The model with another bias, which every place of its maps shows."""
    other = build(**dataclasses.asdict(SMALL)).eval()
    with torch.no_grad():
        other.frm.head.bias[1] += 1  # type: ignore[union-attr]
    return other


def test_check_passes_what_is_the_same_and_names_what_differs(model: ALMRR, exported: bytes) -> None:
    assert check_export(exported, ".onnx", model) <= 1e-4
    other = build(**{**dataclasses.asdict(SMALL), "score_kernel": SMALL.score_kernel - 2})
    other.threshold = 0.5
    with pytest.raises(ValueError, match="scores differ from the network's"):
        check_export(exported, ".onnx", other)
    other = different()
    with pytest.raises(ValueError, match="maps differ from the network's"):
        check_export(exported, ".onnx", other)
    other = build(**dataclasses.asdict(SMALL)).eval()
    other.threshold = 1.0
    with pytest.raises(ValueError, match="decides otherwise"):
        check_export(exported, ".onnx", other)


def test_a_failing_check_is_one_line_and_leaves_the_old_file(
    exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    out.write_text("old")
    other = different()
    save_checkpoint(tmp_path / "last.pt", other, TrainConfig(), {})
    monkeypatch.setitem(WRITERS, ".onnx", lambda model: exported)
    assert main(["--checkpoint", str(tmp_path / "last.pt"), "--out", str(out), "--check"]) == 2
    complaint = capsys.readouterr().err
    assert "maps differ" in complaint
    assert complaint.count("\n") == 1
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.onnx"]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("version", ["2.5.0", "2.7.1+cu126"])
def test_a_torch_that_is_too_old_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    suffix: str,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As from a checkout that is not installed: pip refuses such a torch."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / f"model{suffix}")]) == 2
    complaint = capsys.readouterr().err
    assert f"export needs torch 2.8 or newer, this is {version}" in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_remedy(
    checkpoint: Path,
    tmp_path: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(onnx_model.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "model.onnx"), "--check"]
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert missing in complaint
    assert 'pip install "almrr-ref[export]"' in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "cannot read it"), (b"\x08\x07nonsense", "cannot read it"), (None, "no such file")]
)
def test_what_is_no_onnx_file_is_one_line(
    content: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    arguments = ["--checkpoint", str(tmp_path / "model.onnx"), "--input", str(tmp_path), "--out", str(tmp_path / "out")]
    assert predict(arguments) == 2
    shown = capsys.readouterr().err
    assert complaint in shown
    assert shown.count("\n") == 1


def test_a_foreign_onnx_file_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "foreign.onnx").write_bytes(foreign.SerializeToString())
    with pytest.raises(ValueError, match=r"foreign.onnx: it was not written by python -m almrr_ref.export"):
        load_onnx(tmp_path / "foreign.onnx")


def test_other_file_names_and_precisions_are_refused(
    checkpoint: Path, exported: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "model.pb")]) == 2
    assert "must end in .onnx or .pt2" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_bytes(exported)
    arguments = ["--checkpoint", str(tmp_path / "model.onnx"), "--input", str(tmp_path), "--out", str(tmp_path / "out")]
    assert predict([*arguments, "--dtype", "bfloat16"]) == 2
    assert "--dtype bfloat16 needs a folded checkpoint" in capsys.readouterr().err
