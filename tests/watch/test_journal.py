"""The journal of a watched folder: a torn last row is cut off, wherever it was torn."""

from pathlib import Path

import pytest

from almrr_ref.data.images import ImageError
from almrr_ref.run.files import OutputError
from almrr_ref.watch.arrivals import Arrival
from almrr_ref.watch.journal import HEADING, Journal, message, read_rows

NAMES = ("a.png", "=1+1.png", 'new\r\nline, "quoted".png', "\udcff.png")


def write(path: Path) -> None:
    with Journal(path) as journal:
        for number, name in enumerate(NAMES):
            journal.append(name, Arrival(Path(name), 10, number), ImageError(name, 'a "reason",\r\nso'))


def test_a_row_torn_at_any_byte_is_written_again(tmp_path: Path) -> None:
    whole = tmp_path / "whole.csv"
    write(whole)
    content, ends = whole.read_bytes(), [end for end, _ in read_rows(whole, len(HEADING), 10**6)]
    assert len(ends) == len(NAMES)
    for cut in (
        0,
        1,
        20,
        len(HEADING) - 1,
        len(HEADING),
        *range(ends[1], len(content) + 1),
    ):
        torn = tmp_path / "torn.csv"
        torn.write_bytes(content[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(torn) as journal:
            assert journal.rows == kept
            for number, name in enumerate(NAMES):
                arrival = Arrival(Path(name), 10, number)
                assert journal.verdict(name, arrival) == ("unreadable" if number < kept else None)
                if number >= kept:
                    journal.append(name, arrival, ImageError(name, 'a "reason",\r\nso'))
            assert journal.end == torn.stat().st_size
        assert [(e, r["path"]) for e, r in read_rows(torn, len(HEADING), 10**6)] == [
            (e, r["path"]) for e, r in read_rows(whole, len(HEADING), 10**6)
        ]


def test_a_file_that_changed_is_not_known_and_a_row_tells_all(tmp_path: Path) -> None:
    write(tmp_path / "scores.csv")
    with Journal(tmp_path / "scores.csv") as journal:
        assert journal.verdict("a.png", Arrival(Path("a.png"), 10, 0)) == "unreadable"
        assert journal.verdict("a.png", Arrival(Path("a.png"), 11, 0)) is None
        assert journal.verdict("a.png", Arrival(Path("a.png"), 10, 9)) is None
        assert journal.counts == {"good": 0, "defective": 0, "none": 0, "unreadable": len(NAMES)}
    rows = [row for _, row in read_rows(tmp_path / "scores.csv", len(HEADING), 10**6)]
    assert rows[1]["path"] == "'=1+1.png", "a spreadsheet would run it"
    assert message(rows[1])["path"] == "=1+1.png"
    assert message(rows[0]) | {"judged": ""} == {
        "path": "a.png", "verdict": "unreadable", "error": 'a "reason",\\r\\nso', "judged": "", "score": None,
        "threshold": None, "area": None, "box": None, "regions": [],
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["x,y\r\n", "a.png" + "," * 13 + "\r\n"])
def test_a_damaged_row_is_named_and_nothing_is_overwritten(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open("a", newline="") as file:
        file.write(damage)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(OutputError, match="has a damaged row"):
        Journal(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_bytes() == before
