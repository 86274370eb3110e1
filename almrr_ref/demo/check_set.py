"""A test part without defective images: defects drawn on a fraction of one's own good images.

It shows a quality engineer how a network does on their surface before any defect has turned up, and compares settings
without a look at a real test part. Training does not draw defects of these kinds.
"""

from itertools import cycle
from pathlib import Path

import numpy as np

from almrr_ref.config import ModelConfig
from almrr_ref.data.copies import find_copies, join_parts
from almrr_ref.data.images import Levels, Remarks
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import decode
from almrr_ref.data.recognise import recognise_levels
from almrr_ref.data.shape import settle_size
from almrr_ref.data.split import read_part_ids
from almrr_ref.demo.defects import DEFECTS, FAINT_DEFECTS, damage, faint_damage
from almrr_ref.report.overlays import save_picture
from almrr_ref.run.text import LOGGER, Countdown, one_line

TEST_FRACTION = 0.2  # of the images
FAINT_COPIES = 4  # of every image of a faint test part, with one defect each


def write_check(images: Path, out: Path, seed: int, faint: bool, parts: str | None, pixels: int = 256) -> int:
    """Draw defects on a fifth of one's own good images: data folder of any known layout -> MVTec category at `out`.

    Returns the number of images that cannot be read; the log names each.

    Args:
        faint: False: every second image of the test part gets one of the demo's six defects. True: all stay good, and
            four copies of each get one of eleven kinds, at 20 to 100% of its strength: almost any setting finds the
            six at full strength.
        parts: regular expression for the part that a file shows (data/split.py); no part is in both train and test,
            nor are copies of one picture.
        pixels: the images written have the median shape, and the area of a square of this side, >= 64.
    Raises:
        ValueError: if fewer than ten good images can be read, `parts` does not fit, or a defect cannot be drawn.
    """
    data = find_dataset(images)
    part_of_file = read_part_ids(data, parts)
    config = ModelConfig(image_size="auto", pixels=pixels)
    paths = [sample.path for sample in data.train]
    settled = settle_size(paths, recognise_levels(paths, config), "--pixels")
    decoded = decode(paths, settled.size, None, Levels.of(settled), Remarks())
    pictures, failures = decoded.images, decoded.failures
    copies, near = find_copies(decoded.digests, decoded.thumbnails)
    part_of_file = join_parts(part_of_file, [*copies.items(), *near])
    for path, reason in failures:
        LOGGER.warning(f"not read: {one_line(path)}: {reason}")
    if len(pictures) < 10:
        raise ValueError(f"{images}: {len(pictures)} good images; at least 10 are needed to put some aside")
    unreadable = {path for path, _ in failures}
    part_ids = np.array([part for sample, part in zip(data.train, part_of_file) if sample.path not in unreadable])
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.unique(part_ids))
    if len(shuffled) < 2:
        by = f"by --parts '{parts}' " if parts else ""
        raise ValueError(f"{images}: {by}all images show one part; at least two are needed")
    test: list[int] = []
    for part in shuffled[:-1]:  # at least one part remains to train on
        if len(test) < max(4, round(TEST_FRACTION * len(pictures))):
            test += np.flatnonzero(part_ids == part).tolist()
    train = sorted(set(range(len(pictures))) - set(test))
    kinds = cycle([*DEFECTS, *FAINT_DEFECTS] if faint else DEFECTS)
    progress = Countdown("drawing")
    for k, index in enumerate(test + train):
        picture = pictures[index].permute(1, 2, 0).numpy()
        name = (f"part{part_ids[index]:05d}_" if parts else "") + f"{index:05d}"
        drawn = 0 if k >= len(test) else FAINT_COPIES if faint else k % 2
        if faint or not drawn:
            save_picture(out / ("test" if k < len(test) else "train") / "good" / f"{name}.png", picture)
        for copy, kind in zip(range(drawn), kinds):
            damaged, mask = faint_damage(picture, kind, rng) if faint else damage(picture / 255.0, kind, rng)
            stem = f"{name}_{copy}" if faint else name
            save_picture(out / "ground_truth" / kind / f"{stem}_mask.png", mask)
            save_picture(out / "test" / kind / f"{stem}.png", damaged)
        progress(k + 1, len(pictures))
    return len(failures)
