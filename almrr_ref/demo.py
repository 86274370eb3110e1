"""A procedural data set in MVTec layout: two textures, six kinds of defect, exact masks.

    train/good  test/good  test/<kind>  ground_truth/<kind>/<stem>_mask.png      file names: <texture>_<number>.png

Textures: a twill fabric, rendered yarn by yarn, and a pebbled leather, rendered from a cell pattern. Good images
differ as those of a line do: phase, scale, a slight turn, lighting, single yarns or pebbles, grain.

Defects: scratch, stain, dent, hole, crease, fibre. They are curves, shaded bumps and warps of the texture, drawn by
geometry. None is a thresholded noise region filled with foreign or recoloured texture, which is what training draws
(anomalies.py): the set tests how the method generalises, not whether it recognises its own generator.

Masks: a pixel is defective when a channel differs from the untouched image by `CHANGE` of 255 grey levels or more.
Smaller changes are taken back, gaps inside a defect are closed and darkened by `CHANGE`: mask and change agree exactly.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import expit

Array = np.ndarray
CHANGE = 5


def write_demo(
    directory: str | Path,
    seed: int = 0,
    size: int = 256,
    n_train: int = 120,
    n_test_good: int = 40,
    n_defects: int = 60,
) -> Path:
    """Write the demo set: -> its folder, a MVTec category.

    Args:
        directory: created where missing. Files of an earlier demo set of other counts are not removed.
        seed: every pixel follows from it; image k is the same whatever the counts.
        size: edge of the images, pixels, >= 64.
        n_train, n_test_good: good images, alternating between the two textures.
        n_defects: defective images, spread over the six kinds, and over both textures within a kind.
    Raises:
        ValueError: if a size or a count is too small.
    """
    if size < 64 or min(n_train, n_test_good, n_defects) < 1:
        raise ValueError(f"demo set of size {size} with counts {(n_train, n_test_good, n_defects)}: "
                         "expected a size of at least 64 and counts of at least 1")  # fmt: skip
    root = Path(directory)
    names = list(TEXTURES)
    for part, (folder, count) in enumerate((("train/good", n_train), ("test/good", n_test_good))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            texture = names[k % len(names)]
            image = render(texture, size, np.random.default_rng((seed, part, k)))
            Image.fromarray(image).save(root / folder / f"{texture}_{k:03d}.png", compress_level=3)
    kinds = list(DEFECTS)
    for k in range(n_defects):
        kind, texture = kinds[k % len(kinds)], names[k // len(kinds) % len(names)]
        image, mask = defective(texture, kind, size, np.random.default_rng((seed, 2, k)))
        for folder, name, pixels in (("test", "", image), ("ground_truth", "_mask", mask)):
            (root / folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / kind / f"{texture}_{k:03d}{name}.png", compress_level=3)
    return root


def render(texture: str, size: int, rng: np.random.Generator) -> Array:
    """Name of a texture -> good image (size, size, 3) uint8."""
    return _quantise(TEXTURES[texture](size, rng))


def defective(texture: str, kind: str, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Names of a texture and a defect -> image (size, size, 3) uint8, mask (size, size) uint8 in {0, 255}.

    A defect that covers less than 0.3 or more than 8 % of the image is drawn again.
    """
    clean = TEXTURES[texture](size, rng)
    before = _quantise(clean)
    while True:
        after = _quantise(DEFECTS[kind](clean, rng))
        changed = np.abs(after.astype(np.int16) - before).max(axis=2) >= CHANGE
        closed = ndimage.binary_closing(np.pad(changed, 3), iterations=2)[3:-3, 3:-3]
        filled = ~_large_parts(~closed, size * size // 1000)  # not all holes: a fibre may run in a loop
        mask = _large_parts(filled, size * size // 2000)  # no specks where a soft edge crosses the grain
        if 0.003 <= mask.mean() <= 0.08:
            break
    nudged = np.where(before >= 128, before - CHANGE, before + CHANGE)
    after = np.where(changed[..., None], after, nudged)
    return np.where(mask[..., None], after, before).astype(np.uint8), mask.astype(np.uint8) * 255


def _large_parts(region: Array, area: int) -> Array:
    """Region (h, w) bool -> its 8-connected parts of at least `area` pixels."""
    labels, count = ndimage.label(region, np.ones((3, 3)))
    large = np.bincount(labels.ravel(), minlength=count + 1) >= area
    large[0] = False
    return large[labels]


def _quantise(image: Array) -> Array:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _fabric(size: int, rng: np.random.Generator) -> Array:
    """Twill: every yarn runs over two crossing ones and under two, each round and plied, lit from the top left."""
    x, y = _frame(size, rng, turn=2.0)
    period = size / 24
    u = x / period + 0.10 * _smooth(size, size / 6, rng)
    v = y / period + 0.10 * _smooth(size, size / 6, rng)
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    across, along = u - i - 0.5, v - j - 0.5
    warp = _profile(across) + 0.9 * np.cos(math.pi / 2 * (v + i - 1))
    weft = _profile(along) - 0.9 * np.cos(math.pi / 2 * (u + j - 1))
    top = warp > weft
    tone = 1 + 0.04 * rng.standard_normal((2, 256))
    plies = np.sin(2 * math.pi * np.where(top, 2.0 * v + 1.2 * across, 2.0 * u + 1.2 * along))
    albedo = np.where(top, tone[0][i % 256], tone[1][j % 256]) * (1 + 0.07 * plies)
    colour = np.where(top[..., None], (0.33, 0.40, 0.52), (0.70, 0.69, 0.65))
    return _light(colour * albedo[..., None], np.maximum(warp, weft) * period * 0.3, rng, grain=0.018)


def _profile(across: Array) -> Array:
    """Distance from the axis of a yarn in periods -> height of its round top, deep outside of it."""
    return np.where(np.abs(across) < 0.46, np.sqrt(np.clip(1 - (across / 0.46) ** 2, 0, None)), -0.8)


def _leather(size: int, rng: np.random.Generator) -> Array:
    """Pebbled leather: cells about scattered points, round on top, with soft valleys between, lit from the top left."""
    x, y = _frame(size, rng, turn=8.0)
    period = size / 26
    x, y = x / period + 0.12 * _smooth(size, size / 40, rng), y / period + 0.12 * _smooth(size, size / 40, rng)
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    jitter = rng.uniform(0.1, 0.9, (2, 64, 64))  # one point per unit square; the table repeats outside of the image
    tones = rng.standard_normal((64, 64))
    first, second = np.full_like(x, 9.0), np.full_like(x, 9.0)
    tone = np.zeros_like(x)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            a, b = (i + di) % 64, (j + dj) % 64
            distance = np.hypot(i + di + jitter[0][a, b] - x, j + dj + jitter[1][a, b] - y)
            tone = np.where(distance < first, tones[a, b], tone)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    pebble = np.sqrt(1 - np.exp(-(((second - first) / 0.22) ** 1.5)))
    shading = 1 + 0.04 * tone * pebble + 0.02 * _smooth(size, size / 8, rng)
    colour = np.array((0.50, 0.33, 0.22)) * ((0.70 + 0.30 * pebble) * shading)[..., None]
    height = period * (0.22 * pebble - 0.12 * first**2) + 0.15 * _smooth(size, 1.2, rng)
    return _light(colour, height, rng, grain=0.014)


TEXTURES: dict[str, Callable[[int, np.random.Generator], Array]] = {"fabric": _fabric, "leather": _leather}


def _frame(size: int, rng: np.random.Generator, turn: float) -> tuple[Array, Array]:
    """Pixel coordinates (size, size) about the centre: turned up to `turn` degrees, scaled up to 4 %, moved."""
    angle, scale = math.radians(rng.uniform(-turn, turn)), rng.uniform(0.96, 1.04)
    y, x = np.mgrid[:size, :size] - size / 2
    shift = rng.uniform(-0.25, 0.25, 2) * size
    return (
        scale * (math.cos(angle) * x + math.sin(angle) * y) + shift[0],
        scale * (math.cos(angle) * y - math.sin(angle) * x) + shift[1],
    )


def _smooth(size: int, sigma: float, rng: np.random.Generator) -> Array:
    """Gaussian-filtered noise of unit deviation, (size, size)."""
    step = max(1, int(sigma / 2))  # drawn coarse and enlarged: the same look, much less work
    coarse = ndimage.gaussian_filter(rng.standard_normal((size // step + 3,) * 2), sigma / step, mode="wrap")
    noise = ndimage.zoom(coarse, (size + 2 * step) / coarse.shape[0], order=1)[:size, :size] if step > 1 else coarse
    noise = noise[:size, :size]
    return noise / coarse.std()


def _light(albedo: Array, height: Array, rng: np.random.Generator, grain: float) -> Array:
    """Colour (h, w, 3) and height (h, w) in pixels -> image: light from the top left, a gradient over it, grain."""
    size = height.shape[0]
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(height, size / 400))
    shade = (1 + 0.45 * (slope_x + slope_y)) / np.sqrt(1 + slope_x**2 + slope_y**2)
    shade *= 1 + 0.02 * (height - height.mean()) * 256 / size
    y, x = np.mgrid[:size, :size] / size - 0.5
    across, down = rng.uniform(-0.12, 0.12, 2)
    shade *= rng.uniform(0.95, 1.05) * (1 + across * x + down * y - 0.10 * (x * x + y * y))
    return albedo * shade[..., None] + grain * rng.standard_normal((size, size, 1))


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


def main(argv: list[str] | None = None) -> int:
    """python -m almrr_ref.demo --out DIR"""
    parser = argparse.ArgumentParser(prog="python -m almrr_ref.demo", description="Write the procedural demo set.")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        print(write_demo(arguments.out, arguments.seed))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
