"""The tables that evaluate and predict leave behind: scores.csv and metrics.json."""

import csv
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from almrr_ref.metrics import anomaly_metrics
from almrr_ref.report.scores import (
    ScoresWriter,
    defect_region,
    write_metrics,
)
from almrr_ref.run.files import OutputError


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def limited_size(limit: int) -> None:
    """Let this process write no file beyond `limit` bytes: a small disk that needs no privileges."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_scores_stay_whole_and_go_on_when_the_disk_fills_up(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with ScoresWriter(tmp_path / "scores.csv") as writer:
        writer.write("a.png", 0.5, 0.4, 3, (0, 0, 2, 2))
        size = writer.part.stat().st_size
        limited_size(size + 10)
        try:
            with pytest.raises(OutputError, match=r"scores\.csv"):
                writer.write("b.png", 0.5, 0.4, 3, (0, 0, 2, 2))
            kept = writer.part.stat().st_size
        finally:
            limited_size(unlimited)
        assert kept == size
        writer.write("c.png", 0.1, 0.4, 0)
    assert [row[0] for row in read_csv(tmp_path / "scores.csv")] == ["path", "a.png", "c.png"]


def test_scores_round_trip_with_verdict_and_box(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "out" / "scores.csv", truth=True) as writer:
        writer.write("a/x.png", np.float32(0.7), 0.5, 6, (1, 2, 4, 4), truth=1, defect_type="crack")
        writer.write('y,"1".png', 0.25, 0.5, 0, None, truth=0, defect_type="good")
        writer.write("broken.png", error="cannot read: truncated")
    header, *rows = read_csv(tmp_path / "out" / "scores.csv")
    assert ",".join(header) == "path,truth,defect_type,score,label,threshold,area,x0,y0,x1,y1,error"
    assert rows[0] == ["a/x.png", "1", "crack", "0.699999988", "1", "0.5", "6", "1", "2", "4", "4", ""]
    assert np.float32(rows[0][3]) == np.float32(0.7)
    assert rows[1] == ['y,"1".png', "0", "good", "0.25", "0", "0.5", "0", "", "", "", "", ""]
    assert rows[2] == ["broken.png", *[""] * 10, "cannot read: truncated"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_formula_cells_are_neutralised_and_newlines_do_not_break_rows(tmp_path: Path, start: str) -> None:
    with ScoresWriter(tmp_path / "scores.csv", truth=True) as writer:
        writer.write(start + "cmd()\r\nx.png", -1.0, 0.5, error=start + "e", truth=0, defect_type=start + "t")
    _, row = read_csv(tmp_path / "scores.csv")
    assert (row[0], row[2], row[-1]) == ("'" + start + "cmd()\r\nx.png", "'" + start + "t", "'" + start + "e")
    assert row[3] == "-1"


def test_an_undecodable_file_name_does_not_stop_the_scores(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "scores.csv") as writer:
        writer.write("bad\udcff.png", 0.5, 0.5)
    assert read_csv(tmp_path / "scores.csv")[1][:3] == ["bad\\udcff.png", "0.5", "1"]


def test_rows_are_on_the_disk_at_once_and_the_final_name_means_complete(tmp_path: Path) -> None:
    target = tmp_path / "scores.csv"

    def stop() -> None:
        with ScoresWriter(target) as writer:
            writer.write("a.png", 0.5, 0.5)
            assert [row[0] for row in read_csv(writer.part)] == ["path", "a.png"]
            assert not target.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not target.exists()
    assert len(read_csv(tmp_path / "scores.csv.part")) == 2


def test_a_score_that_is_no_number_never_passes_as_good(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "scores.csv") as writer, pytest.raises(ValueError, match=r"'a\.png' is nan"):
        writer.write("a.png", float("nan"), 0.5)


def test_defect_region_is_half_open_and_includes_the_threshold() -> None:
    values = torch.zeros(1, 5, 7)
    values[0, 2, 3], values[0, 4, 6], values[0, 0, 0] = 0.5, 0.9, 0.49
    assert defect_region(values, 0.5) == (2, (3, 2, 7, 5))
    assert defect_region(np.zeros((3, 3)), 0.5) == (0, None)


def test_metrics_json_reads_back_and_never_holds_nan(tmp_path: Path) -> None:
    metrics = anomaly_metrics([np.eye(3)], [np.eye(3)], [1.0], [1])
    more = {"seed": np.int64(3), "x": np.float32(0.5), "t": torch.tensor(2.0), "path": tmp_path, "list": (1, None)}
    write_metrics(tmp_path / "metrics.json", metrics | more)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["image_auroc"] is None
    assert (result["seed"], result["x"], result["t"], result["list"]) == (3, 0.5, 2.0, [1, None])
    assert result["path"] == str(tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.json: per_type: crack is nan"):
        write_metrics(tmp_path / "metrics.json", {"per_type": {"crack": np.float64("nan")}})
    assert (tmp_path / "metrics.json").read_bytes() == before
