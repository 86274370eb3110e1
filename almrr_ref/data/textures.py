"""The textures A of the simulated anomalies: from a folder of textures, or made from the good images.

Source: `TextureFolder` follows DRAEM (Zavrtanik et al. 2021), which the paper's section 3.2 uses: it draws from DTD and
applies 3 of 10 changes of the imgaug package in random order. These are reimplemented here, with imgaug's documented
ranges. `ImageTextures` is ours: textures of the good images and of noise, so that no collection is needed.

Deviations: colours turn around the gray axis instead of in HSV, so that gray stays gray. Brightness changes all
channels alike. Rotation reflects the border: black corners would be too easy to find.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from almrr_ref.data.images import ImageError, is_image_file, load_image
from almrr_ref.perlin import octave_noise
from almrr_ref.run.random import integer, uniform

CACHE = 512 * 2**20  # bytes of decoded textures that a folder keeps in memory
LEVELS = 256  # of the changes that work on histograms


class TextureFolder:
    """The images of a folder such as DTD and of all folders below it, at `size`, each changed at random.

    Names that begin with a dot are skipped. A file that cannot be read is named in a warning when it is first drawn,
    and listed in `broken`; another is drawn instead.

    Args:
        size: (height, width) in pixels.
        changes: how many of the ten changes each texture gets.
        gray: give the three channels their mean.
    Raises:
        ValueError: if the folder is missing or holds no image.
    """

    def __init__(self, directory: str | Path, size: tuple[int, int], changes: int = 3, gray: bool = False) -> None:
        root = Path(directory)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; expected a folder of texture images such as DTD's images/")
        images = (path for path in root.rglob("*") if is_image_file(path) and not path.is_dir())
        self.paths = sorted(path for path in images if "/." not in f"/{path.relative_to(root).as_posix()}")
        if not self.paths:
            raise ValueError(f"{root}: no image in this folder or below; expected textures such as DTD's images/")
        self.root, self.size, self.changes, self.gray = root, size, changes, gray
        self.broken: dict[Path, str] = {}
        self._cache: dict[Path, Tensor] = {}

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a texture: -> (3, *size) float32 in [0, 1]. Raises ValueError if not one file can be read."""
        while len(self.broken) < len(self.paths):
            # broken files stay in the list: a draw must not depend on earlier ones
            path = self.paths[integer(generator, 0, len(self.paths))]
            if path in self.broken:
                continue
            try:
                texture = self._cache[path] if path in self._cache else load_image(path, self.size)
            except ImageError as error:
                self.broken[path] = str(error)
                warnings.warn(f"texture left out: {error}", stacklevel=2)
                continue
            # no eviction: draws are uniform, so any texture in the cache serves equally often
            if (len(self._cache) + 1) * texture.nbytes <= CACHE:
                self._cache[path] = texture
            changed = change_texture(texture.float().div_(255), generator, self.changes)
            return changed.mean(dim=0, keepdim=True).expand(3, -1, -1) if self.gray else changed
        first = next(iter(self.broken.values()))
        raise ValueError(f"none of the {len(self.paths)} textures can be read, for example {first}")


class ImageTextures:
    """Textures made from the good images, uint8 (n, 3, h, w), n >= 1, and from noise.

    Each texture is a pattern (a training image turned, magnified and moved; or noise of two to five octaves; or both)
    in new tones: visibly brighter or darker than the image it came from, with more or less contrast. Gray images get
    gray textures nine times in ten: colour would make the anomaly too easy to find.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"expected uint8 images (n, 3, h, w), n >= 1; got {tuple(images.shape)} {images.dtype}")
        self.images = images

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a texture: -> (3, h, w) float32 in [0, 1]."""
        image = self.images[integer(generator, 0, len(self.images))].float().div_(255)
        colourful = uniform(generator) < (0.1 if is_gray(image) else 0.5)
        kind = uniform(generator)
        if kind < 0.5:
            return retone(moved_patch(image, generator), image, generator, colourful)
        pattern = octave_noise((image.shape[-2], image.shape[-1]), generator).expand(3, -1, -1)
        if kind < 0.65:
            pattern = 0.5 * pattern + 0.5 * moved_patch(image, generator)
        return retone(pattern, image, generator, colourful)


class MixedTextures:
    """Textures of a folder and of the good images, equally often."""

    def __init__(self, folder: TextureFolder, images: ImageTextures) -> None:
        self.sources = (folder, images)

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.sources[integer(generator, 0, 2)].sample(generator)


