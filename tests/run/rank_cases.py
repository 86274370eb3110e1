"""A command in several ranks, without torchrun around them, so that one rank can be broken on purpose."""

import errno
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trust_cases import TIMEOUT, fork_server, redirect_output

from almrr_ref import evaluate, predict, train, training
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.run import distributed
from almrr_ref.run.files import output_error


@dataclass(frozen=True)
class Rank:
    """How one rank ended: exit code (negative: the signal), what it wrote, and what the function returned."""

    code: int
    out: str
    err: str
    result: Any


def in_ranks(function: Callable[..., Any], arguments: list[Any], folder: Path, count: int = 2) -> list[Rank]:
    """Call a function, which returns an exit code and a result, in ``count`` processes, as torchrun starts them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun holds it
    start = fork_server().Process
    processes = [start(target=_rank, args=(r, count, store.port, function, arguments, folder)) for r in range(count)]
    for process in processes:
        process.start()
    ranks = []
    for r, process in enumerate(processes):
        process.join(TIMEOUT)
        if process.exitcode is None:
            for hanging in processes:
                hanging.kill()
            raise AssertionError(f"rank {r} hangs: {(folder / f'err{r}').read_text()}")
        result = folder / f"result{r}"
        value = pickle.loads(result.read_bytes()) if result.exists() else None
        texts = [(folder / f"{stream}{r}").read_text() for stream in ("out", "err")]
        ranks.append(Rank(process.exitcode, *texts, value))
    return ranks


def _rank(r: int, count: int, port: int, function: Callable[..., Any], arguments: list[Any], folder: Path) -> None:
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    redirect_output(folder / f"out{r}", folder / f"err{r}")
    code, result = function(*arguments)
    (folder / f"result{r}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.exit(code)


def error_lines(ranks: list[Rank]) -> list[str]:
    """What all ranks wrote to stderr, but for warnings."""
    return [line for rank in ranks for line in rank.err.splitlines() if not line.startswith("warning: ")]


def on_last_rank() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def watched_train(flags: list[str], act: Callable[..., Any] | None = None) -> tuple[int, Any]:
    """Train; on the last rank, ``act`` on the losses of the second step: -> exit code; weights, samples drawn."""
    weights: dict[str, torch.Tensor] = {}
    drawn: list[int] = []
    steps: list[Any] = []
    fit, losses_of, sample = training.Trainer.fit, training.training_losses, TrainingSamples.__getitem__

    def watched_fit(trainer: training.Trainer) -> Any:
        drawn.clear()  # of the sample sheet
        stopped = fit(trainer)
        weights.update(trainer.model.state_dict())
        return stopped

    def watched_losses(*arguments: Any) -> dict[str, torch.Tensor]:
        steps.append(arguments)
        acting = act if len(steps) == 2 and on_last_rank() else None
        if acting is die:
            die()
        losses = losses_of(*arguments)
        if acting:
            acting(losses)
        return losses

    def watched_sample(samples: TrainingSamples, number: int) -> Any:
        drawn.append(number)
        return sample(samples, number)

    training.Trainer.fit, training.training_losses = watched_fit, watched_losses  # type: ignore[method-assign]
    TrainingSamples.__getitem__ = watched_sample  # type: ignore[method-assign]
    return train.main(flags), (weights, drawn)


def broken_predict(flags: list[str], act: Callable[..., Any]) -> tuple[int, None]:
    """Predict; on the last rank, ``act`` before writing the second map."""
    save, saved = predict.save_map, []  # type: ignore[var-annotated]

    def watched_save(*arguments: Any) -> None:
        saved.append(arguments)
        if len(saved) == 2 and on_last_rank():
            act()
        save(*arguments)

    predict.save_map = watched_save
    return predict.main(flags), None


def evaluate_once(flags: list[str]) -> tuple[int, None]:
    return evaluate.main(flags), None


def enter_by_first(folder: Path) -> tuple[int, Any]:
    """Hold a context on rank 0 for a block of all ranks -> its value, the files that each rank sees in it."""

    class Held:
        def __enter__(self) -> str:
            (folder / f"entered{distributed.rank()}").touch()
            return "value"

        def __exit__(self, *_: object) -> None:
            (folder / f"left{distributed.rank()}").touch()

    with distributed.process_group():
        with distributed.entered_by_first(Held) as value:
            inside = distributed.gathered(sorted(path.name for path in folder.iterdir()))
        return 0, (value, inside)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_backward(losses: dict[str, torch.Tensor]) -> None:
    losses["rec"].register_hook(die)


def not_a_number(losses: dict[str, torch.Tensor]) -> None:
    losses["rec"] = losses["rec"] * float("nan")


def interrupt(_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def terminate(_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def fill_the_disk() -> None:
    raise output_error(OSError(errno.ENOSPC, ""), "the map")
