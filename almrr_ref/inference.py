"""Image files -> anomaly maps and scores, in a stream: decoding runs ahead, memory does not grow with the files."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.images import ImageError, image_size, load_image, read_image
from almrr_ref.model import ALMRR
from almrr_ref.report import Box, defect_region
from almrr_ref.tiling import predict_tiled


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


def predict_files(
    model: ALMRR, paths: Iterable[Path | Broken], batch_size: int = 8, threads: int = 2
) -> Iterator[Prediction | Broken]:
    """Predict files in their order, one result per file; by tiles if ``model.config.tile`` says so.

    Args:
        paths: consumed as needed: an endless iterable is fine. What is known to be broken comes out as it is.
        batch_size: images, or tiles of one image, that the network sees at a time.
        threads: decoding threads.
    """
    tile = model.config.tile
    size = None if tile else model.config.image_size
    ahead = 2 if tile else 2 * batch_size
    with ThreadPoolExecutor(threads) as pool:
        source = iter(paths)
        waiting: deque[Broken | tuple[Path, Future[tuple[Tensor, tuple[int, int]]]]] = deque()

        def refill() -> None:
            for path in islice(source, ahead - len(waiting)):
                waiting.append(path if isinstance(path, Broken) else (path, pool.submit(_decode, path, size)))

        refill()
        while waiting:
            batch: list[Prediction | Broken | tuple[Path, Tensor, tuple[int, int]]] = []
            for _ in range(min(len(waiting), 1 if tile else batch_size)):
                entry = waiting.popleft()
                if isinstance(entry, Broken):
                    batch.append(entry)
                    continue
                path, future = entry
                try:
                    batch.append((path, *future.result()))
                except ImageError as error:
                    batch.append(Broken(path, error.reason))
            refill()
            yield from _predict_batch(model, batch, batch_size, tile)


def _decode(path: Path, size: int | None) -> tuple[Tensor, tuple[int, int]]:
    if size is None:
        image = read_image(path)
        return image, (image.shape[1], image.shape[2])
    width, height = image_size(path)
    return load_image(path, size), (height, width)


def _predict_batch(model: ALMRR, batch: list, batch_size: int, tile: int | None) -> Iterator[Prediction | Broken]:
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

    The region is where the mean filter behind the image score reaches the threshold, so that it is empty exactly when
    the score lies below. The box is half open (x0, y0, x1, y1); it is None if the region is empty or there is no
    threshold.
    """
    threshold = math.inf if model.threshold is None else model.threshold
    smooth = model.smooth(prediction.anomaly_map[None].float())[0, 0]
    area, box = defect_region(smooth, threshold)
    (height, width), (h, w) = prediction.size, smooth.shape
    if box:
        x0, y0, x1, y1 = box
        box = (x0 * width // w, y0 * height // h, -(-x1 * width // w), -(-y1 * height // h))
    return smooth >= threshold, round(area * height * width / (h * w)), box
