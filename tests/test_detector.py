"""One path from a picture to a verdict: every route gives the same score, map and verdict, or the same refusal."""

import csv
import dataclasses
import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import TINY, build_random
from torch import Tensor
from trust_cases import fork_server

from almrr_ref import Detector, load_checkpoint, predict
from almrr_ref.config import TrainConfig
from almrr_ref.deploy.onnx import to_onnx
from almrr_ref.deploy.predictor import Predictor
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import save_checkpoint

SMALL: dict[str, Any] = {"image_size": 32, "blocks": (1,), "encoder": "cnn1x1", "frm_input": "none"}
SMALL |= {"score_fraction": 0.005}
TILES = (None, 48)


@pytest.fixture(scope="module")
def models() -> dict[int | None, ALMRR]:
    """A network that sees whole images, and one that sees tiles."""
    return {tile: build_random(**SMALL, tile=tile) for tile in TILES}


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of changing strength, uint8 (height, width, 3): scores differ from picture to picture."""
    rng = np.random.default_rng(seed)
    return rng.integers(100 - 25 * (seed % 4), 140 + 25 * (seed % 4), (height, width, 3)).astype(np.uint8)


def save(model: ALMRR, path: Path) -> Path:
    save_checkpoint(path, (model.config, TrainConfig()), dict(model.state_dict()), model.threshold, {})
    return path


@pytest.fixture(scope="module")
def exported(models: dict[int | None, ALMRR]) -> dict[int | None, bytes]:
    """Both as ONNX files; what they compute on their input is the same, so one is written and its config exchanged."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra export)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra export)")
    content = onnx.load_model_from_string(to_onnx(models[None].fuse()))
    files: dict[int | None, bytes] = {}
    for tile, model in models.items():
        for entry in content.metadata_props:
            if entry.key == "model_config":
                entry.value = json.dumps({**dataclasses.asdict(model.config), "weights": None})
        files[tile] = content.SerializeToString()
    return files


