"""Perlin noise against a per-pixel scalar version, and its statistics."""

import math

import numpy as np
import pytest
import torch
from perlin_oracle import scalar_perlin

from almrr_ref.perlin import perlin_noise


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "grid"), [((24, 32), (3, 4)), ((37, 61), (4, 1)), ((5, 9), (8, 2))])
def test_equals_a_scalar_version_on_the_same_gradients(shape, grid):
    noise = perlin_noise(shape, grid, generator(3))
    angles = 2 * math.pi * torch.rand(grid[0] + 1, grid[1] + 1, generator=generator(3)).double()
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), scalar_perlin(shape, angles.numpy()), atol=2e-6)


def test_is_zero_at_lattice_points_and_nowhere_else_in_general():
    noise = perlin_noise((48, 60), (6, 4), generator(0))
    assert torch.equal(noise[::8, ::15], torch.zeros(6, 4))
    assert (noise == 0).sum() == 24


def test_stays_within_about_one_and_uses_the_range():
    draws = generator(1)
    noise = torch.stack([perlin_noise((64, 64), (16, 16), draws) for _ in range(60)])
    assert 0.85 < noise.max() <= 1
    assert -1 <= noise.min() < -0.85
    assert abs(noise.mean()) < 0.01


def test_the_generator_alone_decides_what_is_drawn():
    state = torch.get_rng_state()
    first, again, other = (perlin_noise((33, 21), (4, 4), generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("shape", "grid"), [((0, 5), (1, 1)), ((5, 5), (0, 1))])
def test_refuses_empty_sizes(shape, grid):
    with pytest.raises(ValueError, match="at least 1"):
        perlin_noise(shape, grid, generator(0))
