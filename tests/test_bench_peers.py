"""The peers of bench/peers.py against NumPy, SciPy and scikit-learn, and the command on a tiny data set."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.images import load_image, load_mask
from almrr_ref.data.layouts import find_dataset
from almrr_ref.evaluate import main as evaluate
from almrr_ref.features import FeatureExtractor
from almrr_ref.metrics import METRICS
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import save_checkpoint

BENCH = Path(__file__).resolve().parent.parent / "bench"
SIZE = 64


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """bench/peers.py as a module, with peer_methods beside it."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_peers", BENCH / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["bench_peers"]


@pytest.fixture(scope="module")
def methods(peers: ModuleType) -> ModuleType:
    return sys.modules["peer_methods"]


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    with pytest.warns(UserWarning, match="random weights"):
        return FeatureExtractor("resnet18", (1, 2, 3), "random", SIZE // 4)


def some_images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def plain_k_center(points: np.ndarray, count: int, first: int) -> list[int]:
    chosen = [first]
    nearest = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def finished(grid: np.ndarray) -> np.ndarray:
    """Distances (h, w) -> the map: enlarged by PyTorch, smoothed by SciPy."""
    large = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    return ndimage.gaussian_filter(large[0, 0].numpy(), 4.0)


@pytest.mark.parametrize("candidates", [1, 7, 100, 5000])
def test_k_center_is_the_plain_greedy_selection(
    methods: ModuleType, monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    points = np.random.default_rng(0).normal(size=(1100, 9)) * np.logspace(0, -2, 9) + 5
    monkeypatch.setattr("almrr_ref.plus.memory.CANDIDATES", candidates)
    found = methods.k_center(torch.from_numpy(points), 150, 17)
    assert found.tolist() == plain_k_center(points, 150, 17)


def test_k_center_takes_every_point_once_even_if_all_are_equal(methods: ModuleType) -> None:
    assert sorted(methods.k_center(torch.ones(12, 3), 12, 4).tolist()) == list(range(12))


def test_patchcore_measures_the_distance_to_the_nearest_stored_patch(
    methods: ModuleType, extractor: FeatureExtractor
) -> None:
    good, test = some_images(4, 0), some_images(2, 1)
    predict = methods.fit_patchcore(extractor, good.split(3), seed=3, share=1.0)
    maps, scores = predict(test)
    assert maps.shape == (2, 1, SIZE, SIZE)

    def patches(images: Tensor) -> np.ndarray:
        second, third = (ndimage.uniform_filter(s.numpy(), (0, 0, 3, 3), mode="constant") for s in stages(images)[1:])
        third = F.interpolate(torch.from_numpy(third), (SIZE // 8, SIZE // 8), mode="bilinear").numpy()
        return np.concatenate([second, third], axis=1).transpose(0, 2, 3, 1).astype(np.float64)

    stages: Callable[[Tensor], list[Tensor]] = extractor.stages
    bank, queries = patches(good).reshape(-1, 384), patches(test)
    neighbours = NearestNeighbors(n_neighbors=1).fit(bank)
    for image, anomaly_map, score in zip(queries, maps[:, 0], scores, strict=True):
        expected = neighbours.kneighbors(image.reshape(-1, 384))[0].reshape(SIZE // 8, SIZE // 8)
        np.testing.assert_allclose(float(score), expected.max(), rtol=1e-4)
        np.testing.assert_allclose(anomaly_map.numpy(), finished(expected), rtol=1e-4)


def test_patchcore_keeps_the_share_that_covers_the_projected_patches(
    methods: ModuleType, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = some_images(3, 0)
    seen: list[tuple[Tensor, int]] = []
    k_center = methods.k_center

    def spy(points: Tensor, count: int, first: int) -> Tensor:
        seen.append((points, count))
        chosen: Tensor = k_center(points, count, first)
        return chosen

    monkeypatch.setattr(methods, "k_center", spy)
    _, scores = methods.fit_patchcore(extractor, [good], seed=0, share=0.1)(good)
    [(points, count)] = seen
    assert points.shape == (3 * 64, 128)
    assert count == 19
    assert scores.min() > 0  # patches of the training images themselves are left out of the bank
    other = methods.fit_patchcore(extractor, [good], seed=1, share=0.1)(good)[1]
    same = methods.fit_patchcore(extractor, [good], seed=0, share=0.1)(good)[1]
    assert torch.equal(scores, same)
    assert not torch.equal(scores, other)


def test_nearest_distance_crosses_the_parts_of_the_bank(methods: ModuleType) -> None:
    bank = torch.zeros(16384 + 3, 2)
    bank[-1] = torch.tensor([3.0, 4.0])
    found = methods.nearest_distance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), bank)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("count", "drawn"), [(7, 100), (12, 5)], ids=["0.01 I decides", "the covariance decides"])
def test_padim_is_the_mahalanobis_distance_of_scipy(
    methods: ModuleType, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch, count: int, drawn: int
) -> None:
    assert methods.DRAWN == 100
    monkeypatch.setattr(methods, "DRAWN", drawn)
    good, test = some_images(count, 0), some_images(2, 1)
    maps, scores = methods.fit_padim(extractor, good.split(5), seed=5)(test)

    channels = torch.randperm(448, generator=torch.Generator().manual_seed(5))[:drawn].tolist()

    def features(images: Tensor) -> np.ndarray:
        parts = [stage.numpy().repeat(k, 2).repeat(k, 3) for stage, k in zip(extractor.stages(images), (1, 2, 4))]
        return np.concatenate(parts, axis=1)[:, channels].astype(np.float64)

    train, queries = features(good), features(test)
    grid = np.empty((2, SIZE // 4, SIZE // 4))
    for y, x in np.ndindex(SIZE // 4, SIZE // 4):
        fitted = EmpiricalCovariance().fit(train[:, :, y, x])  # divides by n
        precision = np.linalg.inv(fitted.covariance_ * count / (count - 1) + 0.01 * np.eye(drawn))
        for i in range(2):
            grid[i, y, x] = mahalanobis(queries[i, :, y, x], fitted.location_, precision)
    for i in range(2):
        np.testing.assert_allclose(maps[i, 0].numpy(), finished(grid[i]), rtol=1e-4)
    assert torch.equal(scores, maps.amax((1, 2, 3)))


def test_padim_refuses_a_single_image(methods: ModuleType, extractor: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="at least 2 good images"):
        methods.fit_padim(extractor, [some_images(1, 0)], seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVTec's layout: noise, bright spots that are easy to find and dark lines."""
    root = tmp_path_factory.mktemp("peers") / "noise"
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 5), ("test/good", 3), ("test/spot", 3), ("test/line", 2)):
        (root / folder).mkdir(parents=True)
        kind = folder.rsplit("/", 1)[1]
        for i in range(count):
            image, mask = generator.normal(128, 8, (SIZE, SIZE)), np.zeros((SIZE, SIZE), dtype=bool)
            y, x = generator.integers(8, SIZE - 20, 2)
            if kind == "spot":
                mask[y : y + 12, x : x + 12] = True
            elif kind == "line":
                mask[y : y + 4] = True
            image[mask] += 100 if kind == "spot" else -20
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / folder / f"{i}.png")
            if kind != "good":
                (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(root / "ground_truth" / kind / f"{i}_mask.png")
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Untrained networks as training leaves them, in the folders net-0 and net-1."""
    paths = []
    for seed in (0, 1):
        config = ModelConfig(
            backbone="resnet18", weights="random", image_size=SIZE, d_model=8, depth=1, reduced_channels=8, frm_width=4
        )
        with pytest.warns(UserWarning, match="random weights"):
            model = ALMRR(config, seed=seed).eval()
        model.threshold = 0.5
        paths.append(tmp_path_factory.mktemp("runs") / f"net-{seed}" / "last.pt")
        save_checkpoint(paths[-1], model, TrainConfig(), {})
    return paths


def run(peers: ModuleType, *arguments: object) -> int:
    with pytest.warns(UserWarning, match="random weights"):
        code: int = peers.main([*map(str, arguments)])
    return code


def test_the_command_prints_a_row_for_each_method_and_selection(
    peers: ModuleType, data: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "deep" / "peers.json"
    code = run(
        peers, "--data", data, "--weights", "random", "--image-size", SIZE, "--coreset", 0.2, "--seeds", 0, 1,
        "--checkpoint", *checkpoints, "--without", "line", "--json", report, "--out", tmp_path / "scores",
    )  # fmt: skip
    assert code == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, *body = [[cell.strip() for cell in line] for line in lines]
    assert head[:3] == ["method", "defects", "image auroc"]
    names = ["PatchCore 20%", "PaDiM", "net"]
    groups = ["all", "without line", "only line", "only spot"]
    assert [row[:2] for row in body] == [[name, group] for group in groups for name in names]

    rows = json.loads(report.read_text())["rows"]
    assert {name: len(runs) for name, runs in rows.items()} == dict.fromkeys(names, 2)
    for name, row in zip(names, body, strict=False):
        for metric, cell in zip(METRICS, row[2:], strict=False):
            first, second = (100 * run[metric] for run in rows[name])
            mean, deviation = (float(part) for part in cell.split("±"))
            assert mean == pytest.approx((first + second) / 2, abs=0.0051)
            assert deviation == pytest.approx(abs(first - second) / math.sqrt(2), abs=0.0051)
        # without the lines, only the spots are left; per type, the thresholds of the lines' pixels split the same sums
        for part in rows[name]:
            spots = {m: part["per_type"]["spot"][m] for m in METRICS}
            assert {m: part["without"]["line"][m] for m in METRICS} == pytest.approx(spots, rel=1e-12)
    assert rows["PaDiM"][0]["per_type"]["spot"]["image_auroc"] == 1
    assert len((tmp_path / "scores" / "PaDiM 2.csv").read_text().splitlines()) == 9


def test_a_checkpoint_has_the_figures_of_evaluate(
    peers: ModuleType, data: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    assert evaluate(["--checkpoint", str(checkpoints[0]), "--data", str(data), "--out", str(tmp_path)]) == 0
    expected = json.loads((tmp_path / "metrics.json").read_text())
    report = tmp_path / "peers.json"
    arguments = ["--data", data, "--image-size", SIZE, "--methods", "--checkpoint", checkpoints[0], "--json", report]
    assert peers.main([*map(str, arguments)]) == 0
    [found] = json.loads(report.read_text())["rows"]["net-0"]
    assert {m: found[m] for m in METRICS} == {m: expected[m] for m in METRICS}
    assert found["per_type"] == expected["per_type"]


def test_what_cannot_be_read_is_named_and_left_out(
    peers: ModuleType, data: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "noise"
    for path in data.rglob("*.png"):
        target = broken / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (broken / "test/good/0.png").write_bytes(b"nothing")
    (broken / "ground_truth/spot/1_mask.png").write_bytes(b"nothing")
    report = tmp_path / "peers.json"
    arguments = ["--data", broken, "--image-size", SIZE, "--methods", "--checkpoint", checkpoints[0], "--json", report]
    assert peers.main([*map(str, arguments)]) == 1
    errors = capsys.readouterr().err
    assert "good/0.png" in errors
    assert "spot/1.png" in errors
    content = json.loads(report.read_text())
    assert len(content["unreadable"]) == 2
    assert content["rows"]["net-0"][0]["counts"]["images"] == 6
    test = peers.load_test(find_dataset(broken).test, SIZE)
    for image, mask, sample in zip(test.images, test.masks, test.samples, strict=True):
        assert torch.equal(image, load_image(sample.path, SIZE))
        assert (mask is None) == (sample.mask_path is None)
        assert mask is None or torch.equal(mask, load_mask(sample.mask_path, SIZE))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--without", "dent"], "the defect types here are line, spot"),
        (["--coreset", "0"], "a share above 0"),
        (["--coreset", "nan"], "a share above 0"),
        (["--methods"], "nothing to compare"),
        (["--checkpoint", "missing/last.pt"], "there is no such checkpoint"),
        (["--backbone", "resnet19", "--weights", "random"], "unknown backbone"),
        (["--checkpoint", "NET", "--image-size", "128"], "was trained on images of 64 pixels"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    peers: ModuleType,
    data: Path,
    checkpoints: list[Path],
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(checkpoints[0]) if word == "NET" else word for word in arguments]
    sized = [] if "--image-size" in given else ["--image-size", str(SIZE)]
    try:
        code = peers.main(["--data", str(data), *sized, *given])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert complaint in capsys.readouterr().err
