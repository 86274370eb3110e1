"""From a picture to a verdict: the one path, for files, arrays and frames; the commands take it, too.

    picture -> 8 bits -> the network's size, or tiles -> anomaly map -> score -> verdict and regions

Pictures become pixels by data/images.py; the map and the score are the network's (deploy/predictor.py). A picture is
defective unless its score lies below the threshold: a score that is not a number is no reason to let it pass.
"""

import base64
import html
import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from almrr_ref.data.images import ImageError, Levels, Picture, Remarks, read_image, resize_image
from almrr_ref.deploy.onnx import load_onnx
from almrr_ref.deploy.predictor import Predictor
from almrr_ref.model import load_checkpoint
from almrr_ref.report.overlays import overlay_row
from almrr_ref.run.ahead import mapped_ahead
from almrr_ref.run.cli import pick_device

IMPORTED_BY = os.getpid()  # a process that was forked later has another number
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Box = tuple[int, int, int, int]  # half open, as in Pillow and NumPy: x0 <= x < x1, y0 <= y < y1


@dataclass(frozen=True)
class Region:
    """One defect: connected pixels (also by their corners) whose smoothed map reaches the threshold.

    box and area are in pixels of the picture; peak and mean of the smoothed map, which is what the score is made of.
    """

    box: Box
    area: int
    peak: float
    mean: float


@dataclass(frozen=True, eq=False)
class Result:
    """What the network says of one picture.

    score: in [0, 1].
    threshold: the picture is defective at or above it; None: no verdict.
    regions: of a defective picture, the largest first; empty exactly when the verdict is good or there is none.
    size: (height, width) of the picture.
    pixels: the picture at the resolution of the network's map, uint8 (3, h, w).
    network_map: (1, h, w) in [0, 1]: as the network gives it; by tiles it has the picture's size.
    mask: all regions, bool (h, w), at the resolution of the network's map.
    path: of a file.
    """

    score: float
    threshold: float | None
    regions: list[Region]
    size: tuple[int, int]
    pixels: Tensor = field(repr=False)
    network_map: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    path: Path | None = None

    @property
    def defective(self) -> bool | None:
        """The verdict; None without a threshold."""
        return None if self.threshold is None else not self.score < self.threshold

    @cached_property
    def anomaly_map(self) -> npt.NDArray[np.float32]:
        """The map at the picture's own size, float32 (h, w) in [0, 1]."""
        own_size = self.network_map.shape[1:] == self.size
        scaled = self.network_map if own_size else F.interpolate(self.network_map[None], self.size, mode="bilinear")[0]
        return scaled[0].numpy()

    @property
    def area(self) -> int:
        """Of all regions, in pixels of the picture."""
        return _in_pixels(int(self.mask.sum()), self.size, self.mask) if self.regions else 0

    @property
    def box(self) -> Box | None:
        """Around all regions, in pixels of the picture."""
        corners = list(zip(*(region.box for region in self.regions)))
        return (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])) if corners else None

    def overlay(self, truth: Tensor | None = None) -> Image.Image:
        """Draw picture, ``truth`` (a mask of the map's size) if there is one, map, and outlined regions."""
        return overlay_row(self.pixels, self.network_map, self.threshold, truth, region=self.mask)

    def _repr_html_(self) -> str:
        """The overlay and the verdict, for notebooks."""
        buffer = io.BytesIO()
        self.overlay().save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        verdict = {None: "no verdict", False: "good", True: "defective"}[self.defective]
        limit = "no threshold" if self.threshold is None else f"threshold {self.threshold:.4f}"
        text = f"{self.path or 'picture'}: {verdict}, score {self.score:.4f} ({limit}), {len(self.regions)} regions"
        return f'<figure><img src="data:image/png;base64,{data}"><figcaption>{html.escape(text)}</figcaption></figure>'


