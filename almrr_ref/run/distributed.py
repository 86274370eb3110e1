"""Several processes as one run, started by ``torchrun --nproc_per_node=N -m almrr_ref.train ...`` (or predict).

Each process is a rank from 0 to N - 1 and computes its share. What they exchange goes through torch.distributed: gloo
on CPUs, NCCL for tensors on GPUs (one GPU a rank). Rank 0 prints and writes. Without torchrun there is one rank, and
every function here returns at once: the single process computes exactly what it would without this module.

Only the first rank that fails says why. The others then fail because it is gone, which would hide the cause.

Source: own. The gradients are averaged by hand, not by DistributedDataParallel: a step runs the network's modules one
by one, and its trainable weights are few beside its work, so that hiding the exchange behind the backward pass would
gain little.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says to a process
_LONGEST_WAIT = timedelta(days=7)  # rank 0 may measure, draw and write for hours while the others wait
T = TypeVar("T")


class GroupError(ValueError):
    """Another rank is gone, or the ranks do not agree."""


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ["RANK"]) if all(name in os.environ for name in _VARIABLES) else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _VARIABLES) else 1


def share(batch_size: int) -> int:
    """How much of a batch is this rank's.

    Raises:
        ValueError: if it cannot be shared evenly: the mean over the ranks would not be the mean over the samples.
    """
    if batch_size % world_size():
        raise ValueError(f"--batch-size {batch_size} is no multiple of the {world_size()} processes that share a batch")
    return batch_size // world_size()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks within this block; ranks other than 0 print nothing to stdout in it.

    A rank that fails after another one has failed ends with exit code 2 and without a message. SIGTERM, which torchrun
    sends to the ranks that are left when one has died, is an error (training, which saves first, sets its own handler).

    Raises:
        GroupError: if the group cannot be formed.
    """
    if world_size() == 1:
        yield
        return
    with _gone():
        store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_LONGEST_WAIT)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with contextlib.ExitStack() as stack:
            if number:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except (Exception, KeyboardInterrupt) as error:
        if not _first_to_fail(store):
            raise SystemExit(2) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, whose work is done; a rank of several at once, its output flushed.

    That is without the destructors of PyTorch's communication: now and then one finds a thread of its own still running
    as the interpreter ends and aborts, and torchrun then ends the ranks that are still at work.
    """
    if world_size() > 1:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _end(*_: int | FrameType | None) -> None:
    raise GroupError("ended by SIGTERM: torchrun was stopped, or another process of this run has died")


def _first_to_fail(store: dist.Store) -> bool:
    try:
        return int(store.add("almrr_ref/failed", 1)) == 1
    except RuntimeError:
        return False  # whoever holds the store is gone, so this is not the first


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """An exchange that fails, does so because another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:150]
        raise GroupError(f"another process of this run is gone, so this one ends ({reason})") from error


def local_device(device: torch.device) -> torch.device:
    """This rank's device: its own GPU of the machine if the device is "cuda".

    Raises:
        ValueError: if the machine has fewer GPUs than ranks.
    """
    if world_size() == 1 or device.type != "cuda":
        return device
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()}); "
            f"use --nproc_per_node={torch.cuda.device_count()}, or --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` on rank 0 alone and return its result on all; the others wait. The result must be picklable."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    with _gone():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _gone():
        dist.all_gather_object(values, value)
    return values


def check_equal(value: object, what: str) -> None:
    """Refuse to go on if the ranks have read different things.

    Raises:
        GroupError: naming what differs.
    """
    if any(other != value for other in gathered(value)):
        raise GroupError(f"the processes of this run do not see the same {what}; was it changed meanwhile? start again")


def largest(value: int) -> int:
    """The largest value of all ranks, on all of them: how they agree to stop."""
    return value if world_size() == 1 else int(_reduced(torch.tensor(value), dist.ReduceOp.MAX))


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, element by element."""
    return values if world_size() == 1 else _reduced(values.clone()) / world_size()


def _reduced(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    with _gone():
        dist.all_reduce(values, operation)
    return values


@torch.no_grad()
def _replace(tensors: Iterable[Tensor], exchange: Callable[[Tensor], Tensor]) -> None:
    """Exchange tensors of one dtype and device as one, which takes one wait instead of hundreds."""
    parts = list(tensors)
    if parts:
        flat = exchange(torch.cat([part.flatten() for part in parts]))
        for part, new in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(new.view_as(part))


def average_gradients(model: nn.Module) -> None:
    """Give every parameter the mean of its gradient over the ranks."""
    if world_size() > 1:
        _replace((p.grad for p in model.parameters() if p.grad is not None), mean)


def average_running_statistics(model: nn.Module | None) -> None:
    """Average the running means and variances of the batch norms over the ranks, so that all shares count.

    Training itself does not read them. They are linear in what each batch contributes, so it does not matter when, or
    how often, they are averaged.
    """
    if world_size() > 1 and model is not None:
        _replace((b for b in model.buffers() if b.is_floating_point()), mean)


def copy_from_first(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            with _gone():
                _replace([tensor], _broadcast)


def _broadcast(values: Tensor) -> Tensor:
    dist.broadcast(values, src=0)
    return values
