"""Perlin noise, from which section 3.2 of the paper takes the mask M of Eq. (1).

Source: K. Perlin, "Improving Noise", SIGGRAPH 2002 (gradient noise with the quintic fade), times sqrt(2) as in DRAEM,
so that unit gradients span [-1, 1].

Deviation: gradients are unit vectors at uniformly random angles, not Perlin's hashed set of twelve, and the noise does
not tile. The sum over the four corners of a cell is written as matrix products, exact and without a gather:

    noise[y, x] = sum over corners of  wy wx (gy dy + gx dx)  =  ((wy dy) Gy wx^T + wy Gx (wx dx)^T)[y, x]
"""

import math

import torch
from torch import Tensor

from almrr_ref.run.random import integer, uniform


def perlin_noise(shape: tuple[int, int], grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw one field of gradient noise: (h, w) pixels over (cells_y, cells_x) cells -> (h, w).

    Args:
        shape: height and width of the field in pixels, each >= 1; need not be multiples of the grid.
        grid: number of lattice cells along each axis, each >= 1: more cells, finer noise.
        generator: the only source of randomness; the field lives on its device.
    Returns:
        float32, about [-1, 1], zero at every lattice point that a pixel hits.
    Raises:
        ValueError: if a size is below 1.
    Source: Perlin 2002.
    """
    if min(*shape, *grid) < 1:
        raise ValueError(f"shape and grid must be at least 1 along both axes, got shape {shape} and grid {grid}")
    device = generator.device
    angle = 2 * math.pi * torch.rand(grid[0] + 1, grid[1] + 1, generator=generator, device=device)
    weight_y, moment_y = _corner_weights(shape[0], grid[0], device)
    weight_x, moment_x = _corner_weights(shape[1], grid[1], device)
    rows = torch.cat([moment_y @ angle.sin(), weight_y @ angle.cos()], dim=1)  # (h, 2 * (cells_x + 1))
    columns = torch.cat([weight_x, moment_x], dim=1)  # (w, 2 * (cells_x + 1))
    return math.sqrt(2.0) * (rows @ columns.T)


def octave_noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Perlin noise of two to five octaves, each half as coarse and weaker, plus grain: -> (1, h, w), about [0, 1].

    The first grid has 2 .. 16 cells, drawn for each axis, so that there are streaks as well as clouds; later grids have
    at most 64.
    """
    cells = [2 ** integer(generator, 1, 5), 2 ** integer(generator, 1, 5)]
    persistence = uniform(generator, 0.35, 0.8)
    noise = torch.zeros(shape, device=generator.device)
    for octave in range(integer(generator, 2, 6)):
        grid = (min(cells[0] << octave, 64), min(cells[1] << octave, 64))
        noise.add_(perlin_noise(shape, grid, generator), alpha=persistence**octave)
    grain = torch.rand(shape, generator=generator, device=generator.device).sub_(0.5)
    return noise.add_(grain, alpha=uniform(generator, 0.0, 0.4)).mul_(0.5).add_(0.5)[None]


def _corner_weights(size: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weigh the lattice lines of one axis for each of its pixels: -> weights, moments, each (size, cells + 1).

    Each row has two entries, for the lines before and after the pixel: weights holds their fade (wy, wx above), moments
    the fade times the signed distance in cells from the line to the pixel (wy dy, wx dx).
    """
    scaled = torch.arange(size, device=device) * cells
    before = scaled // size  # integers: a pixel on a lattice line gets the offset 0 exactly
    offset = (scaled % size).float() / size
    fade = offset**3 * (offset * (offset * 6 - 15) + 10)
    lines = torch.stack([before, before + 1], dim=1)  # (size, 2)
    weight = torch.stack([1 - fade, fade], dim=1)
    distance = torch.stack([offset, offset - 1], dim=1)
    empty = torch.zeros(size, cells + 1, device=device)
    return empty.scatter(1, lines, weight), empty.scatter(1, lines, weight * distance)
