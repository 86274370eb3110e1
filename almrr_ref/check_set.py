"""A test part without defective images: the demo's six defects drawn on a share of one's own good images.

It serves two purposes: a quality engineer sees how a network does on the own surface before any defect has turned up,
and settings can be compared without ever looking at a real test part. Training does not draw defects of these kinds.
"""

import math
from pathlib import Path

import numpy as np

from almrr_ref.datasets import find_dataset, load_images
from almrr_ref.demo_defects import DEFECTS, damage, save_picture


def write_check(
    images: str | Path,
    directory: str | Path,
    seed: int = 0,
    size: int = 256,
    share: float = 0.2,
    faint: bool = False,
) -> Path:
    """Draw the six defects on a share of one's own good images: -> the folder, a MVTec category.

    With no defective images at hand, this shows how a network does on defects of kinds that it was not trained on, on
    one's own surface; and it is a way to compare settings that never looks at a real test part.

    Args:
        images: a data folder of any known layout; its good training images serve.
        directory: created where missing.
        seed: of the split and of every defect.
        size: edge of the images written, pixels, >= 64.
        share: of the images for the test part; every second one of them gets a defect.
        faint: draw every defect at 15 to 80% of its strength (log-uniform): full ones are found by almost any setting,
            so that they tell settings apart no more.
    Raises:
        ValueError: if fewer than ten good images can be read, or a defect cannot be drawn.
    """
    samples = find_dataset(images).train
    pictures, _ = load_images(samples, size)
    if len(pictures) < 10:
        raise ValueError(f"{images}: {len(pictures)} good images; at least 10 are needed to put some aside")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pictures))
    count = max(4, round(share * len(pictures)))
    root, kinds = Path(directory), list(DEFECTS)
    for k, index in enumerate(order):
        picture, name = pictures[index].permute(1, 2, 0).numpy(), f"{index:05d}"
        if k < count and k % 2:
            kind = kinds[k // 2 % len(kinds)]
            damaged, mask = damage(picture / 255.0, kind, rng)
            strength = math.exp(rng.uniform(math.log(0.15), math.log(0.8))) if faint else 1.0
            picture = np.round(picture + strength * (damaged.astype(float) - picture)).astype(np.uint8)
            save_picture(root / "ground_truth" / kind / f"{name}_mask.png", mask)
            save_picture(root / "test" / kind / f"{name}.png", picture)
        else:
            save_picture(root / ("test" if k < count else "train") / "good" / f"{name}.png", picture)
    return root
