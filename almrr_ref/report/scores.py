"""What evaluate and predict leave behind: scores.csv, metrics.json, and (from overlays and page) pictures and a page.

Source: architecture.md, "Commands". Decisions: scores.csv grows row by row as scores.csv.part, so that a killed run
keeps its rows and progress can be watched, and gets its name when it is complete. Earlier results are never mixed with
new ones: they stay, or all of them go. Text that a spreadsheet would take
for a formula is preceded by an apostrophe. metrics.json is written at once and never holds NaN: JSON knows none.
"""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from almrr_ref.report.overlays import contact_sheet, overlay_row, save_picture
from almrr_ref.report.page import ReportRow, write_html
from almrr_ref.run.files import (
    MAPS,
    OVERLAYS,
    SCORES,
    OutputError,
    atomic_path,
    atomic_write,
    hold_folder,
    make_folder,
    output_error,
)

__all__ = [
    "ReportRow", "ScoresWriter", "clear_results", "contact_sheet", "defect_region", "merge_scores", "overlay_row",
    "results_folder", "save_picture",
    "write_html", "write_metrics",
]  # fmt: skip

Box = tuple[int, int, int, int]

_RESULTS = ("metrics.json", "index.html", OVERLAYS, MAPS)
_PICTURES = (".png", ".tiff", ".part")  # in the folders

