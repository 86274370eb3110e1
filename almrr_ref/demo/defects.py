"""Defects drawn on a good image: the demo's six kinds, and five fainter ones for check sets.

They are curves, bumps, warps, grain and shading, drawn by geometry. None is a thresholded noise region filled with
foreign or recoloured texture, which is what training draws (anomalies.py).

Each kind takes the clean image, (h, w, 3) float, about [0, 1]. Lengths grow with the image: `_side` is that of the
square of its area, and a pixel is 1/256 of it. The six return the image, and `damage` finds the mask by comparing. The
five have soft outlines and return their mask, (h, w) bool, as well.
"""

import math

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import expit

Array = np.ndarray
Rng = np.random.Generator
CHANGE = 5  # of 255 grey levels: a pixel that changes less is not defective
WEAKEST = 0.2  # strength of a faint defect, at least; up to 1, log-uniform
SMALLEST = 2e-4  # fraction of the image that a faint defect covers, at least: 13 pixels of 256x256


def _scratch(image: Array, rng: Rng) -> Array:
    """A thin cut: bright bared core, dark shadow beside it, thinning out at the ends."""
    distance, position, _ = _curve(image, rng, (0.35, 0.7), bend=0.3)
    width = _side(image) / 256 * rng.uniform(1.3, 1.9)
    depth = _taper(position, 0.2)
    image = image * (1 - 0.6 * depth * _bell(distance - 2 * width, 1.3 * width))[..., None]
    return image + (0.9 * depth * _bell(distance, width))[..., None] * ((0.93, 0.90, 0.84) - image)


def _stain(image: Array, rng: Rng) -> Array:
    """A dried liquid: the texture shows through, darker and browner, with a darker rim."""
    radial, _ = _blob(image, rng, rng.uniform(0.08, 0.14) * _side(image), wobble=0.16, waves=7)
    cover = rng.uniform(0.72, 0.85) * expit(45 * (1 - radial)) + 0.35 * _bell(radial - 0.94, 0.05)
    return image * (1 - cover[..., None] * (1 - np.array((0.34, 0.25, 0.16))))


def _dent(image: Array, rng: Rng) -> Array:
    """A pit: the texture is drawn to its centre, the side towards the light is dark, the other bright."""
    radius = rng.uniform(0.05, 0.075) * _side(image)
    radial, offset = _blob(image, rng, radius, wobble=0.06, waves=4)
    pit = np.exp(-(radial**3))  # steeper at its edge than a bell: it ends where it seems to
    slope = pit * (offset[0] + offset[1]) / radius
    return _move(image, 0.5 * pit * offset) * (1 + 0.85 * slope - 0.25 * pit)[..., None]


def _hole(image: Array, rng: Rng) -> Array:
    """A tear: darkness behind, a ragged edge that catches the light on the far side."""
    radial, offset = _blob(image, rng, rng.uniform(0.04, 0.075) * _side(image), wobble=0.10, waves=24)
    inside = expit(30 * (1 - radial))
    behind = 0.04 + 0.03 * (offset[0] + offset[1] > 0) * radial
    lit = 0.35 * _bell(radial - 1.15, 0.12) * (offset[0] + offset[1]) / (np.hypot(*offset) + 1)
    return image * ((1 - inside) * (1 + lit))[..., None] + (inside * behind)[..., None]


def _crease(image: Array, rng: Rng) -> Array:
    """A fold: the texture is pinched along a line, bright on one flank and dark on the other."""
    distance, position, normal = _curve(image, rng, (0.45, 0.75), bend=0.12)
    width = _side(image) / 256 * rng.uniform(3.0, 4.0)
    depth = _taper(position, 0.25)
    pinch = depth * np.sign(distance) * 1.6 * width * _bell(distance, 1.7 * width)
    flanks = _bell(distance + width, width) - 1.3 * _bell(distance - width, width)
    return _move(image, pinch * normal) * (1 + 0.5 * depth * flanks)[..., None]


