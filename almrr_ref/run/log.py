"""The progress of a training run: on the screen, in log.jsonl, and how it is stopped."""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from almrr_ref.run.distributed import rank
from almrr_ref.run.files import atomic_write, writing
from almrr_ref.run.text import duration


class StopSignal:
    """Within this block, the first Ctrl-C or SIGTERM only sets ``requested``; a second one has its usual effect."""

    requested: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class TrainingLog:
    """Lines on the screen and in log.jsonl: losses, rate, images per second, time left. Under torchrun rank 0 writes.

    Args:
        path: log.jsonl; lines of steps after ``first``, of a run that was killed, are removed.
        first, steps: how many are already done, and how many there are in all.
    """

    def __init__(self, path: Path, first: int, steps: int, batch_size: int) -> None:
        self.path, self.steps, self.batch_size = path, steps, batch_size
        lines = path.read_text(errors="replace").splitlines() if first and path.exists() else []
        if rank() == 0:
            atomic_write(path, "".join(line + "\n" for line in lines if _step_of(line) <= first))
        self.done = self.first = first
        self.start = self.reported = self.shown = time.monotonic()

    def report(self, done: int, losses: dict[str, list[float]], rate: float) -> None:
        """Log the mean of each loss over the steps since the last report."""
        if rank():
            return
        now = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        speed = (done - self.done) * self.batch_size / max(now - self.reported, 1e-9)
        self.done, self.reported = done, now
        entry = {"step": done, "lr": rate, "images_per_second": round(speed, 2)}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry | {f"loss_{name}": mean for name, mean in means.items()}) + "\n")
        if now - self.shown > 5 or done == self.steps or done - self.first <= 20:
            self.shown = now
            left = (self.steps - done) * (now - self.start) / max(1, done - self.first)
            shown = "  ".join(f"L_{name} {mean:.4f}" for name, mean in means.items())
            print(f"step {done}/{self.steps}  {shown}  {speed:.1f} images/s  {duration(left)} left", flush=True)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a half-written last line of a killed run
