"""The texture sources A of the simulated anomalies: a folder of textures, or the good images themselves.

Source: `TextureFolder` follows DRAEM (Zavrtanik et al. 2021), which draws from DTD and changes what it draws.
`OwnTextures` is an addition: it makes textures out of the good images and of noise, so that no collection is needed.
Both draw with `.sample(generator)`, all that `anomalies.training_sample` asks of a source.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.data.images import ImageError, is_image_file, load_image
from almrr_ref.data.textures import change_texture, integer, is_gray, moved_patch, octave_noise, retone, uniform


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
        self.root, self.size, self.cache_bytes, self.changes, self.gray = root, size, cache_bytes, changes, gray
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


class MixedTextures:
    """Textures from two sources, each as often as the other."""

    def __init__(self, first: "TextureFolder | OwnTextures", second: "TextureFolder | OwnTextures") -> None:
        self.sources = (first, second)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a texture: -> (3, h, w) float32 in [0, 1]."""
        return self.sources[integer(generator, 0, 2)].sample(generator)


def texture_source(
    folder: str | None, images: Tensor, size: int, mixed: bool
) -> TextureFolder | OwnTextures | MixedTextures:
    """The source that a training run draws from.

    Args:
        folder: of textures, or None for those of the images themselves.
        images: the good training images, uint8 (n, 3, size, size).
        size: side of a texture in pixels.
        mixed: draw from both, and give gray images gray textures only: colour would give the anomaly away.
    Raises:
        ValueError: if the folder is missing or holds no image.
    """
    own = OwnTextures(images)
    if folder is None:
        return own
    if not mixed:
        return TextureFolder(folder, size)
    gray = all(is_gray(image.float() / 255) for image in images[:32])
    return MixedTextures(TextureFolder(folder, size, gray=gray), own)
