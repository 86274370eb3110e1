"""The six kinds of defect of the demo set: image (h, w, 3) -> the same image with one scratch, stain, dent … on it.

They are curves, shaded bumps and warps of the texture, drawn by geometry. None is a thresholded noise region filled
with foreign or recoloured texture, which is what training draws (anomalies.py).

Each defect takes the clean image, float, about [0, 1], square, and the generator of all its draws. Lengths grow with
the image. What it changes it does not tell: `damage` finds the mask by comparing. A pixel is defective when a channel
differs from the untouched image by `CHANGE` of 255 grey levels or more; smaller changes are taken back, gaps inside a
defect are closed and darkened by `CHANGE`: mask and change agree exactly.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import expit

Array = np.ndarray
CHANGE = 5  # grey levels


def _scratch(image: Array, rng: np.random.Generator) -> Array:
    """A thin cut: bright bared core, dark shadow beside it, thinning out at the ends."""
    size = image.shape[0]
    distance, position, _ = _curve(size, rng, (0.35, 0.7), bend=0.3)
    width = size / 256 * rng.uniform(1.3, 1.9)
    depth = _taper(position, 0.2)
    shadow = 0.6 * depth * _bell(distance - 2 * width, 1.3 * width)
    core = 0.9 * depth * _bell(distance, width)
    image = image * (1 - shadow[..., None])
    return image + core[..., None] * ((0.93, 0.90, 0.84) - image)


def _stain(image: Array, rng: np.random.Generator) -> Array:
    """A dried liquid: the texture shows through, darker and browner, with a darker rim."""
    size = image.shape[0]
    radial, _ = _blob(size, rng, rng.uniform(0.08, 0.14) * size, wobble=0.16, waves=7)
    cover = rng.uniform(0.72, 0.85) * expit(45 * (1 - radial)) + 0.35 * _bell(radial - 0.94, 0.05)
    return image * (1 - cover[..., None] * (1 - np.array((0.34, 0.25, 0.16))))


def _dent(image: Array, rng: np.random.Generator) -> Array:
    """A pit pressed in: the texture is drawn to its centre, the side towards the light is dark, the other bright."""
    size = image.shape[0]
    radius = rng.uniform(0.05, 0.075) * size
    radial, offset = _blob(size, rng, radius, wobble=0.06, waves=4)
    pit = np.exp(-(radial**3))  # steeper at its edge than a bell: it ends where it seems to
    slope = pit * (offset[0] + offset[1]) / radius
    return _move(image, 0.5 * pit * offset) * (1 + 0.85 * slope - 0.25 * pit)[..., None]


def _hole(image: Array, rng: np.random.Generator) -> Array:
    """A tear: darkness behind, a ragged edge that catches the light away from it."""
    size = image.shape[0]
    radial, offset = _blob(size, rng, rng.uniform(0.04, 0.075) * size, wobble=0.10, waves=24)
    inside = expit(30 * (1 - radial))
    behind = 0.04 + 0.03 * (offset[0] + offset[1] > 0) * radial
    lit = 0.35 * _bell(radial - 1.15, 0.12) * (offset[0] + offset[1]) / (np.hypot(*offset) + 1)
    return image * ((1 - inside) * (1 + lit))[..., None] + (inside * behind)[..., None]


def _crease(image: Array, rng: np.random.Generator) -> Array:
    """A fold: the texture is pinched along a line, bright on one flank and dark on the other."""
    size = image.shape[0]
    distance, position, normal = _curve(size, rng, (0.45, 0.75), bend=0.12)
    width = size / 256 * rng.uniform(3.0, 4.0)
    depth = _taper(position, 0.25)
    pinch = depth * np.sign(distance) * 1.6 * width * _bell(distance, 1.7 * width)
    flanks = _bell(distance + width, width) - 1.3 * _bell(distance - width, width)
    return _move(image, pinch * normal) * (1 + 0.5 * depth * flanks)[..., None]


def _fibre(image: Array, rng: np.random.Generator) -> Array:
    """A foreign fibre lying on the surface: curly, of one colour, round, with a shadow."""
    size = image.shape[0]
    distance, _, _ = _curve(size, rng, (0.4, 0.7), bend=1.2)
    width = size / 256 * rng.uniform(1.3, 1.9)
    body = expit(4 * (1 - np.abs(distance) / width))
    shadow = 0.55 * ndimage.shift(_bell(distance, 1.6 * width), 1.5 * width, order=1)
    colour = np.array(((0.08, 0.10, 0.28), (0.58, 0.07, 0.10), (0.95, 0.95, 0.92)))[rng.integers(3)]
    roundness = 1 - 0.3 * np.minimum(np.abs(distance) / width, 1)
    image = image * (1 - shadow[..., None])
    return image + body[..., None] * (colour * roundness[..., None] - image)


DEFECTS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "scratch": _scratch, "stain": _stain, "dent": _dent, "hole": _hole, "crease": _crease, "fibre": _fibre,
}  # fmt: skip


def damage(clean: Array, kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Good image (size, size, 3) in [0, 1], name of a defect -> image uint8, mask (size, size) uint8 in {0, 255}.

    Grey images stay grey. A defect that covers less than 0.3 or more than 8 % of the image is drawn again.

    Raises:
        ValueError: if a hundred defects in a row were too small or too large.
    """
    size, before = clean.shape[0], quantise(clean)
    grey = bool((clean == clean[:, :, :1]).all())
    for _ in range(100):
        drawn = DEFECTS[kind](clean, rng)
        after = quantise(np.broadcast_to(drawn.mean(axis=2, keepdims=True), drawn.shape) if grey else drawn)
        changed = np.abs(after.astype(np.int16) - before).max(axis=2) >= CHANGE
        closed = ndimage.binary_closing(np.pad(changed, 3), iterations=2)[3:-3, 3:-3]
        filled = ~_large_parts(~closed, size * size // 1000)  # not all holes: a fibre may run in a loop
        mask = _large_parts(filled, size * size // 2000)  # no specks where a soft edge crosses the grain
        if 0.003 <= mask.mean() <= 0.08:
            break
    else:
        raise ValueError(f"no {kind} between 0.3 and 8 % of the image came out; the image may be all black or white")
    nudged = np.where(before >= 128, before - CHANGE, before + CHANGE)
    after = np.where(changed[..., None], after, nudged)
    return np.where(mask[..., None], after, before).astype(np.uint8), mask.astype(np.uint8) * 255


def _large_parts(region: Array, area: int) -> Array:
    """Region (h, w) bool -> its 8-connected parts of at least `area` pixels."""
    labels, count = ndimage.label(region, np.ones((3, 3)))
    large = np.bincount(labels.ravel(), minlength=count + 1) >= area
    large[0] = False
    return large[labels]


def quantise(image: Array) -> Array:
    """Image in [0, 1] -> uint8."""
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _curve(size: int, rng: np.random.Generator, length: tuple[float, float], bend: float) -> tuple[Array, Array, Array]:
    """A random curve -> signed distance to it (pixels, inf far away), position along it in [0, 1], normal (2, h, w).

    Args:
        length: range of lengths as a fraction of `size`.
        bend: how far the direction drifts over the length, about this many radians.
    """
    n = 400
    drift = ndimage.gaussian_filter1d(rng.standard_normal(n), n / 8)
    heading = rng.uniform(0, 2 * math.pi) + bend * (drift - drift.mean()) / drift.std()
    steps = np.stack([np.cos(heading), np.sin(heading)]) * rng.uniform(*length) * size / n
    points = np.cumsum(steps, axis=1).T
    points += rng.uniform(0.35, 0.65, 2) * size - points.mean(axis=0)
    pixels = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1)
    distance, index = cKDTree(points).query(pixels, distance_upper_bound=size / 8)
    index = np.minimum(index, n - 1)
    normal = np.stack([-np.sin(heading), np.cos(heading)])[:, index]
    offset = (pixels - points[index]).transpose(2, 0, 1)
    side = np.where((normal * offset).sum(axis=0) < 0, -1, 1)
    return side * distance, index / (n - 1), normal


def _bell(distance: Array, width: float) -> Array:
    return np.exp(-((distance / width) ** 2))


def _taper(position: Array, ends: float) -> Array:
    """Position along a curve in [0, 1] -> weight: 1, falling to 0 over `ends` at both ends."""
    return np.minimum(np.minimum(position, 1 - position) / ends, 1)


def _blob(size: int, rng: np.random.Generator, radius: float, wobble: float, waves: int) -> tuple[Array, Array]:
    """A round spot of uneven outline -> distance from its centre in units of its radius, offset (2, h, w) in pixels."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    offset = np.stack([x, y]) - rng.uniform(0.2, 0.8, (2, 1, 1)) * size
    angle = np.arctan2(offset[1], offset[0])
    outline = np.ones_like(angle)
    for wave in range(2, waves):
        outline += wobble * rng.uniform(-1, 1) * np.cos(wave * angle + rng.uniform(0, 2 * math.pi)) / wave**0.5
    return np.hypot(*offset) / (radius * outline), offset


def _move(image: Array, shift: Array) -> Array:
    """Image (h, w, 3) sampled `shift` (x, y: (2, h, w) pixels) away, bilinear, mirrored at the borders."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    places = np.stack([y + shift[1], x + shift[0]])
    return np.stack([ndimage.map_coordinates(channel, places, order=1, mode="mirror")
                     for channel in image.transpose(2, 0, 1)], axis=-1)  # fmt: skip
