"""The peers of bench/peers.py against NumPy, SciPy and scikit-learn, and the command on a tiny data set."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peer_methods
import peers
import pytest
import torch
import torch.nn.functional as F
from peer_methods import Predict
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.roi import encode_roi
from almrr_ref.features import FeatureExtractor
from almrr_ref.metrics import METRICS
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import save_checkpoint

SIZE = 64


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    with pytest.warns(UserWarning, match="random weights"):
        return FeatureExtractor("resnet18", (1, 2, 3), "random", (SIZE // 4, SIZE // 4))


def some_images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def finished(grid: np.ndarray) -> np.ndarray:
    """Distances (h, w) -> the map: enlarged by PyTorch, smoothed by SciPy."""
    large = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    return ndimage.gaussian_filter(large[0, 0].numpy(), 4.0)


def test_patchcore_measures_the_distance_to_the_nearest_stored_patch(extractor: FeatureExtractor) -> None:
    good, test = some_images(4, 0), some_images(2, 1)
    maps, scores = peer_methods.fit_patchcore(extractor, good.split(3), seed=3, fraction=1.0)(test)

    def patches(images: Tensor) -> np.ndarray:
        stages = extractor.stages(images)[1:]
        second, third = (ndimage.uniform_filter(s.numpy(), (0, 0, 3, 3), mode="constant") for s in stages)
        third = F.interpolate(torch.from_numpy(third), (SIZE // 8, SIZE // 8), mode="bilinear").numpy()
        return np.concatenate([second, third], axis=1).transpose(0, 2, 3, 1).astype(np.float64)

    neighbours = NearestNeighbors(n_neighbors=1).fit(patches(good).reshape(-1, 384))
    for image, anomaly_map, score in zip(patches(test), maps[:, 0], scores, strict=True):
        expected = neighbours.kneighbors(image.reshape(-1, 384))[0].reshape(SIZE // 8, SIZE // 8)
        np.testing.assert_allclose(float(score), expected.max(), rtol=1e-4)
        np.testing.assert_allclose(anomaly_map.numpy(), finished(expected), rtol=1e-4)


@pytest.mark.parametrize("many", [1000, 400])
@pytest.mark.parametrize(("count", "drawn"), [(7, 100), (12, 5)], ids=["0.01 I decides", "the covariance decides"])
def test_padim_is_the_mahalanobis_distance_of_scipy(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch, count: int, drawn: int, many: int
) -> None:
    with pytest.raises(ValueError, match="at least 2 good images"):
        peer_methods.fit_padim(extractor, [some_images(1, 0)], seed=0)
    monkeypatch.setattr(peer_methods, "MANY", many)
    monkeypatch.setattr(peer_methods, "DRAWN_OF_MANY" if many < sum(extractor.channels) else "DRAWN", drawn)
    good, test = some_images(count, 0), some_images(2, 1)
    maps, scores = peer_methods.fit_padim(extractor, good.split(5), seed=5)(test)
    assert torch.equal(scores, maps.amax((1, 2, 3)))
    channels = torch.randperm(448, generator=torch.Generator().manual_seed(5))[:drawn].tolist()

    def features(images: Tensor) -> np.ndarray:
        stages = [stage.numpy().repeat(k, 2).repeat(k, 3) for stage, k in zip(extractor.stages(images), (1, 2, 4))]
        return np.concatenate(stages, axis=1)[:, channels].astype(np.float64)

    train, queries = features(good), features(test)
    grid = np.empty((2, SIZE // 4, SIZE // 4))
    for y, x in np.ndindex(grid.shape[1:]):
        fitted = EmpiricalCovariance().fit(train[:, :, y, x])  # divides by n
        precision = np.linalg.inv(fitted.covariance_ * count / (count - 1) + 0.01 * np.eye(drawn))
        grid[:, y, x] = [mahalanobis(query, fitted.location_, precision) for query in queries[:, :, y, x]]
    for distances, anomaly_map in zip(grid, maps[:, 0].numpy()):
        np.testing.assert_allclose(anomaly_map, finished(distances), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_the_command_prints_a_row_for_each_method_and_selection(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(backbone="resnet18", weights="random", image_size=SIZE, d_model=8, depth=1, frm_width=4)
    checkpoints = [tmp_path / f"net-{seed}" / "last.pt" for seed in (0, 1)]
    for seed, path in enumerate(checkpoints):
        save_checkpoint(path, (config, TrainConfig()), ALMRR(config, seed=seed).state_dict(), None, {})
    flags = ["--data", grid, "--weights", "random", "--image-size", SIZE, "--coreset", 0.2, "--seeds", 0, 1]
    flags += ["--without", "scratch", "--json", report := tmp_path / "new" / "peers.json", "--checkpoint", *checkpoints]
    assert peers.main([*map(str, flags)]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    _, *body = [[cell.strip() for cell in line] for line in lines]
    names, groups = ["PatchCore 20%", "PaDiM", "net"], ["all", "without scratch", "only scratch", "only stain"]
    assert [row[:2] for row in body] == [[name, group] for group in groups for name in names]
    rows = json.loads(report.read_text())["rows"]
    assert {name: len(runs) for name, runs in rows.items()} == dict.fromkeys(names, 2)
    for name, row in zip(names, body, strict=False):
        for metric, cell in zip(METRICS, row[2:], strict=False):
            first, second = (100 * run[metric] for run in rows[name])
            mean, deviation = (float(text) for text in cell.split("±"))
            assert mean == pytest.approx((first + second) / 2, abs=0.0051)
            assert deviation == pytest.approx(abs(first - second) / math.sqrt(2), abs=0.0051)
        for metrics in rows[name]:  # without the scratch, only the stain is left
            stain = {m: metrics["per_type"]["stain"][m] for m in METRICS}
            assert {m: metrics["without"]["scratch"][m] for m in METRICS} == pytest.approx(stain, rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_pictures_of_12_bits_are_as_bright_as_the_network_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for number, folder in enumerate(("train/good", "train/good", "test/good", "test/spot")):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(3000, 4096, (SIZE, SIZE), dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{number}.png")
    seen: list[Tensor] = []

    def fit(extractor: object, batches: Iterable[Tensor], seed: int) -> Predict:
        seen.extend(batches)
        return lambda images: (seen.append(images), images[:, :1], images.amax((1, 2, 3)))[1:]

    monkeypatch.setattr(peers, "fit_padim", fit)
    flags = ["--data", str(tmp_path / "data"), "--weights", "random", "--image-size", str(SIZE), "--methods", "padim"]
    assert peers.main(flags) == 0
    assert all(images.mean() > 0.8 for images in seen)
    assert len(seen) > 1


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    ("changes", "complaint"), [({"roi": True}, "judges a region alone"), ({"bits": 12}, r"judges Levels\(bits=12")]
)
def test_a_checkpoint_that_sees_other_images_is_no_row(
    grid: Path, changes: dict[str, Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "roi" in changes:
        changes = {"roi_png": encode_roi(torch.ones(SIZE, SIZE, dtype=torch.bool).triu())}
    path, config = tmp_path / "last.pt", ModelConfig(backbone="resnet18", image_size=SIZE, weights="random", **changes)
    model = ALMRR(config)
    save_checkpoint(path, (config, TrainConfig()), model.state_dict(), None, {})
    flags = ["--data", grid, "--weights", "random", "--image-size", SIZE, "--methods", "--checkpoint", path]
    assert peers.main([*map(str, flags)]) == 2
    assert re.search(complaint, capsys.readouterr().err)