def _fibre(image: Array, rng: Rng) -> Array:
    """A foreign fibre on the surface: curly, of one colour, round, with a shadow."""
    distance, _, _ = _curve(image, rng, (0.4, 0.7), bend=1.2)
    width = _side(image) / 256 * rng.uniform(1.3, 1.9)
    body = expit(4 * (1 - np.abs(distance) / width))
    image = image * (1 - 0.55 * ndimage.shift(_bell(distance, 1.6 * width), 1.5 * width, order=1))[..., None]
    colour = np.array(((0.08, 0.10, 0.28), (0.58, 0.07, 0.10), (0.95, 0.95, 0.92)))[rng.integers(3)]
    roundness = 1 - 0.3 * np.minimum(np.abs(distance) / width, 1)
    return image + body[..., None] * (colour * roundness[..., None] - image)


def _crack(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A dark, jagged line, one to four pixels wide, thinning out at both ends."""
    roughness, turn = rng.uniform(0.08, 0.2), rng.uniform(0, 2 * math.pi)
    points = np.zeros((257, 2))
    points[-1] = math.cos(turn), math.sin(turn)
    for step in (256, 128, 64, 32, 16, 8, 4, 2):  # displaces the middle of every piece
        before, after = points[:-1:step], points[step::step]
        length = np.linalg.norm(after - before, axis=1, keepdims=True)
        points[step // 2 :: step] = (before + after) / 2 + roughness * length * rng.standard_normal(before.shape)
    points = points * rng.uniform(0.2, 0.7) * _side(image)
    points += rng.uniform(0.25, 0.75, 2) * _extent(image) - points.mean(axis=0)
    distance, nearest = _nearest_point(points, image)
    half_width = rng.uniform(0.7, 1.6) * _side(image) / 256
    depth = np.clip(half_width + 0.5 - distance, 0, 1) * _taper(nearest / (len(points) - 1), 0.1)
    return image * (1 - 0.7 * depth[..., None]), depth > 0.3


def _pores(image: Array, rng: Rng) -> tuple[Array, Array]:
    """One to four dark pits close together, 3 to 12 pixels wide."""
    y, x = np.indices(image.shape[:2]) / (_side(image) / 256)
    depth, centre = np.zeros(image.shape[:2]), rng.uniform(38, 218, 2) * (_extent(image) / _side(image))
    for _ in range(rng.integers(1, 5)):
        centre_x, centre_y = centre + rng.normal(0, 12, 2)
        distance = np.hypot(x - centre_x, (y - centre_y) * rng.uniform(0.7, 1.4))
        depth = np.maximum(depth, expit(1.5 * (rng.uniform(1.5, 6) - distance)))
    return image * (1 - 0.8 * depth[..., None]), depth > 0.3


def _chip(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A piece broken out of the border: another tone without the texture, a ragged edge."""
    y, x = np.indices(image.shape[:2]) / _side(image)
    right, bottom = _extent(image) / _side(image)
    borders = ((x, y, bottom), (right - x, y, bottom), (y, x, right), (bottom - y, x, right))
    inward, along, length = borders[rng.integers(4)]
    along = (along - rng.uniform(0.1, 0.9) * length) / rng.uniform(0.08, 0.3)
    edge = rng.uniform(0.05, 0.2) * np.exp(-1.5 * along**2) + 0.012 * _noise(image, 3, rng)
    cover = ndimage.gaussian_filter(((inward < edge) & (abs(along) < 1.5)).astype(float), 0.8 * _side(image) / 256)
    fill = np.clip(rng.uniform(0.15, 0.8) + 0.04 * _noise(image, 2, rng), 0, 1)
    return image + cover[..., None] * (fill[..., None] - image), cover > 0.3


def _wear(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A rubbed patch: the texture blurred, a rough grain in its place, a little lighter or darker."""
    y, x = np.indices(image.shape[:2])
    centre_x, centre_y = rng.uniform(0.2, 0.8, 2) * _extent(image)
    radius = rng.uniform(0.06, 0.15) * _side(image)
    radial = np.hypot(x - centre_x, (y - centre_y) * rng.uniform(0.6, 1.6)) / radius + 0.25 * _noise(image, 6, rng)
    cover = expit(8 * (1 - radial))
    blurred = ndimage.gaussian_filter(image, (3 * _side(image) / 256, 3 * _side(image) / 256, 0))
    tone = 1 + rng.choice([-1, 1]) * rng.uniform(0, 0.25)
    fill = np.clip(blurred * tone + 0.12 * blurred.mean() * _noise(image, 1.2, rng)[..., None], 0, 1)
    return image + cover[..., None] * (fill - image), cover > 0.4


def _shade(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A wide, soft band or patch that is lighter or darker, sometimes grainy."""
    y, x = (places / length - 0.5 for places, length in zip(np.indices(image.shape[:2]), image.shape))
    turn = rng.uniform(0, 2 * math.pi)
    across, along = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    wavy = across - rng.uniform(-0.3, 0.3) + 0.05 * _noise(image, 20, rng)
    cover = _bell(wavy, rng.uniform(0.06, 0.2))
    if rng.random() < 0.5:
        cover *= _bell(along - rng.uniform(-0.3, 0.3), rng.uniform(0.15, 0.4))
    if rng.random() < 0.5:
        cover *= 1 + 0.15 * _noise(image, 2, rng)
    return image * (1 + rng.choice([-1, 1]) * 0.5 * cover[..., None]), cover > 0.4


DEFECTS = dict(scratch=_scratch, stain=_stain, dent=_dent, hole=_hole, crease=_crease, fibre=_fibre)
FAINT_DEFECTS = dict(crack=_crack, pores=_pores, chip=_chip, wear=_wear, shade=_shade)


def damage(clean: Array, kind: str, rng: Rng) -> tuple[Array, Array]:
    """Good image (h, w, 3) in [0, 1], one of `DEFECTS` -> image uint8, mask (h, w) uint8 in {0, 255}.

    A pixel is defective when a channel differs from the clean image by `CHANGE` or more. Smaller changes are taken
    back; gaps inside a defect are closed and changed by `CHANGE`: mask and change agree exactly. Grey images stay grey.
    A defect on less than 0.3 or more than 8 % of the image is drawn again, up to a hundred times, before a ValueError.
    """
    before, area, grey = quantise(clean), clean.shape[0] * clean.shape[1], (clean == clean[:, :, :1]).all()
    for _ in range(100):
        drawn = DEFECTS[kind](clean, rng)
        after = quantise(drawn.mean(axis=2, keepdims=True) if grey else drawn)
        changed = np.abs(after.astype(np.int16) - before).max(axis=2) >= CHANGE
        closed = ndimage.binary_closing(np.pad(changed, 3), iterations=2)[3:-3, 3:-3]
        filled = ~_large_regions(~closed, area // 1000)  # not all holes: a fibre may run in a loop
        mask = _large_regions(filled, area // 2000)  # no specks where a soft edge crosses the grain
        if 0.003 <= mask.mean() <= 0.08:
            after = np.where(changed[..., None], after, np.where(before >= 128, before - CHANGE, before + CHANGE))
            return np.where(mask[..., None], after, before).astype(np.uint8), mask * np.uint8(255)
    raise ValueError(f"no {kind} between 0.3 and 8 % of the image came out; the image may be all black or white")


def full_damage(clean: Array, kind: str, rng: Rng) -> tuple[Array, Array]:
    """Good image (h, w, 3) in [0, 1], one of both dictionaries -> damaged image (h, w, 3), mask (h, w).

    Raises ValueError as `damage` does.
    """
    if kind in DEFECTS:
        damaged, mask = damage(clean, kind, rng)
        return damaged / 255.0, mask
    mask = np.zeros(1)
    while mask.mean() < SMALLEST:  # it lies outside of the image: draw another one
        damaged, mask = FAINT_DEFECTS[kind](clean, rng)
    return damaged, mask


def faint_damage(picture: Array, kind: str, rng: Rng) -> tuple[Array, Array]:
    """Good image uint8 (h, w, 3), one of both dictionaries -> weakened image uint8, mask (h, w) uint8 in {0, 255}."""
    clean = picture / 255.0
    damaged, mask = full_damage(clean, kind, rng)
    strength = math.exp(rng.uniform(math.log(WEAKEST), 0))
    return quantise(clean + strength * (damaged - clean)), (mask > 0) * np.uint8(255)


def quantise(image: Array) -> Array:
    """Image in [0, 1] -> uint8."""
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _large_regions(mask: Array, area: int) -> Array:
    """Mask (h, w) bool -> its 8-connected regions of at least `area` pixels."""
    labels = ndimage.label(mask, np.ones((3, 3)))[0]
    return mask & (np.bincount(labels.ravel()) >= area)[labels]


def _side(image: Array) -> float:
    """Side in pixels of the square of the image's area."""
    return math.sqrt(image.shape[0] * image.shape[1])


def _extent(image: Array) -> Array:
    """(width, height) in pixels."""
    return np.array(image.shape[1::-1])


def _curve(image: Array, rng: Rng, length: tuple[float, float], bend: float) -> tuple[Array, Array, Array]:
    """A random curve -> signed distance to it (pixels, inf far away), position along it in [0, 1], normal (2, h, w)."""
    n = 400
    drift = ndimage.gaussian_filter1d(rng.standard_normal(n), n / 8)
    heading = rng.uniform(0, 2 * math.pi) + bend * (drift - drift.mean()) / drift.std()
    points = np.cumsum(np.stack([np.cos(heading), np.sin(heading)]) * rng.uniform(*length) * _side(image) / n, axis=1).T
    points += rng.uniform(0.35, 0.65, 2) * _extent(image) - points.mean(axis=0)
    distance, nearest = _nearest_point(points, image)
    normal = np.stack([-np.sin(heading), np.cos(heading)])[:, nearest]
    offset = np.indices(image.shape[:2])[::-1] - points[nearest].transpose(2, 0, 1)
    signed = np.where((normal * offset).sum(axis=0) < 0, -distance, distance)
    return signed, nearest / (n - 1), normal


def _nearest_point(points: Array, image: Array) -> tuple[Array, Array]:
    """Points (n, 2), x and y -> for each pixel the distance to the nearest (inf beyond side / 8) and its index."""
    pixels = np.moveaxis(np.indices(image.shape[:2])[::-1], 0, -1)
    distance, index = cKDTree(points).query(pixels, distance_upper_bound=_side(image) / 8)
    return distance, np.minimum(index, len(points) - 1)


def _bell(distance: Array, width: float) -> Array:
    """Distance -> weight: 1 at 0, 1/e at `width`."""
    return np.exp(-((distance / width) ** 2))


def _taper(position: Array, ends: float) -> Array:
    """Position along a curve in [0, 1] -> weight: 1, falling to 0 over `ends` at both ends."""
    return np.minimum(np.minimum(position, 1 - position) / ends, 1)


def _blob(image: Array, rng: Rng, radius: float, wobble: float, waves: int) -> tuple[Array, Array]:
    """A round spot of uneven outline -> distance from its centre in units of its radius, offset (2, h, w) in pixels."""
    offset = np.indices(image.shape[:2])[::-1] - rng.uniform(0.2, 0.8, (2, 1, 1)) * _extent(image)[:, None, None]
    angle = np.arctan2(offset[1], offset[0])
    outline = np.ones_like(angle)
    for wave in range(2, waves):
        outline += wobble * rng.uniform(-1, 1) * np.cos(wave * angle + rng.uniform(0, 2 * math.pi)) / wave**0.5
    return np.hypot(*offset) / (radius * outline), offset


def _move(image: Array, shift: Array) -> Array:
    """Image (h, w, 3) sampled `shift` (x, y: (2, h, w) pixels) away, bilinear, mirrored at the borders."""
    places = np.indices(image.shape[:2]) + shift[::-1]
    return np.dstack([ndimage.map_coordinates(c, places, order=1, mode="mirror") for c in np.moveaxis(image, 2, 0)])


def _noise(image: Array, sigma: float, rng: Rng) -> Array:
    """Smooth noise of deviation 1, (h, w); sigma in 256ths of the side."""
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape[:2]), sigma * _side(image) / 256, mode="wrap")
    return noise / noise.std()
