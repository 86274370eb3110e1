"""Image files -> anomaly maps and scores, in a stream: decoding runs ahead, memory does not grow with the files."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from almrr_ref.data.images import ImageError, image_size, load_image, read_image
from almrr_ref.data.tiling import predict_tiled
from almrr_ref.model import ALMRR

THREADS = min(8, max(2, os.cpu_count() or 2))  # that decode, and as many that write
Box = tuple[int, int, int, int]  # half open, as in Pillow and NumPy: x0 <= x < x1, y0 <= y < y1
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Prediction:
    """What the network says of one file.

    image: uint8 (3, h, w), at the map's resolution.
    anomaly_map: (1, h, w) in [0, 1]: the network's output, or, by tiles, one value per pixel of the file.
    score: in [0, 1].
    size: (height, width) of the file's image in pixels.
    """

    path: Path
    image: Tensor
    anomaly_map: Tensor
    score: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Broken:
    """A file that could not be read, and why."""

    path: Path
    reason: str


Decoded = tuple[Path, Tensor, tuple[int, int]]  # of a file: image (3, h, w), and size (height, width) in the file


def mapped_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Call a function on every item in threads, at most ``ahead`` items before the one whose result is awaited.

    Results come in the order of the items. An exception comes out in place of its result; what has not begun by then,
    or when the caller stops asking, never does.
    """
    waiting: deque[Future[Result]] = deque()
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


def predict_files(model: ALMRR, paths: Iterable[Path | Broken], batch_size: int = 8) -> Iterator[Prediction | Broken]:
    """Predict files in their order, one result per file; by tiles if ``model.config.tile`` says so.

    Args:
        paths: consumed as needed: an endless iterable is fine. What is known to be broken comes out as it is.
        batch_size: images, or tiles of one image, that the network sees at a time.
    """
    tile = model.config.tile
    size, at_once = (None, 1) if tile else (model.config.image_size, batch_size)
    decoded = mapped_ahead(lambda path: _decode(path, size), paths, 2 * at_once)
    while batch := list(islice(decoded, at_once)):
        yield from _predict_batch(model, batch, batch_size, tile)


def _decode(path: Path | Broken, size: int | None) -> Decoded | Broken:
    if isinstance(path, Broken):
        return path
    try:
        if size is None:
            image = read_image(path)
            return path, image, (image.shape[1], image.shape[2])
        width, height = image_size(path)
        return path, load_image(path, size), (height, width)
    except ImageError as error:
        return Broken(path, error.reason)


def _predict_batch(
    model: ALMRR, batch: list[Decoded | Broken], batch_size: int, tile: int | None
) -> Iterator[Prediction | Broken]:
    good = [entry for entry in batch if not isinstance(entry, Broken)]
    results: list[tuple[Tensor, float]] = []
    if tile:
        for _, image, _ in good:
            anomaly_map = predict_tiled(model, image, tile, batch_size)
            results.append((anomaly_map, float(model.image_scores(anomaly_map[None]))))
    elif good:
        maps, scores = model.predict(torch.stack([image for _, image, _ in good]).float() / 255)
        results = list(zip(maps.cpu(), scores.tolist()))
    ready = iter(zip(good, results))
    for entry in batch:
        if isinstance(entry, Broken):
            yield entry
        else:
            (path, image, size), (anomaly_map, score) = next(ready)
            yield Prediction(path, image, anomaly_map, score, size)


def found_region(model: ALMRR, prediction: Prediction) -> tuple[Tensor, int, Box | None]:
    """Where the map exceeds the threshold: region (h, w) of the map, area and bounding box in pixels of the file.

    The region is where the smoothed map behind the image score reaches the threshold, and empty exactly when the score
    lies below. What lies in the score's margin alone (config) is no part of it. The box is half open (x0, y0, x1, y1);
    it is None if the region is empty or there is no threshold.
    """
    threshold = model.threshold
    if threshold is None or prediction.score < threshold:
        threshold = math.inf
    smooth = model.smooth(prediction.anomaly_map[None].float())[0, 0]
    if (m := model.config.score_margin) and threshold < math.inf:
        connected, _ = ndimage.label((smooth >= threshold).numpy(), structure=np.ones((3, 3)))
        outside = ~np.isin(connected, np.unique(connected[m : len(connected) - m, m : connected.shape[1] - m]))
        smooth = smooth.masked_fill(torch.from_numpy(outside), -math.inf)
    area, box = defect_region(smooth, threshold)
    (height, width), (h, w) = prediction.size, smooth.shape
    if box:
        x0, y0, x1, y1 = box
        box = (x0 * width // w, y0 * height // h, -(-x1 * width // w), -(-y1 * height // h))
    return smooth >= threshold, round(area * height * width / (h * w)), box


def defect_region(smooth: Tensor, threshold: float) -> tuple[int, Box | None]:
    """Map (h, w) -> where it reaches the threshold: area in pixels, bounding box; None if no pixel does."""
    y, x = (smooth >= threshold).nonzero(as_tuple=True)
    if not len(x):
        return 0, None
    return len(x), (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
