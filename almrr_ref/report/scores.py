"""The output of evaluate and predict: the folder of results, scores.csv, boxes.json, metrics.json.

scores.csv grows row by row as scores.csv.part, so that a killed run keeps its rows and progress can be watched; it is
renamed when it is complete. boxes.json lists all images before all boxes, so it is written at the end, from a file with
one line per image: memory does not grow with them. Earlier results never mix with new ones: all of them stay, or all of
them are removed.
"""

import csv
import errno
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from almrr_ref.run.files import (
    BOXES,
    LAYERS,
    MAPS,
    OVERLAYS,
    SCORES,
    OutputError,
    atomic_path,
    atomic_write,
    hold_folder,
    writing,
)

_RESULTS = ("metrics.json", "index.html", OVERLAYS, MAPS, LAYERS)  # and scores.csv, boxes.json, complete or not
_TABLES = re.compile(rf"({re.escape(SCORES)}|{re.escape(BOXES)})(\.\d+)?(\.part)?")  # .0: of rank 0
_PICTURES = (".png", ".tiff", ".js", ".part")  # in the folders
COLUMNS = ("path", "score", "label", "threshold", "area", "x0", "y0", "x1", "y1", "error")
_TRUTH_COLUMNS = ("path", "truth", "defect_type", *COLUMNS[1:])
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@contextmanager
def results_folder(out: Path, overwrite: bool) -> Iterator[None]:
    """Make a folder for results, clear it, and lock it against other processes while the block runs.

    Raises:
        OutputError: if it holds earlier results and not ``overwrite``, another process holds it, or it is read-only.
    """
    with hold_folder(out):
        clear_results(out, overwrite)
        yield


def clear_results(out: Path, overwrite: bool) -> None:
    """Remove earlier results, and nothing else; OutputError if there are any and not ``overwrite``.

    Every folder of results has scores.csv, complete or not; one without it is another's, and stays as it is.
    """
    results = sorted((path for path in out.glob("*") if _TABLES.fullmatch(path.name)), reverse=True)
    results += [out / name for name in _RESULTS if (out / name).exists()]
    if results and not overwrite:
        what = f"{os.fspath(out)!r} holds earlier results ({results[0].name})"
        raise OutputError(f"{what}; replace them with --overwrite, or name another --out")
    if results and not results[0].name.startswith(SCORES):
        what = f"{os.fspath(out)!r} holds {results[0].name}, but no {SCORES}: nothing says that it is ours"
        raise OutputError(f"{what}; remove it yourself, or name another --out")
    with writing(out):
        for path in reversed(results):  # scores.csv last: a run that is killed here can be started again
            if path.is_dir():
                _clear_pictures(path)
            else:
                path.unlink()


def _clear_pictures(top: Path) -> None:
    """Remove the pictures and maps below a folder, and then the empty folders."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            if name.endswith(_PICTURES):
                os.unlink(os.path.join(folder, name))
        if not os.listdir(folder) and not os.path.islink(folder):
            os.rmdir(folder)


class LineFile:
    """A file that grows line by line; no line is ever half written. Use as a context manager.

    Args:
        keep: how many bytes of an earlier file at ``path`` stay; the rest is cut off.
        sync: whether each line is flushed to the disk, so that it survives a power cut.
    """

    def __init__(self, path: Path, keep: int = 0, sync: bool = False) -> None:
        self.path, self._sync = path, sync
        with writing(path):
            self._file = open(path, "r+b" if keep else "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
            self._file.truncate(keep)
            self._file.seek(keep)

    def append(self, text: str) -> None:
        """Write a text that ends in a line end. On an OutputError nothing of it remains in the file."""
        line = text.encode("utf-8", "backslashreplace")
        start = self._file.tell()
        with writing(self.path):
            try:
                if self._sync and not os.fstat(self._file.fileno()).st_nlink:
                    raise OSError(errno.ENOENT, "it was deleted or replaced while it grew; start again")
                while line:  # where the disk is nearly full, an unbuffered write may write only some of the bytes
                    line = line[self._file.write(line) :]
                if self._sync:
                    os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(start)
                self._file.seek(start)
                raise

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.path), self._file:
            os.fsync(self._file.fileno())


class ScoresWriter:
    """Write scores.csv row by row; use as a context manager.

    Columns: path, score, label, threshold, area, x0, y0, x1, y1, error. The label is the verdict, 1 where score >=
    threshold; x0 to y1 are the half-open bounding box of all regions (result.py). With ``truth``, the
    columns truth (0 or 1) and defect_type follow the path. UTF-8, RFC 4180 (a newline is quoted).

    Each row is written to `<path>.part` at once; leaving the block without an exception renames it to `path`.
    """

    def __init__(self, path: Path, truth: bool = False) -> None:
        self.path, self.unfinished = path, path.with_name(path.name + ".part")
        self._truth, self._lines = truth, LineFile(self.unfinished)
        self._lines.append(csv_line(_TRUTH_COLUMNS if truth else COLUMNS))

    def write(
        self,
        path: str | os.PathLike[str],
        score: float | None = None,
        threshold: float | None = None,
        area: int | None = None,
        box: tuple[int, int, int, int] | None = None,
        error: str = "",
        truth: int | None = None,
        defect_type: str = "",
    ) -> None:
        """Append one image's row; None leaves a cell empty.

        Raises:
            ValueError: if the score is NaN or infinite: it has no verdict, and must not pass as good.
            OutputError: if the row cannot be written; nothing of it remains.
        """
        name, *cells = score_cells(path, score, threshold, area, box, error)
        truth_cells = [truth, _plain_text(defect_type)] if self._truth else []
        self._lines.append(csv_line([name, *truth_cells, *cells]))

    def __enter__(self) -> "ScoresWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.__exit__()
        if kind is None:
            with writing(self.path):
                os.replace(self.unfinished, self.path)


def score_cells(
    path: str | os.PathLike[str],
    score: float | None = None,
    threshold: float | None = None,
    area: int | None = None,
    box: tuple[int, int, int, int] | None = None,
    error: str = "",
) -> list[str | int | None]:
    """One image's cells under COLUMNS; ValueError if the score is NaN or infinite."""
    if score is not None and not math.isfinite(score):
        raise ValueError(f"the score of {os.fspath(path)!r} is {score}; expected a finite number")
    label = None if score is None or threshold is None else int(not score < threshold)
    cells = [_number(score), label, _number(threshold), area, *(box or [None] * 4), _plain_text(error)]
    return [_plain_text(os.fspath(path)), *cells]


