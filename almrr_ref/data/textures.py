"""What textures are made with: ten random changes, patterns of an image itself and of noise, resampling on tensors.

Source: the anomaly generator of DRAEM (Zavrtanik et al. 2021), which the paper's section 3.2 uses: 3 of 10 changes,
without repetition, in random order: gamma, brightness, sharpness, hue and saturation, solarize, posterize, invert,
autocontrast, equalize, rotation. DRAEM calls the imgaug package, whose documented ranges hold here; these are own
versions on tensors.

Deviations: hue and saturation turn and stretch the colour around the gray axis (one 3x3 matrix) where imgaug goes
through HSV, so that a gray texture stays gray; brightness acts on all channels alike; the rotation reflects the border
instead of filling the corners with black, which would make a black triangle the easiest anomaly of all.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.perlin import perlin_noise

LEVELS = 256


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what follows on one CPU thread of torch, then give the number of threads back.

    For work made of many operations on single images, each too short to share: where other processes hold a core,
    waiting for the second thread at the end of each costs up to forty times as much as the work.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw one number from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw one integer from low .. high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device=generator.device).item())


def change_texture(texture: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Apply `count` different changes out of `CHANGES`, in random order: (3, h, w) in [0, 1] -> the same.

    Raises:
        ValueError: if count is not in 0 .. 10.
    """
    if not 0 <= count <= len(CHANGES):
        raise ValueError(f"count must be between 0 and {len(CHANGES)}, got {count}")
    order = torch.randperm(len(CHANGES), generator=generator, device=generator.device).tolist()
    for index in order[:count]:
        texture = CHANGES[index](texture, generator)
    return texture


