"""The scripts in bench/ as modules, started from their folder as a user does; and a data set in MVTec's layout."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category with a name of the paper's: noise of 64x64 pixels, bright spots that are easy to find, dark lines."""
    root, generator = tmp_path_factory.mktemp("data") / "grid", np.random.default_rng(0)
    for folder, count in (("train/good", 5), ("test/good", 3), ("test/spot", 3), ("test/line", 2)):
        (root / folder).mkdir(parents=True)
        kind = folder.split("/")[1]
        for i in range(count):
            image, mask = generator.normal(128, 8, (64, 64)), np.zeros((64, 64), dtype=bool)
            y, x = generator.integers(8, 44, 2)
            if kind != "good":
                mask[(slice(y, y + 12), slice(x, x + 12)) if kind == "spot" else slice(y, y + 4)] = True
                (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(root / "ground_truth" / kind / f"{i}_mask.png")
            image[mask] += 100 if kind == "spot" else -20
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / folder / f"{i}.png")
    return root
