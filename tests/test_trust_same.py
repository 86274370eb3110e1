"""The same answer twice: in another process, in other batches, in another order, from a copy elsewhere."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from trust_cases import SMALLEST_FLAGS, Ended, run, write_images

from almrr_ref.deploy.inference import Prediction, predict_files
from almrr_ref.run.checkpoint import load_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good/ (sizes differ), of which run/ holds a network."""
    root = tmp_path_factory.mktemp("same")
    for seed, size in enumerate((32, 45, 100)):
        write_images(root / "good" / str(size), 5, seed, size)
    assert train(root, "run", "0").code == 0
    return root


def train(root: Path, out: str, workers: str) -> Ended:
    flags = ["--data", str(root / "good"), "--out", str(root / out), *SMALLEST_FLAGS, "--steps", "12"]
    return run("train", [*flags, "--workers", workers], root / "io")


def scores(folder: Path) -> dict[str, float]:
    with (folder / "scores.csv").open(newline="") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("workers", ["0", "3"])
def test_another_process_on_a_copy_trains_the_same_weights_bit_for_bit(
    trained: Path, tmp_path: Path, workers: str
) -> None:
    """The files are created in the opposite order, so that the file system lists them in another one."""
    for file in sorted((trained / "good").rglob("*.png"), reverse=True):
        copy = tmp_path / file.relative_to(trained)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    assert train(tmp_path, "run", workers).code == 0
    a, b = (read_checkpoint(root / "run" / "last.pt") for root in (trained, tmp_path))
    assert a["threshold"] == b["threshold"]
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def test_predict_writes_the_same_bytes_twice_and_other_batches_hardly_change_a_score(
    trained: Path, tmp_path: Path
) -> None:
    base = ["--checkpoint", str(trained / "run" / "last.pt"), "--input", str(trained / "good"), "--out"]
    for name, batch in (("a", "4"), ("b", "4"), ("one", "1"), ("all", "15")):
        assert run("predict", [*base, str(tmp_path / name), "--batch-size", batch], tmp_path / "io").code == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 1 + 2 * 15
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    expected = scores(tmp_path / "a")
    assert len(set(expected.values())) > 10, "scores that hardly differ prove nothing"
    for name in ("one", "all"):
        assert scores(tmp_path / name) == pytest.approx(expected, abs=1e-6, rel=0)


def test_no_image_that_the_threshold_comes_from_is_called_defective(trained: Path, tmp_path: Path) -> None:
    """The threshold lies above the highest score by more than folding and another batch size change it."""
    flags = ["--data", str(trained / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "2"]
    assert run("train", [*flags, "--holdout", "0"], tmp_path / "io").code == 0
    base = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--input", str(trained / "good"), "--out"]
    for name, more in (("fused", []), ("one", ["--batch-size", "1"]), ("plain", ["--no-fuse"])):
        ended = run("predict", [*base, str(tmp_path / name), *more], tmp_path / "io")
        assert "15 images in" in ended.out
        assert ": 0 above the threshold" in ended.out, name


@pytest.mark.parametrize("tile", [None, 32])
def test_neither_order_nor_company_changes_a_map(trained: Path, tile: int | None) -> None:
    model = load_checkpoint(trained / "run" / "last.pt")
    object.__setattr__(model.config, "tile", tile)
    paths = sorted((trained / "good").rglob("*.png"))

    def results(some: list[Path], batch: int) -> dict[Path, torch.Tensor]:
        found = predict_files(model, some, batch)
        return {result.path: result.anomaly_map for result in found if isinstance(result, Prediction)}

    expected = results(paths, 4)
    for some, batch in ((paths[::-1], 4), (paths[::-1], 3), (paths[7:8], 8), (paths[1::2], 2)):
        found = results(some, batch)
        assert list(found) == some
        for path, anomaly_map in found.items():
            torch.testing.assert_close(anomaly_map, expected[path], atol=1e-6, rtol=0)
