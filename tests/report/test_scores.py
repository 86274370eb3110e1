"""The tables that evaluate and predict leave behind: scores.csv and metrics.json."""

import csv
import json
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from almrr_ref.report.scores import ScoresWriter, merge_scores, name_in, write_metrics
from almrr_ref.run.files import OutputError


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_rows_are_on_the_disk_at_once_and_stay_whole_when_it_fills_up(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: it needs no privileges."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with suppress(KeyboardInterrupt), ScoresWriter(tmp_path / "scores.csv") as writer:
        writer.write("a.png", 0.5, 0.4, 3, (0, 0, 2, 2))
        size = writer.unfinished.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))
        try:
            with pytest.raises(OutputError, match=r"scores\.csv"):
                writer.write("b.png", 0.5, 0.4, 3, (0, 0, 2, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert writer.unfinished.stat().st_size == size
        writer.write("c.png", 0.1, 0.4, 0)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv.part"], "the final name means complete"
    assert [row[0] for row in read_csv(tmp_path / "scores.csv.part")] == ["path", "a.png", "c.png"]


def test_scores_round_trip_with_verdict_and_box(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "scores.csv", truth=True) as writer:
        writer.write("a/x.png", np.float32(0.7), 0.5, 6, (1, 2, 4, 4), truth=1, defect_type="crack")
        writer.write('y,"1".png', 0.25, 0.5, 0, None, truth=0, defect_type="good")
        writer.write("undecodable\udcff.png", 0.5, 0.5, truth=0)
        writer.write("broken.png", error="cannot read: truncated")
        with pytest.raises(ValueError, match=r"'nan\.png' is nan"):
            writer.write("nan.png", float("nan"), 0.5)  # it must not pass as good
    header, *rows = read_csv(tmp_path / "scores.csv")
    assert ",".join(header) == "path,truth,defect_type,score,label,threshold,area,x0,y0,x1,y1,error"
    assert rows[0] == ["a/x.png", "1", "crack", "0.699999988079071", "1", "0.5", "6", "1", "2", "4", "4", ""]
    assert float(rows[0][3]) == np.float32(0.7), "as a threshold it is reached"
    assert rows[1] == ['y,"1".png', "0", "good", "0.25", "0", "0.5", "0", "", "", "", "", ""]
    assert rows[2] == ["undecodable\\udcff.png", "0", "", "0.5", "1", "0.5", *[""] * 6]
    assert rows[3:] == [["broken.png", *[""] * 10, "cannot read: truncated"]]


def test_a_name_comes_back_whatever_it_begins_with(tmp_path: Path) -> None:
    names = ["=x.png", "'=x.png", "''=x.png", "'x.png", "x.png"]
    with ScoresWriter(tmp_path / "scores.csv") as writer:
        for name in names:
            writer.write(name, 0.5)
    cells = [row[0] for row in read_csv(tmp_path / "scores.csv")[1:]]
    assert (list(map(name_in, cells)), len(set(cells))) == (names, 5)


def test_a_spreadsheet_that_separates_by_semicolons_or_tabs_too_keeps_a_name_and_a_reason_whole(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "scores.csv.0") as writer:
        writer.write("a;=1+1\t@x.png", error="too large; try less")
    merge_scores(tmp_path / "scores.csv", [tmp_path / "scores.csv.0"])
    assert (tmp_path / "scores.csv").read_bytes().splitlines()[1] == b'"a;=1+1\t@x.png",,,,,,,,,"too large; try less"'


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_formula_cells_are_neutralised_and_newlines_do_not_break_rows(tmp_path: Path, start: str) -> None:
    with ScoresWriter(tmp_path / "scores.csv", truth=True) as writer:
        writer.write(start + "cmd()\r\nx.png", -1.0, 0.5, error=start + "e", truth=0, defect_type=start + "t")
    _, row = read_csv(tmp_path / "scores.csv")
    assert (row[0], row[2], row[-1]) == ("'" + start + "cmd()\r\nx.png", "'" + start + "t", "'" + start + "e")
    assert row[3] == "-1.0"


def test_metrics_json_reads_back_and_never_holds_nan(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.json", {"x": 0.5, "n": [1, None]}
    write_metrics(path, metrics)
    for value in (np.float64("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_metrics(path, {"per_type": {"crack": value}})
    assert json.loads(path.read_text()) == metrics
