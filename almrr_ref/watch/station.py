"""Watch a folder: every whole picture is judged once, in order of arrival, recorded, moved and reported.

    arrivals.py -> decoders.py -> Detector.stream -> overlay and map -> a row of scores.csv (journal.py) -> --move-to
                                                                                 `-> webhook.py, in a thread of its own

A picture counts as judged when its row is on the disk. After a kill, what follows from a row is caught up on: a file
with a row that is still in the folder is moved and not judged again. An obstacle, such as a full disk or a folder that
is gone for a while, is reported once; the work is tried again until it succeeds.
"""

import dataclasses
import errno
import math
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, count, takewhile
from pathlib import Path

import numpy as np
from PIL import Image

from almrr_ref.calibration.drift import Drift
from almrr_ref.data.decoders import Decoders
from almrr_ref.data.images import ImageError, pages
from almrr_ref.detector import Detector
from almrr_ref.report.result import Result
from almrr_ref.report.scores import clear_results
from almrr_ref.run.ahead import mapped_ahead
from almrr_ref.run.files import SCORES, OutputError, hold_folder, output_error
from almrr_ref.run.text import LOGGER, decimals, one_line
from almrr_ref.watch.arrivals import Arrival, Arrivals
from almrr_ref.watch.journal import Journal, Row
from almrr_ref.watch.webhook import Webhook

LONGEST_PAUSE = 30.0  # seconds between two tries where the disk is full or the folder is gone
DECODERS = 2
SLOWEST = 120.0  # seconds for a decoder and one picture
OF_ONE_FILE = {  # errors of moving it for which it alone has to wait: its name or its rights, not the disk
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}
Judged = Result | ImageError


