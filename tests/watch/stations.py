"""A station at work in a thread, and what the tests wait for."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trust_cases import read_scores

from almrr_ref import Detector
from almrr_ref.watch.station import Station


@contextmanager
def watching(checkpoint: Path, camera: Path, **options: Any) -> Iterator[Station]:
    """A station at work in a thread, with the network's threshold or one that half of the pictures reach."""
    detector = Detector.load(checkpoint, "cpu", options.pop("threshold", None))
    saved = options.pop("save", lambda result, name: None)
    watched = Station(lambda: detector, camera, camera.parent / "out", saved, **options)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            watched.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield watched
    finally:
        watched.stop.set()
        thread.join()
    assert not failed


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def rows(out: Path) -> list[dict[str, str]]:
    return read_scores(out) if (out / "scores.csv").exists() else []
