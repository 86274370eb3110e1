"""Perlin noise against a per-pixel scalar version."""

import math

import numpy as np
import pytest
import torch
from perlin_oracle import scalar_perlin

from almrr_ref.perlin import perlin_noise


@pytest.mark.parametrize(("shape", "grid"), [((24, 32), (3, 4)), ((37, 61), (4, 1)), ((5, 9), (8, 2))])
def test_equals_a_scalar_version_on_the_same_gradients(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    noise = perlin_noise(shape, grid, torch.Generator().manual_seed(3))
    turns = torch.rand(grid[0] + 1, grid[1] + 1, generator=torch.Generator().manual_seed(3)).double().numpy()
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), scalar_perlin(shape, 2 * math.pi * turns), atol=2e-6)


@pytest.mark.parametrize(("shape", "grid"), [((0, 5), (1, 1)), ((5, 5), (0, 1))])
def test_refuses_empty_sizes(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        perlin_noise(shape, grid, torch.Generator())