def csv_line(cells: Sequence[str | int | None]) -> str:
    """Cells -> a row of RFC 4180; what spreadsheets may take for a separator is quoted, too."""
    text, line_end = io.StringIO(), ";\t\r\n"  # every version of csv quotes the characters of the line end
    csv.writer(text, lineterminator=line_end).writerow(cells)
    return text.getvalue().removesuffix(line_end) + "\r\n"


def merge_scores(path: Path, rank_files: list[Path]) -> None:
    """Join N files of ScoresWriter to one at `path`, and remove them: file r holds rows r, r + N, r + 2 N ...

    Raises:
        OutputError: if a file cannot be read or written; the N files are still there then.
    """
    with atomic_path(path) as temporary, ExitStack() as stack:  # the files close before the renaming
        readers = [csv.reader(stack.enter_context(open(file, newline="", encoding="utf-8"))) for file in rank_files]
        table = stack.enter_context(open(temporary, "w", newline="", encoding="utf-8"))
        table.write(csv_line(next(zip(*readers))[0]))  # the heading, which every file has
        for rows in zip_longest(*readers):
            table.writelines(csv_line(row) for row in rows if row is not None)
    for file in rank_files:
        file.unlink()


def boxes_line(name: str | os.PathLike[str], size: tuple[int, int], regions: Sequence[Any]) -> str:
    """One image -> its line for `write_boxes`: name, height, width, and for each region x0, y0, x1, y1, area, peak."""
    boxes = [(*region.box, region.area, region.peak) for region in regions]
    return json.dumps([os.fspath(name), *size, boxes], allow_nan=False) + "\n"


def write_boxes(path: Path, rank_files: list[Path]) -> None:
    """Join N files of `boxes_line` to one in COCO's format, and remove them: file r holds every Nth line.

        images: id, file_name, width, height;   categories: one, "defect"
        annotations: id, image_id, category_id, bbox [x, y, width, height], area, score (the peak), iscrowd

    A line "null" stands for an image that could not be read. Raises OutputError, with the N files still there.
    """

    def lines(stack: ExitStack) -> Iterator[list[Any]]:
        files = [stack.enter_context(open(file, encoding="utf-8")) for file in rank_files]  # noqa: SIM115
        read = (json.loads(line) for group in zip_longest(*files) for line in group if line is not None)
        return (entry for entry in read if entry is not None)

    def images(stack: ExitStack) -> Iterator[dict[str, Any]]:
        for number, (name, height, width, _) in enumerate(lines(stack), start=1):
            yield {"id": number, "file_name": name, "width": width, "height": height}

    def annotations(stack: ExitStack) -> Iterator[dict[str, Any]]:
        numbered = ((i, box) for i, (*_, boxes) in enumerate(lines(stack), start=1) for box in boxes)
        for number, (image, (x0, y0, x1, y1, area, peak)) in enumerate(numbered, start=1):
            place = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "score": peak, "iscrowd": 0}
            yield {"id": number, "image_id": image, "category_id": 1, **place}

    with atomic_path(path) as temporary, ExitStack() as stack, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"categories": [{"id": 1, "name": "defect"}]')
        for name, entries in (("images", images(stack)), ("annotations", annotations(stack))):
            file.write(f',\n"{name}": [')
            for number, entry in enumerate(entries):
                file.write((",\n" if number else "\n") + json.dumps(entry))
            file.write("]")
        file.write("}\n")
    for used in rank_files:
        used.unlink()


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write a dictionary as JSON, atomically; ValueError if a value is NaN or infinite, which JSON cannot hold."""
    atomic_write(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def _plain_text(text: str) -> str:
    """Keep a spreadsheet from running a cell as a formula, by a quote before it."""
    return "'" + text if text.lstrip("'").startswith(_FORMULA_STARTS) else text


def name_in(cell: str) -> str:
    """The name of a picture, as it was before `_plain_text`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA_STARTS) else cell


def _number(value: float | None) -> str:
    """Write a number so that reading it back gives the same one: a score, taken as threshold, is reached by itself."""
    return "" if value is None else repr(float(value))
