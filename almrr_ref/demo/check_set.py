"""A test part without defective images: defects drawn on a fraction of one's own good images.

So a quality engineer sees how a network does on their surface before any defect has turned up, and settings can be
compared without looking at a real test part. Training does not draw defects of these kinds.
"""

from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.split import load_images, read_part_ids
from almrr_ref.demo.defects import DEFECTS, FAINT_DEFECTS, damage, faint_damage
from almrr_ref.report.overlays import save_picture
from almrr_ref.run.text import Countdown

TEST_FRACTION = 0.2  # of the images
FAINT_COPIES = 4  # of every image of a faint test part, with one defect each


def write_check(
    images: str | Path, out: str | Path, seed: int = 0, size: int = 256, faint: bool = False, parts: str | None = None
) -> Path:
    """Draw defects on a fifth of one's own good images: -> the folder, a MVTec category.

    Args:
        images: a data folder of any known layout; its good training images serve.
        out: created where missing.
        seed: of the split and of every defect.
        size: edge of the images written, pixels, >= 64.
        faint: if not, every second image of the test part gets one of the demo's six defects. If so, all are good, and
            four copies of each get one of eleven kinds, at 20 to 100% of its strength: almost any setting finds the
            six at full strength.
        parts: regular expression for the part that a file shows (data/split.py): none is then trained on and checked.
    Raises:
        ValueError: if fewer than ten good images can be read, `parts` does not fit, or a defect cannot be drawn.
    """
    data = find_dataset(images)
    part_ids = read_part_ids(data, parts)
    pictures, failures = load_images(data.train, size)
    unreadable = {path for path, _ in failures}
    part_ids = [part for sample, part in zip(data.train, part_ids) if sample.path not in unreadable]
    if len(pictures) < 10:
        raise ValueError(f"{images}: {len(pictures)} good images; at least 10 are needed to put some aside")
    images_of: dict[int, list[int]] = {}
    for index, part in enumerate(part_ids):
        images_of.setdefault(part, []).append(index)
    if len(images_of) < 2:
        raise ValueError(f"{images}: by --parts '{parts}' all images show one part; at least two are needed")
    rng, groups = np.random.default_rng(seed), list(images_of.values())
    shuffled = [groups[k] for k in rng.permutation(len(groups))]
    test: list[int] = []
    for members in shuffled[:-1]:  # at least one part is left to train on
        if len(test) < max(4, round(TEST_FRACTION * len(pictures))):
            test += members
    train = sorted(set(range(len(pictures))) - set(test))
    root, kinds = Path(out), cycle([*DEFECTS, *FAINT_DEFECTS] if faint else DEFECTS)
    progress = Countdown("drawing")
    for k, index in enumerate(test + train):
        picture, name = pictures[index].permute(1, 2, 0).numpy(), f"{index:05d}"
        if parts:
            name = f"part{part_ids[index]:05d}_{name}"  # for --parts 'part([0-9]+)_' of training
        copies = 0 if k >= len(test) else FAINT_COPIES if faint else k % 2
        if faint or not copies:
            split = "test" if k < len(test) else "train"
            save_picture(root / split / "good" / f"{name}.png", Image.fromarray(picture))
        for copy, kind in zip(range(copies), kinds):
            damaged, mask = faint_damage(picture, kind, rng) if faint else damage(picture / 255.0, kind, rng)
            stem = f"{name}_{copy}" if faint else name
            save_picture(root / "ground_truth" / kind / f"{stem}_mask.png", Image.fromarray(mask))
            save_picture(root / "test" / kind / f"{stem}.png", Image.fromarray(damaged))
        progress(k + 1, len(pictures))
    return root
