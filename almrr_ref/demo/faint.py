"""Five more kinds of defect, for check sets: image (h, w, 3) -> the same image with a crack, pores, … and a mask.

What the demo's six (demo_defects.py) leave out: what is thin and jagged, small and many, at the border, rough, or wide
and soft. As there, none is drawn as training draws its anomalies, so that what they tell is not what was learned by
heart. Weakened by `write_check`, they lie at the limit of what can be seen.

Each takes a clean image, float in [0, 1], square, and the generator of all its draws, and gives the damaged image and
where it is damaged, (h, w) bool. Gray images stay gray. Lengths grow with the image; a pixel is 1/256 of its side.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import expit

Array = np.ndarray
Damaged = tuple[Array, Array]


def _crack(image: Array, rng: np.random.Generator) -> Damaged:
    """A dark, jagged line, one to four pixels wide, thinning out at both ends."""
    size = image.shape[0]
    points = _jagged(rng.uniform(0.08, 0.2), rng) * rng.uniform(0.2, 0.7) * size
    points += rng.uniform(0.25, 0.75, 2) * size - points.mean(axis=0)
    y, x = np.mgrid[:size, :size]
    distance, nearest = cKDTree(points).query(np.stack([x, y], axis=-1))
    position = nearest / (len(points) - 1)
    half_width = rng.uniform(0.7, 1.6) * size / 256
    depth = np.clip(half_width + 0.5 - distance, 0, 1) * np.minimum(1, np.minimum(position, 1 - position) / 0.1)
    return image * (1 - 0.7 * depth[..., None]), depth > 0.3


def _pores(image: Array, rng: np.random.Generator) -> Damaged:
    """One to four dark pits close together, 3 to 12 pixels wide."""
    size = image.shape[0]
    unit = size / 256
    y, x = np.mgrid[:size, :size] / unit
    depth, centre = np.zeros((size, size)), rng.uniform(38, 218, 2)
    for _ in range(rng.integers(1, 5)):
        across, down = centre + rng.normal(0, 12, 2)
        distance = np.hypot(x - across, (y - down) * rng.uniform(0.7, 1.4))
        depth = np.maximum(depth, expit(1.5 * (rng.uniform(1.5, 6) - distance)))
    return image * (1 - 0.8 * depth[..., None]), depth > 0.3


def _chip(image: Array, rng: np.random.Generator) -> Damaged:
    """A piece broken out of the border: another tone without the texture, a ragged edge."""
    size = image.shape[0]
    y, x = np.mgrid[:size, :size] / size
    inward, along = ((x, y), (1 - x, y), (y, x), (1 - y, x))[rng.integers(4)]
    along = (along - rng.uniform(0.1, 0.9)) / rng.uniform(0.08, 0.3)
    edge = rng.uniform(0.05, 0.2) * np.exp(-1.5 * along**2) + 0.012 * _noise(size, 3, rng)
    gone = ndimage.gaussian_filter(((inward < edge) & (abs(along) < 1.5)).astype(float), 0.8 * size / 256)
    fill = np.clip(rng.uniform(0.15, 0.8) + 0.04 * _noise(size, 2, rng), 0, 1)
    return image + gone[..., None] * (fill[..., None] - image), gone > 0.3


def _wear(image: Array, rng: np.random.Generator) -> Damaged:
    """A rubbed patch: the texture blurred, a rough grain in its place, a little lighter or darker."""
    size = image.shape[0]
    y, x = np.mgrid[:size, :size]
    across, down = rng.uniform(0.2, 0.8, 2) * size
    radius = rng.uniform(0.06, 0.15) * size
    radial = np.hypot(x - across, (y - down) * rng.uniform(0.6, 1.6)) / radius + 0.25 * _noise(size, 6, rng)
    cover = expit(8 * (1 - radial))
    blurred = ndimage.gaussian_filter(image, (3 * size / 256, 3 * size / 256, 0))
    tone = 1 + rng.choice([-1, 1]) * rng.uniform(0, 0.25)
    fill = np.clip(blurred * tone + 0.12 * blurred.mean() * _noise(size, 1.2, rng)[..., None], 0, 1)
    return image + cover[..., None] * (fill - image), cover > 0.4


def _shade(image: Array, rng: np.random.Generator) -> Damaged:
    """A wide, soft band or patch that is lighter or darker, sometimes grainy."""
    size = image.shape[0]
    y, x = np.mgrid[:size, :size] / size - 0.5
    turn = rng.uniform(0, 2 * math.pi)
    across, along = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    wavy = across - rng.uniform(-0.3, 0.3) + 0.05 * _noise(size, 20, rng)
    cover = np.exp(-((wavy / rng.uniform(0.06, 0.2)) ** 2))
    if rng.random() < 0.5:
        cover *= np.exp(-(((along - rng.uniform(-0.3, 0.3)) / rng.uniform(0.15, 0.4)) ** 2))
    if rng.random() < 0.5:
        cover *= 1 + 0.15 * _noise(size, 2, rng)
    return image * (1 + rng.choice([-1, 1]) * 0.5 * cover[..., None]), cover > 0.4


FAINT_DEFECTS: dict[str, Callable[[Array, np.random.Generator], Damaged]] = {
    "crack": _crack, "pores": _pores, "chip": _chip, "wear": _wear, "shade": _shade,
}  # fmt: skip


def _jagged(roughness: float, rng: np.random.Generator) -> Array:
    """A line of length 1 in a random direction, its middle points displaced again and again: (257, 2)."""
    turn = rng.uniform(0, 2 * math.pi)
    points, step = np.zeros((257, 2)), 256
    points[-1] = math.cos(turn), math.sin(turn)
    while step > 1:
        half = step // 2
        before, after = points[:-1:step], points[step::step]
        length = np.linalg.norm(after - before, axis=1, keepdims=True)
        points[half::step] = (before + after) / 2 + roughness * length * rng.standard_normal(before.shape)
        step = half
    return points


def _noise(size: int, sigma: float, rng: np.random.Generator) -> Array:
    """Smooth noise of deviation 1; sigma in 256ths of the side."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), sigma * size / 256, mode="wrap")
    return noise / noise.std()
