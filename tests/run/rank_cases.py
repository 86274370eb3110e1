"""A command in several ranks, without torchrun around them, so that one rank can be broken on purpose."""

import errno
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from trust_cases import TIMEOUT, fork_server, redirect_output

from almrr_ref import fit, predict, train, training
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.model import ALMRR
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
    distributed.end_process(code)  # as the commands end


def error_lines(ranks: list[Rank]) -> list[str]:
    """What all ranks wrote to stderr, but for warnings."""
    return [line for rank in ranks for line in rank.err.splitlines() if not line.startswith("warning: ")]


def on_last_rank() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def command(name: str, flags: list[str]) -> tuple[int, None]:
    """Run a command -> its exit code."""
    return import_module(f"almrr_ref.{name}").main(flags), None


def watched_train(flags: list[str], act: Callable[[ALMRR], object] | None = None) -> tuple[int, Any]:
    """Train; on the last rank, ``act`` before the second step: -> exit code; weights, samples drawn."""
    models: list[ALMRR] = []  # of every step
    drawn: list[int] = []
    losses_of, sample = training.training_losses, TrainingSamples.__getitem__

    def watched_losses(model: ALMRR, *arguments: Any) -> dict[str, torch.Tensor]:
        models.append(model)
        if act and len(models) == 2 and on_last_rank():
            act(model)
        return losses_of(model, *arguments)

    def watched_sample(samples: TrainingSamples, number: int) -> Any:
        drawn.append(number)
        return sample(samples, number)

    fit.save_sample_sheet = fit.how_long = lambda *_: ""  # they draw, too
    training.training_losses = watched_losses
    TrainingSamples.__getitem__ = watched_sample  # type: ignore[method-assign]
    code = train.main(flags)
    return code, (dict(models[-1].state_dict()) if models else {}, drawn)


def broken_predict(flags: list[str], act: Callable[[], object]) -> tuple[int, None]:
    """Predict; on the last rank, ``act`` before writing the second map."""
    save, saved = predict.save_map, []  # type: ignore[var-annotated]

    def watched_save(*arguments: Any) -> None:
        saved.append(arguments)
        if len(saved) == 2 and on_last_rank():
            act()
        save(*arguments)

    predict.save_map = watched_save
    return predict.main(flags), None


def interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def terminate(*_: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def die(*_: object) -> None:
    signal.raise_signal(signal.SIGKILL)


def die_in_backward(model: ALMRR) -> None:
    next(model.mfrm.parameters()).register_hook(die)


@torch.no_grad()
def ruin_a_weight(model: ALMRR) -> None:
    next(model.mfrm.parameters()).mul_(float("nan"))


def fill_the_disk() -> None:
    raise output_error(OSError(errno.ENOSPC, ""), "the map")
