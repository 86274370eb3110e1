"""Simulated anomalies beyond the paper's: lines, soft regions, faint changes of tone (`--anomaly-style varied`).

A network that learns only from Eq. (1), foreign texture in sharp regions, misses thin cracks and faint or soft defects.
Here, every second anomaly has another shape, another fill, or both. All shapes come from Perlin noise:

    region   where the noise exceeds a threshold, as in the paper
    line     where the noise crosses zero, 1 to 5 pixels wide, cut to a stretch by a region: cracks, scratches
    soft     a region with a wide, smooth border: stains, uneven coating
"""

import math

import torch
from torch import Tensor

from almrr_ref.anomalies import fit_texture, perlin_mask, textured_anomaly
from almrr_ref.data.roi import FEWEST_PIXELS
from almrr_ref.data.textures import TextureSource, moved_patch, resample
from almrr_ref.perlin import perlin_noise
from almrr_ref.run.random import integer, one_thread, uniform

VISIBLE = 4 / 255  # smallest mean change of a pixel that counts as anomalous


@one_thread()
def varied_anomaly(image: Tensor, source: TextureSource, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an anomaly, the paper's or another: (3, h, w) in [0, 1] -> augmented (3, h, w), mask (1, h, w) in {0, 1}.

    The image is at least 8 pixels high and wide. The mask is never empty.
    """
    if uniform(generator) < 0.5:
        return textured_anomaly(image, source, generator)
    for _ in range(20):
        weight = draw_shape((image.shape[1], image.shape[2]), generator)
        filled = draw_fill(image, source, generator)
        augmented = (image + weight * (filled - image)).clamp_(0, 1)
        mask = ((augmented - image).abs().mean(dim=0, keepdim=True) >= VISIBLE) & (weight > 0.3)
        if mask.sum() >= FEWEST_PIXELS:  # else there is nothing to see
            return torch.where(weight > 0, augmented, image), mask.to(image)
    return textured_anomaly(image, source, generator)


def draw_shape(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a region, a line or a soft region: -> the opacity of the fill, (1, h, w) in [0, 1]."""
    region = perlin_mask(shape, generator)
    kind = uniform(generator)
    if kind < 0.25:
        return region
    if kind < 0.65:
        return draw_line(shape, generator)
    return soften(region, uniform(generator, 0.01, 0.06) * math.sqrt(shape[0] * shape[1]))


def draw_line(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a stretch of the zero line of Perlin noise, with smooth edges: -> (1, h, w) in [0, 1]."""
    for _ in range(20):
        grid = (2 ** integer(generator, 0, 4), 2 ** integer(generator, 0, 4))
        noise = resample(perlin_noise(shape, grid, generator)[None], uniform(generator, -90, 90), padding="border")[0]
        slope = torch.hypot(*torch.gradient(noise)).clamp(min=1e-4)
        half_width = uniform(generator, 0.5, 2.5) * math.sqrt(shape[0] * shape[1]) / 256
        line = (half_width + 0.5 - noise.abs() / slope).clamp(0, 1)[None]  # distance in pixels from the zero line
        stretch = soften(perlin_mask(shape, generator, threshold=0.25, max_exponent=3), 2.0)
        if (line * stretch > 0.5).sum() >= 8:
            return line * stretch
    return perlin_mask(shape, generator)


def soften(mask: Tensor, radius: float) -> Tensor:
    """Blur a mask by three mean filters of about the radius in pixels: (1, h, w) -> (1, h, w) with a peak of 1."""
    rows, columns = (repeated_mean(side, max(1, round(radius)), 3) for side in mask.shape[1:])
    mask = rows @ mask @ columns.T
    return mask / mask.max().clamp(min=1e-6)


def repeated_mean(length: int, radius: int, times: int) -> Tensor:
    """Mean filters one after the other, each of what is there at the ends, as one matrix: (length, length)."""
    place = torch.arange(length)
    near = ((place - place[:, None]).abs() <= radius).float()
    return torch.linalg.matrix_power(near / near.sum(dim=1, keepdim=True), times)


def draw_fill(image: Tensor, source: TextureSource, generator: torch.Generator) -> Tensor:
    """Draw the fill of a shape, (3, h, w): a texture, another place of the image, or the image darker or lighter."""
    kind = uniform(generator)
    if kind < 0.25:
        texture = fit_texture(source.sample(generator).to(image), (image.shape[1], image.shape[2]))
        return torch.lerp(image, texture, uniform(generator, 0.2, 1.0))
    if kind < 0.4:
        return moved_patch(image, generator)
    change = math.exp(uniform(generator, math.log(0.06), math.log(0.7)))  # faint as often as strong
    if uniform(generator) < 0.65:  # most damage is dark: depth, dirt, shadow
        return image * (1 - change)
    return image + change * (1 - image)
