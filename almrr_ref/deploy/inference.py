"""Image files -> anomaly maps and scores, in a stream: decoding runs ahead, memory does not grow with the files."""

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
from almrr_ref.data.tiling import blend_tiles, cut_tiles
from almrr_ref.deploy.predictor import Predictor

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


def predict_files(
    model: Predictor, paths: Iterable[Path | ImageError], batch_size: int = 8, tile: int | None = None
) -> Iterator[Prediction | ImageError]:
    """Predict files in their order, one result per file; one that cannot be read comes out as its error.

    Args:
        paths: consumed as needed: an endless iterable is fine. An error among them comes out as it is.
        batch_size: images, or tiles of one image, that the network sees at a time.
        tile: side of the tiles in pixels; None for that of the training, which may be none.
    """
    tile = tile or model.config.tile
    size, files = (None, 1) if tile else (model.config.image_size, batch_size)
    decoded = mapped_ahead(lambda path: _decode(path, size), paths, 2 * files)
    while batch := list(islice(decoded, files)):
        readable = [entry for entry in batch if not isinstance(entry, ImageError)]
        results: list[tuple[Tensor, float]] = []
        if tile:
            for _, image, _ in readable:
                anomaly_map = predict_tiled(model, image, tile, batch_size)
                results.append((anomaly_map, float(model.image_scores(anomaly_map[None]))))
        elif readable:
            maps, scores = model.predict(torch.stack([image for _, image, _ in readable]).float() / 255)
            results = list(zip(maps.cpu(), scores.tolist()))
        remaining = iter(results)
        for entry in batch:
            if isinstance(entry, ImageError):
                yield entry
            else:
                anomaly_map, score = next(remaining)
                yield Prediction(entry[0], entry[1], anomaly_map, score, entry[2])


def _decode(path: Path | ImageError, size: int | None) -> Decoded | ImageError:
    if isinstance(path, ImageError):
        return path
    try:
        if size is None:
            image = read_image(path)
            return path, image, (image.shape[1], image.shape[2])
        width, height = image_size(path)
        return path, load_image(path, size), (height, width)
    except ImageError as error:
        return error


def predict_tiled(model: Predictor, image: Tensor, tile: int, batch_size: int = 8) -> Tensor:
    """Anomaly map of one large image by tiles: uint8 (3, h, w) -> (1, h, w) in [0, 1], on the CPU.

    Args:
        tile: side of a tile in pixels of the image.
        batch_size: tiles at a time.
    """

    def tile_maps() -> Iterator[Tensor]:
        tiles = cut_tiles(image, tile, model.config.image_size)
        while batch := list(islice(tiles, batch_size)):
            maps, _ = model.predict(torch.stack(batch).float() / 255)
            yield from maps[:, 0].cpu()

    return blend_tiles(tile_maps(), image.shape[1], image.shape[2], tile)


def defect_region(model: Predictor, prediction: Prediction) -> tuple[Tensor, int, Box | None]:
    """Where the map exceeds the threshold: region (h, w) of the map, area and bounding box in pixels of the file.

    The region is where the smoothed map behind the image score reaches the threshold, and empty exactly when the score
    lies below or there is no threshold; then the box is None. What lies in the score's margin alone is no part of it.
    """
    smooth = model.smooth(prediction.anomaly_map[None].float())[0, 0]
    if model.threshold is None or prediction.score < model.threshold:
        return torch.zeros(smooth.shape, dtype=torch.bool), 0, None
    region = (smooth >= model.threshold).numpy()
    if m := model.config.score_margin:
        connected, _ = ndimage.label(region, structure=np.ones((3, 3)))
        inside = np.unique(connected[m : len(connected) - m, m : connected.shape[1] - m])
        region &= np.isin(connected, inside)
    (height, width), (h, w) = prediction.size, region.shape
    y, x = region.nonzero()
    if not len(y):
        return torch.from_numpy(region), 0, None
    box = (
        int(x.min()) * width // w,
        int(y.min()) * height // h,
        -(-(int(x.max()) + 1) * width // w),  # rounded up
        -(-(int(y.max()) + 1) * height // h),
    )
    return torch.from_numpy(region), round(len(y) * height * width / (h * w)), box
