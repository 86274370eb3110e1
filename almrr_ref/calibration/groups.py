"""Images that show the same part, found without a regular expression: near-identical ones by the backbone's features.

Each image, at SIDE pixels, is described by the second stage's features, pooled to POOLED x POOLED cells, less their
mean over all images and divided by their deviation. Two images whose descriptions have a cosine above SIMILAR are
linked; linked images form a group. The 761 good magnetic tiles, of 132 parts by their names, form 222 groups: 91% of
the pairs in a group show one part, and 52% of the pairs that show one part are in a group. 222 different images of a
grid form 216.
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from almrr_ref.data.images import ImageError, Levels, Picture, load_image
from almrr_ref.model import ALMRR

SIDE = 96
POOLED = 6
SIMILAR = 0.7
FEWEST = 20  # images; mean and deviation of fewer say too little
MOST = 5000  # images; all pairs of more take too long


@torch.inference_mode()
def find_groups(model: ALMRR, pictures: Sequence[Picture]) -> list[int]:
    """Pictures -> the group of each, from 0.

    Each picture has a group of its own where fewer than half are linked, or there are too few or too many pictures;
    one that cannot be read has in any case.
    """
    alone = list(range(len(pictures)))
    if not FEWEST <= len(pictures) <= MOST:
        return alone
    levels, features = Levels.of(model.config), dict[int, Tensor]()
    for i, picture in enumerate(pictures):
        with suppress(ImageError):  # `measure_good` will name it
            features[i] = _description(model, load_image(picture, (SIDE, SIDE), levels).to(model.device))
    if len(features) < FEWEST:
        return alone
    groups = linked(torch.stack(list(features.values())))
    if (np.bincount(groups)[groups] > 1).mean() < 0.5:
        return alone
    group_of = dict(zip(features, groups.tolist()))
    return [group_of.get(i, len(pictures) + i) for i in alone]


def _description(model: ALMRR, image: Tensor) -> Tensor:
    stages = model.extractor.stages(image[None].float() / 255)
    return F.adaptive_avg_pool2d(stages[min(1, len(stages) - 1)], POOLED).flatten().float().cpu()


def linked(features: Tensor) -> np.ndarray:
    """Descriptions (n, d) -> group of each (n,)."""
    features = (features - features.mean(dim=0)) / features.std(dim=0).clamp(min=1e-6)
    features = F.normalize(features, dim=1)
    similar = (features @ features.T > SIMILAR).numpy()
    groups: np.ndarray = connected_components(similar, directed=False)[1]
    return groups
