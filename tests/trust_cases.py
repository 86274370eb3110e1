"""Real processes for the trust tests: the commands, run in children that can be killed, limited and measured.

Importing torch takes seconds, a fork milliseconds. So one clean server process imports everything once, and every
command runs in a fork of it: a process of its own, with its own signals, limits, memory and files.
"""

import contextlib
import functools
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

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_FLAGS = [  # ResNet-18 up to block 1 at 32 pixels: 64 tokens in all, milliseconds a step
    *("--preset", "small", "--backbone", "resnet18", "--weights", "random", "--blocks", "1", "--image-size", "32"),
    *("--batch-size", "2", "--device", "cpu"),
]
OTHER_USER = 65534  # for the option `user`: the superuser may read and write everything
SMALLEST = {  # settings without a flag, for the option `presets`
    "reduced_channels": 16, "d_model": 12, "depth": 1, "decoder_channels": (8, 8), "frm_width": 4, "frm_levels": 2,
}  # fmt: skip
TIMEOUT = 240  # seconds after which a command counts as hanging


def write_images(folder: Path, count: int, seed: int = 0, size: int = 32) -> None:
    """Noise images, good enough for everything but the accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(90, 160, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


def open_to_all(folder: Path) -> None:
    """Let every user of the machine read the folder: pytest's are closed."""
    for part in (*folder.parents, folder):
        if part.stat().st_uid == os.geteuid() and part.stat().st_mode & 0o055 != 0o055:
            part.chmod(part.stat().st_mode | 0o055)


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
        name: train, evaluate or predict.
        arguments: of its command line.
        folder: for what it prints.
        presets: settings that have no flag, set as if the preset said so, in addition to SMALLEST.
        constants: constants of the command's module, such as how often it reports.
        file_limit: bytes that a file may have (as `ulimit -f`).
        user: user number to run as, if this is the superuser.
    """

    def __init__(self, name: str, arguments: list[str], folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.process: ForkServerProcess = _server().Process(target=_child, args=(name, arguments, folder, options))
        self.process.start()

    def kill(self, which: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process and its workers, as a terminal does; without effect if it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, which)

    @property
    def _pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self._read('out')} {self._read('err')}")
        measured = self._read("measured").split() or ["nan", "-1"]
        return Ended(self.process.exitcode, self._read("out"), self._read("err"), float(measured[0]), int(measured[1]))

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


def run(name: str, arguments: list[str], folder: Path, **options: Any) -> Ended:
    """Run a command to its end; skips where the user named has no way to the Python installation."""
    if options.get("user") is not None and os.geteuid() == 0:
        for place in map(Path, (torch.__file__, __file__)):
            if any(not part.stat().st_mode & 0o001 for part in place.resolve().parents):
                pytest.skip(f"{place} lies in a folder that is closed to other users")
    return Running(name, arguments, folder, **options).end()


def wait_until(process: Running, happened: Callable[[], bool]) -> None:
    """Return as soon as something has happened, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while process.process.exitcode is None and not happened():
        assert time.monotonic() < deadline, "it never happened"
        process.process.join(0.0002)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    commands = [f"almrr_ref.{name}" for name in ("train", "evaluate", "predict")]
    context.set_forkserver_preload(["trust_cases", *commands, "torch._dynamo"])  # optimisers import the last, slowly
    return context


def _child(name: str, arguments: list[str], folder: Path, options: dict[str, Any]) -> None:
    """In the child: redirect, limit, run the command's main, and note what it needed."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with "&" has it ignored
    multiprocessing.set_start_method(None, force=True)  # for workers: as in a command that nobody forked
    for stream, number in (("out", 1), ("err", 2)):
        descriptor = os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as we do)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    module = import_module(f"almrr_ref.{name}")
    vars(module).update(options.get("constants", {}))
    import_module("almrr_ref.config").PRESETS["small"].update(SMALLEST, **options.get("presets", {}))
    measured = os.open(folder / "measured", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if options.get("user") is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(options["user"])
        os.setuid(options["user"])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if options.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_limit"], unlimited[1]))
    try:
        code = module.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    os.write(measured, f"{peak} {after - before}".encode())
    sys.stdout.flush()
    sys.exit(code)
