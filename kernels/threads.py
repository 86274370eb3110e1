"""Threads for compiled code: those of PyTorch's operators where they can be had, and Python's otherwise.

PyTorch's threads stay awake for some milliseconds after an operator, waiting for the next one. Threads of another pool
find no free core then, and begin when all is done. So the work goes to PyTorch's own: to OpenMP, by the function that
compilers call for a parallel region. Where that is not found (macOS, Windows), Python's threads do as well, only later.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MEMBER = ctypes.CFUNCTYPE(None)  # OpenMP passes an argument, which nobody reads
FIRST_PROCESS = os.getpid()  # as the package is imported: the first scan may come after a fork


def run_together(function: Callable[[], None], count: int, alive: object) -> None:
    """Call a function `count` times at once, or less often: each call takes what is left of a common work.

    Args:
        function: raises nothing, and is no Python code: Ctrl-C would end that where its exception is lost.
        alive: what is to live until the last call has ended, even if Ctrl-C ends the wait for it.
    """
    team = _openmp(os.getpid()) if count > 1 else None
    if team is not None:
        team(MEMBER(function), None, count, 0)
        return
    others: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # no thread is to be had, as at the interpreter's end: this one does all
        for _ in range(1, count):
            others.append(_pool(os.getpid()).submit(_call, function, alive))
    function()
    for other in others:
        if not other.cancel():  # one that has not begun has nothing left to do
            other.result()


def _call(function: Callable[[], None], alive: object) -> None:
    function()


@functools.cache
def _openmp(process: int) -> Any:
    """GOMP_parallel(function, data, threads, flags) of GNU's, LLVM's or Intel's OpenMP; None if it cannot be called.

    A forked process has no threads of it, but OpenMP believes so and would wait for them.
    """
    if process != FIRST_PROCESS:
        return None
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows
        return None


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Python's threads of a process: a fork takes none along."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="almrr-scan")