def gamma(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Raise each channel to a power of its own, U(0.5, 2)."""
    exponents = [uniform(generator, 0.5, 2.0) for _ in range(3)]
    return torch.stack([channel**exponent for channel, exponent in zip(texture, exponents, strict=True)])


def brightness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by U(0.8, 1.2) and add U(-30, 30) / 255."""
    factor = uniform(generator, 0.8, 1.2)
    return (texture * factor + uniform(generator, -30, 30) / 255).clamp_(0, 1)


def sharpness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Blend with a 3x3-smoothed copy by the factor U(0, 2): below 1 blurs, above 1 sharpens."""
    factor = uniform(generator, 0.0, 2.0)
    padded = functional.pad(texture[None], (1, 1, 1, 1), mode="replicate")[0]
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]  # (3, h, w + 2)
    neighbourhood = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = (neighbourhood + 4 * texture) / 13  # Pillow's SMOOTH kernel: centre 5, neighbours 1
    return torch.lerp(smooth, texture, factor).clamp_(0, 1)


def hue_saturation(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue by up to 50/255 of a circle and scale the saturation by 1 + U(-50, 50) / 100."""
    angle = 2 * math.pi * uniform(generator, -50, 50) / 255
    return turn_colour(texture, angle, 1 + uniform(generator, -50, 50) / 100)


def solarize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """In half of the cases invert what lies above a threshold of U(32, 128) / 255."""
    threshold = uniform(generator, 32, 128) / 255
    if uniform(generator) < 0.5:
        return texture
    return torch.where(texture > threshold, 1 - texture, texture)


def posterize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Keep the upper 1 to 8 bits of each value."""
    step = 2 ** (8 - integer(generator, 1, 9))
    return texture.mul(LEVELS - 1).div_(step).floor_().mul_(step / (LEVELS - 1))


def invert(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn into the negative; the generator is unused and stands here because all changes are called alike."""
    return 1 - texture


def autocontrast(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch each channel to [0, 1] after cutting U(0, 20) percent of its pixels off both ends."""
    cutoff = uniform(generator, 0.0, 0.20)
    _, histogram = _levels(texture)
    share = histogram.cumsum(dim=1) / histogram.sum(dim=1, keepdim=True)  # (3, 256)
    low = (share <= cutoff).sum(dim=1)
    high = (share < 1 - cutoff).sum(dim=1)
    span = (high - low).clamp(min=1)
    stretched = (texture * (LEVELS - 1) - low[:, None, None]) / span[:, None, None]
    flat = (high <= low)[:, None, None]
    return torch.where(flat, texture, stretched.clamp_(0, 1))


def equalize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Spread the values of each channel evenly over [0, 1]; the generator is unused, see `invert`."""
    index, histogram = _levels(texture)
    darker = histogram.cumsum(dim=1) - histogram  # how many pixels lie below each level
    most = (darker * (histogram > 0)).amax(dim=1, keepdim=True)  # 0 where a channel has one level only
    table = darker / most.clamp(min=1)
    return torch.where(most[:, :, None] == 0, texture, table.flatten().take(index))


def rotate(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by U(-45, 45) degrees with reflected borders."""
    return rotate_reflect(texture, uniform(generator, -45, 45))


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert, autocontrast, equalize, rotate,
)  # fmt: skip


def turn_colour(texture: Tensor, angle: float, saturation: float) -> Tensor:
    """Turn colours by `angle` (radians) around the gray axis and scale their distance from it: (3, h, w) -> (3, h, w).

    Rodrigues' rotation about (1, 1, 1) / sqrt(3), so that equal channels stay equal.
    """
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    turned = math.cos(angle) * (torch.eye(3) - axis) + math.sin(angle) * cross
    matrix = (axis + saturation * turned).to(texture)
    return (matrix @ texture.flatten(1)).reshape_as(texture).clamp_(0, 1)


def rotate_reflect(image: Tensor, angle: float) -> Tensor:
    """Rotate about the centre, the outside filled by reflection: (c, h, w) -> (c, h, w) within the range it had.

    Args:
        angle: degrees, counter-clockwise positive.
    """
    return resample(image, angle)


def resample(
    image: Tensor,
    angle: float,
    zoom: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    padding: str = "reflection",
) -> Tensor:
    """Rotate, magnify and move with bilinear interpolation: (c, h, w) -> (c, h, w).

    Args:
        angle: degrees, counter-clockwise positive, about the centre.
        zoom: magnification, > 0.
        shift: where the output's centre lies in the input, (y, x) from its centre in half heights and half widths.
        padding: what lies outside: "reflection", "border" or "zeros".
    """
    h, w = image.shape[-2:]
    sine, cosine = math.sin(math.radians(angle)) / zoom, math.cos(math.radians(angle)) / zoom
    y = _pixel_centres(h, image)[:, None]
    x = _pixel_centres(w, image)[None, :]
    # normalised coordinates: the aspect ratio keeps the turn a turn when the image is not square
    source_x = (cosine * x + shift[1]) - (sine * h / w) * y
    source_y = (sine * w / h) * x + (cosine * y + shift[0])
    grid = torch.stack([source_x, source_y], dim=-1)[None]  # (1, h, w, 2)
    return functional.grid_sample(image[None], grid, padding_mode=padding, align_corners=False)[0]


def moved_patch(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn an image by any angle, magnify it by 1/2 .. 3 and move it, borders reflected: (3, h, w) -> (3, h, w)."""
    zoom = 2 ** uniform(generator, -1.0, math.log2(3.0))
    shift = (uniform(generator, -1, 1), uniform(generator, -1, 1))
    return resample(image, uniform(generator, -180, 180), zoom, shift)


def octave_noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Add Perlin noise of two to five octaves, each half as coarse and weaker, and grain: -> (1, h, w), about [0, 1].

    Each axis has its own first grid, 2 .. 16 cells, so that streaks occur as well as clouds; no grid is finer than 64.
    """
    cells = [2 ** integer(generator, 1, 5), 2 ** integer(generator, 1, 5)]
    persistence = uniform(generator, 0.35, 0.8)
    noise = torch.zeros(shape, device=generator.device)
    for octave in range(integer(generator, 2, 6)):
        grid = (min(cells[0] << octave, 64), min(cells[1] << octave, 64))
        noise.add_(perlin_noise(shape, grid, generator), alpha=persistence**octave)
    grain = torch.rand(shape, generator=generator, device=generator.device).sub_(0.5)
    return noise.add_(grain, alpha=uniform(generator, 0.0, 0.4)).mul_(0.5).add_(0.5)[None]


def retone(pattern: Tensor, image: Tensor, generator: torch.Generator, colourful: bool) -> Tensor:
    """Give a pattern new tones that differ visibly from the image's: (3, h, w) -> (3, h, w) in [0, 1].

    The mean moves by 0.08 .. 0.4 away from the image's, into whichever direction there is room; the deviation becomes
    0.3 .. 2.5 times the image's or, where the image is nearly flat, a few percent. Colour, if wanted, is a shift per
    channel and a turn of the hue.
    """
    centre = image.mean(dim=(1, 2), keepdim=True)  # (3, 1, 1)
    level = centre.mean().item()
    shift = uniform(generator, 0.08, 0.4) * (1 if uniform(generator) < 0.5 else -1)
    if not 0.02 < level + shift < 0.98:
        shift = -shift
    spread = max(image.std().item(), 0.03) * math.exp(uniform(generator, math.log(0.3), math.log(2.5)))
    shifts = torch.full_like(centre, shift)
    if colourful:
        draws = torch.rand(3, 1, 1, generator=generator, device=generator.device)
        shifts = shifts + 0.3 * (draws.to(shifts) - 0.5)
    scale = spread / max(pattern.std().item(), 1e-3)
    if uniform(generator) < 0.2:
        scale = -scale  # the negative: grooves become ridges
    tones = (pattern - pattern.mean(dim=(1, 2), keepdim=True)) * scale + (centre + shifts)
    tones = tones.clamp_(0, 1)
    if not colourful:
        return tones
    return turn_colour(tones, uniform(generator, -math.pi, math.pi), uniform(generator, 0.5, 1.5))


def is_gray(image: Tensor) -> bool:
    """Tell whether the channels agree to within 3% everywhere on a coarse grid of pixels."""
    sparse = image[:, ::4, ::4]
    return (sparse.amax(dim=0) - sparse.amin(dim=0)).max().item() <= 0.03


def _pixel_centres(size: int, like: Tensor) -> Tensor:
    return (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1


def _levels(texture: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to 256 levels: -> index (3, h, w) into a flattened (3, 256) table, and the histogram (3, 256)."""
    channel = torch.arange(3, device=texture.device)[:, None, None] * LEVELS
    index = (texture * (LEVELS - 1)).round().long() + channel
    return index, torch.bincount(index.flatten(), minlength=3 * LEVELS).reshape(3, LEVELS)
