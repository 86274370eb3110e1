"""Simulated anomalies, Eq. (1) of the paper (section 3.2), and the texture sources A that they are drawn from.

    I_a = (1 - M) * I  +  (1 - alpha) (M * I)  +  alpha (M * A)

M is thresholded Perlin noise, A a texture, alpha how much of the texture shows. DRAEM (Zavrtanik et al. 2021), whose
generator the paper takes, draws beta from U(0, 0.8) and multiplies the *image* by it inside M; the paper's alpha
multiplies the texture. So alpha = 1 - beta, uniform in (0.2, 1].

Deviations from DRAEM: an empty mask (one in twenty) is drawn again; all draws come from one explicit generator; the
optional rotation of the clean image reflects its borders (DRAEM fills them with black and calls that normal).
`OwnTextures` is an addition: it makes textures out of the good images themselves, so that no collection is needed.
"""

import warnings
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.images import ImageError, is_image_file, load_image
from almrr_ref.perlin import perlin_noise
from almrr_ref.textures import (
    change_texture,
    integer,
    is_gray,
    moved_patch,
    octave_noise,
    one_thread,
    resample,
    retone,
    rotate_reflect,
    uniform,
)

SMALLEST_SIDE = 8


class TextureSource(Protocol):
    """What `training_sample` needs of a source."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw one texture, (3, h, w) float32 in [0, 1]."""


