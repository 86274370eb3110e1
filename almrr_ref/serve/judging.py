"""The one thread that runs the network, which judges queued pictures together; and the counts for /metrics."""

import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from almrr_ref.calibration.drift import LIMIT, Drift
from almrr_ref.data.images import ImageError
from almrr_ref.detector import Detector
from almrr_ref.report.result import Result

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds


class Judge:
    """Pictures -> results, in one thread; use as a context manager.

    Args:
        detector: called before every batch, since the network may have changed.
    """

    def __init__(self, detector: Callable[[], Detector]) -> None:
        self._detector = detector
        self._waiting: queue.Queue[tuple[np.ndarray, Future[Result]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)

    def submit(self, pixels: np.ndarray) -> "Future[Result]":
        """Queue a picture, uint8 (h, w, 3), for its result, or an ImageError, RuntimeError or MemoryError."""
        future: Future[Result] = Future()
        self._waiting.put((pixels, future))
        if not self._thread.is_alive():  # it has ended and would never answer
            future.cancel()
        return future

    def _work(self) -> None:
        while first := self._waiting.get():
            batch = [first]
            try:
                detector = self._detector()
                while len(batch) < detector.batch_size and not self._waiting.empty():
                    if (entry := self._waiting.get()) is None:
                        self._waiting.put(None)  # the end, once these are judged
                        break
                    batch.append(entry)
                results = list(detector.stream([pixels for pixels, _ in batch]))
            except (ValueError, RuntimeError, MemoryError, OSError) as error:  # PyTorch's, such as a full GPU
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results):
                if isinstance(result, ImageError):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def __enter__(self) -> "Judge":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        while not self._waiting.empty():
            if entry := self._waiting.get():
                entry[1].cancel()


class Counts:
    """Counts of pictures judged and requests refused, for /metrics. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pictures: Counter[str] = Counter({"good": 0, "defective": 0})
        self.refused: Counter[str] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds, self._timed = 0.0, 0

    def judged(self, verdict: str, seconds: float | None = None) -> None:
        """Count a picture; ``seconds`` from its bytes to its result."""
        with self._lock:
            self.pictures[verdict] += 1
            if seconds is not None:
                self._seconds, self._timed = self._seconds + seconds, self._timed + 1
                self._buckets.update(limit for limit in BUCKETS if seconds <= limit)

    def refuse(self, reason: str) -> None:
        """Count a request that got no result."""
        with self._lock:
            self.refused[reason] += 1

    def text(self, in_flight: int, threshold: float | None, drift: Drift) -> str:
        """The metrics in Prometheus' text format; ``in_flight``: pictures between arrival and answer."""
        with self._lock:
            lines = ["# TYPE almrr_pictures_total counter"]
            lines += [f'almrr_pictures_total{{verdict="{name}"}} {n}' for name, n in sorted(self.pictures.items())]
            lines += ["# TYPE almrr_refused_total counter"]
            lines += [f'almrr_refused_total{{reason="{name}"}} {n}' for name, n in sorted(self.refused.items())]
            lines += ["# TYPE almrr_judging_seconds histogram"]
            lines += [f'almrr_judging_seconds_bucket{{le="{limit}"}} {self._buckets[limit]}' for limit in BUCKETS]
            lines += [f'almrr_judging_seconds_bucket{{le="+Inf"}} {self._timed}']
            lines += [f"almrr_judging_seconds_sum {self._seconds:.6f}", f"almrr_judging_seconds_count {self._timed}"]
        lines += ["# TYPE almrr_waiting gauge", f"almrr_waiting {in_flight}"]
        lines += ["# TYPE almrr_threshold gauge"] + ([] if threshold is None else [f"almrr_threshold {threshold:.9g}"])
        lines += ["# HELP almrr_drift CUSUM of good pictures' scores against calibration; a warning from 1 on"]
        lines += ["# TYPE almrr_drift gauge"]
        lines += [f'almrr_drift{{kind="{kind}"}} {total / LIMIT:.4f}' for kind, total in drift.charts.items()]
        lines += ["# TYPE almrr_drift_warning gauge", f"almrr_drift_warning {int(bool(drift.standing))}"]
        return "\n".join(lines) + "\n"
