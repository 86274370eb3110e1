"""The commands as real processes, which can be killed, limited and measured, and the smallest run of them.

Importing torch takes seconds, a fork milliseconds. So one clean server process imports everything once, and every
command runs in a fork of it: a process of its own, with its own signals, limits, memory and files.
"""

import contextlib
import csv
import functools
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from almrr_ref.run.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
_SIZES = "reduced_channels=16 d_model=12 depth=1 decoder_channels=(8,8) frm_width=4 frm_levels=2"
SMALLEST_FLAGS = [  # ResNet-18 up to block 1 at 32 pixels: 4 tokens, milliseconds a step
    *("--preset", "paper", "--backbone", "resnet18", "--weights", "random", "--blocks", "1", "--image-size", "32"),
    *("--batch-size", "2", "--device", "cpu"),
    *(flag for setting in _SIZES.split() for flag in ("--set", setting)),
]
MEMORY_FLAGS = ["--frm-input", "memory", "--standardise", "position", "--set", "memory=20"]  # what `plus` adds
OTHER_USER = 65534  # for the option `user`: the superuser may read and write everything
TIMEOUT = 240  # seconds after which a command counts as hanging


def write_images(folder: Path, count: int, seed: int = 0, size: int | tuple[int, int] = 32) -> None:
    """Noise images, good enough for everything but the accuracy; of one side, or height and width."""
    height, width = size if isinstance(size, tuple) else (size, size)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


def slow_to_decode() -> bytes:
    """A small JPEG that takes its decoder ten seconds: its last scan is there ten thousand times."""
    buffer = io.BytesIO()
    Image.new("L", (900, 1000), 128).save(buffer, "JPEG", progressive=True)
    start, end = buffer.getvalue().rindex(b"\xff\xda"), -2
    return buffer.getvalue()[:start] + buffer.getvalue()[start:end] * 10_000 + buffer.getvalue()[end:]


def processor_time(pid: int) -> int:
    """That a process has taken, in ticks of 10 ms."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def open_to_all(folder: Path) -> None:
    """Let every user of the machine read the folder: pytest's are closed."""
    for parent in (*folder.parents, folder):
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(parent.stat().st_mode | 0o055)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint."""
    loaded: dict[str, torch.Tensor] = read_checkpoint(run / "last.pt")["weights"]
    return loaded


def read_scores(out: Path) -> list[dict[str, str]]:
    """The rows of scores.csv."""
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal), what it wrote, peak memory in MiB, files left open."""

    code: int
    out: str
    err: str
    peak: float
    open_files: int

    @property
    def error_line(self) -> str:
        """The one line on stderr, but for warnings, of a command that ended with code 2."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, self.err
        assert "error: " in lines[0]
        return lines[0]


class Running:
    """A command in its own process and process group.

    Args:
        folder: for what it prints.
        options: constants of training.py; file_limit, bytes a file may have; user, whom the superuser turns into.
    """

    def __init__(self, name: str, arguments: list[str], folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.process: ForkServerProcess = fork_server().Process(
            target=_child, args=(name, arguments, folder), kwargs=options
        )
        self.process.start()

    def kill(self, which: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process and its workers, as a terminal does; without effect if it has ended."""
        assert self.process.pid is not None
        for send in (os.killpg, os.kill):  # one that has just begun has no group of its own yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.process.pid, which)
                return

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Return as soon as something has happened, or the process has ended."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.exitcode is None and not happened():
            assert time.monotonic() < deadline, "it never happened"
            self.process.join(0.0002)

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self._read('out')} {self._read('err')}")
        peak, open_files = self._read("measured").split() or ["nan", "-1"]
        return Ended(self.process.exitcode, self._read("out"), self._read("err"), float(peak), int(open_files))

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


def run(name: str, arguments: list[str], folder: Path, **options: Any) -> Ended:
    """Run a command to its end; skips where the user named has no way to the Python installation."""
    if options.get("user") is not None and os.geteuid() == 0:
        for place in map(Path, (torch.__file__, __file__)):
            if any(not parent.stat().st_mode & 0o001 for parent in place.resolve().parents):
                pytest.skip(f"{place} lies in a folder that is closed to other users")
    return Running(name, arguments, folder, **options).end()


@functools.cache
def fork_server() -> ForkServerContext:
    """The process that has imported everything, to fork from."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    commands = [f"almrr_ref.{name}" for name in ("train", "evaluate", "predict")]
    context.set_forkserver_preload(["trust_cases", *commands])
    return context


def redirect_output(out: Path, err: Path) -> None:
    """In a child: write what is printed, from C as well, into two files; and compute on one thread."""
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as we do)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)


def _child(
    name: str,
    arguments: list[str],
    folder: Path,
    constants: dict[str, Any] | None = None,
    file_limit: int = 0,
    user: int | None = None,
) -> None:
    """In the child: redirect, limit, run the command's main, and note what it needed."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with "&" has it ignored
    multiprocessing.set_start_method(None, force=True)  # for workers: as in a command that nobody forked
    redirect_output(folder / "out", folder / "err")
    vars(import_module("almrr_ref.training")).update(constants or {})
    measured = os.open(folder / "measured", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if user is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    before = _open_files()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, unlimited[1]))
    try:
        code = import_module(f"almrr_ref.{name}").main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    os.write(measured, f"{peak} {_open_files() - before}".encode())
    sys.stdout.flush()
    sys.exit(code)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
