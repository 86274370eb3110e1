"""A procedural data set in MVTec layout: two textures, six kinds of defect, exact masks.

    train/good  test/good  test/<kind>  ground_truth/<kind>/<stem>_mask.png      file names: <texture>_<number>.png

Textures: a twill fabric, rendered yarn by yarn, and a pebbled leather, rendered from a cell pattern. Good images differ
as those of a production line do: phase, scale, a slight turn, lighting, single yarns or pebbles, grain. The defects
(defects.py) are unlike the simulated anomalies of training: the set tests how the method generalises.
"""

import math
import shutil
from pathlib import Path

import numpy as np
from scipy import ndimage

from almrr_ref.demo.defects import DEFECTS, Array, Rng, damage, quantise
from almrr_ref.report.overlays import save_picture
from almrr_ref.run.ahead import THREADS, mapped_ahead


def data_folder(data: str, run: Path) -> Path:
    """The folder that --data names: a path, or the demo set's in the run's folder, where it is written if missing."""
    if data != "demo":
        return Path(data)
    folder, unfinished = run / "demo-images", run / ".demo-images.part"
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it drew them
        write_demo(unfinished)
        unfinished.rename(folder)
    return folder


def write_demo(
    folder: Path, seed: int = 0, size: int = 256, n_train: int = 120, n_test_good: int = 40, n_defects: int = 60
) -> None:
    """Write the demo set, a MVTec category.

    Args:
        seed: every pixel follows from it; image k is the same whatever the counts.
        size: edge of the images, pixels, >= 64.
        n_train, n_test_good: good images, alternating between the two textures.
        n_defects: defective images, spread over the six kinds, and over both textures within a kind.
    """
    textures, kinds = list(TEXTURES), list(DEFECTS)

    def write(place: tuple[int, int]) -> None:
        stream, k = place
        kind = kinds[k % len(kinds)] if stream == 2 else None
        texture = textures[(k if kind is None else k // len(kinds)) % len(textures)]
        image, mask = draw(texture, (seed, stream, k), size, kind)
        part, name = ("train", "test", "test")[stream], f"{texture}_{k:03d}"
        save_picture(folder / part / (kind or "good") / f"{name}.png", image)
        if kind:
            save_picture(folder / "ground_truth" / kind / f"{name}_mask.png", mask)

    places = [(stream, k) for stream, count in enumerate((n_train, n_test_good, n_defects)) for k in range(count)]
    for _ in mapped_ahead(write, places, ahead=2 * THREADS):
        pass


def draw(texture: str, seed: int | tuple[int, ...], size: int = 256, kind: str | None = None) -> tuple[Array, Array]:
    """Draw one image of the demo: -> image uint8 (size, size, 3), mask of its defect uint8 (size, size) in {0, 255}.

    Args:
        texture: fabric or leather.
        seed: every pixel follows from it.
        kind: of the defect, out of `DEFECTS`; without it the image is good.
    """
    rng = np.random.default_rng(seed)
    clean = TEXTURES[texture](size, rng)
    return damage(clean, kind, rng) if kind else (quantise(clean), np.zeros((size, size), dtype=np.uint8))


def _fabric(size: int, rng: Rng) -> Array:
    """Twill: every yarn runs over two crossing ones and under two, each round and plied, lit from the top left."""
    x, y = _frame(size, rng, turn=2.0)
    period = size / 24
    u = x / period + 0.10 * _smooth(size, size / 6, rng)
    v = y / period + 0.10 * _smooth(size, size / 6, rng)
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    across, along = axes = np.stack((u - i, v - j)) - 0.5  # distance from the axis of a yarn, in periods
    warp, weft = np.where(np.abs(axes) < 0.46, np.sqrt(np.clip(1 - (axes / 0.46) ** 2, 0, None)), -0.8)  # deep between
    warp += 0.9 * np.cos(math.pi / 2 * (v + i - 1))
    weft -= 0.9 * np.cos(math.pi / 2 * (u + j - 1))
    top = warp > weft
    tone = 1 + 0.04 * rng.standard_normal((2, 256))
    plies = np.sin(2 * math.pi * np.where(top, 2.0 * v + 1.2 * across, 2.0 * u + 1.2 * along))
    albedo = np.where(top, tone[0][i % 256], tone[1][j % 256]) * (1 + 0.07 * plies)
    colour = np.where(top[..., None], (0.33, 0.40, 0.52), (0.70, 0.69, 0.65))
    return _light(colour * albedo[..., None], np.maximum(warp, weft) * period * 0.3, rng, grain=0.018)


def _leather(size: int, rng: Rng) -> Array:
    """Pebbled leather: cells about scattered points, round on top, with soft valleys between, lit from the top left."""
    x, y = _frame(size, rng, turn=8.0)
    period = size / 26
    x, y = x / period + 0.12 * _smooth(size, size / 40, rng), y / period + 0.12 * _smooth(size, size / 40, rng)
    jitter = rng.uniform(0.1, 0.9, (2, 64, 64))  # one point per unit square; the table repeats outside of the image
    tones = rng.standard_normal((64, 64))
    square = np.floor([x, y]).astype(int)
    first, second, tone = np.full_like(x, np.inf), np.full_like(x, np.inf), np.zeros_like(x)
    for step in np.ndindex(3, 3):  # the squares around
        i, j = square + np.reshape(step, (2, 1, 1)) - 1
        place = (i & 63) * 64 + (j & 63)
        squared = (i + jitter[0].take(place) - x) ** 2 + (j + jitter[1].take(place) - y) ** 2
        tone = np.where(squared < first, tones.take(place), tone)
        second = np.minimum(second, np.maximum(first, squared))
        first = np.minimum(first, squared)
    first, second = np.sqrt(first), np.sqrt(second)
    pebble = np.sqrt(1 - np.exp(-(((second - first) / 0.22) ** 1.5)))
    shading = 1 + 0.04 * tone * pebble + 0.02 * _smooth(size, size / 8, rng)
    colour = np.array((0.50, 0.33, 0.22)) * ((0.70 + 0.30 * pebble) * shading)[..., None]
    height = period * (0.22 * pebble - 0.12 * first**2) + 0.15 * _smooth(size, 1.2, rng)
    return _light(colour, height, rng, grain=0.014)


TEXTURES = dict(fabric=_fabric, leather=_leather)


def _frame(size: int, rng: Rng, turn: float) -> tuple[Array, Array]:
    """Pixel coordinates (size, size) about the centre: turned up to `turn` degrees, scaled up to 4 %, moved."""
    angle, scale = math.radians(rng.uniform(-turn, turn)), rng.uniform(0.96, 1.04)
    y, x = np.mgrid[:size, :size] - size / 2
    right, down = rng.uniform(-0.25, 0.25, 2) * size
    turned_x, turned_y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    return scale * turned_x + right, scale * turned_y + down


def _smooth(size: int, sigma: float, rng: Rng) -> Array:
    """Gaussian-filtered noise of unit deviation, (size, size)."""
    step = max(1, int(sigma / 2))  # drawn coarse and enlarged: the same look, much less work
    coarse = ndimage.gaussian_filter(rng.standard_normal((size // step + 3,) * 2), sigma / step, mode="wrap")
    noise = ndimage.zoom(coarse, (size + 2 * step) / coarse.shape[0], order=1) if step > 1 else coarse
    return noise[:size, :size] / coarse.std()


def _light(albedo: Array, height: Array, rng: Rng, grain: float) -> Array:
    """Colour (h, w, 3) and height (h, w) in pixels -> image: light from the top left, a gradient over it, grain."""
    size = height.shape[0]
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(height, size / 400))
    shade = (1 + 0.45 * (slope_x + slope_y)) / np.sqrt(1 + slope_x**2 + slope_y**2)
    shade *= 1 + 0.02 * (height - height.mean()) * 256 / size
    y, x = np.mgrid[:size, :size] / size - 0.5
    across, down = rng.uniform(-0.12, 0.12, 2)
    shade *= rng.uniform(0.95, 1.05) * (1 + across * x + down * y - 0.10 * (x * x + y * y))
    return albedo * shade[..., None] + grain * rng.standard_normal((size, size, 1))
