"""From a picture to a verdict: the one path for files, arrays and frames, which the commands use, too.

    picture -> 8 bits -> the network's size, or tiles -> anomaly map -> score -> verdict and regions

data/images.py turns pictures into pixels, deploy/predictor.py gives map and score, report/result.py finds the regions.
A picture is defective unless its score lies below the threshold; if its score is not a number, its result is an error.
"""

import dataclasses
import math
import os
import pickle
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.data.images import (
    ImageError,
    Levels,
    Picture,
    Remarks,
    copied_picture,
    is_one_picture,
    read_image,
    resize_image,
)
from almrr_ref.data.shape import of_another_shape
from almrr_ref.deploy.onnx import load_onnx
from almrr_ref.deploy.predictor import Predictor
from almrr_ref.model import restore_model
from almrr_ref.report.result import Region, Result, find_regions
from almrr_ref.run.ahead import in_batches, mapped_ahead
from almrr_ref.run.checkpoint import read_checkpoint, valid_calibration
from almrr_ref.run.cli import DTYPES, pick_device
from almrr_ref.run.text import LOGGER, one_line

IMPORTED_BY = os.getpid()  # a process that was forked later has another number


class Detector:
    """Pictures -> results. Safe in threads, in DataLoader workers, and on a CPU after spawn and, on one thread, fork.

    A picture is a path, the bytes of a file, a PIL image, a uint8 or uint16 array (h, w), (h, w, 1) or (h, w, 3),
    or a float tensor in [0, 1], (3, h, w) or (h, w).

    Args:
        model: a network of any form, put into evaluation mode; ``Detector.load`` takes it from a file.
        threshold: in place of the network's; it may be set later, too, also to None, for no verdicts.
        tile: side of the tiles in pixels of the picture, in place of that of the training: for pictures at another
            resolution.
        batch_size: pictures, or tiles of one picture, that the network sees at a time.
        calibration: the checkpoint's record of it (calibration/verdict.py), for pages.
    Raises:
        ValueError: if the threshold is no number from 0 to 1, ``batch_size`` is below 1, or ``tile`` is none that
            training takes, or given for a network that was trained on whole images.
    """

    def __init__(
        self,
        model: Predictor,
        threshold: float | None = None,
        tile: int | None = None,
        batch_size: int = 8,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, Predictor):
            raise ValueError(f"model is a {type(model).__name__}: expected a network; Detector.load takes a file")
        if not hasattr(batch_size, "__index__") or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 and whole, got {batch_size!r}")
        if tile and not model.config.tile:
            raise ValueError(
                f"--tile {tile}: this network was trained on whole images, and a part of one looks new to it; "
                f"leave --tile away, or train with --tile {tile}"
            )
        if tile is not None:
            dataclasses.replace(model.config, tile=tile)  # refuses what training would refuse
        self.model, self.batch_size, self.calibration = model.eval(), batch_size, calibration
        self.threshold = model.threshold if threshold is None else threshold
        self.tile, self.levels = tile or model.config.tile, Levels.of(model.config)
        self._remarked: set[str] = set()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        threshold: float | None = None,
        dtype: str = "float32",
        fuse: bool = True,
        **options: Any,
    ) -> "Detector":
        """Load a training run's last.pt, or a model.onnx that export wrote.

        Args:
            device: auto, cpu, cuda or cuda:N.
            dtype: float32, bfloat16 or float16: of the folded network's products.
            fuse: fold the network: the same maps to 1e-5, several times less work.
            options: the other arguments of the class.
        Raises:
            ValueError: if the file is not usable, or device or dtype is none that it can have.
        """
        path = Path(path)
        exported = path.suffix.lower() == ".onnx"
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
        if dtype != "float32" and (exported or not fuse):
            raise ValueError(f"--dtype {dtype} needs a folded checkpoint: no --no-fuse, and no .onnx file")
        if exported:
            return cls(load_onnx(path, device), threshold, **options)
        content = read_checkpoint(path)
        model = restore_model(content, pick_device(device))
        calibration = valid_calibration(content.get("calibration"), model.config)
        return cls(model.fuse(DTYPES[dtype]) if fuse else model, threshold, calibration=calibration, **options)

    @property
    def threshold(self) -> float | None:
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        if value is not None and not (hasattr(value, "__float__") and 0 <= float(value) <= 1):
            raise ValueError(f"a threshold lies within 0 and 1, as scores do; got {value!r}")
        self._threshold = None if value is None else float(value)

    @property
    def ahead(self) -> int:
        """How many pictures may lie decoded before the network, or judged behind it: fewer if they are cut in tiles."""
        return 2 if self.tile else 2 * self.batch_size

    def __getstate__(self) -> dict[str, bytes]:
        """By value: multiprocessing would send each of hundreds of tensors as an open file."""
        return {"pickled": pickle.dumps(self.__dict__)}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        self.__dict__.update(pickle.loads(state["pickled"]))

    def __call__(self, picture: Picture) -> Result:
        """Judge one picture; a ValueError says what is wrong with it."""
        _after_fork()
        [result] = self._judge([self._prepare(picture)])
        if isinstance(result, ImageError):
            raise result
        return result

    def batch(self, pictures: Iterable[Picture]) -> list[Result]:
        """Judge pictures, in their order; ValueError if there are none, or one of them cannot be read."""
        results: list[Result] = []
        for result in self.stream(pictures):
            if isinstance(result, ImageError):
                place = result.path if result.path != Path("picture") else f"pictures[{len(results)}]"
                raise ImageError(place, result.reason)
            results.append(result)
        if not results:
            raise ValueError("pictures is empty; expected at least one picture")
        return results

    def stream(
        self, pictures: Iterable[Picture | ImageError], remarks: Remarks | None = None
    ) -> Iterator[Result | ImageError]:
        """Judge pictures in their order, one result each; for one that cannot be read the result is its error.

        Decoding runs ahead in threads. The pictures are consumed as needed: an endless iterable is fine, but the first
        result comes after 1.5 times `ahead` pictures: call the detector itself with each frame of a camera. An error
        among them is passed on, and an exception of the iterable is raised behind the results of those before it.
        ``remarks`` collects what is dropped from pictures, such as alpha; without it the log says it once. An array may
        be filled with the next picture as soon as it is consumed.
        """
        if is_one_picture(pictures):
            raise ValueError("this is one picture; call the detector with it, or give a list")
        if not isinstance(pictures, Iterable):
            raise ValueError(f"{type(pictures).__name__} holds no pictures; give a list of them")
        _after_fork()
        prepared = mapped_ahead(partial(self._prepare, remarks=remarks), map(copied_picture, pictures), self.ahead)
        for batch in in_batches(prepared, self.ahead // 2):
            yield from self._judge(batch)

    def _prepare(self, picture: Picture | ImageError, remarks: Remarks | None = None) -> "Prepared | ImageError":
        noted = remarks or Remarks()
        name = picture if isinstance(picture, str | os.PathLike) else "picture"
        try:
            if isinstance(picture, ImageError):
                return picture
            pixels, size = read_image(picture, self.levels, noted), self.model.config.size
        except ImageError as error:
            return error
        height, width = pixels.shape[1], pixels.shape[2]
        if not self.tile and (kind := of_another_shape(height / width, self.model.config)):
            noted.add(kind, name)
        if remarks is None:
            self.remark(name, noted.counts)
        path = Path(picture) if isinstance(picture, str | os.PathLike) else None
        return path, pixels if self.tile else resize_image(pixels, size), (height, width)

    def remark(self, name: str | os.PathLike[str], kinds: Iterable[str]) -> None:
        """Log what was left out of a picture, each kind once."""
        for kind in set(kinds) - self._remarked:
            self._remarked.add(kind)
            LOGGER.warning("%s: %s; said once", one_line(name), kind)

    @torch.no_grad()
    def _judge(self, batch: "list[Prepared | ImageError]") -> list[Result | ImageError]:
        """One pass of the network: its pictures, and errors among them, -> one result each."""
        pixels = [entry[1] for entry in batch if not isinstance(entry, ImageError)]
        scored: Iterator[tuple[Tensor, float]] = iter(())
        if pixels:
            if self.tile:
                maps = self.model.tiled_map(pixels[0], self.tile, self.batch_size)[None]
            else:
                maps = self.model.pixel_maps(torch.stack(pixels)).float()
            copies = (each.clone() for each in maps.cpu())  # a result that lives on must not keep its whole batch
            scored = zip(copies, self.model.image_scores(maps).tolist())
        return [entry if isinstance(entry, ImageError) else self._result(entry, *next(scored)) for entry in batch]

    def _result(self, prepared: "Prepared", network_map: Tensor, score: float) -> Result | ImageError:
        path, pixels, size = prepared
        if not math.isfinite(score):
            return ImageError(path or "picture", f"its score is {score}; a higher --dtype may help")
        mask = torch.zeros(network_map.shape[1:], dtype=torch.bool)
        regions: list[Region] = []
        if self.threshold is not None and not score < self.threshold:
            mask, regions = find_regions(self.model, network_map, self.threshold, size)
        return Result(score, self.threshold, regions, size, pixels, network_map, mask, path)


Prepared = tuple[Path | None, Tensor, tuple[int, int]]  # path of a file, uint8 (3, h', w'), (h, w) of the picture


def _after_fork() -> None:
    """In a forked process: one thread. Those of PyTorch's pool are gone, and it would wait for them for ever."""
    if os.getpid() != IMPORTED_BY:
        torch.set_num_threads(1)
