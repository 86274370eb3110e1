"""One cell of a table: one variant trained on one category with one seed, in a process of its own.

A cell is a run of ``python -m almrr_ref.train`` in a folder of its own, so that a crash takes nothing else with it. The
folder's cell.json says which settings it belongs to and whether it is finished; a cell that is not goes on from its
last checkpoint (``--resume``). Variants with the same settings share a cell, whatever table they stand in.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_json

from almrr_ref.run.files import make_folder
from almrr_ref.run.text import duration, one_line

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs from using one folder there
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
Place = tuple[str, str, int]  # of a cell in a table: category, variant, seed


@dataclass(frozen=True)
class Cell:
    """What is trained, on which data, and where: the flags of train but for --out, and the cell's own folder."""

    name: str
    data: Path
    folder: Path
    flags: tuple[str, ...]

    @property
    def metrics_file(self) -> Path:
        return self.folder / "evaluation" / "metrics.json"

    def stored(self) -> dict[str, Any]:
        """The content of cell.json; {} before the first start.

        Raises:
            ValueError: if the folder's cell has other settings, or cell.json is none.
        """
        path = self.folder / "cell.json"
        if not path.exists():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            flags = content["flags"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; remove {self.folder} and run again") from error
        if flags != list(self.flags):
            raise ValueError(f"{self.folder} holds a cell with other settings ({' '.join(flags)}); name another --out")
        return content

    def finished(self) -> bool:
        return bool(self.stored().get("finished")) and self.metrics_file.exists()

    def metrics(self) -> dict[str, Any]:
        """What train measured on the test part: metrics.json."""
        content: dict[str, Any] = json.loads(self.metrics_file.read_text())
        return content


def make_flags(settings: dict[str, Any]) -> tuple[str, ...]:
    """Settings -> flags of the train command; None stands for one that is left out."""
    flags: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return tuple(flags)


def run_cell(cell: Cell, lock: int | None) -> str:
    """Train and evaluate a cell, or go on where it stopped; return "" if it is finished then, else the reason.

    Args:
        lock: file descriptor that the training keeps open, from `hold_folder`.
    """
    make_folder(cell.folder)
    cell.stored()
    write_json(cell.folder / "cell.json", {"flags": cell.flags, "finished": False})
    cell.metrics_file.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*_paths(), str(ROOT)])}
    command = [sys.executable, "-m", "almrr_ref.train", *cell.flags, "--out", str(cell.folder.resolve()), "--resume"]
    start, log = time.monotonic(), cell.folder / "train.log"
    with log.open("ab") as file:
        before = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True, pass_fds=[lock] if lock else []
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves and ends
            process.wait()
            raise
    if code in (0, 1) and cell.metrics_file.exists():
        write_json(cell.folder / "cell.json", {"flags": cell.flags, "finished": True, "exit_code": code})
        print(f"{cell.name}: {duration(time.monotonic() - start)}", flush=True)
        return ""
    return _reason(code, log.read_bytes()[before:].decode(errors="replace"))


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _reason(code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if "error: " in line] or lines[-1:]
    if code == 0:
        return "the data has no test part, or the training was stopped"
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {one_line(told[-1].split('error: ')[-1])}" if told else how


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[int | None]:
    """Keep other runs out of the folder; wait for a training that a killed run has left behind in it.

    The lock is shared with every training started, so that it outlives a bench that is killed.
    """
    make_folder(out)
    with open(out / ".lock", "w") as file:
        if fcntl is None:
            yield None
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another run, or the last training of one that was killed, is at work in {out}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
