"""The thread that has the network outlives what fails, and leaves nobody waiting when it ends."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from almrr_ref.serve.judging import Judge

PICTURE = np.zeros((4, 4, 3), np.uint8)


def test_a_detector_that_cannot_be_loaded_costs_its_pictures_alone() -> None:
    given: Iterator[Any] = iter([RuntimeError("the GPU is full"), SimpleNamespace(batch_size=2, stream=list)])

    def detector() -> Any:
        if isinstance(one := next(given), Exception):
            raise one
        return one

    with Judge(detector) as judge:
        with pytest.raises(RuntimeError, match="GPU is full"):
            judge.submit(PICTURE).result(timeout=20)
        assert judge.submit(PICTURE).result(timeout=20) is PICTURE


def test_whoever_waits_when_it_ends_gets_an_answer() -> None:
    go_on = threading.Event()

    def stream(pictures: list[Any]) -> list[Any]:
        go_on.wait(20)
        return pictures

    with Judge(lambda: SimpleNamespace(batch_size=4, stream=stream)) as judge:  # type: ignore[arg-type, return-value]
        futures = [judge.submit(PICTURE) for _ in range(3)]
        judge._waiting.put(None)
        futures += [judge.submit(PICTURE) for _ in range(2)]
        go_on.set()
    futures.append(judge.submit(PICTURE))
    assert all(future.done() for future in futures)
    assert not any(future.cancelled() for future in futures[:3])