class Detector:
    """Pictures -> results. Safe in threads, in DataLoader workers, and on a CPU after spawn and, on one thread, fork.

    A picture is a path, the bytes of a file, a PIL image, a uint8 or uint16 array (h, w) or (h, w, 3), or a float
    tensor in [0, 1], (3, h, w) or (h, w).

    Args:
        model: a network of any form; ``Detector.load`` takes it from a file.
        threshold: in place of the network's.
        tile: side of the tiles in pixels of the picture, in place of that of the training: for pictures at another
            resolution.
        batch_size: pictures, or tiles of one picture, that the network sees at a time.
    Raises:
        ValueError: if the threshold is no number, or ``tile`` is given for a network that was trained on whole images.
    """

    def __init__(
        self, model: Predictor, threshold: float | None = None, tile: int | None = None, batch_size: int = 8
    ) -> None:
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        if tile and not model.config.tile:
            raise ValueError(
                f"--tile {tile}: this network was trained on whole images, and a part of one looks new to it; "
                f"leave --tile away, or train with --tile {tile}"
            )
        self.model, self.batch_size = model.eval(), batch_size
        self.threshold = model.threshold if threshold is None else threshold
        self.tile, self.levels = tile or model.config.tile, Levels.of(model.config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        threshold: float | None = None,
        dtype: str = "float32",
        fuse: bool = True,
        **options: Any,
    ) -> "Detector":
        """Load a training run's last.pt, or a model.onnx that export wrote.

        Args:
            device: auto, cpu, cuda, cuda:N or mps.
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
        model = load_checkpoint(path, pick_device(device))
        return cls(model.fuse(DTYPES[dtype]) if fuse else model, threshold, **options)

    def __call__(self, picture: Picture) -> Result:
        """Judge one picture; ValueError, which says what is wrong, if it is none."""
        _after_fork()
        result = next(self._judge([self._prepare(picture)]))
        if isinstance(result, ImageError):
            raise result
        return result

    def batch(self, pictures: Iterable[Picture]) -> list[Result]:
        """Judge several pictures, in their order; ValueError if there is none, or one of them is none."""
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
        """Judge pictures in their order, one result each; a file that gives none comes out as its error.

        Decoding runs ahead in threads. The pictures are consumed as needed and not kept: an endless iterable is fine.
        An error among them comes out as it is. ``remarks`` takes up what is left out of pictures, such as alpha.
        """
        _after_fork()
        count = 1 if self.tile else self.batch_size
        prepared = mapped_ahead(partial(self._prepare, remarks=remarks), pictures, 2 * count)
        while batch := list(islice(prepared, count)):
            yield from self._judge(batch)

    def _prepare(self, picture: Picture | ImageError, remarks: Remarks | None = None) -> "Prepared | ImageError":
        try:
            if isinstance(picture, ImageError):
                return picture
            pixels, side = read_image(picture, self.levels, remarks), self.model.config.image_size
        except ImageError as error:
            return error
        path = Path(picture) if isinstance(picture, str | os.PathLike) else None
        return path, pixels if self.tile else resize_image(pixels, side, side), (pixels.shape[1], pixels.shape[2])

    @torch.inference_mode()
    def _judge(self, batch: "list[Prepared | ImageError]") -> Iterator[Result | ImageError]:
        """One pass of the network: its pictures, and errors among them, -> one result each."""
        pixels = [entry[1] for entry in batch if not isinstance(entry, ImageError)]
        scored: Iterator[tuple[Tensor, float]] = iter(())
        if pixels:
            if self.tile:
                maps = self.model.tiled_map(pixels[0], self.tile, self.batch_size)[None]
            else:
                maps = self.model.pixel_maps(torch.stack(pixels)).float()
            scored = zip(maps.cpu(), self.model.image_scores(maps).tolist())
        return (entry if isinstance(entry, ImageError) else self._result(entry, *next(scored)) for entry in batch)

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


def find_regions(
    model: Predictor, network_map: Tensor, threshold: float, size: tuple[int, int]
) -> tuple[Tensor, list[Region]]:
    """Where the smoothed map (1, h, w) of a defective picture reaches the threshold: -> mask (h, w), regions.

    What lies in the score's margin alone is no region. There is at least one: a score that reaches the threshold by
    the rounding of its mean has the highest pixel.

    Args:
        size: (height, width) of the picture.
    """
    smoothed = model.smooth(network_map[None])[0, 0]
    level = min(threshold, float(model.within_margin(smoothed).max()))
    labels, _ = ndimage.label((smoothed >= level).numpy(), structure=np.ones((3, 3)), output=np.int32)
    counted = np.unique(model.within_margin(torch.from_numpy(labels)))
    boxes, values, regions = ndimage.find_objects(labels), smoothed.numpy(), []
    (height, width), (h, w) = size, labels.shape
    for label in counted[counted > 0]:
        y, x = place = boxes[label - 1]
        inside = values[place][labels[place] == label]
        box = x.start * width // w, y.start * height // h, -(-x.stop * width // w), -(-y.stop * height // h)
        regions.append(Region(box, _in_pixels(len(inside), size, smoothed), float(inside.max()), float(inside.mean())))
    regions.sort(key=lambda region: (region.area, region.peak), reverse=True)
    return torch.from_numpy(np.isin(labels, counted[counted > 0])), regions


def _in_pixels(count: int, size: tuple[int, int], plane: Tensor) -> int:
    """Pixels of a map's plane (h, w) -> as many of the picture, at least one."""
    return max(1, round(count * size[0] * size[1] / plane.numel()))