@one_thread()
def training_sample(
    image: Tensor, source: TextureSource, generator: torch.Generator, clean_probability: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Leave an image clean or give it a simulated anomaly: (3, h, w) -> augmented (3, h, w), mask (1, h, w).

    Args:
        image: (3, h, w) float in [0, 1].
        source: where the textures come from, for example `TextureFolder` or `OwnTextures`.
        generator: the only source of randomness.
        clean_probability: share of images left as they are; they come back as the same tensor with a mask
            of zeros.
    """
    if uniform(generator) < clean_probability:
        return image, torch.zeros_like(image[:1])
    return simulate_anomaly(image, source.sample(generator), generator)


@one_thread()
def simulate_anomaly(
    image: Tensor,
    texture: Tensor,
    generator: torch.Generator,
    alpha_range: tuple[float, float] = (0.2, 1.0),
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Blend a texture into Perlin-shaped regions of an image: (3, h, w) -> augmented (3, h, w), mask (1, h, w).

    Args:
        image: (3, h, w) float in [0, 1], at least 8 pixels high and wide.
        texture: (3, any h, any w) float in [0, 1]; resized to the image. It is blended as it is: the sources change it.
        generator: the only source of randomness.
        alpha_range: alpha is uniform between these, within [0, 1]; 1 shows nothing but the texture.
        threshold: the mask is where the noise exceeds this, in (0, 1).
    Returns:
        The augmented image in [0, 1], outside the mask bit for bit that of `image`; the mask in {0, 1}, never empty.
    Raises:
        ValueError: if a shape, a dtype or an argument is not as above.
    Source: paper, Eq. (1).
    """
    _check_image("image", image)
    _check_image("texture", texture)
    if not 0 <= alpha_range[0] <= alpha_range[1] <= 1:
        raise ValueError(f"alpha_range must be two increasing numbers in [0, 1], got {alpha_range}")
    h, w = image.shape[-2:]
    mask = perlin_mask((h, w), generator, threshold).to(image)
    alpha = uniform(generator, *alpha_range)
    return blend(image, fit_texture(texture.to(image), (h, w)), mask, alpha), mask


def blend(image: Tensor, texture: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Apply Eq. (1): image, texture (3, h, w) in [0, 1], mask (1, h, w) in {0, 1} -> (3, h, w) in [0, 1]."""
    blended = ((1 - alpha) * image).add_(texture, alpha=alpha).clamp_(0, 1)
    return torch.where(mask > 0, blended, image)


def perlin_mask(
    shape: tuple[int, int], generator: torch.Generator, threshold: float = 0.5, max_exponent: int = 5
) -> Tensor:
    """Draw masks until one is not empty: -> (1, h, w) float32 in {0, 1}.

    At 256x256 one draw in twenty is empty; the others cover 5% of the image on average.

    Raises:
        ValueError: if the threshold is not in (0, 1), or a side is below 8 pixels: there the pixels of a fine grid
            all lie on lattice points, where the noise is zero.
    Source: DRAEM; the paper names the generator only.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, the range of the noise, got {threshold}")
    if min(shape) < SMALLEST_SIDE:
        raise ValueError(f"image of {shape[0]}x{shape[1]} pixels is too small; use at least {SMALLEST_SIDE} each way")
    for _ in range(1000):
        mask = draw_mask(shape, generator, threshold, max_exponent)
        if mask.any():
            return mask.float()
    raise ValueError(f"1000 masks in a row were empty at threshold {threshold}; lower the threshold")


def draw_mask(shape: tuple[int, int], generator: torch.Generator, threshold: float, max_exponent: int) -> Tensor:
    """Draw one mask, possibly empty: -> (1, h, w) bool.

    Noise on a grid of 2^0 .. 2^max_exponent cells along each axis, turned by U(-90, 90) degrees (zeros move in from
    outside), thresholded.
    """
    grid = (2 ** integer(generator, 0, max_exponent + 1), 2 ** integer(generator, 0, max_exponent + 1))
    noise = perlin_noise(shape, grid, generator)[None]
    return resample(noise, uniform(generator, -90, 90), padding="zeros") > threshold


def fit_texture(texture: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize a texture to the image, smoothly: (3, any, any) -> (3, h, w)."""
    if texture.shape[-2:] == shape:
        return texture
    return functional.interpolate(texture[None], shape, mode="bilinear", antialias=True)[0].clamp_(0, 1)


def augment_clean(image: Tensor, generator: torch.Generator, probability: float = 0.3) -> Tensor:
    """Rotate a clean image by U(-90, 90) degrees now and then: (3, h, w) -> (3, h, w).

    Only for textures without a preferred direction: on aligned parts it teaches poses that never come.
    """
    if uniform(generator) >= probability:
        return image
    return rotate_reflect(image, uniform(generator, -90, 90))


def _check_image(name: str, image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        expected = "a float tensor (3, h, w) in [0, 1]; from uint8: image.float() / 255"
        raise ValueError(f"{name}: expected {expected}; got {tuple(image.shape)} {image.dtype}")


class TextureFolder:
    """Texture source A: the images of a folder and of all folders below it, such as DTD, each changed in 3 random ways.

    Images are decoded when first drawn and kept as uint8 up to a bound, so that DTD's 5,640 images need no 1.1 GB.
    A file that cannot be read is named in a warning when first drawn, listed in `broken`, and another is drawn instead.
    """

    def __init__(
        self, directory: str | Path, size: int, cache_bytes: int = 512 * 2**20, changes: int = 3, gray: bool = False
    ) -> None:
        """List the images, decode none.

        Args:
            directory: folder that is read recursively; names that begin with a dot are skipped.
            size: side of the square textures in pixels.
            cache_bytes: how many bytes of decoded textures to keep.
            changes: how many of the ten changes each texture gets.
            gray: give the three channels their mean, since colour on gray images is too easy to find.
        Raises:
            ValueError: if the folder is missing or holds no image.
        """
        root = Path(directory)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; expected a folder of texture images such as DTD's images/")
        self.paths = sorted(
            path
            for path in root.rglob("*")
            if is_image_file(path)
            and not path.is_dir()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if not self.paths:
            raise ValueError(f"{root}: no image in this folder or below; expected textures such as DTD's images/")
        self.size, self.cache_bytes, self.changes, self.gray = size, cache_bytes, changes, gray
        self.broken: dict[Path, str] = {}
        self._cache: dict[Path, Tensor] = {}

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a texture: -> (3, size, size) float32 in [0, 1].

        Raises:
            ValueError: if not one file can be read.
        """
        while len(self.broken) < len(self.paths):
            # broken files stay in the list: the draws must not depend on what earlier draws have found out
            texture = self._load(self.paths[integer(generator, 0, len(self.paths))])
            if texture is not None:
                changed = change_texture(texture.float().div_(255), generator, self.changes)
                return changed.mean(dim=0, keepdim=True).expand(3, -1, -1) if self.gray else changed
        path, reason = next(iter(self.broken.items()))
        raise ValueError(f"none of the {len(self.paths)} textures can be read, for example {path}: {reason}")

    def _load(self, path: Path) -> Tensor | None:
        if path in self.broken:
            return None
        if path in self._cache:
            return self._cache[path]
        try:
            texture = load_image(path, self.size)
        except ImageError as error:
            self.broken[path] = str(error)
            warnings.warn(f"texture left out: {error}", stacklevel=3)
            return None
        # no eviction: draws are uniform, so whichever textures are kept serve equally often
        if (len(self._cache) + 1) * texture.nbytes <= self.cache_bytes:
            self._cache[path] = texture
        return texture


class OwnTextures:
    """Textures made of the good images themselves and of noise: a source for when there is no texture collection.

    Each texture is a pattern (a training image turned, magnified and moved; or noise of several octaves; or both) in
    new tones: brighter or darker than the image it came from by a visible amount, with more or less contrast. Gray
    images (three equal channels) get gray textures nine times in ten: colour would give the anomaly away.
    """

    def __init__(self, images: Tensor) -> None:
        """Keep a reference to the images, no copy.

        Args:
            images: (n, 3, h, w) uint8, n >= 1: the good training images.
        Raises:
            ValueError: if the shape or the dtype is another, or there is no image.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or len(images) == 0:
            raise ValueError(f"images must be uint8 (n, 3, h, w), n >= 1, got {images.dtype} {tuple(images.shape)}")
        self.images = images

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a texture: -> (3, h, w) float32 in [0, 1]."""
        index = integer(generator, 0, len(self.images))
        image = self.images[index].float().div_(255)
        colourful = uniform(generator) < (0.1 if is_gray(image) else 0.5)
        kind = uniform(generator)
        if kind < 0.5:
            pattern = moved_patch(image, generator)
        else:
            pattern = octave_noise((image.shape[-2], image.shape[-1]), generator).expand(3, -1, -1)
            if kind < 0.65:
                pattern = 0.5 * pattern + 0.5 * moved_patch(image, generator)
        return retone(pattern, image, generator, colourful)
