"""What is served: the network, the threads and processes around it, and the watched folder."""

import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from almrr_ref.calibration.by_hand import set_region, set_threshold
from almrr_ref.calibration.drift import Drift
from almrr_ref.config import VERSION
from almrr_ref.data.decoders import NAME, Decoders
from almrr_ref.data.roi import Polygon, draw_region
from almrr_ref.detector import Detector
from almrr_ref.report.overlays import encoded
from almrr_ref.report.result import Result
from almrr_ref.run.checkpoint import FIGURES, CheckpointError, read_checkpoint
from almrr_ref.run.files import hold_folder
from almrr_ref.run.text import LOGGER, one_line
from almrr_ref.serve.judging import Counts, Judge
from almrr_ref.watch.journal import Row, message
from almrr_ref.watch.station import DECODERS, Judged, Station

SHOWN = 200  # rows of the watched folder that the page can show
THUMBNAIL = 900  # pixels across, of their overlays
EXPORTED = "this is an exported network; change its last.pt and export again"


class Service:
    """One network and all that serves it; `running` keeps it at work.

    Args:
        path: the network's file; threshold and region can be changed if it is a last.pt.
        load: loads it: now, and whenever the file has changed.
        max_pixels: of the largest picture that is decoded.
    """

    def __init__(self, path: Path, load: Callable[[], Detector], max_pixels: int | None) -> None:
        self.path, self._load, self._max_pixels = path, load, max_pixels
        self.exported, self._changing = path.suffix.lower() == ".onnx", threading.RLock()
        self._written, self._detector = self._when_written(), load()
        self.counts, self.judge = Counts(), Judge(lambda: self.detector)
        self.drift = Drift.of(self.detector.calibration)
        self.station: Station | None = None
        self.failure = ""  # why the folder is no longer watched
        self._recent: deque[tuple[int, dict[str, Any], bytes]] = deque(maxlen=SHOWN)
        self._lock = threading.Lock()
        self._rows = time.time_ns() // 10**6  # of the last row; a restart begins higher: open pages go on

    @property
    def detector(self) -> Detector:
        """The network as its file has it: loaded again when `calibrate` or a training has replaced it."""
        with self._changing:
            if (written := self._when_written()) not in (self._written, None):
                self._written = written
                try:
                    self._reload()
                except ValueError as error:
                    LOGGER.warning(f"judging by the earlier network: {one_line(error)}")
        return self._detector

    def _when_written(self) -> tuple[int, int] | None:
        """Time of writing and inode, which tell one file from the next of its name; None while there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _reload(self) -> None:
        fresh = self._load()
        if fresh.levels != self._detector.levels:  # the decoders have the earlier ones
            raise ValueError(f"{one_line(self.path)} was trained on pictures of another depth; start again to serve it")
        self._detector = fresh
        self.drift.begin((fresh.calibration or {}).get("good_scores", ()))
        LOGGER.info(f"{one_line(self.path)} has changed; threshold {fresh.threshold}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep decoders, judge, and the station, if there is one, at work."""
        with Decoders(DECODERS, self.detector.levels, self._max_pixels) as self.decoders, self.judge:
            watching = threading.Thread(target=self._watch, name="station", daemon=True)
            if self.station:
                watching.start()
            try:
                yield
            finally:
                if self.station:
                    self.station.stop.set()
                    watching.join()

    def _watch(self) -> None:
        assert self.station
        try:
            self.station.run()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            self.failure = f"the folder is no longer watched: {error}"
            LOGGER.warning(self.failure)

    def judged(self, data: bytes) -> tuple[Result, float]:
        """An encoded picture -> its result and the seconds it took. Raises ValueError, RuntimeError, MemoryError."""
        start = time.monotonic()
        pixels, left_out = self.decoders.decode(data)
        self.detector.remark(NAME, left_out)
        result = self.judge.submit(pixels).result()
        seconds = time.monotonic() - start
        self.counts.judged(verdict(result), seconds)
        if self.station is None and result.threshold is not None and result.score < result.threshold:
            with self._lock:
                self.drift.add(result.score, result.threshold)
        return result, seconds

    def add_row(self, row: Row, result: Judged) -> None:
        """Take a new row of the watched folder, with its overlay, for the page."""
        entry, picture = message(row), b""
        self.counts.judged(entry["verdict"])
        if isinstance(result, Result):
            overlay = result.overlay().convert("RGB")
            overlay.thumbnail((THUMBNAIL, THUMBNAIL))
            picture = encoded(overlay, "JPEG", quality=85)
        with self._lock:
            self._rows += 1
            self._recent.append((self._rows, entry, picture))

    def rows_after(self, number: int) -> list[dict[str, Any]]:
        """Rows of the watched folder with a higher number, the oldest first."""
        with self._lock:
            return [{"number": n, **entry, "picture": bool(p)} for n, entry, p in self._recent if n > number]

    def picture_of(self, number: int) -> bytes:
        """The overlay of a row as JPEG; empty if there is none."""
        with self._lock:
            return next((picture for n, _, picture in self._recent if n == number), b"")

    def calibration(self) -> dict[str, Any]:
        """What another threshold would promise and find, and why none can be set."""
        record = self.detector.calibration or {}
        figures = {name: record.get(name, []) for name in (*FIGURES, "thresholds")}
        fixed = EXPORTED if self.exported else ""
        return {"threshold": self.detector.threshold, "changeable": bool(record), "fixed": fixed, **figures}

    def set_threshold(self, value: float) -> None:
        """Write a threshold into the checkpoint, and judge by it from now on. Raises ValueError."""
        self._change(lambda: set_threshold(self.path, value))

    def region(self) -> dict[str, Any]:
        """How much of a picture is judged, whether calibration was of another region, and why none can be drawn."""
        model, record = self.detector.model, self.detector.calibration or {}
        fixed = EXPORTED if self.exported else "this network sees tiles" if model.config.tile else ""
        share = 1.0 if model.roi is None else float(model.roi.float().mean())
        return {"share": share, "outdated": bool(record) and not set(FIGURES) <= set(record), "fixed": fixed}

    def region_png(self) -> bytes:
        """The mask of what is judged, white on black, at the network's size."""
        model = self.detector.model
        roi = torch.ones(model.config.size, dtype=torch.bool) if model.roi is None else model.roi.cpu()
        return encoded(Image.fromarray(roi.numpy()), "PNG")

    def set_region(self, polygons: Sequence[Polygon]) -> None:
        """Judge only inside these polygons from now on (none: whole pictures), by the checkpoint, too. ValueError."""
        png = draw_region(polygons, self.detector.model.config.size)
        self._change(lambda: set_region(self.path, png))

    def _change(self, change: Callable[[], None]) -> None:
        """Call ``change``, which rewrites the checkpoint, and load the new one. Raises ValueError."""
        if self.exported:
            raise CheckpointError(EXPORTED)
        with self._changing, hold_folder(self.path.parent):
            change()
            self._written = self._when_written()
            self._reload()

    def about(self) -> dict[str, Any]:
        """Network, training and versions."""
        content: dict[str, Any] = {}
        trouble = {}
        try:
            content = {} if self.exported else read_checkpoint(self.path)
        except CheckpointError as error:  # the earlier network still judges
            trouble = {"file now": str(error)}
        training = content.get("train_config", {})
        facts = {
            "network": str(self.path),
            **trouble,
            "backbone": self.detector.model.config.backbone,
            "image size": "{} x {} (height x width)".format(*self.detector.model.config.size),
            "tile": self.detector.tile or "no: whole images",
            "device": str(self.detector.model.device),
            "threshold": self.detector.threshold,
            "region of interest": f"{self.region()['share']:.0%} of a picture",
            "trained on": training.get("data", "not stated"),
            "steps": (content.get("training") or {}).get("step", "not stated"),
            "good images of the calibration": len((content.get("calibration") or {}).get("good_scores", [])),
        }
        versions = {f"trained with {name}": value for name, value in content.get("versions", {}).items()}
        now = {"almrr-ref": VERSION, "PyTorch": str(torch.__version__), "Python": platform.python_version()}
        return facts | versions | {f"running {name}": value for name, value in now.items()}


def verdict(result: Result) -> str:
    """good, defective, or none without a threshold."""
    return {False: "good", True: "defective", None: "none"}[result.defective]


def answer(result: Result, seconds: float) -> dict[str, Any]:
    """A result as JSON."""
    facts = {"verdict": verdict(result), "score": result.score, "threshold": result.threshold, "area": result.area}
    regions = [asdict(region) for region in result.regions]
    return {**facts, "box": result.box, "size": result.size, "regions": regions, "seconds": round(seconds, 4)}


def encoded_map(result: Result, kind: str) -> bytes:
    """The network's map as a grey PNG of 8 bits, 255 for 1, or as a float32 TIFF."""
    values = result.network_map[0].float()
    grey = (values * 255).round().clamp(0, 255).byte()
    return encoded(Image.fromarray((grey if kind == "png" else values).numpy()), kind.upper())