TextureSource = TextureFolder | ImageTextures | MixedTextures  # where the textures of anomalies come from
# draws one anomaly: image (3, h, w), source, generator -> augmented image (3, h, w), mask (1, h, w)
Draw = Callable[[Tensor, TextureSource, torch.Generator], tuple[Tensor, Tensor]]


def texture_source(folder: str | None, images: Tensor, mixed: bool) -> TextureSource:
    """The source of a training run: a folder of textures, the images uint8 (n, 3, h, w), or both (`mixed`).

    Where both serve, gray images get gray textures only. Raises ValueError if the folder holds no image.
    """
    if folder is None:
        return ImageTextures(images)
    size = images.shape[2], images.shape[3]
    if not mixed:
        return TextureFolder(folder, size)
    gray = all(is_gray(image.float() / 255) for image in images[:32])
    return MixedTextures(TextureFolder(folder, size, gray=gray), ImageTextures(images))


def is_gray(image: Tensor) -> bool:
    """Whether the channels agree to within 3% everywhere on a coarse grid of pixels."""
    sparse = image[:, ::4, ::4]
    return (sparse.amax(dim=0) - sparse.amin(dim=0)).max().item() <= 0.03


def moved_patch(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn an image by any angle, magnify it by 1/2 .. 3 and move it, borders reflected: (3, h, w) -> (3, h, w)."""
    zoom = 2 ** uniform(generator, -1.0, math.log2(3.0))
    shift = (uniform(generator, -1, 1), uniform(generator, -1, 1))
    return resample(image, uniform(generator, -180, 180), zoom, shift)


def retone(pattern: Tensor, image: Tensor, generator: torch.Generator, colourful: bool) -> Tensor:
    """Give a pattern new tones that differ visibly from the image's: (3, h, w) -> (3, h, w) in [0, 1].

    The mean moves 0.08 .. 0.4 away from the image's, and stays within [0, 1]. The deviation becomes 0.3 .. 2.5 times
    the image's, or times 0.03 for a nearly flat one. Colour is a shift per channel and a turn of the hue.
    """
    centre = image.mean(dim=(1, 2), keepdim=True)  # (3, 1, 1)
    shift = uniform(generator, 0.08, 0.4) * (1 if uniform(generator) < 0.5 else -1)
    if not 0.02 < centre.mean().item() + shift < 0.98:
        shift = -shift
    spread = max(image.std().item(), 0.03) * math.exp(uniform(generator, math.log(0.3), math.log(2.5)))
    shifts = torch.full_like(centre, shift)
    if colourful:
        draws = torch.rand(3, 1, 1, generator=generator, device=generator.device)
        shifts = shifts + 0.3 * (draws.to(shifts) - 0.5)
    scale = spread / max(pattern.std().item(), 1e-3)
    scale = -scale if uniform(generator) < 0.2 else scale  # the negative: grooves become ridges
    tones = ((pattern - pattern.mean(dim=(1, 2), keepdim=True)) * scale + (centre + shifts)).clamp_(0, 1)
    if not colourful:
        return tones
    return turn_colour(tones, uniform(generator, -math.pi, math.pi), uniform(generator, 0.5, 1.5))


def change_texture(texture: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Apply `count` different changes out of `CHANGES`, in random order: (3, h, w) in [0, 1] -> the same."""
    order = torch.randperm(len(CHANGES), generator=generator, device=generator.device).tolist()
    for index in order[:count]:
        texture = CHANGES[index](texture, generator)
    return texture


def gamma(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Raise each channel to its own power, U(0.5, 2)."""
    return torch.stack([channel ** uniform(generator, 0.5, 2.0) for channel in texture])


def brightness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by U(0.8, 1.2) and add U(-30, 30) / 255."""
    factor = uniform(generator, 0.8, 1.2)
    return (texture * factor + uniform(generator, -30, 30) / 255).clamp_(0, 1)


def sharpness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Blend with a 3x3-smoothed copy by the factor U(0, 2): below 1 blurs, above 1 sharpens."""
    factor = uniform(generator, 0.0, 2.0)
    padded = F.pad(texture[None], (1, 1, 1, 1), mode="replicate")[0]
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]  # (3, h, w + 2)
    neighbourhood = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = (neighbourhood + 4 * texture) / 13  # Pillow's SMOOTH kernel: centre 5, neighbours 1
    return torch.lerp(smooth, texture, factor).clamp_(0, 1)


def hue_saturation(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue by up to 50/255 of a circle and scale the saturation by 1 + U(-50, 50) / 100."""
    angle = 2 * math.pi * uniform(generator, -50, 50) / 255
    return turn_colour(texture, angle, 1 + uniform(generator, -50, 50) / 100)


def solarize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """In half of the cases, invert what lies above a threshold of U(32, 128) / 255."""
    threshold = uniform(generator, 32, 128) / 255
    return texture if uniform(generator) < 0.5 else torch.where(texture > threshold, 1 - texture, texture)


def posterize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Keep the upper 1 to 8 bits of each value."""
    step = 2 ** (8 - integer(generator, 1, 9))
    return texture.mul(LEVELS - 1).div_(step).floor_().mul_(step / (LEVELS - 1))


def invert(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turn into the negative."""
    return 1 - texture


def autocontrast(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch each channel to [0, 1] after cutting U(0, 20) percent of its pixels off both ends."""
    cutoff = uniform(generator, 0.0, 0.20)
    _, histogram = _histogram(texture)
    fraction = histogram.cumsum(dim=1) / histogram.sum(dim=1, keepdim=True)  # (3, 256), of the pixels up to a level
    low = (fraction <= cutoff).sum(dim=1)
    high = (fraction < 1 - cutoff).sum(dim=1)
    span = (high - low).clamp(min=1)
    stretched = (texture * (LEVELS - 1) - low[:, None, None]) / span[:, None, None]
    return torch.where((high <= low)[:, None, None], texture, stretched.clamp_(0, 1))


def equalize(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Spread the values of each channel evenly over [0, 1]."""
    index, histogram = _histogram(texture)
    darker = histogram.cumsum(dim=1) - histogram  # number of pixels below each level
    most = (darker * (histogram > 0)).amax(dim=1, keepdim=True)  # 0 where a channel has one level only
    table = darker / most.clamp(min=1)
    return torch.where(most[:, :, None] == 0, texture, table.flatten().take(index))


def rotate(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by U(-45, 45) degrees with reflected borders."""
    return resample(texture, uniform(generator, -45, 45))


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert, autocontrast, equalize, rotate,
)  # fmt: skip


def turn_colour(texture: Tensor, angle: float, saturation: float) -> Tensor:
    """Turn colours by an angle (radians) about the gray axis (Rodrigues' rotation) and scale their distance to it."""
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    turned = math.cos(angle) * (torch.eye(3) - axis) + math.sin(angle) * cross
    matrix = (axis + saturation * turned).to(texture)
    return (matrix @ texture.flatten(1)).reshape_as(texture).clamp_(0, 1)


def resample(
    image: Tensor, angle: float, zoom: float = 1, shift: tuple[float, float] = (0, 0), padding: str = "reflection"
) -> Tensor:
    """Rotate (degrees, counter-clockwise), magnify and move with bilinear interpolation: (c, h, w) -> (c, h, w).

    `shift` is where the output's centre lies in the input, (y, x) from its centre in half heights and half widths.
    `padding` of what lies outside is "reflection", "border" or "zeros".
    """
    h, w = image.shape[-2:]
    sine, cosine = math.sin(math.radians(angle)) / zoom, math.cos(math.radians(angle)) / zoom
    y, x = (((2 * torch.arange(n, device=image.device, dtype=image.dtype) + 1) / n - 1) for n in (h, w))
    y = y[:, None]
    # normalised coordinates: the aspect ratio keeps the turn a turn when the image is not square
    source_x = (cosine * x + shift[1]) - (sine * h / w) * y
    source_y = (sine * w / h) * x + (cosine * y + shift[0])
    grid = torch.stack([source_x, source_y], dim=-1)[None]  # (1, h, w, 2)
    return F.grid_sample(image[None], grid, padding_mode=padding, align_corners=False)[0]


def _histogram(texture: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to 256 levels: -> index (3, h, w) into a flattened (3, 256) table, and the histogram (3, 256)."""
    channel = torch.arange(3, device=texture.device)[:, None, None] * LEVELS
    index = (texture * (LEVELS - 1)).round().long() + channel
    return index, torch.bincount(index.flatten(), minlength=3 * LEVELS).reshape(3, LEVELS)
