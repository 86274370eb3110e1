"""Simulated anomalies, Eq. (1) of the paper (section 3.2).

    I_a = (1 - M) * I  +  (1 - alpha) (M * I)  +  alpha (M * A)

M is thresholded Perlin noise, A a texture (sources: data/textures.py), alpha how much of the texture shows. The
generator is that of DRAEM (Zavrtanik et al. 2021), which draws beta from U(0, 0.8) and multiplies the *image* by it
inside M; the paper's alpha multiplies the texture. So alpha = 1 - beta, uniform in (0.2, 1].

Deviations from DRAEM: an empty mask (one in twenty) is drawn again; all draws come from one explicit generator.
"""

import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.data.textures import TextureSource, resample
from almrr_ref.perlin import perlin_noise
from almrr_ref.run.random import integer, one_thread, uniform

SMALLEST_SIDE = 8  # below it the pixels of a fine grid all lie on lattice points, where the noise is zero


@one_thread()
def simulate_anomaly(
    image: Tensor,
    texture: Tensor,
    generator: torch.Generator,
    alpha_range: tuple[float, float] = (0.2, 1.0),
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Blend a texture into Perlin regions of an image, Eq. (1): (3, h, w) -> augmented (3, h, w), mask (1, h, w).

    Args:
        image: (3, h, w) float in [0, 1], at least 8 pixels high and wide.
        texture: (3, any h, any w) float in [0, 1]; resized to the image.
        generator: the only source of randomness.
        alpha_range: alpha is uniform between these, within [0, 1]; 1 shows nothing but the texture.
        threshold: the mask is where the noise exceeds this, in (0, 1).
    Returns:
        The augmented image in [0, 1], outside the mask bit for bit that of `image`; the mask in {0, 1}, never empty.
    Raises:
        ValueError: if a shape, a dtype or an argument is not as above.
    """
    _check_image("image", image)
    _check_image("texture", texture)
    if not 0 <= alpha_range[0] <= alpha_range[1] <= 1:
        raise ValueError(f"alpha_range must be two increasing numbers in [0, 1], got {alpha_range}")
    h, w = image.shape[-2:]
    mask = perlin_mask((h, w), generator, threshold).to(image)
    alpha = uniform(generator, *alpha_range)
    blended = ((1 - alpha) * image).add_(fit_texture(texture.to(image), (h, w)), alpha=alpha).clamp_(0, 1)
    return torch.where(mask > 0, blended, image), mask


def textured_anomaly(image: Tensor, source: TextureSource, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the paper's anomaly, its texture from a source: (3, h, w) -> augmented (3, h, w), mask (1, h, w)."""
    return simulate_anomaly(image, source.sample(generator), generator)


def perlin_mask(
    shape: tuple[int, int], generator: torch.Generator, threshold: float = 0.5, max_exponent: int = 5
) -> Tensor:
    """Draw masks M until one is not empty: -> (1, h, w) float32 in {0, 1}.

    At 256x256 one draw in twenty is empty; the others cover 5% of the image on average.

    Raises:
        ValueError: if the threshold is not in (0, 1), or a side is below 8 pixels.
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

    Perlin noise on 2^0 .. 2^max_exponent cells along each axis, turned by U(-90, 90) degrees with zeros from outside,
    where it exceeds the threshold.
    """
    grid = (2 ** integer(generator, 0, max_exponent + 1), 2 ** integer(generator, 0, max_exponent + 1))
    noise = perlin_noise(shape, grid, generator)[None]
    return resample(noise, uniform(generator, -90, 90), padding="zeros") > threshold


def fit_texture(texture: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize a texture to the image, smoothly: (3, any, any) -> (3, h, w)."""
    if texture.shape[-2:] == shape:
        return texture
    return functional.interpolate(texture[None], shape, mode="bilinear", antialias=True)[0].clamp_(0, 1)


def _check_image(name: str, image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        expected = "a float tensor (3, h, w) in [0, 1]; from uint8: image.float() / 255"
        raise ValueError(f"{name}: expected {expected}; got {tuple(image.shape)} {image.dtype}")
