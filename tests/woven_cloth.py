"""Pictures of woven cloth, and settings for a network that finds defects on them after seconds."""

from typing import Any

import numpy as np

SIZE = (32, 64)  # too small for simulated defects, which take long
SMALL: dict[str, Any] = {"backbone": "resnet18", "weights": "random", "blocks": (1, 2), "image_size": SIZE}
SMALL |= {"encoder": "cnn1x1", "reduced_channels": 8, "decoder_channels": (8, 8), "frm_width": 4, "frm_levels": 2}
SMALL |= {"memory": 100, "holdout": 0.0, "device": "cpu", "preset": "plus"}


def cloth(seed: int, defect: tuple[slice, slice] | None = None) -> np.ndarray:
    """A picture, uint8 (h, w, 3), with a white defect if one is wanted."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[: SIZE[0], : SIZE[1]]
    x, y = 0.9 * x + rng.uniform(0, 6), 0.7 * y + rng.uniform(0, 6)  # so no position repeats
    woven = 128 + 40 * np.sin(x) + 25 * np.cos(y) + rng.normal(0, 8, SIZE)
    if defect:
        woven[defect] = 255
    return np.repeat(woven.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


GOOD = [cloth(seed) for seed in range(12)]
