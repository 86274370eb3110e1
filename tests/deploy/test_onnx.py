"""Exported files against the plain network, with every parameter away from its start."""

import csv
import dataclasses
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_network import TINY, build_random, good_images
from torch import Tensor

from almrr_ref import export
from almrr_ref.config import TrainConfig
from almrr_ref.data.roi import encode_roi
from almrr_ref.deploy import onnx as deploy_onnx
from almrr_ref.deploy.onnx import INPUT, OUTPUTS, load_onnx, metadata, open_onnx, run_onnx, to_onnx
from almrr_ref.model import ALMRR
from almrr_ref.predict import main as predict
from almrr_ref.run.checkpoint import save_checkpoint

onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra export)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra export)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra export)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROI = torch.zeros(32, 64, dtype=torch.bool)
ROI[5:25, 7:40] = True
DRAWN = ROI.roll(9, 1)  # after training, partly outside of it
NETWORKS: dict[str, dict[str, Any]] = {
    "mamba": {"blocks": (1,), "d_conv": 3, "average_directions": False, "threshold": 0.5}
    | {"backbone": "resnet50", "reduced_channels": 2000},
    "transformer": {"frm_input": "none", "backbone": "vgg19", "blocks": (2, 3), "score_fraction": 0.05}
    | {"roi_png": encode_roi(ROI), "judged_png": encode_roi(DRAWN), "brightness": 0.3},
    "cnn1x1": {"frm_input": "memory", "standardise": "position", "blocks": (1, 2, 3, 4), "patch_size": 2}
    | {"memory": 7000, "brightness": 0.6, "score_fraction": 0.005, "backbone": "efficientnet_lite0"},
}
IMAGES = good_images(3, seed=3, size=(32, 64))


def build_network(encoder: str, **changes: Any) -> ALMRR:
    return build_random(**{"encoder": encoder, "image_size": (32, 64), "depth": 1, **NETWORKS[encoder], **changes})


@functools.cache
def build_and_export(encoder: str) -> tuple[ALMRR, bytes]:
    model = build_network(encoder)
    model.outline_offset = 0.25
    if model.evidence is not None:  # all images lie above the level of good ones
        with torch.no_grad():
            levels = model.evidence.image_levels(model.evidence.border_evened(model(IMAGES / 255).evidence))
        model.evidence.level.copy_(torch.stack([levels.amin(dim=0) - 0.1, torch.full((3,), 0.1)]))
    if encoder == "cnn1x1":  # one image below the threshold, two above
        model.threshold = float(model.predict(IMAGES / 255)[1].sort().values[:2].mean())
    return model, to_onnx(model.fuse())


@pytest.fixture(scope="module")
def model() -> ALMRR:
    return build_and_export("mamba")[0]


@pytest.fixture(scope="module")
def exported() -> bytes:
    return build_and_export("mamba")[1]


def run_openvino(content: bytes, images: Tensor) -> list[Tensor]:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (the extra test)")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.from_numpy(array) for array in compiled(images.numpy()).values()]


READERS = {"onnxruntime": lambda content, images: run_onnx(open_onnx(content), images), "openvino": run_openvino}


@pytest.mark.parametrize("encoder", NETWORKS)
@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_the_file_gets_the_maps_scores_and_decisions_of_the_network(reader: str, encoder: str) -> None:
    model, content = build_and_export(encoder)
    expected_maps, expected_scores = model.predict(IMAGES / 255)
    assert float(expected_maps.max() - expected_maps.min()) > 1e-3
    for count in (3, 1):
        maps, scores, *defective = READERS[reader](content, IMAGES[:count] / 255)
        torch.testing.assert_close(maps, expected_maps[:count], atol=1e-5, rtol=0)
        torch.testing.assert_close(scores, expected_scores[:count], atol=1e-5, rtol=0)
        expected = [] if model.threshold is None else [(expected_scores[:count] >= model.threshold).tolist()]
        assert [decisions.tolist() for decisions in defective] == expected


