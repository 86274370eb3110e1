"""Several processes as one run, started by ``torchrun --nproc_per_node=N -m almrr_ref.train ...`` (or predict).

Each process is a rank from 0 to N - 1 and computes its part of the work. Ranks exchange tensors and small objects: by
gloo on CPUs, by NCCL on GPUs (one GPU a rank). Rank 0 prints and writes. Without torchrun there is one rank, and
nothing here changes what it computes. Only the first rank that fails says why: the others fail because it is gone.
"""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
# What `wrap` made, held until the process ends. If an error dropped it after the group has gone, it would hold the
# interpreter's lock and wait for a thread of gloo's, which may itself wait for that lock.
_KEPT: list[nn.Module] = []
_LONGEST_WAIT = timedelta(days=7)  # rank 0 may measure, draw and write for hours while the others wait
T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ["RANK"]) if all(name in os.environ for name in _VARIABLES) else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _VARIABLES) else 1


def rank_batch_size(batch_size: int) -> int:
    """Images of a batch that this rank computes; ValueError if the ranks cannot have equally many."""
    if batch_size % world_size():
        raise ValueError(f"--batch-size {batch_size} is no multiple of the {world_size()} processes that share a batch")
    return batch_size // world_size()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks within this block; ranks other than 0 print nothing to stdout in it.

    A rank that fails after another one has failed ends with exit code 2 and without a message. SIGTERM, which torchrun
    sends to the ranks that are left when one has died, is an error (training, which saves first, sets its own handler).
    """
    if world_size() == 1:
        yield
        return
    with exchanging():
        store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_LONGEST_WAIT)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if number else sys.stdout):
            yield
    except (Exception, KeyboardInterrupt):
        failed_before = True
        with contextlib.suppress(RuntimeError):  # whoever holds the store is gone
            failed_before = store.add("almrr_ref/failed", 1) > 1
        if failed_before:
            end_process(2)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, its output flushed.

    One of several ranks ends without the destructors of PyTorch's communication: now and then one of them aborts, since
    its thread still runs, and torchrun then ends the ranks that are still working.
    """
    if world_size() > 1:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _end(*_: int | FrameType | None) -> None:
    raise ValueError("ended by SIGTERM: torchrun was stopped, or another process of this run has died")


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """For a block in which ranks exchange tensors: if that fails, another rank has ended; a ValueError says so."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0][:150]
        raise ValueError(f"another process of this run is gone, so this one ends ({reason})") from error


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` on rank 0 alone and return its result on all; the others wait. The result must be picklable."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    with exchanging():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


@contextlib.contextmanager
def entered_by_first(make: Callable[[], contextlib.AbstractContextManager[T]]) -> Iterator[T]:
    """Enter a context on rank 0 alone for as long as this block runs; all ranks get its value, as from `from_first`."""
    with contextlib.ExitStack() as stack:
        yield from_first(lambda: stack.enter_context(make()))


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with exchanging():
        dist.all_gather_object(values, value)
    return values


def check_equal(value: object, what: str) -> None:
    """Raise a ValueError that names what differs if the ranks have read different things."""
    if any(other != value for other in gathered(value)):
        raise ValueError(f"the processes of this run do not see the same {what}; was it changed meanwhile? start again")


def largest(value: int) -> int:
    """The largest value of all ranks, on all of them: how they agree to stop."""
    return int(_reduced(torch.tensor(int(value)), dist.ReduceOp.MAX))


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, element by element."""
    return _reduced(values.clone()) / world_size()


def _reduced(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if world_size() > 1:
        with exchanging():
            dist.all_reduce(values, operation)
    return values


def wrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, which gives every rank the weights of rank 0 and the mean gradients.

    Running statistics are not averaged in every step, but by `average_running_statistics` before they are written.
    """
    if world_size() == 1:
        return model
    with exchanging(), warnings.catch_warnings():
        for buffer in model.buffers():  # what rank 0 alone has measured; DDP may leave buffers out
            dist.broadcast(buffer, src=0)
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 gives broadcast_buffers another name
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    _KEPT.append(wrapped)
    return wrapped


@torch.no_grad()
def average_running_statistics(model: nn.Module | None) -> None:
    """Average the running means and variances of the batch norms over the ranks, so that all their images count.

    They are linear in what each batch contributes, so it does not matter when and how often they are averaged.
    """
    if world_size() > 1 and model is not None:
        for statistics in model.buffers():
            if statistics.is_floating_point():
                statistics.copy_(mean(statistics))
