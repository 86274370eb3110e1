"""scores.csv of a watched folder: the one record of what was judged, from which everything else is derived.

After the columns of `predict` come: regions (JSON: x0, y0, x1, y1, area, peak of the largest), size and written (which
identify the file), judged (UTC). A row is flushed to the disk before the file counts as judged. A last row that a kill
or a power cut tore is cut off at the next start, and the file is judged again: no row is half, and none is there twice.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from almrr_ref.data.images import ImageError
from almrr_ref.report.result import Result
from almrr_ref.report.scores import COLUMNS, LineFile, csv_line, name_in, score_cells
from almrr_ref.run.files import OutputError
from almrr_ref.run.text import one_line
from almrr_ref.watch.arrivals import Arrival

WATCH_COLUMNS = (*COLUMNS, "regions", "size", "written", "judged")
MOST_REGIONS = 100  # of one picture in a row
HEADING = csv_line(WATCH_COLUMNS)
Row = dict[str, str]


class Journal:
    """scores.csv, to which rows are appended; use as a context manager, while the folder is held.

    Args:
        each: called with every earlier row.
    Raises:
        OutputError: if the file is not that of a watched folder, or cannot be read or written.
    """

    def __init__(self, path: Path, each: Callable[[Row], object] = lambda row: None) -> None:
        self.path, self.rows, keep = path, 0, 0
        self.counts = Counter(dict.fromkeys(("good", "defective", "none", "unreadable"), 0))  # of all rows
        self._verdicts: dict[int, str] = {}  # by hash: a million rows take some 100 MB
        for end, record in _records(path) if path.exists() else ():
            if not keep and record != HEADING.encode():
                raise _foreign(path)
            if keep:
                row = _row(record, path)
                self._index(row)
                each(row)
            keep = end
        if not keep and path.exists() and not HEADING.encode().startswith(path.read_bytes()):
            raise _foreign(path)
        self._lines = LineFile(path, keep, sync=True)
        self.end = keep  # of the last row that is on the disk, in bytes
        if not keep:
            self._append(HEADING)

    def verdict(self, name: str, arrival: Arrival) -> str | None:
        """The verdict on a picture: good, defective, unreadable, none (no threshold); None if it was not judged."""
        return self._verdicts.get(_key(_cell(name), arrival.size, arrival.written))

    def forget(self, name: str, arrival: Arrival) -> None:
        """Take a picture for one that was not judged: another one has its name, size and time of writing."""
        self._verdicts.pop(_key(_cell(name), arrival.size, arrival.written), None)

    def append(self, name: str, arrival: Arrival, result: Result | ImageError) -> Row:
        """Write the row of a picture and return it; OutputError if that fails, and then none of it is in the file."""
        if isinstance(result, ImageError):
            cells, regions = score_cells(name, error=result.reason), ""
        else:
            cells = score_cells(name, result.score, result.threshold, result.area, result.box)
            largest = [[*r.box, r.area, round(r.peak, 6)] for r in result.regions[:MOST_REGIONS]]
            regions = json.dumps(largest, separators=(",", ":"))
        judged = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = csv_line([*cells, regions, arrival.size, arrival.written, judged])
        self._append(line)
        row = _row(line.encode("utf-8", "backslashreplace"), self.path)
        self._index(row)
        return row

    def _append(self, line: str) -> None:
        self._lines.append(line)
        self.end += len(line.encode("utf-8", "backslashreplace"))

    def _index(self, row: Row) -> None:
        verdict = verdict_of(row)
        self.rows += 1
        self.counts[verdict] += 1
        self._verdicts[_key(row["path"], int(row["size"]), int(row["written"]))] = verdict

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()


def verdict_of(row: Row) -> str:
    """A row -> good, defective, unreadable, or none without a threshold."""
    if row["error"]:
        return "unreadable"
    return {"0": "good", "1": "defective", "": "none"}[row["label"]]


def read_rows(path: Path, start: int, end: int) -> Iterator[tuple[int, Row]]:
    """The rows of a journal between two byte positions, each with the position of its end; OutputError."""
    for position, record in _records(path, start):
        if position > end:
            return
        yield position, _row(record, path)


def _records(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The whole rows of a file, with the heading, each with the position of its end; a torn last one is left out."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            record, position = b"", start
            for line in file:
                record += line
                if record.endswith(b"\r\n") and record.count(b'"') % 2 == 0:  # else in quotes, or torn
                    position += len(record)
                    yield position, record
                    record = b""
    except OSError as error:
        raise OutputError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error


def message(row: Row) -> dict[str, Any]:
    """A row -> its JSON, for the webhook and the page."""
    numbers = {name: json.loads(row[name]) if row[name] else None for name in ("score", "threshold", "area")}
    box = [int(row[name]) for name in ("x0", "y0", "x1", "y1")] if row["x0"] else None
    regions = [{"box": r[:4], "area": r[4], "peak": r[5]} for r in json.loads(row["regions"] or "[]")]
    texts = {"path": name_in(row["path"]), "verdict": verdict_of(row), "error": row["error"] or None}
    return {**texts, "judged": row["judged"], **numbers, "box": box, "regions": regions}


def _row(record: bytes, path: Path) -> Row:
    cells = next(csv.reader(io.StringIO(record.decode("utf-8", "replace"), newline="")))
    if len(cells) != len(WATCH_COLUMNS) or not re.fullmatch(r"\d+,-?\d+", ",".join(cells[-3:-1])):
        raise OutputError(
            f"{os.fspath(path)!r} has a damaged row ({one_line(cells)[:80]}); repair it, or name another --out"
        )
    return dict(zip(WATCH_COLUMNS, cells))


def _foreign(path: Path) -> OutputError:
    return OutputError(f"{os.fspath(path)!r} is not of a watched folder; name another --out")


def _key(cell: str, size: int, written: int) -> int:
    return hash((cell, size, written))


def _cell(name: str) -> str:
    """A name as it stands in the file."""
    cell = score_cells(name)[0]
    return str(cell).encode("utf-8", "backslashreplace").decode()
