"""What every form of the network shares, the plain one and the deployed ones: images -> anomaly maps -> image scores.

Source: ALMRR section 4.1. The paper does not say how a map becomes an image score; ours is the highest pixel of the map
behind a 9x9 mean filter, so that a single pixel raises no alarm; `plus`: the mean of the highest 0.5% of them.
"""

import math
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.data.images import ROUNDING, resize_image
from almrr_ref.data.roi import judged_of
from almrr_ref.data.tiling import blend_tiles, cut_tiles
from almrr_ref.features import resize


class Predictor(nn.Module):
    """A network that predicts maps and scores; every form of it implements ``maps``.

    Args:
        threshold: of the image score; an image at or above it is called defective. None before calibration.
        outline_offset: the logit of a region's peak exceeds the threshold's by this much, at least.
    """

    roi: Tensor | None  # bool (h, w), true where images are judged; None: everywhere

    def __init__(self, config: ModelConfig, threshold: float | None = None, outline_offset: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("roi", judged_of(config), persistent=False)  # it follows from the config
        self.roi_area = 0 if self.roi is None else int(self.roi.sum())
        self.threshold = threshold
        self.outline_offset = outline_offset

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def threshold_of_pass(self) -> float | None:
        """The threshold, if one pass sees a whole picture; None if it sees a tile, which decides nothing."""
        return None if self.config.tile else self.threshold

    def maps(self, images: Tensor) -> Tensor:
        """Anomaly maps: (b, 3, h, w) in [0, 1] on the network's device -> (b, 1, h, w) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores, without gradients and in evaluation mode, the same as `Detector`'s.

        Images of another size than the network's are resized; a network trained with tiles cuts tiles instead. Values
        are rounded to 8 bits a channel, as in a file.

        Args:
            images: (b, 3, h, w) in [0, 1], of any size.
        Returns:
            maps in [0, 1], of ``config.size``, (b, 1, h', w'), or, by tiles, (b, 1, h, w); and scores (b,).
        Raises:
            ValueError: for another shape, an integer type, no image at all, or a value outside [0, 1].
        """
        check_form(images)
        check_range(*(float(value) for value in images.aminmax()))
        pixels = to_8_bits(images).to(torch.uint8)
        if self.config.tile:
            maps = torch.stack([self.tiled_map(image) for image in pixels.cpu()]).to(self.device)
        else:
            size = self.config.size
            if pixels.shape[-2:] != size:
                pixels = torch.stack([resize_image(image, size) for image in pixels.cpu()])
            maps = self.pixel_maps(pixels)
        maps = maps.clone()  # outside of inference mode, whose tensors no gradient may pass
        return maps, self.image_scores(maps)

    @torch.inference_mode()
    def pixel_maps(self, pixels: Tensor) -> Tensor:
        """Anomaly maps in evaluation mode: uint8 (b, 3, h, w) on any device -> (b, 1, h, w) on the network's."""
        training = [module for module in self.modules() if module.training]
        for module in training:  # none in a deployed form, where other threads may be at it
            module.training = False
        try:
            with torch.autocast(self.device.type, enabled=False):  # the network says itself what 16 bits may do
                return self.maps(pixels.to(self.device).float() / 255)
        finally:
            for module in training:
                module.training = True

    def check_size(self, images: Tensor) -> None:
        """Raise a ValueError unless images (b, 3, h, w) have the network's size."""
        height, width = self.config.size
        if images.shape[-2:] != (height, width):
            raise ValueError(f"images are {tuple(images.shape)}: expected (b, 3, {height}, {width}); predict resizes")

    def tiled_map(self, image: Tensor, tile: int | None = None, batch_size: int = 8) -> Tensor:
        """Anomaly map of one image by overlapping tiles: uint8 (3, h, w) -> (1, h, w) in [0, 1], on the CPU.

        Args:
            tile: side of a tile in pixels of the image; None for that of the training.
            batch_size: tiles at a time.
        """
        tile = tile or self.config.tile
        assert tile, "the network was trained on whole images"

        def tile_maps() -> Iterator[Tensor]:
            tiles = cut_tiles(image, tile, self.config.size)
            while batch := list(islice(tiles, batch_size)):
                yield from self.pixel_maps(torch.stack(batch))[:, 0].float().cpu()

        return blend_tiles(tile_maps(), image.shape[1], image.shape[2], tile)

    def image_scores(self, maps: Tensor) -> Tensor:
        """The highest pixel of the smoothed map, or the mean of the highest fraction (config): (b, 1, h, w) -> (b,)."""
        return self.scores_of(self.smooth(maps))

    def scores_of(self, smoothed: Tensor) -> Tensor:
        """`image_scores` of maps that `smooth` has filtered."""
        fraction = self.config.score_fraction
        if not fraction:
            return smoothed.amax(dim=(1, 2, 3))
        area = self.roi_area or math.prod(self.config.size)  # of a tiled image as many as of one tile
        count = max(1, round(fraction * area))
        return smoothed.flatten(1).topk(min(count, smoothed[0].numel())).values.mean(dim=1)

    def inside_roi(self, maps: Tensor, outside: float = 0.0) -> Tensor:
        """Maps (b, 1, h, w) with one value outside the region of interest, if there is one."""
        return maps if self.roi is None else maps.where(self.roi.to(maps.device), outside)

    def smooth(self, maps: Tensor) -> Tensor:
        """Mean filter of side ``score_kernel``, at the border over the pixels inside: (b, 1, h, w) -> (b, 1, h, w).

        The edge of the region of interest is a border, too; outside it the result is -inf, below every threshold.
        """
        if self.roi is None:
            return self._mean(maps)
        covered = self._mean(self.roi.to(maps)[None, None]).clamp(min=1e-6)
        return self.inside_roi(self._mean(self.inside_roi(maps)) / covered, -math.inf)

    def _mean(self, maps: Tensor) -> Tensor:
        k = self.config.score_kernel  # down the columns, then along the rows: 2 k sums a pixel instead of k^2
        if maps.is_cuda:
            down = F.avg_pool2d(maps, (k, 1), stride=1, padding=(k // 2, 0), count_include_pad=False)
            return F.avg_pool2d(down, (1, k), stride=1, padding=(0, k // 2), count_include_pad=False)
        for dim, padding in ((2, (0, 0, k // 2, k // 2)), (3, (k // 2, k // 2))):  # a fifth of the time on a CPU
            padded, n, total = F.pad(maps, padding), maps.shape[dim], torch.zeros_like(maps)
            for shift in range(k):
                total += padded.narrow(dim, shift, n)
            place = torch.arange(n, device=maps.device)
            inside = (place + k // 2).clamp(max=n - 1) - (place - k // 2).clamp(min=0) + 1
            maps = total / (inside[:, None] if dim == 2 else inside)
        return maps


class DeployedPredictor(Predictor):
    """A form for prediction alone: no gradients, always in evaluation mode."""

    def train(self, mode: bool = True) -> "DeployedPredictor":
        return super().train(False)


def to_image_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps from the feature grid to the image's size: (b, c, h, w) -> (b, c, *size), float32 or float64."""
    return resize(maps if maps.dtype == torch.float64 else maps.float(), size)


def check_form(images: Tensor) -> None:
    """Raise a ValueError unless images are a floating (b, 3, h, w) tensor that is not empty."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be a floating (b, 3, h, w) tensor in [0, 1] that is not empty; got {came}")


def check_range(low: float, high: float) -> None:
    """Raise a ValueError unless the least and the highest value of images fit [0, 1]."""
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also if they are NaN
        remedy = "divide them by 255" if low >= 0 and high <= 255 else "give colours, neither normalised nor NaN"
        raise ValueError(f"images must lie in [0, 1]; got values from {low:g} to {high:g}: {remedy}")


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] -> the nearest of 8 bits' levels, whole numbers from 0 to 255, float32."""
    return (images.double() * 255).round_().clamp_(0, 255).float()  # halves go where those of a file go
