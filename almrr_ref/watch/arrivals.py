"""Which files of a watched folder are whole, found by looking repeatedly: that works on every file system.

A file is whole when two looks, at least REST seconds apart, find the same size and time of writing, also one that was
renamed into place. The folders below are watched, too; links to folders are not followed.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from almrr_ref.data.images import is_image_file
from almrr_ref.run.files import is_of_results
from almrr_ref.run.text import one_line

INTERVAL = 0.2  # seconds between two looks, and at least five times as long as a look takes
REST = 0.4  # seconds without a change after which a file counts as whole
PATIENCE = 5.0  # the same for a file that could not be read: its writer may be slow


@dataclass(frozen=True)
class Arrival:
    """A file and what identifies its content: size in bytes, time of writing in nanoseconds."""

    path: Path
    size: int
    written: int

    def unchanged(self, moved_to: Path | None = None) -> bool:
        """Whether the file, or the one at another path, is still the one seen. Raises OSError if it is gone."""
        status = os.stat(moved_to or self.path)
        return (status.st_size, status.st_mtime_ns) == (self.size, self.written)


@dataclass
class _Rest:
    arrival: Arrival
    changed: tuple[int, str]  # sorts by arrival: last change of the file's entry, in nanoseconds; path
    since: float  # when this size and time of writing were first seen
    needed: float = REST
    done: bool = False


class Arrivals:
    """The image files of a folder and of those below it; `look` returns each once it is whole.

    Args:
        left_out: folders that are not searched.
    """

    def __init__(self, folder: Path, left_out: Iterable[Path] = ()) -> None:
        self.folder, self._left_out = folder, {os.path.realpath(path) for path in left_out}
        self._files: dict[str, _Rest] = {}
        self.pause, self.trouble = INTERVAL, ""

    def look(self) -> list[Arrival]:
        """Files that are whole and not done, in order of arrival; ``trouble`` names a folder that cannot be read.

        Raises OSError if the watched folder itself cannot be read.
        """
        start, self.trouble = time.monotonic(), ""
        present = {}
        for path, status in self._below(os.fspath(self.folder)):
            rest, arrival = self._files.get(path), Arrival(Path(path), status.st_size, status.st_mtime_ns)
            if rest is None or rest.arrival != arrival:
                rest = _Rest(arrival, (status.st_ctime_ns, path), start)
            present[path] = rest
        self._files = present
        self.pause = max(INTERVAL, 5 * (time.monotonic() - start))
        whole = [rest for rest in present.values() if not rest.done and start - rest.since >= rest.needed]
        return [rest.arrival for rest in sorted(whole, key=lambda rest: rest.changed)]

    def done(self, arrival: Arrival, done: bool = True) -> None:
        """Mark a file as done: `look` does not return it again unless it changes."""
        self._files[os.fspath(arrival.path)].done = done

    def moved(self, arrival: Arrival) -> None:
        """Forget a file that was moved away: one that has its place at the next look is another."""
        self._files.pop(os.fspath(arrival.path), None)

    def postpone(self, arrival: Arrival) -> bool:
        """Let a file that could not be read rest for PATIENCE; -> whether it must still wait."""
        rest = self._files[os.fspath(arrival.path)]
        rest.needed = PATIENCE
        return time.monotonic() - rest.since < PATIENCE

    def _skipped(self, folder: "os.DirEntry[str]") -> bool:
        left_out = os.path.realpath(folder.path) in self._left_out or is_of_results(Path(folder.path))
        return folder.name.startswith(".") or left_out

    def _below(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):  # whatever its name
                        if not self._skipped(entry):
                            yield from self._below(entry.path)
                    elif is_image_file(entry.name):
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            yield entry.path, status
                except FileNotFoundError:  # gone since the folder was listed
                    continue
                except OSError as error:  # it alone must wait
                    self.trouble = f"cannot read {one_line(error.filename)}: {error.strerror}"
