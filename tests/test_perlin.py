"""Perlin noise against a per-pixel scalar version written from Perlin's description, and its statistics."""

import math

import numpy as np
import pytest
import torch

from almrr_ref.perlin import perlin_noise
from almrr_ref.run.random import one_thread


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Many short operations: a second thread only waits, long where the cores are shared."""
    with one_thread():
        yield


def scalar_perlin(shape: tuple[int, int], angles: np.ndarray) -> np.ndarray:
    """Gradient noise one pixel at a time: interpolate corner ramps, first along x, then along y."""
    cells_y, cells_x = angles.shape[0] - 1, angles.shape[1] - 1

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    def ramp(row: int, column: int, y: float, x: float) -> float:
        angle = angles[row, column]
        return math.cos(angle) * (x - column) + math.sin(angle) * (y - row)

    noise = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y, x = i * cells_y / shape[0], j * cells_x / shape[1]
            row, column = math.floor(y), math.floor(x)
            along_x = fade(x - column)
            top = (1 - along_x) * ramp(row, column, y, x) + along_x * ramp(row, column + 1, y, x)
            bottom = (1 - along_x) * ramp(row + 1, column, y, x) + along_x * ramp(row + 1, column + 1, y, x)
            along_y = fade(y - row)
            noise[i, j] = math.sqrt(2) * ((1 - along_y) * top + along_y * bottom)
    return noise


@pytest.mark.parametrize(
    ("shape", "grid"), [((24, 32), (3, 4)), ((37, 61), (4, 1)), ((19, 23), (5, 7)), ((5, 9), (8, 2))]
)
def test_equals_a_scalar_version_on_the_same_gradients(shape, grid):
    noise = perlin_noise(shape, grid, torch.Generator().manual_seed(3))
    angles = 2 * math.pi * torch.rand(grid[0] + 1, grid[1] + 1, generator=torch.Generator().manual_seed(3)).double()

    assert noise.shape == shape
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), scalar_perlin(shape, angles.numpy()), atol=2e-6)


def test_is_zero_at_lattice_points_and_nowhere_else_in_general():
    noise = perlin_noise((48, 60), (6, 4), torch.Generator().manual_seed(0))

    assert torch.equal(noise[::8, ::15], torch.zeros(6, 4))
    assert (noise == 0).sum() == 24


def test_stays_within_about_one_and_uses_the_range():
    generator = torch.Generator().manual_seed(1)
    noise = torch.stack([perlin_noise((64, 64), (16, 16), generator) for _ in range(60)])

    assert noise.abs().max() <= 1.0
    assert noise.max() > 0.85
    assert noise.min() < -0.85
    assert abs(noise.mean()) < 0.01


def test_both_axes_look_alike():
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([perlin_noise((64, 64), (8, 8), generator) for _ in range(200)])
    along_y = (noise[:, 1:] - noise[:, :-1]).square().mean()
    along_x = (noise[:, :, 1:] - noise[:, :, :-1]).square().mean()
    diagonals = [
        (noise[:, 1:, 1:] - noise[:, :-1, :-1]).square().mean(),
        (noise[:, 1:, :-1] - noise[:, :-1, 1:]).square().mean(),
    ]

    assert along_y / along_x == pytest.approx(1, abs=0.04)
    assert diagonals[0] / diagonals[1] == pytest.approx(1, abs=0.04)


def test_grid_is_y_then_x():
    noise = perlin_noise((64, 64), (16, 1), torch.Generator().manual_seed(4))

    changes_y = (noise[1:] - noise[:-1]).square().mean()
    changes_x = (noise[:, 1:] - noise[:, :-1]).square().mean()
    assert changes_y > 20 * changes_x


def test_same_seed_same_noise_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, second = (perlin_noise((33, 21), (4, 4), torch.Generator().manual_seed(5)) for _ in range(2))
    other = perlin_noise((33, 21), (4, 4), torch.Generator().manual_seed(6))

    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("shape", "grid"), [((0, 5), (1, 1)), ((5, 5), (0, 1))])
def test_refuses_empty_sizes(shape, grid):
    with pytest.raises(ValueError, match="at least 1"):
        perlin_noise(shape, grid, torch.Generator())
