"""Perlin noise one pixel at a time, written from Perlin's description."""

import math

import numpy as np


def scalar_perlin(shape: tuple[int, int], angles: np.ndarray) -> np.ndarray:
    """Interpolate the ramps of the four corners, first along x, then along y."""
    cells_y, cells_x = angles.shape[0] - 1, angles.shape[1] - 1

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    def ramp(row: int, column: int, y: float, x: float) -> float:
        angle = angles[row, column]
        return math.cos(angle) * (x - column) + math.sin(angle) * (y - row)

    noise = np.zeros(shape)
    for i, j in np.ndindex(shape):
        y, x = i * cells_y / shape[0], j * cells_x / shape[1]
        row, column = math.floor(y), math.floor(x)
        along_x, along_y = fade(x - column), fade(y - row)
        top = (1 - along_x) * ramp(row, column, y, x) + along_x * ramp(row, column + 1, y, x)
        bottom = (1 - along_x) * ramp(row + 1, column, y, x) + along_x * ramp(row + 1, column + 1, y, x)
        noise[i, j] = math.sqrt(2) * ((1 - along_y) * top + along_y * bottom)
    return noise
