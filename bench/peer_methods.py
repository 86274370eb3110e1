"""A plain PatchCore and PaDiM on our feature extractor: good images -> `Predict`. For the rows of peers.py.

Source and deviations:

- PatchCore (Roth et al. 2022) takes blocks 2 and 3, the mean of every 3x3 neighbourhood, block 3 resized bilinearly to
  the grid of block 2, channels concatenated (the authors' code averages neighbours and channels together, down to 1024
  values). It keeps the patches that greedy k-center chooses on a random projection to 128 dimensions, exactly (the
  authors' code approximates its start). The map is the distance to the nearest stored patch, the image score its
  maximum, without the paper's reweighting (the authors' code has none either).
- PaDiM (Defard et al. 2021) takes blocks 1 to 3: at each position of block 1's grid the vectors of blocks 2 and 3 that
  cover it, 100 channels drawn at random (550 of a ResNet-50, as the authors of a wide one), a Gaussian with 0.01 I
  added to its covariance. The map is the Mahalanobis distance, the image score the maximum of the finished map.

Both maps are enlarged to the image bilinearly and smoothed by a Gaussian with a deviation of 4 pixels (both papers').
"""

from collections.abc import Callable, Iterable

import common  # noqa: F401 (finds the package in a checkout)
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from almrr_ref.features import FeatureExtractor
from almrr_ref.plus.k_center import k_center

PROJECTED, SIGMA = 128, 4.0  # dimensions of the coreset's search; pixels
DRAWN, DRAWN_OF_MANY, MANY = 100, 550, 1000  # channels of PaDiM, of at most MANY and of more
POSITIONS = 256  # whose covariances are taken at a time
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (b, 3, h, w) in [0, 1] -> maps (b, 1, h, w), scores (b,)


def finish_map(distances: Tensor, images: Tensor) -> Tensor:
    """Distances on the feature grid (b, h', w') -> maps (b, 1, h, w) of the images: enlarged, smoothed, on the CPU."""
    maps = F.interpolate(distances[:, None].float(), images.shape[2:], mode="bilinear", align_corners=False).cpu()
    return torch.from_numpy(ndimage.gaussian_filter(maps.numpy(), (0, 0, SIGMA, SIGMA)))


def local_patches(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """PatchCore's features: (b, 3, h, w) -> (b, h', w', c) on the grid of block 2."""
    fine, coarse = (F.avg_pool2d(stage, 3, stride=1, padding=1) for stage in extractor.stages(images)[1:])
    coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)


def nearest_distance(queries: Tensor, bank: Tensor) -> Tensor:
    """Distance of each query (n, c) to the nearest of the bank's rows (m, c): (n,)."""
    return torch.stack([torch.cdist(queries, chunk).amin(1) for chunk in bank.split(16384)]).amin(0)


def fit_patchcore(extractor: FeatureExtractor, images: Iterable[Tensor], seed: int, fraction: float) -> Predict:
    """Keep a fraction of the good images' patches: batches (b, 3, h, w) in [0, 1] -> predict."""
    patches = torch.cat([local_patches(extractor, batch).flatten(0, 2) for batch in images])
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(patches.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    first = int(torch.randint(len(patches), (1,), generator=generator))
    bank = patches[k_center(patches @ projection.to(patches.device), max(1, round(fraction * len(patches))), first)]
    return patchcore(extractor, bank)


def patchcore(extractor: FeatureExtractor, bank: Tensor) -> Predict:
    """PatchCore with the stored patches (m, c)."""

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        distances = torch.stack(
            [nearest_distance(p.flatten(0, 1), bank).view(p.shape[:2]) for p in local_patches(extractor, images)]
        )
        return finish_map(distances, images), distances.amax((1, 2)).cpu()

    return predict


def position_features(extractor: FeatureExtractor, images: Tensor, channels: Tensor) -> Tensor:
    """PaDiM's features: (b, 3, h, w) -> (h' w', channels, b) on the grid of block 1."""
    stages = extractor.stages(images)
    maps = torch.cat([F.interpolate(stage, stages[0].shape[2:], mode="nearest") for stage in stages], dim=1)
    return maps[:, channels].flatten(2).permute(2, 1, 0)


def fit_padim(extractor: FeatureExtractor, images: Iterable[Tensor], seed: int) -> Predict:
    """Fit a Gaussian to every position: batches (b, 3, h, w) in [0, 1] -> predict. Covariances in float64.

    Raises:
        ValueError: for fewer than two images.
    """
    total = sum(extractor.channels)
    drawn = DRAWN if total <= MANY else DRAWN_OF_MANY
    channels = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:drawn]
    features = torch.cat([position_features(extractor, batch, channels) for batch in images], dim=2)  # (h w, c, n)
    if features.shape[2] < 2:
        raise ValueError(f"PaDiM needs at least 2 good images for its covariances, there are {features.shape[2]}")
    mean, whitening = features.mean(2, keepdim=True, dtype=torch.float64), []
    for block, middle in zip(features.split(POSITIONS), mean.split(POSITIONS)):
        deviations = block.double() - middle
        covariance = deviations @ deviations.mT / (features.shape[2] - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(0.01)
        identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        # |L^-1 (x - mean)| with covariance = L L^T is the Mahalanobis distance.
        lower = torch.linalg.cholesky(covariance)
        whitening.append(torch.linalg.solve_triangular(lower, identity, upper=False).float())
    centre, inverse = mean.float(), torch.cat(whitening)
    del features, whitening

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        difference = position_features(extractor, images, channels) - centre
        distances = torch.linalg.vector_norm(inverse @ difference, dim=1)  # (h w, b)
        maps = finish_map(distances.T.reshape(-1, *extractor.feature_size), images)
        return maps, maps.amax((1, 2, 3))

    return predict
