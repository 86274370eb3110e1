"""The ten random changes of a texture, and bilinear resampling, on tensors.

Source: the anomaly generator of DRAEM (Zavrtanik et al. 2021), which the paper's section 3.2 uses. It applies 3 of 10
changes of the imgaug package in random order. These are reimplemented here, with imgaug's documented ranges.

Deviations: colours turn around the gray axis instead of in HSV, so that gray stays gray. Brightness changes all
channels alike. Rotation reflects the border: black corners would be too easy to find.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.run.random import integer, uniform

LEVELS = 256


def change_texture(texture: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Apply `count` different changes out of `CHANGES`, in random order: (3, h, w) in [0, 1] -> the same."""
    order = torch.randperm(len(CHANGES), generator=generator, device=generator.device).tolist()
    for index in order[:count]:
        texture = CHANGES[index](texture, generator)
    return texture


def gamma(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Raise each channel to its own power, U(0.5, 2)."""
    return torch.stack([channel ** uniform(generator, 0.5, 2.0) for channel in texture])


def brightness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by U(0.8, 1.2) and add U(-30, 30) / 255."""
    factor = uniform(generator, 0.8, 1.2)
    return (texture * factor + uniform(generator, -30, 30) / 255).clamp_(0, 1)


def sharpness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Blend with a 3x3-smoothed copy by the factor U(0, 2): below 1 blurs, above 1 sharpens."""
    factor = uniform(generator, 0.0, 2.0)
    padded = functional.pad(texture[None], (1, 1, 1, 1), mode="replicate")[0]
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]  # (3, h, w + 2)
    neighbourhood = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = (neighbourhood + 4 * texture) / 13  # Pillow's SMOOTH kernel: centre 5, neighbours 1
    return torch.lerp(smooth, texture, factor).clamp_(0, 1)


def hue_saturation(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue by up to 50/255 of a circle and scale the saturation by 1 + U(-50, 50) / 100."""
    angle = 2 * math.pi * uniform(generator, -50, 50) / 255
    return turn_colour(texture, angle, 1 + uniform(generator, -50, 50) / 100)


def solarize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """In half of the cases, invert what lies above a threshold of U(32, 128) / 255."""
    threshold = uniform(generator, 32, 128) / 255
    return texture if uniform(generator) < 0.5 else torch.where(texture > threshold, 1 - texture, texture)


def posterize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Keep the upper 1 to 8 bits of each value."""
    step = 2 ** (8 - integer(generator, 1, 9))
    return texture.mul(LEVELS - 1).div_(step).floor_().mul_(step / (LEVELS - 1))


def invert(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn into the negative."""
    return 1 - texture


def autocontrast(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch each channel to [0, 1] after cutting U(0, 20) percent of its pixels off both ends."""
    cutoff = uniform(generator, 0.0, 0.20)
    _, histogram = _histogram(texture)
    fraction = histogram.cumsum(dim=1) / histogram.sum(dim=1, keepdim=True)  # (3, 256), of the pixels up to a level
    low = (fraction <= cutoff).sum(dim=1)
    high = (fraction < 1 - cutoff).sum(dim=1)
    span = (high - low).clamp(min=1)
    stretched = (texture * (LEVELS - 1) - low[:, None, None]) / span[:, None, None]
    return torch.where((high <= low)[:, None, None], texture, stretched.clamp_(0, 1))


def equalize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Spread the values of each channel evenly over [0, 1]."""
    index, histogram = _histogram(texture)
    darker = histogram.cumsum(dim=1) - histogram  # number of pixels below each level
    most = (darker * (histogram > 0)).amax(dim=1, keepdim=True)  # 0 where a channel has one level only
    table = darker / most.clamp(min=1)
    return torch.where(most[:, :, None] == 0, texture, table.flatten().take(index))


def rotate(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by U(-45, 45) degrees with reflected borders."""
    return resample(texture, uniform(generator, -45, 45))


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert, autocontrast, equalize, rotate,
)  # fmt: skip


def turn_colour(texture: Tensor, angle: float, saturation: float) -> Tensor:
    """Turn colours by an angle (radians) about the gray axis (Rodrigues' rotation) and scale their distance to it."""
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    turned = math.cos(angle) * (torch.eye(3) - axis) + math.sin(angle) * cross
    matrix = (axis + saturation * turned).to(texture)
    return (matrix @ texture.flatten(1)).reshape_as(texture).clamp_(0, 1)


def resample(
    image: Tensor, angle: float, zoom: float = 1, shift: tuple[float, float] = (0, 0), padding: str = "reflection"
) -> Tensor:
    """Rotate (degrees, counter-clockwise), magnify and move with bilinear interpolation: (c, h, w) -> (c, h, w).

    `shift` is where the output's centre lies in the input, (y, x) from its centre in half heights and half widths.
    `padding` of what lies outside is "reflection", "border" or "zeros".
    """
    h, w = image.shape[-2:]
    sine, cosine = math.sin(math.radians(angle)) / zoom, math.cos(math.radians(angle)) / zoom
    y, x = (((2 * torch.arange(n, device=image.device, dtype=image.dtype) + 1) / n - 1) for n in (h, w))
    y = y[:, None]
    # normalised coordinates: the aspect ratio keeps the turn a turn when the image is not square
    source_x = (cosine * x + shift[1]) - (sine * h / w) * y
    source_y = (sine * w / h) * x + (cosine * y + shift[0])
    grid = torch.stack([source_x, source_y], dim=-1)[None]  # (1, h, w, 2)
    return functional.grid_sample(image[None], grid, padding_mode=padding, align_corners=False)[0]


def _histogram(texture: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to 256 levels: -> index (3, h, w) into a flattened (3, 256) table, and the histogram (3, 256)."""
    channel = torch.arange(3, device=texture.device)[:, None, None] * LEVELS
    index = (texture * (LEVELS - 1)).round().long() + channel
    return index, torch.bincount(index.flatten(), minlength=3 * LEVELS).reshape(3, LEVELS)
