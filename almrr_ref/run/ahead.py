"""Work in threads ahead of the loop that takes the results: decoding before the network, writing after it."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = min(8, max(2, os.cpu_count() or 2))  # of one stage
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped_ahead(function: Callable[[Item], Answer], items: Iterable[Item], ahead: int) -> Iterator[Answer]:
    """Call a function on every item in threads, at most ``ahead`` items before the one whose result is awaited.

    Results come in the order of the items. An exception is raised in place of its result; after that, or once the
    caller stops, no further call begins.
    """
    waiting: deque[Future[Answer]] = deque()
    pool = ThreadPoolExecutor(min(THREADS, ahead))

    def calls() -> Iterator[Future[Answer]]:
        try:
            for item in items:
                yield pool.submit(function, item)
        except Exception as error:  # of the items: raised in its turn
            failed: Future[Answer] = Future()
            failed.set_exception(error)
            yield failed

    try:
        for call in calls():
            waiting.append(call)
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of ``size``, the last one shorter. An exception of theirs is raised behind the items before it."""
    batch: list[Item] = []
    failure: Exception | None = None
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception as error:
        failure = error
    if batch:
        yield batch
    if failure is not None:
        raise failure
