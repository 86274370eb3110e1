"""The textures A of the simulated anomalies: from a folder of textures, or made from the good images.

Source: `TextureFolder` follows DRAEM (Zavrtanik et al. 2021), which draws from DTD and changes each texture.
`ImageTextures` is ours: it makes textures from the good images and from noise, so that no collection is needed.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.data.images import ImageError, is_image_file, load_image
from almrr_ref.data.texture_changes import change_texture, resample, turn_colour
from almrr_ref.perlin import perlin_noise
from almrr_ref.run.random import integer, uniform

CACHE = 512 * 2**20  # bytes of decoded textures that a folder keeps in memory


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


def octave_noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Perlin noise of two to five octaves, each half as coarse and weaker, plus grain: -> (1, h, w), about [0, 1].

    The first grid has 2 .. 16 cells, drawn for each axis, so that there are streaks as well as clouds; later grids have
    at most 64.
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
