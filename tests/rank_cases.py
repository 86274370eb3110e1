"""A command in several ranks, without torchrun around them, so that one rank can be broken on purpose."""

import errno
import itertools
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trust_cases import SMALLEST, SMALLEST_FLAGS, TIMEOUT, _server

from almrr_ref import evaluate, predict, train, training
from almrr_ref.config import PRESETS
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.deploy import inference
from almrr_ref.run import distributed
from almrr_ref.run.files import output_error

Act = Callable[[], float | None]


@dataclass(frozen=True)
class Rank:
    """How one rank ended: exit code (negative: the signal), what it wrote, and what the function returned."""

    code: int
    out: str
    err: str
    result: Any


def in_ranks(function: Callable[..., Any], arguments: list[Any], folder: Path, count: int = 2) -> list[Rank]:
    """Call a function of a test module in `count` processes, with the variables that torchrun sets."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun holds it
    start = _server().Process
    ranks = [start(target=_rank, args=(r, count, store.port, function, arguments, folder)) for r in range(count)]
    for process in ranks:
        process.start()
    ended = []
    for r, process in enumerate(ranks):
        process.join(TIMEOUT)
        if process.exitcode is None:
            for hanging in ranks:
                hanging.kill()
            raise AssertionError(f"rank {r} hangs: {(folder / f'err{r}').read_text()}")
        result = folder / f"result{r}"
        value = pickle.loads(result.read_bytes()) if result.exists() else None
        texts = [(folder / f"{stream}{r}").read_text() for stream in ("out", "err")]
        ended.append(Rank(process.exitcode, *texts, value))
    return ended


def error_lines(ranks: list[Rank]) -> list[str]:
    """What all ranks wrote to stderr, but for warnings."""
    return [line for rank in ranks for line in rank.err.splitlines() if not line.startswith("warning: ")]


def _rank(r: int, count: int, port: int, function: Callable[..., Any], arguments: list[Any], folder: Path) -> None:
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    for stream, number in (("out", 1), ("err", 2)):
        descriptor = os.open(folder / f"{stream}{r}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as we do)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    PRESETS[SMALLEST_FLAGS[1]].update(SMALLEST)
    code, result = function(*arguments)
    (folder / f"result{r}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.exit(code)


def on_call(number: int, act: Act | None) -> Act:
    """A function that acts when it is called for the `number`th time on the last rank, and returns a factor."""
    calls = itertools.count(1)

    def called() -> float:
        last_rank = distributed.rank() == distributed.world_size() - 1
        return (act() or 1.0) if next(calls) == number and act and last_rank else 1.0

    return called


def watched_train(flags: list[str], at_step: int = 0, act: Act | None = None) -> tuple[int, Any]:
    """Train; on the last rank, act in step `at_step` and multiply its losses by what comes of it.

    Returns:
        Exit code; weights at the end, numbers of the samples drawn for training.
    """
    weights: dict[str, torch.Tensor] = {}
    drawn: list[int] = []
    fit, compute, sample = training.Trainer.fit, training.training_losses, TrainingSamples.__getitem__
    factor = on_call(at_step, act)

    def watched_fit(trainer: training.Trainer) -> Any:
        drawn.clear()  # of the sample sheet
        stopped = fit(trainer)
        weights.update(trainer.model.state_dict())
        return stopped

    def watched_losses(*arguments: Any) -> dict[str, torch.Tensor]:
        losses, by = compute(*arguments), factor()
        return {name: loss * by for name, loss in losses.items()}

    def watched_sample(samples: TrainingSamples, number: int) -> Any:
        drawn.append(number)
        return sample(samples, number)

    training.Trainer.fit, training.training_losses = watched_fit, watched_losses  # type: ignore[method-assign]
    TrainingSamples.__getitem__ = watched_sample  # type: ignore[method-assign]
    return train.main(flags), (weights, drawn)


def watched_predict(flags: list[str], at_file: int = 0, act: Act | None = None) -> tuple[int, Any]:
    """Predict; on the last rank, act before writing the map of its file number `at_file`.

    Returns:
        Exit code; names of the files that this rank decoded.
    """
    decoded: list[str] = []
    decode, save, about_to_save = inference._decode, predict.save_map, on_call(at_file, act)

    def watched_decode(path: Any, size: int | None) -> Any:
        decoded.append(path.name)
        return decode(path, size)

    def watched_save(*arguments: Any) -> None:
        about_to_save()
        save(*arguments)

    inference._decode, predict.save_map = watched_decode, watched_save
    return predict.main(flags), decoded


def evaluate_once(flags: list[str]) -> tuple[int, None]:
    return evaluate.main(flags), None


interrupt, terminate = partial(signal.raise_signal, signal.SIGINT), partial(signal.raise_signal, signal.SIGTERM)
not_a_number = partial(float, "nan")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk() -> None:
    raise output_error(OSError(errno.ENOSPC, ""), "the map")
