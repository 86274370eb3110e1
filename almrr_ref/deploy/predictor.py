"""What every form of the network shares, the plain one and the deployed ones: images -> anomaly maps -> image scores.

Source: ALMRR section 4.1. The paper does not say how a map becomes an image score; ours is the highest pixel of the map
behind a 9x9 mean filter, so that a single pixel raises no alarm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.features import resize


class Predictor(nn.Module):
    """A network that can be asked for maps and scores; a form of it implements ``maps``.

    Args:
        threshold: of the image score; an image at or above it is called defective. None before calibration.
    """

    def __init__(self, config: ModelConfig, threshold: float | None = None) -> None:
        super().__init__()
        self.config = config
        self.threshold = threshold

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def maps(self, images: Tensor) -> Tensor:
        """Anomaly maps: (b, 3, s, s) in [0, 1] on the network's device -> (b, 1, s, s) in [0, 1]."""
        raise NotImplementedError

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores of images of any size, without gradients and in evaluation mode.

        Args:
            images: (b, 3, h, w) in [0, 1]; resized to the network's input size if they have another.
        Returns:
            maps (b, 1, s, s) in [0, 1] with s = ``config.image_size``, and scores (b,) in [0, 1].
        Raises:
            ValueError: if images is not a floating (b, 3, h, w) tensor.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be a floating (b, 3, h, w) tensor in [0, 1]; got {given}")
        size = (self.config.image_size,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        was_training = self.training
        self.eval()
        maps = self.maps(images.to(self.device))
        self.train(was_training)
        return maps, self.image_scores(maps)

    def image_scores(self, maps: Tensor) -> Tensor:
        """The highest pixel of the smoothed map, or the mean of the highest fraction (config): (b, 1, h, w) -> (b,).

        The margin (config) does not count: good images vary most at the border, where features see the padding.
        """
        margin, fraction = self.config.score_margin, self.config.score_fraction
        smoothed = self.smooth(maps)[:, :, margin : maps.shape[2] - margin, margin : maps.shape[3] - margin]
        if not fraction:
            return smoothed.amax(dim=(1, 2, 3))
        count = max(1, round(fraction * self.config.image_size**2))  # of a tiled image as many as of one tile
        return smoothed.flatten(1).topk(min(count, smoothed[0].numel())).values.mean(dim=1)

    def smooth(self, maps: Tensor) -> Tensor:
        """Mean filter of side ``score_kernel``, at the border over the pixels inside: (b, 1, h, w) -> (b, 1, h, w)."""
        k = self.config.score_kernel  # down the columns, then along the rows: 2 k sums a pixel instead of k^2
        down = F.avg_pool2d(maps, (k, 1), stride=1, padding=(k // 2, 0), count_include_pad=False)
        return F.avg_pool2d(down, (1, k), stride=1, padding=(0, k // 2), count_include_pad=False)


class DeployedPredictor(Predictor):
    """A form for prediction alone: no gradients, always in evaluation mode."""

    def train(self, mode: bool = True) -> "DeployedPredictor":
        return super().train(False)


def to_image_size(maps: Tensor, size: int) -> Tensor:
    """Bring maps from the feature grid to the image's size: (b, c, h, w) -> (b, c, size, size), float32 or float64."""
    return resize(maps if maps.dtype == torch.float64 else maps.float(), size)
