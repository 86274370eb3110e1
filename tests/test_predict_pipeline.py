"""Predictions in a stream: work runs ahead, results keep their order, an error comes out, nothing starts after it."""

import csv
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trust_cases import SMALLEST, write_images

from almrr_ref import predict
from almrr_ref.config import PRESETS, make_configs
from almrr_ref.deploy.inference import THREADS, mapped_ahead
from almrr_ref.model import ALMRR
from almrr_ref.run.files import OutputError, output_error

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


def test_results_keep_the_order_of_the_items_though_a_later_one_is_done_first() -> None:
    """The first item waits for the second: it would wait for ever if they did not run side by side."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(60)
        if item == 1:
            second_done.set()
        return item

    assert list(mapped_ahead(work, range(50), ahead=4)) == list(range(50))


def test_items_are_taken_at_most_so_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for result in mapped_ahead(lambda item: item, items(), ahead=5):
        assert len(taken) <= result + 5
    assert len(taken) == 100


@pytest.mark.parametrize("ahead", [1, THREADS, 4 * THREADS])
def test_an_error_comes_out_in_place_of_its_result_and_ends_everything(ahead: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 7:
            raise KeyError(item)
        return item

    before = threading.active_count()
    with pytest.raises(KeyError, match="7"):
        list(mapped_ahead(work, range(1000), ahead))
    assert len(begun) <= 7 + ahead
    assert threading.active_count() == before


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ALMRR:
    monkeypatch.setitem(PRESETS, "small", {**PRESETS["small"], **SMALLEST})
    given: dict[str, Any] = {"backbone": "resnet18", "weights": "random", "blocks": (1,), "image_size": 32}
    network = ALMRR(make_configs("small", given)[0]).eval()
    network.threshold = 0.5
    return network


def test_a_writer_that_fails_ends_the_run_with_its_error_and_the_rows_before_it(
    model: ALMRR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "in", 60)
    honest = predict.save_map

    def failing(path: Path, prediction: Any) -> None:
        if prediction.path.name == "011.png":
            raise output_error(OSError(28, "No space left on device"), path)
        honest(path, prediction)

    monkeypatch.setattr(predict, "save_map", failing)
    with pytest.raises(OutputError, match=r"011.png.tiff': the disk is full"):
        predict.predict(model, tmp_path / "in", tmp_path / "out", batch_size=4, overlays=False)
    with (tmp_path / "out" / "scores.csv.part").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [f"{i:03}.png" for i in range(11)]
    assert not (tmp_path / "out" / "scores.csv").exists()
    maps = {path.name for path in (tmp_path / "out" / "maps").iterdir()}
    assert {f"{i:03}.png.tiff" for i in range(11)} <= maps
    assert len(maps) < 40


def test_every_row_stands_beside_its_own_map(model: ALMRR, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 30)
    predict.predict(model, tmp_path / "in", tmp_path / "out", batch_size=4)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{i:03}.png" for i in range(30)]
    for row in rows:
        with Image.open(tmp_path / "out" / "maps" / f"{row['path']}.tiff") as stored:
            width, height = stored.size
            anomaly_map = torch.frombuffer(bytearray(stored.tobytes()), dtype=torch.float32).view(1, 1, height, width)
        assert float(model.image_scores(anomaly_map)[0]) == pytest.approx(float(row["score"]), abs=1e-6)
