"""Image files -> anomaly maps and scores, in a stream: decoding runs ahead, memory does not grow with the files."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    decoded = mapped_ahead(partial(_decode, size=size), paths, 2 * files)
    while batch := list(islice(decoded, files)):
        images = [entry[1] for entry in batch if not isinstance(entry, ImageError)]
        results: Iterator[tuple[Tensor, float]] = iter(())
        if tile and images:
            anomaly_map = predict_tiled(model, images[0], tile, batch_size)
            results = iter([(anomaly_map, float(model.image_scores(anomaly_map[None])))])
        elif images:
            maps, scores = model.predict(torch.stack(images).float() / 255)
            results = zip(maps.cpu(), scores.tolist())
        for entry in batch:
            yield entry if isinstance(entry, ImageError) else Prediction(*entry[:2], *next(results), entry[2])


def _decode(path: Path | ImageError, size: int | None) -> tuple[Path, Tensor, tuple[int, int]] | ImageError:
    """A file's path, image (3, size, size), or (3, h, w) without a size, and (height, width) in the file."""
    if isinstance(path, ImageError):
        return path
    try:
        width, height = image_size(path)
        return path, read_image(path) if size is None else load_image(path, size), (height, width)
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
    threshold = math.inf if model.threshold is None or prediction.score < model.threshold else model.threshold
    region = (model.smooth(prediction.anomaly_map[None].float())[0, 0] >= threshold).numpy()
    (height, width), (h, w), m = prediction.size, region.shape, model.config.score_margin
    if m:
        connected, _ = ndimage.label(region, structure=np.ones((3, 3)))
        region &= np.isin(connected, np.unique(connected[m : h - m, m : w - m]))
    extent = ndimage.find_objects(region.astype(np.uint8))
    if not extent:
        return torch.from_numpy(region), 0, None
    y, x = extent[0]
    box = (
        x.start * width // w,
        y.start * height // h,
        -(-x.stop * width // w),
        -(-y.stop * height // h),
    )  # rounded out
    return torch.from_numpy(region), round(int(region.sum()) * height * width / (h * w)), box
