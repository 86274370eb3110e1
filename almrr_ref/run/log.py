"""The progress of a training run, logged and in log.jsonl; and the signals that stop it."""

import json
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from almrr_ref.run.distributed import mean, rank
from almrr_ref.run.files import atomic_write, writing
from almrr_ref.run.text import LOGGER, duration


class StopSignal:
    """Within this block, the first Ctrl-C or SIGTERM only sets ``requested``; a second one has its usual effect.

    Only the main thread gets signals: in any other thread the block changes nothing.
    """

    requested: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.getsignal(number) for number in numbers}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def loss_values(losses: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Losses of some steps as numbers, over all ranks; the host waits for the device once."""
    values = iter(mean(torch.stack([loss for step in losses for loss in step.values()]).cpu()).tolist())
    return [{name: next(values) for name in step} for step in losses]


def mean_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each loss over the steps that have it: rec, focal, dice."""
    names = sorted({name for step in losses for name in step}, reverse=True)
    return {name: statistics.fmean(step[name] for step in losses if name in step) for name in names}


class TrainingLog:
    """Messages and lines of log.jsonl: losses, rate, images per second, time left. Under torchrun rank 0 writes.

    Args:
        path: log.jsonl, or None; lines of steps after ``first``, left by a run that was killed, are removed.
        first, steps: number of steps already done, and of all.
    """

    def __init__(self, path: Path | None, first: int, steps: int, batch_size: int) -> None:
        self.path, self.steps, self.batch_size = path, steps, batch_size
        if path and rank() == 0:
            lines = path.read_text(errors="replace").splitlines() if first and path.exists() else []
            atomic_write(path, "".join(line + "\n" for line in lines if _step_of(line) <= first))
        self.done = self.first = first
        self.start = self.reported = self.shown = time.monotonic()

    def report(self, done: int, means: dict[str, float], rate: float) -> None:
        """Log the mean of each loss over the steps since the last report."""
        if rank():
            return
        now = time.monotonic()
        speed = (done - self.done) * self.batch_size / max(now - self.reported, 1e-9)
        self.done, self.reported = done, now
        entry = {"step": done, "lr": rate, "images_per_second": round(speed, 2)}
        if self.path:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(entry | {f"loss_{name}": mean for name, mean in means.items()}) + "\n")
        if now - self.shown > 5 or done == self.steps or done - self.first <= 20:
            self.shown = now
            left = (self.steps - done) * (now - self.start) / max(1, done - self.first)
            shown = "  ".join(f"L_{name} {mean:.4f}" for name, mean in means.items())
            LOGGER.info("step %d/%d  %s  %.1f images/s  %s left", done, self.steps, shown, speed, duration(left))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a half-written last line of a killed run