@pytest.mark.parametrize(("when", "encoder"), [("dynamic", "mamba"), ("static", "mamba"), ("dynamic", "cnn1x1")])
def test_onnxruntime_quantises_the_file_to_8_bits(when: str, encoder: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    model, exported = build_and_export(encoder)
    out, images = tmp_path / "int8.onnx", [{INPUT: image[None].numpy()} for image in IMAGES / 255]
    if when == "dynamic":
        quantization.quantize_dynamic(onnx.load_from_string(exported), out)
    else:

        class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return images.pop() if images else None

        quantization.quantize_static(onnx.load_from_string(exported), out, Calibration())
    content = out.read_bytes()
    assert len(content) < 0.6 * len(exported)
    expected, maps = model.predict(IMAGES / 255)[0], run_onnx(open_onnx(content), IMAGES / 255)[0]
    assert 0 < float((maps - expected).abs().max()) < 0.2 * float(expected.max() - expected.min())
    assert float(torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1]) > 0.95


def save(model: ALMRR, folder: Path) -> str:
    path = folder / "last.pt"
    save_checkpoint(path, (model.config, TrainConfig()), model.state_dict(), model.threshold, {})
    return str(path)


def the_complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says on stderr, which is one line."""
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1, complaint
    return complaint


def test_an_onnx_file_of_the_mamba_network_takes_published_operators_alone_and_says_what_goes_in_and_out(
    model: ALMRR, exported: bytes, tmp_path: Path
) -> None:
    content = onnx.load_from_string(exported)
    onnx.checker.check_model(content, full_check=True)
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    assert not content.functions
    assert {node.domain for node in content.graph.node} == {""}
    assert "Scan" in {node.op_type for node in content.graph.node}
    assert [value.name for value in content.graph.input] == [INPUT]
    assert [value.name for value in content.graph.output] == list(OUTPUTS)
    shape = content.graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_param or dimension.dim_value for dimension in shape] == ["batch", 3, 32, 64]
    stored = {entry.key: entry.value for entry in content.metadata_props}
    expected = {"threshold": "0.5", "outline_offset": "0.25", "image_size": "32 64", "tile": "", "score_kernel": "9"}
    assert expected.items() <= metadata(model.fuse()).items() == stored.items()
    assert "weights" not in json.loads(stored["model_config"])  # a path on the machine that trained
    (tmp_path / "model.onnx").write_bytes(exported)
    loaded = load_onnx(tmp_path / "model.onnx", torch.device("cpu"))
    assert (loaded.threshold, loaded.outline_offset, loaded.training) == (0.5, 0.25, False)
    assert loaded.config == dataclasses.replace(model.config, weights=None)


def test_a_file_with_a_region_pools_nothing_that_no_image_changes() -> None:
    """OpenVINO refuses to load that where it computes in 16 bits."""
    region = encode_roi(torch.ones(96, 96).tril() > 0)
    network = build_network("transformer", image_size=96, blocks=(1,), roi_png=region, judged_png=None)
    graph, of_images = onnx.load_from_string(to_onnx(network.fuse())).graph, {INPUT}
    for node in graph.node:
        assert node.op_type != "AveragePool" or node.input[0] in of_images
        of_images |= set(node.output) if of_images & set(node.input) else set()


def test_predict_writes_the_same_with_an_onnx_file_as_with_the_checkpoint(
    model: ALMRR, exported: bytes, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(good_images(3, size=70)):
        Image.fromarray(pixels[:, : 40 + 10 * i].permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    (tmp_path / "model.onnx").write_bytes(exported)
    tables = []
    for network in (save(model, tmp_path), str(tmp_path / "model.onnx")):
        out = Path(network).with_suffix("")
        arguments = ["--checkpoint", network, "--input", str(tmp_path / "images"), "--out", str(out)]
        assert predict([*arguments, "--batch-size", "2"]) == 1  # for the broken file
        tables.append(list(csv.DictReader((out / "scores.csv").open())))
    assert [len(table) for table in tables] == [4, 4]
    for theirs, ours in zip(*tables):
        assert float(ours.pop("score") or 0) == pytest.approx(float(theirs.pop("score") or 0), abs=1e-5)
        assert ours == theirs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_frame_is_defective_and_the_others_of_its_batch_keep_their_scores(
    exported: bytes, value: float
) -> None:
    """Maxima, of ReLUs and of the score, may pass over a NaN."""
    session, images = open_onnx(exported), IMAGES / 255
    expected = run_onnx(session, images)
    images[1, 2, 3, 4] = torch.nan
    _, scores, defective = run_onnx(session, images)
    assert scores.isnan().tolist() == [False, True, False]
    assert bool(defective[1])
    assert torch.equal(scores[::2], expected[1][::2])


CHANGES: dict[str, dict[str, Any]] = {
    "scores differ from the network's": {"score_kernel": TINY.score_kernel - 2},
    "maps differ from the network's": {},  # and the bias that the test changes
    "decides otherwise": {"threshold": 0.0},  # every image is defective
}


@pytest.mark.parametrize("complaint", CHANGES)
def test_a_failing_check_names_what_differs_and_leaves_the_old_file(
    complaint: str, exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_network("mamba", **CHANGES[complaint])
    other.frm.head.bias.data[1] += 0 if CHANGES[complaint] else 1  # type: ignore[union-attr]
    (tmp_path / "model.onnx").write_text("old")
    monkeypatch.setattr(export, "to_onnx", lambda network: exported)
    assert export.main(["--checkpoint", save(other, tmp_path), "--out", str(tmp_path / "model.onnx"), "--check"]) == 2
    assert complaint in the_complaint(capsys)
    assert (tmp_path / "model.onnx").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.onnx"]


@pytest.mark.parametrize(
    ("suffix", "missing", "complaint"),
    [
        (".onnx", "onnxruntime", 'onnxruntime: pip install "almrr-ref[export]"'),
        (".pb", "", "must end in .onnx"),
    ],
)
def test_what_cannot_be_exported_is_one_line_with_the_remedy(
    model: ALMRR,
    suffix: str,
    missing: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(deploy_onnx.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert (
        export.main(["--checkpoint", save(model, tmp_path), "--out", str(tmp_path / f"model{suffix}"), "--check"]) == 2
    )
    assert complaint in the_complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("empty", "cannot read it"),
        ("none", "no such file"),
        ("foreign", "it was not written by"),
        ("odd", "model_config is damaged"),
        ("other", "with score_margin=12"),
        ("old", "lacks 'outline_offset': another version exported it"),
        ("ours", "--dtype"),
    ],
)
def test_what_predict_cannot_do_with_a_file_is_one_line(
    kind: str, complaint: str, exported: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, odd = onnx.load_from_string(exported), onnx.load_from_string(exported)
    del foreign.metadata_props[:]
    next(entry for entry in odd.metadata_props if entry.key == "model_config").value = "5"
    other, old = onnx.load_from_string(exported), onnx.load_from_string(exported)
    next(entry for entry in other.metadata_props if entry.key == "model_config").value = '{"score_margin": 12}'
    next(entry for entry in old.metadata_props if entry.key == "outline_offset").key = "offset"
    made = {"foreign": foreign, "odd": odd, "other": other, "old": old}
    contents = {kind: network.SerializeToString() for kind, network in made.items()}
    contents |= {"empty": b"", "ours": exported}
    if kind in contents:
        (tmp_path / "model.onnx").write_bytes(contents[kind])
    arguments = ["--checkpoint", str(tmp_path / "model.onnx"), "--input", str(tmp_path), "--out", str(tmp_path / "out")]
    assert predict([*arguments, *(["--dtype", "bfloat16"] if kind == "ours" else [])]) == 2
    assert complaint in the_complaint(capsys)


@pytest.mark.parametrize(("message", "expected"), [("Failed to allocate memory", MemoryError), ("", RuntimeError)])
def test_an_error_of_onnxruntime_is_of_a_class_that_serve_and_the_commands_expect(
    message: str, expected: type[Exception]
) -> None:
    class Failing:
        def run(self, *_: object) -> None:
            raise Exception(message)  # as onnxruntime's Fail, which derives from nothing else

    with pytest.raises(expected):
        run_onnx(Failing(), IMAGES / 255)
