"""Work in threads ahead of the loop that takes the results: decoding before the network, writing after it."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = min(8, max(2, os.cpu_count() or 2))  # of one stage
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def mapped_ahead(function: Callable[[Item], Answer], items: Iterable[Item], ahead: int) -> Iterator[Answer]:
    """Call a function on every item in threads, at most ``ahead`` items before the one whose result is awaited.

    Results come in the order of the items. An exception is raised in place of its result; after that, or once the
    caller stops, no further call begins.
    """
    waiting: deque[Future[Answer]] = deque()
    pool = ThreadPoolExecutor(min(THREADS, ahead))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