@pytest.fixture(params=["drawn", "real"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Pictures in a folder of their own, which hold what 8 bits can."""
    if request.param == "real":
        source = request.getfixturevalue("shared_dir") / "data" / "mt_defect"
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(source.rglob("*.jpg"))[:600:150]]
        pictures = [picture[:120, :150] for picture in pictures]
    else:
        pictures = [drawn(50 + 20 * i, 90 - 10 * i, i) for i in range(4)]
    (tmp_path / "in").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / f"{i}.png")
    return sorted((tmp_path / "in").iterdir())


@pytest.mark.parametrize("tile", TILES)
def test_every_route_gives_the_same_score_and_verdict(
    models: dict[int | None, ALMRR],
    exported: dict[int | None, bytes],
    files: list[Path],
    tmp_path: Path,
    tile: int | None,
) -> None:
    """Path, bytes, Pillow, array, tensor, batch, model.predict, command and ONNX; two of four are called defective."""
    model, arrays = models[tile], [np.asarray(Image.open(path)) for path in files]
    tensors = [torch.from_numpy(array.transpose(2, 0, 1) / np.float32(255)) for array in arrays]
    in_order = sorted(float(model.predict(tensor[None])[1]) for tensor in tensors)
    assert in_order[2] - in_order[1] > 1e-4, "scores that hardly differ prove nothing"
    threshold = (in_order[1] + in_order[2]) / 2
    last = save(model, tmp_path / "last.pt")
    detector = Detector.load(last, threshold=threshold)
    routes = {
        "path": [detector(path) for path in files],
        "text": [detector(str(path)) for path in files],
        "bytes": [detector(path.read_bytes()) for path in files],
        "Pillow": [detector(Image.open(path)) for path in files],
        "array": [detector(array) for array in arrays],
        "tensor": [detector(tensor) for tensor in tensors],
        "batch": detector.batch(arrays),
    }
    for name, results in routes.items():
        scores = [result.score for result in results]
        assert scores == pytest.approx([result.score for result in routes["path"]], abs=1e-6, rel=0), name
        assert sum(result.defective is True for result in results) == 2, name
        assert [result.anomaly_map.shape for result in results] == [array.shape[:2] for array in arrays], name
    assert predict.main([
        "--checkpoint", str(last), "--input", str(files[0].parent), "--out", str(tmp_path / "out"),
        "--threshold", str(threshold), "--no-overlays",
    ]) == 0  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    expected = [result.score for result in routes["path"]]
    assert [float(row["score"]) for row in rows] == pytest.approx(expected, abs=1e-6, rel=0)
    assert [row["label"] == "1" for row in rows] == [result.defective for result in routes["path"]]
    (tmp_path / "model.onnx").write_bytes(exported[tile])
    with_onnx = pickle.loads(pickle.dumps(Detector.load(tmp_path / "model.onnx", "cpu", threshold)))
    for result, through_onnx in zip(routes["path"], with_onnx.batch(files)):
        assert through_onnx.score == pytest.approx(result.score, abs=1e-5)
        assert through_onnx.defective == result.defective
    loaded = load_checkpoint(last)
    for result, tensor in zip(routes["path"], tensors):
        maps, scores = loaded.predict(tensor[None])
        assert float(scores) == pytest.approx(result.score, abs=1e-5)  # folding changes the last digits
        torch.testing.assert_close(maps[0], result.network_map, atol=1e-5, rtol=0)
        maps, scores = detector.model.predict(tensor[None])
        assert float(scores) == pytest.approx(result.score, abs=1e-6)
        assert torch.equal(maps[0], result.network_map)


class Given(Predictor):
    """A form of the network whose map is given: smoothing off, the score the mean of the highest 20 pixels."""

    def __init__(self, anomaly_map: Tensor, threshold: float | None = 0.5, **changes: Any) -> None:
        sizes = {"score_kernel": 1, "score_fraction": 0.005}
        super().__init__(dataclasses.replace(TINY, **{**sizes, **changes}), threshold)
        self.anomaly_map = anomaly_map

    def maps(self, images: Tensor) -> Tensor:
        return self.anomaly_map.expand(len(images), 1, 64, 64)


def test_regions_are_in_pixels_of_the_picture_the_largest_first_also_in_a_corner() -> None:
    anomaly_map = torch.zeros(64, 64)
    anomaly_map[62:, 61:] = 1.0  # too few pixels for the score
    anomaly_map[40, 50] = 0.49
    detector = Detector(Given(anomaly_map))
    good = detector(drawn(64, 64))
    assert (good.defective, good.regions, good.box, good.area) == (False, [], None, 0)
    anomaly_map[30, 20:28], anomaly_map[31, 28] = 0.5, 0.8  # joined by a corner
    result = detector(drawn(3 * 64, 2 * 64))
    assert result.defective
    assert [region.box for region in result.regions] == [(40, 90, 58, 96), (122, 186, 128, 192)]
    assert [region.area for region in result.regions] == [54, 36]
    assert [region.peak for region in result.regions] == pytest.approx([0.8, 1.0])
    assert [region.mean for region in result.regions] == pytest.approx([(8 * 0.5 + 0.8) / 9, 1.0])
    assert (result.box, result.area, int(result.mask.sum())) == ((40, 90, 128, 192), 90, 15)
    assert result.anomaly_map.shape == (192, 128)
    assert result.anomaly_map.dtype == np.float32
    assert Detector(Given(anomaly_map, None))(drawn(9, 9)).defective is None
    assert Detector(Given(anomaly_map, None), threshold=0.1)(drawn(9, 9)).defective
    html = result._repr_html_()
    assert html.startswith('<figure><img src="data:image/png;base64,')
    assert "defective, score 0." in html


def test_a_score_that_is_no_number_is_no_good() -> None:
    detector = Detector(Given(torch.full((64, 64), torch.nan)))
    with pytest.raises(ValueError, match="picture: its score is nan"):
        detector(drawn(9, 9))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (600, 24), (24, 24), (25, 600)])
def test_every_size_has_a_finite_score(
    models: dict[int | None, ALMRR], shape: tuple[int, int], tile: int | None
) -> None:
    """Though a tiled map may have fewer pixels than the score is the mean of."""
    result = Detector(models[tile], threshold=0.0)(drawn(*shape))
    assert 0 < result.score < 1
    assert result.anomaly_map.shape == shape
    assert result.regions
    assert result.overlay().width > 200


def test_what_is_no_picture_is_refused_by_name(models: dict[int | None, ALMRR], tmp_path: Path) -> None:
    model, detector = models[None], Detector(models[None])
    nan, image = torch.full((1, 3, 40, 40), 0.5), torch.full((1, 3, 40, 40), 0.5)
    nan[0, 1, 2, 3] = torch.nan
    wrong = {
        "got values from nan": nan, "got values from inf": image / 0,
        "divide them by 255": image * 255, "neither normalised": image - 1, "torch.uint8": image.byte(),
        "got torch.float32 \\(0, 3": image[:0], "got torch.float32 \\(3, 40, 40": image[0],
    }  # fmt: skip
    for complaint, images in wrong.items():
        with pytest.raises(ValueError, match=f"^images must .*{complaint}"):
            model.predict(images)
    for picture in (nan[0], image[0] * 255, image[0, 0].int(), np.zeros((4, 4)), b"no image", tmp_path / "absent.png"):
        with pytest.raises(ValueError, match=r"^(picture|.*absent\.png): "):
            detector(picture)
    with pytest.raises(ValueError, match=r"^pictures\[1\]: "):
        detector.batch([image[0], nan[0]])
    with pytest.raises(ValueError, match="pictures is empty"):
        detector.batch([])
    with pytest.raises(ValueError, match="int holds no pictures; give a list"):
        detector.batch(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--tile 48: this network was trained on whole images"):
        Detector(model, tile=48)
    with pytest.raises(ValueError, match="--tile must be at least 32, got 1"):
        Detector(build_random(tile=32), tile=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Detector(model, batch_size=0)
    for threshold in (float("nan"), "0.5", [0.5]):
        with pytest.raises(ValueError, match=r"a threshold lies within 0 and 1, as scores do; got ['[n]"):
            Detector(model, threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size must be at least 1 and whole, got 2\.5"):
        Detector(model, batch_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model is a str: expected a network; Detector\.load takes a file"):
        Detector("last.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this is one picture; call the detector with it, or give a list"):
        Detector(model).batch("good.png")


def test_threads_and_processes_give_the_same_results() -> None:
    """Eight threads at once; two processes forked after PyTorch has started its threads; two that get it pickled."""
    pictures = [drawn(40 + i, 60, i) for i in range(8)]
    detector = Detector(build_random(**{**SMALL, "image_size": 128}).fuse())  # large enough for threads of PyTorch
    with ThreadPoolExecutor(8) as pool:  # first: packing the weights is part of it
        results = [list(pool.map(detector, pictures))]
    expected = [detector(picture).score for picture in pictures]
    for context in (multiprocessing.get_context("fork"), fork_server()):  # the latter as spawn does, but faster
        torch.set_num_threads(2)
        try:
            detector(pictures[0])
            with context.Pool(2) as processes:
                results.append(processes.map_async(detector, pictures, 4).get(timeout=60))
        finally:
            torch.set_num_threads(1)
    for scores in ([result.score for result in each] for each in results):
        assert scores == pytest.approx(expected, abs=1e-6)


def test_a_forked_process_opens_an_onnx_session_of_its_own_and_does_not_wait_for_the_old_one(
    exported: dict[int | None, bytes], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(exported[None])
    torch.set_num_threads(2)  # onnxruntime starts as many
    try:
        detector, picture = Detector.load(tmp_path / "model.onnx", "cpu"), drawn(40, 60)
        score = detector(picture).score
        processes = [
            multiprocessing.get_context("fork").Process(target=_assert_score, args=(detector, picture, score))
            for _ in range(4)  # some of them would wait
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * 4
    finally:
        torch.set_num_threads(1)


def _assert_score(detector: Detector, picture: np.ndarray, score: float) -> None:
    assert detector(picture).score == pytest.approx(score, abs=1e-6)
