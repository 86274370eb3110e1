"""A procedural data set in MVTec layout: two textures, six kinds of defect, exact masks.

    train/good  test/good  test/<kind>  ground_truth/<kind>/<stem>_mask.png      file names: <texture>_<number>.png

Textures: a twill fabric, rendered yarn by yarn, and a pebbled leather, rendered from a cell pattern. Good images
differ as those of a line do: phase, scale, a slight turn, lighting, single yarns or pebbles, grain.

Defects: scratch, stain, dent, hole, crease, fibre (demo_defects.py). They are drawn by geometry, unlike the simulated
anomalies of the training: the set tests how the method generalises, not whether it recognises its own generator.

Masks: a pixel is defective when a channel differs from the untouched image by `CHANGE` of 255 grey levels or more.
Smaller changes are taken back, gaps inside a defect are closed and darkened by `CHANGE`: mask and change agree exactly.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from almrr_ref.data.datasets import describe, find_dataset
from almrr_ref.demo.check_set import write_check
from almrr_ref.demo.defects import CHANGE, DEFECTS, Array, damage, quantise
from almrr_ref.report.overlays import save_picture
from almrr_ref.run.cli import make_parser, run_command
from almrr_ref.run.files import make_folder

__all__ = ["CHANGE", "DEFECTS", "TEXTURES", "defective", "render", "write_demo"]


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
        for k in range(count):
            texture = names[k % len(names)]
            image = render(texture, size, np.random.default_rng((seed, part, k)))
            save_picture(root / folder / f"{texture}_{k:03d}.png", image)
    kinds = list(DEFECTS)
    for k in range(n_defects):
        kind, texture = kinds[k % len(kinds)], names[k // len(kinds) % len(names)]
        image, mask = defective(texture, kind, size, np.random.default_rng((seed, 2, k)))
        save_picture(root / "test" / kind / f"{texture}_{k:03d}.png", image)
        save_picture(root / "ground_truth" / kind / f"{texture}_{k:03d}_mask.png", mask)
    return root


def render(texture: str, size: int, rng: np.random.Generator) -> Array:
    """Name of a texture -> good image (size, size, 3) uint8."""
    return quantise(TEXTURES[texture](size, rng))


def defective(texture: str, kind: str, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Names of a texture and a defect -> image (size, size, 3) uint8, mask (size, size) uint8 in {0, 255}.

    The texture is rendered, then damaged: see `damage`.
    """
    return damage(TEXTURES[texture](size, rng), kind, rng)


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


def main(argv: list[str] | None = None) -> int:
    """Write the demo set, or a check set of one's own images."""
    parser = make_parser(
        "demo",
        "Write the procedural demo set; or, with --images, draw its defects on a part of your own good images,\n"
        "so that a network can be checked where no defective image is at hand.\n\nexamples:\n"
        "  python -m almrr_ref.demo --out demo-images\n"
        "  python -m almrr_ref.demo --images good-images/ --out check\n"
        "  python -m almrr_ref.train --data check --preset plus --backbone efficientnet_lite0",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, a MVTec category")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of good images, or any known layout")
    parser.add_argument(
        "--faint", action="store_true", help="with --images: eleven kinds, at 20 to 100%% of their strength"
    )
    parser.add_argument(
        "--parts",
        metavar="REGEX",
        help="with --images: its first group says which part a file shows, where several images show the same part; "
        "no part is then both trained on and checked; train on the set with --parts 'part([0-9]+)_'",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of everything random (default: 0)")
    return run_command(command, parser, argv)


def command(arguments: argparse.Namespace) -> int:
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out {arguments.out} is there already and not an empty folder; name another")
    make_folder(arguments.out)
    if arguments.images:
        write_check(arguments.images, arguments.out, arguments.seed, faint=arguments.faint, parts=arguments.parts)
    else:
        write_demo(arguments.out, arguments.seed)
    print(describe(find_dataset(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