_COLUMNS = ("path", "score", "label", "threshold", "area", "x0", "y0", "x1", "y1", "error")
_TRUTH_COLUMNS = ("path", "truth", "defect_type", *_COLUMNS[1:])
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@contextmanager
def results_folder(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Make a folder for results, without earlier ones, and keep other processes out of it while the block runs.

    Raises:
        OutputError: if it holds earlier results and not ``overwrite``, another process writes into it, or this one
            cannot.
    """
    with hold_folder(make_folder(out)):
        clear_results(Path(out), overwrite)
        yield Path(out)


def clear_results(out: Path, overwrite: bool) -> None:
    """Remove earlier results, so that no picture of a file that is gone passes for a new one; nothing else.

    Raises:
        OutputError: if there are earlier results and not ``overwrite``, or they cannot be removed.
    """
    found = sorted(out.glob(SCORES + "*")) + [out / name for name in _RESULTS if (out / name).exists()]
    if found and not overwrite:
        raise OutputError(
            f"{os.fspath(out)!r} holds earlier results ({found[0].name}); replace them with --overwrite, "
            "or name another --out"
        )
    try:
        for path in found:
            if path.is_dir():
                _clear_pictures(path)
            else:
                path.unlink()
    except OSError as error:
        raise output_error(error, out) from error


def _clear_pictures(top: Path) -> None:
    """Remove the pictures and maps below a folder, and the folders that are empty then."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            if name.endswith(_PICTURES):
                os.unlink(os.path.join(folder, name))
        if not os.listdir(folder) and not os.path.islink(folder):
            os.rmdir(folder)


def defect_region(anomaly_map: npt.ArrayLike | torch.Tensor, threshold: float) -> tuple[int, Box | None]:
    """Measure where a map (h, w) or (1, h, w) reaches the threshold: area in pixels, bounding box (x0, y0, x1, y1).

    The box is half open, as in Pillow and NumPy: x0 <= x < x1, y0 <= y < y1. None if no pixel reaches the threshold.
    """
    values = anomaly_map.detach().cpu().float().numpy() if isinstance(anomaly_map, torch.Tensor) else anomaly_map
    found = np.asarray(values) >= threshold
    found = found[0] if found.ndim == 3 else found
    if not found.any():
        return 0, None
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return int(np.count_nonzero(found)), box


class ScoresWriter:
    """Write scores.csv row by row; use as a context manager.

    Columns: path, score, label, threshold, area, x0, y0, x1, y1, error. `label` is the verdict, 1 where score >=
    threshold; x0 to y1 are the half-open bounding box of the pixels at or above the threshold. With `truth`, the
    columns truth (0 or 1) and defect_type follow the path. What is unknown, e.g. after an error, is left empty.

    Rows go to `<path>.part` as they come, each whole. Leaving the block normally renames that file to `path`; leaving
    it by an exception, or being killed, keeps it under its temporary name. UTF-8, RFC 4180 (a newline is quoted).

    Args:
        path: the file to write, its folder is created.
        truth: whether the truth is known.
    Raises:
        OutputError: if the file cannot be written; the rows so far stay whole.
    """

    def __init__(self, path: str | os.PathLike[str], truth: bool = False) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self._truth = truth
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.part, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise output_error(error, self.path) from error
        try:
            self._append(_TRUTH_COLUMNS if truth else _COLUMNS)
        except ValueError:
            self._file.close()
            raise

    def write(
        self,
        path: str | os.PathLike[str],
        score: float | None = None,
        threshold: float | None = None,
        area: int | None = None,
        box: Box | None = None,
        error: str = "",
        truth: int | None = None,
        defect_type: str = "",
    ) -> None:
        """Append one image's row; None leaves a cell empty.

        Raises:
            ValueError: if the score is NaN or infinite: it has no verdict, and must not pass as good.
            OutputError: if the row cannot be written; nothing of it has been.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"the score of {os.fspath(path)!r} is {score}; expected a finite number")
        label = "" if score is None or threshold is None else int(score >= threshold)
        cells = [_plain_text(os.fspath(path))]
        if self._truth:
            cells += ["" if truth is None else str(int(truth)), _plain_text(defect_type)]
        cells += [_number(score), str(label), _number(threshold), "" if area is None else str(int(area))]
        cells += [str(int(edge)) for edge in box] if box else [""] * 4
        self._append([*cells, _plain_text(error)])

    def _append(self, cells: list[str] | tuple[str, ...]) -> None:
        """Write one line whole, or cut off what was written of it."""
        text = io.StringIO()
        csv.writer(text).writerow(cells)  # the default line end, \r\n, makes every version of csv quote both characters
        line = text.getvalue().encode("utf-8", "backslashreplace")
        start = self._file.tell()
        try:
            while line:  # an unbuffered write may take only a part where the disk is nearly full
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(start)
            self._file.seek(start)
            raise output_error(error, self.path) from error

    def __enter__(self) -> "ScoresWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file:
                os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self.part, self.path)
        except OSError as failure:
            raise output_error(failure, self.path) from failure


def merge_scores(path: Path, shares: list[Path]) -> None:
    """Join N files of ScoresWriter to one at `path`, at once, and remove them: file r holds rows r, r + N, r + 2 N ...

    Raises:
        OutputError: if a file cannot be read or written; the shares are still there then.
    """
    with atomic_path(path) as temporary, contextlib.ExitStack() as stack:  # the files close before the renaming
        readers = [csv.reader(stack.enter_context(open(share, newline="", encoding="utf-8"))) for share in shares]
        writer = csv.writer(stack.enter_context(open(temporary, "w", newline="", encoding="utf-8")))
        headings = [next(reader) for reader in readers]
        writer.writerow(headings[0])
        for rows in zip_longest(*readers):
            writer.writerows(row for row in rows if row is not None)
    for share in shares:
        share.unlink()


def write_metrics(path: str | os.PathLike[str], metrics: dict[str, Any]) -> None:
    """Write a dictionary as JSON, at once; NumPy numbers, tensors of one element and paths are allowed as values.

    Raises:
        ValueError: if a value is NaN or infinite (named with its keys) or nothing that JSON can hold.
        OutputError: if the file cannot be written; the old one is still there then.
    """
    atomic_write(path, json.dumps(_jsonable(metrics, Path(path).name), indent=2, allow_nan=False) + "\n")


def _jsonable(value: Any, name: str) -> Any:
    """Turn a nested value into what JSON knows; `name` leads to it in an error."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item, f"{name}: {key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _jsonable(value.tolist(), name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, which JSON cannot hold; use None and say why it is undefined")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name} is of type {type(value).__name__}, which JSON cannot hold")


def _plain_text(text: str) -> str:
    """Keep a spreadsheet from running a cell as a formula: an apostrophe before a telling first character."""
    return "'" + text if text.startswith(_FORMULA_STARTS) else text


def _number(value: float | None) -> str:
    """Write a number so that reading it back as float32 gives the same one."""
    return "" if value is None else f"{float(value):.9g}"