class Station:
    """A watched folder.

    Args:
        detector: called once for every group of pictures, since the network may change.
        folder: is watched, with the folders below it.
        out: folder of scores.csv, to which rows are appended.
        save: called with every result and the file's path within the folder, to write overlay and map.
        move_to: judged files are moved into good/, defective/ and unreadable/ below it.
        webhook: URL and secret.
        drift: gets the scores of good pictures.
        on_row: called with every new row and its result, in the thread that watches.
    """

    def __init__(
        self,
        detector: Callable[[], Detector],
        folder: Path,
        out: Path,
        save: Callable[[Result, Path], None],
        move_to: Path | None = None,
        webhook: tuple[str, bytes] | None = None,
        drift: Drift | None = None,
        on_row: Callable[[Row, Judged], None] = lambda row, result: None,
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"--watch {one_line(folder)}: no such folder")
        if move_to and folder.resolve() == move_to.resolve():
            raise ValueError(f"--move-to {one_line(move_to)} is the watched folder; name another one")
        if move_to and detector().threshold is None:
            remedy = "python -m almrr_ref.calibrate sets one"
            raise ValueError(f"--move-to needs a threshold: this network has none; {remedy}")
        self.detector, self.folder, self.out, self.save = detector, folder, out, save
        self.move_to, self.webhook, self.drift, self.on_row = move_to, webhook, drift, on_row
        self.stop = threading.Event()
        self.trouble = ""  # why pictures have to wait; empty: they do not
        self.counts: Counter[str] = Counter()  # verdicts of all rows

    def run(self, overwrite: bool = False) -> None:
        """Watch until ``stop`` is set. Raises OutputError if ``out`` cannot be used from the start."""
        with hold_folder(self.out), ExitStack() as stack:
            if overwrite:
                clear_results(self.out, overwrite)
                (self.out / "webhook.json").unlink(missing_ok=True)
            self._journal = stack.enter_context(Journal(self.out / SCORES, self._drifted_before))
            if self.drift and self.drift.standing:
                LOGGER.warning(self.drift.said())
            if self.webhook:
                stack.enter_context(Webhook(*self.webhook, self._journal, self.out / "webhook.json"))
            decoders = Decoders(DECODERS, self.detector().levels, Image.MAX_IMAGE_PIXELS, SLOWEST)
            self.decoders = stack.enter_context(decoders)
            self.counts = self._journal.counts
            earlier = f"; {self._journal.rows} were judged before" if self._journal.rows else ""
            LOGGER.info(f"watching {one_line(self.folder)}{earlier}; Ctrl-C ends it")
            arrivals = Arrivals(self.folder, [self.out, *([self.move_to] if self.move_to else [])])
            failures = 0
            while not self.stop.is_set():
                try:
                    self._judge(arrivals, arrivals.look())
                    failures = 0
                    self._say_trouble(arrivals.trouble)
                except OSError as error:
                    failures += 1
                    self._say_trouble(f"cannot read {one_line(error.filename or self.folder)}: {error.strerror}")
                except OutputError as error:
                    failures += 1
                    self._say_trouble(str(error))
                self.stop.wait(max(arrivals.pause, min(LONGEST_PAUSE, 0.5 * 2**failures) if failures else 0))

    def _judge(self, arrivals: Arrivals, whole: Iterable[Arrival]) -> None:
        """Judge the pictures of whole files, and finish every file. Raises OSError, OutputError."""
        waiting: deque[tuple[Arrival, bool]] = deque()  # of every picture: its file, whether it is the file's last
        paths: deque[Path] = deque()  # of the pictures that the network has not judged yet

        def pictures() -> Iterator[Path | ImageError]:
            for arrival in whole:
                if self.stop.is_set():
                    return
                try:
                    if not arrival.unchanged():
                        continue
                except FileNotFoundError:
                    continue
                unjudged = self._unjudged(arrival)
                if not unjudged:
                    self._finish(arrivals, arrival)
                for number, picture in enumerate(unjudged, start=1):
                    waiting.append((arrival, number == len(unjudged)))
                    paths.append(picture.path if isinstance(picture, ImageError) else picture)
                    yield picture

        detector = self.detector()
        skipped: set[Path] = set()  # files one of whose pictures got no row, such as those that changed meanwhile
        decoded = mapped_ahead(self._decoded, pictures(), DECODERS + 1)
        results = (_named(result, paths.popleft()) for result in detector.stream(decoded))
        for result in mapped_ahead(self._saved, results, detector.ahead):
            arrival, last = waiting.popleft()
            if arrival.path in skipped or not self._record(arrivals, arrival, result):
                skipped.add(arrival.path)
            elif last:
                self._finish(arrivals, arrival)

    def _unjudged(self, arrival: Arrival) -> Sequence[Path | ImageError]:
        """The pictures of a file that have no row yet."""
        verdicts = self._verdicts(arrival)
        if verdicts and self.move_to and _is_another(self._target(self.move_to, arrival, verdicts), arrival.path):
            for name in verdicts:  # of a file that was moved: the clock of the camera stands still
                self._journal.forget(name, arrival)
        elif self._name(arrival.path) in verdicts:
            return []
        try:
            paths = pages(arrival.path)
        except ImageError as error:
            return [error]
        return [path for path in paths if not self._journal.verdict(self._name(path), arrival)]

    def _decoded(self, picture: Path | ImageError) -> np.ndarray | ImageError:
        """The pixels of a picture, decoded in another process: a crash of Pillow must not end the watch."""
        if isinstance(picture, ImageError):
            return picture
        try:
            pixels, left_out = self.decoders.decode(picture)
            self.detector().remark(picture, left_out)
            return pixels
        except ImageError as error:
            return error

    def _saved(self, result: Judged) -> Judged:
        if isinstance(result, Result) and result.path is not None:
            self.save(result, self._name_path(result.path))
        return result

    def _record(self, arrivals: Arrivals, arrival: Arrival, result: Judged) -> bool:
        """Write the row of one picture; -> False if its file has changed, is gone, or may not be whole yet."""
        try:
            if not arrival.unchanged():
                return False
        except FileNotFoundError:
            if isinstance(result, ImageError):
                LOGGER.info(f"{one_line(arrival.path)} is gone before it was judged")
                return False
        if isinstance(result, ImageError) and arrivals.postpone(arrival):
            return False
        path = result.path or arrival.path
        row = self._journal.append(self._name(path), arrival, result)
        if row["error"]:
            LOGGER.warning(f"not read: {one_line(path)}: {row['error']}")
        elif row["label"] == "1":
            LOGGER.info(f"defective: {one_line(path)}, score {decimals(float(row['score']))}")
        if warning := self._drifted(row):
            LOGGER.warning(warning)
        self.on_row(row, result)
        return True

    def _drifted_before(self, row: Row) -> None:
        """Give the drift charts an earlier row, unless it had another threshold: the network was calibrated since."""
        before, now = row["threshold"], self.detector().threshold
        if before and now is not None and math.isclose(float(before), now, rel_tol=1e-6):
            self._drifted(row)

    def _drifted(self, row: Row) -> str:
        """Give the drift charts a row; -> a warning, empty if there is none."""
        if self.drift is None or row["label"] != "0":
            return ""
        return self.drift.add(float(row["score"]), float(row["threshold"]))

    def _finish(self, arrivals: Arrivals, arrival: Arrival) -> None:
        """Move a file, all of whose pictures have rows, if --move-to is given. Raises OutputError."""
        arrivals.done(arrival)
        try:
            if self.move_to and arrival.unchanged():  # else another picture of its name is there, to be judged first
                self._move(arrival, self.move_to)
                arrivals.moved(arrival)
        except FileNotFoundError:  # gone, or moved by a process that was killed
            return
        except OSError as error:
            arrivals.done(arrival, False)
            if error.errno not in OF_ONE_FILE:
                raise output_error(error, self.move_to or arrival.path) from error
            arrivals.trouble = arrivals.trouble or f"cannot move {one_line(arrival.path)}: {error.strerror}"

    def _move(self, arrival: Arrival, move_to: Path) -> None:
        """Move a file to the folder of its verdict, the worst of its pages; another file of its name there stays."""
        wanted = target = self._target(move_to, arrival, self._verdicts(arrival))
        numbers = count(2)
        while target.exists() and (not arrival.unchanged(target) or _is_another(target, arrival.path)):
            beside = f"{wanted.stem}-{arrival.written}{wanted.suffix}"
            target = wanted.with_name(beside if target == wanted else f"{next(numbers)}-{beside}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(arrival.path, target)
            if not arrival.unchanged(target) and not arrival.path.exists():
                os.replace(target, arrival.path)  # it was replaced at this very moment
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            temporary = target.with_name(f".{target.name}.part")
            shutil.copy2(arrival.path, temporary)  # to another file system: a whole copy, then the removal
            if not arrival.unchanged():
                os.unlink(temporary)  # it was replaced meanwhile: the new one is judged first
                return
            os.replace(temporary, target)
            os.unlink(arrival.path)

    def _verdicts(self, arrival: Arrival) -> dict[str, str]:
        """The verdicts on a file and on its pages, as far as there are any, by their names in the journal."""
        name = self._name(arrival.path)
        by_name = ((n, self._journal.verdict(n, arrival)) for n in chain([name], (f"{name}#{k}" for k in count(1))))
        whole = next(by_name)
        return {n: verdict for n, verdict in (whole, *takewhile(lambda page: page[1], by_name)) if verdict}

    def _target(self, move_to: Path, arrival: Arrival, verdicts: dict[str, str]) -> Path:
        """Where a file of these verdicts belongs: in the folder of the worst."""
        worst = next(v for v in ("defective", "unreadable", "good", "none") if v in verdicts.values())
        return move_to / worst / self._name_path(arrival.path)

    def _name_path(self, path: Path) -> Path:
        return path.relative_to(self.folder)

    def _name(self, path: Path) -> str:
        """How a picture is named in the journal."""
        return os.fspath(self._name_path(path))

    def _say_trouble(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            LOGGER.warning(f"{trouble}; trying again until it works")
        elif self.trouble and not trouble:
            LOGGER.info("it works again")
        self.trouble = trouble


def _is_another(there: Path, here: Path) -> bool:
    """Whether a file holds other bytes than the one here; False where there is none."""
    try:
        return there.read_bytes() != here.read_bytes()
    except OSError:
        return False


def _named(result: Judged, path: Path) -> Judged:
    """The result of pixels, as that of the file they came from."""
    return ImageError(path, result.reason) if isinstance(result, ImageError) else dataclasses.replace(result, path=path)
