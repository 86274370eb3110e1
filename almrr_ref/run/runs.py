"""A training run's surroundings: its folder, its images, its log, and how it is stopped."""

import json
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from almrr_ref.config import PRESETS, make_configs
from almrr_ref.data.layouts import DataSet, describe, find_dataset
from almrr_ref.demo.surfaces import write_demo
from almrr_ref.run.checkpoint import SAMPLES_FORMAT, read_checkpoint
from almrr_ref.run.distributed import rank
from almrr_ref.run.files import atomic_write, hold_folder, make_folder, output_error
from almrr_ref.run.text import duration, one_line

MAY_CHANGE = ("workers",)  # settings that a resumed run may have otherwise: they do not touch the result


def open_run(
    out: Path | None, data: str, wanted: dict[str, Any], resume: bool, overwrite: bool, at_end: ExitStack
) -> tuple[Path, dict[str, Any] | None]:
    """Find or make the folder of a run, and the checkpoint to continue from.

    Args:
        out: the folder, or None for runs/NAME of the data.
        data: the --data value.
        wanted: the settings named by preset and flags; a resumed run must have the same.
        at_end: takes what keeps other runs out of the folder until this one ends.

    Returns:
        The folder, and the checkpoint's dictionary if the run is resumed (None if there is nothing to resume yet).
    Raises:
        ValueError: if a run is already there and neither is said, another process is at it, or a setting differs from
            the resumed run's.
    """
    if not data:
        raise ValueError("--data is empty; give a folder of images, or 'demo'")
    run = out or Path("runs") / (Path(data).resolve().name or "root")
    last = run / "last.pt"
    if run.is_file():
        raise ValueError(f"--out {run} is a file; name a folder")
    if data != "demo" and Path(data).resolve() in [run.resolve(), *run.resolve().parents]:
        raise ValueError(f"--out {run} lies in the data folder, whose images are trained on; name a folder elsewhere")
    at_end.enter_context(hold_folder(make_folder(run)))
    if last.exists() and not (resume or overwrite):
        raise ValueError(
            f"{run} holds a run already; continue it with --resume, replace it with --overwrite, or name another --out"
        )
    if not resume:
        return run, None
    if not last.exists():
        print(f"no checkpoint in {one_line(run)} yet: starting from the beginning")
        return run, None
    content = read_checkpoint(last)
    if content["format"] < SAMPLES_FORMAT and content["training"]["step"] < content["training"]["steps"]:
        raise ValueError(
            f"--resume: the run in {run} was begun by an older version, whose samples were drawn otherwise; start anew "
            "with another --out, or with --overwrite"
        )
    stored = {**content["model_config"], **content["train_config"]}
    for name, value in wanted.items():
        kept = stored[name]
        if name not in MAY_CHANGE and _plain(name, value) != _plain(name, kept):
            raise ValueError(
                f"--resume: the run in {run} has {name.replace('_', '-')} {kept}, not {value}; "
                "give the flags of its first command again, or start anew with another --out"
            )
    return run, content


def _plain(name: str, value: Any) -> Any:
    """A setting in the form in which two of them can be compared: folders as absolute paths, lists as tuples."""
    if name in ("data", "anomaly_source", "weights") and value not in (None, "demo", "random"):
        return Path(value).resolve()
    return tuple(value) if isinstance(value, list) else value


def wanted_settings(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line names, by preset or flag, for comparing with a run to resume.

    Raises:
        ValueError: as `make_configs`.
    """
    values = {name: value for config in make_configs(preset or "paper", given) for name, value in vars(config).items()}
    return {name: values[name] for name in {**PRESETS.get(preset or "", {}), **given}}


def open_data(data: str, run: Path) -> DataSet:
    """Detect the layout of a data folder, or write the demo set into the run's folder, and say what was found."""
    if data == "demo":
        folder = run / "demo-images"
        if not folder.is_dir():
            part = run / ".demo-images.part"
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it drew them
            write_demo(part)
            part.rename(folder)
        data = str(folder)
    data_set = find_dataset(data)
    print(describe(data_set))
    return data_set


class StopSignal:
    """Within this block, the first Ctrl-C or SIGTERM only sets ``requested``, so that the run can save.

    A second one has its usual effect at once.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def __enter__(self) -> "StopSignal":
        for which in (signal.SIGINT, signal.SIGTERM):
            self._before[which] = signal.signal(which, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


class TrainingLog:
    """Lines on the screen and in log.jsonl: loss by part, rate, images per second, time left; and when to save.

    Under torchrun only rank 0 writes.

    Args:
        path: log.jsonl; lines of steps after ``first`` (from a run that was killed after its last checkpoint) are
            removed.
        first: steps already done.
        steps: steps of the whole run.
        batch_size: images a step.
        save_minutes: time between two checkpoints.
    """

    def __init__(self, path: Path, first: int, steps: int, batch_size: int, save_minutes: float) -> None:
        self.path, self.steps, self.batch_size, self.save_seconds = path, steps, batch_size, 60 * save_minutes
        kept = (
            [line for line in path.read_text(errors="replace").splitlines() if first and _step_of(line) <= first]
            if path.exists()
            else []
        )
        if rank() == 0:
            atomic_write(path, "".join(line + "\n" for line in kept))
        self.done = self.first = first
        self.start = self.reported = self.saved = self.shown = time.monotonic()

    def report(self, done: int, losses: dict[str, list[float]], rate: float) -> None:
        """Log the mean of each part of the loss over the steps since the last report."""
        if rank():
            return
        now = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        speed = (done - self.done) * self.batch_size / max(now - self.reported, 1e-9)
        self.done, self.reported = done, now
        entry = {
            "step": done,
            "lr": rate,
            "images_per_second": round(speed, 2),
            **{f"loss_{k}": v for k, v in means.items()},
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise output_error(error, self.path) from error
        if now - self.shown > 5 or done == self.steps or done - self.first <= 20:
            self.shown = now
            left = (self.steps - done) * (now - self.start) / max(1, done - self.first)
            parts = "  ".join(f"L_{name} {value:.4f}" for name, value in means.items())
            print(f"step {done}/{self.steps}  {parts}  {speed:.1f} images/s  {duration(left)} left", flush=True)

    def save_is_due(self) -> bool:
        """Whether the time between checkpoints has passed; asking resets the clock when it has."""
        if time.monotonic() - self.saved < self.save_seconds:
            return False
        self.saved = time.monotonic()
        return True


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a half-written last line of a killed run
