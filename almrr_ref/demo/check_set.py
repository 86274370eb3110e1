"""A test part without defective images: defects drawn on a share of one's own good images.

It serves two purposes: a quality engineer sees how a network does on the own surface before any defect has turned up,
and settings can be compared without ever looking at a real test part. Training does not draw defects of these kinds.
"""

import math
from pathlib import Path

import numpy as np

from almrr_ref.data.datasets import find_dataset, load_images
from almrr_ref.data.split import part_numbers
from almrr_ref.demo.defects import DEFECTS, damage, quantise
from almrr_ref.demo.faint import FAINT_DEFECTS
from almrr_ref.report.overlays import save_picture
from almrr_ref.run.text import Countdown

WEAKEST = 0.2  # strength of a faint defect, at least; up to 1, log-uniform
SMALLEST = 2e-4  # share of the image that a faint defect covers, at least: 13 pixels of 256x256
COPIES = 4  # faint defects drawn on every image of the test part, each on a copy of its own


def write_check(
    images: str | Path,
    directory: str | Path,
    seed: int = 0,
    size: int = 256,
    share: float = 0.2,
    faint: bool = False,
    parts: str | None = None,
) -> Path:
    """Draw defects on a share of one's own good images: -> the folder, a MVTec category.

    Args:
        images: a data folder of any known layout; its good training images serve.
        directory: created where missing.
        seed: of the split and of every defect.
        size: edge of the images written, pixels, >= 64.
        share: of the images for the test part; every second one of them gets one of the demo's six defects.
        faint: instead, every one of them is a good image of the test part, and four copies of it get a defect each, of
            eleven kinds, at 20 to 100% of its strength: the demo's full ones are found by almost any setting, so that
            they tell settings apart no more.
        parts: regular expression for the part that a file shows (good_images.py): none is then trained on and checked.
    Raises:
        ValueError: if fewer than ten good images can be read, ``parts`` does not fit, or a defect cannot be drawn.
    """
    data = find_dataset(images)
    numbers = part_numbers(data, parts)
    pictures, failures = load_images(data.train, size)
    broken = {path for path, _ in failures}
    numbers = [number for sample, number in zip(data.train, numbers) if sample.path not in broken]
    if len(pictures) < 10:
        raise ValueError(f"{images}: {len(pictures)} good images; at least 10 are needed to put some aside")
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for i, number in enumerate(numbers):
        members.setdefault(number, []).append(i)
    if len(members) < 2:
        raise ValueError(f"{images}: by --parts '{parts}' all images show one part; at least two are needed")
    shown = list(members.values())
    shuffled = rng.permutation(len(shown))
    order = [i for part in shuffled for i in shown[part]]
    count = max(4, round(share * len(pictures)))
    while count < len(order) and numbers[order[count]] == numbers[order[count - 1]]:
        count += 1  # the rest of the part
    count = min(count, len(order) - len(shown[shuffled[-1]]))  # one part at least is left to train on
    root, kinds = Path(directory), [*DEFECTS, *(FAINT_DEFECTS if faint else ())]
    progress, drawn = Countdown("drawing"), 0
    for k, index in enumerate(order):
        picture, name = pictures[index].permute(1, 2, 0).numpy(), f"{index:05d}"
        if parts:
            name = f"part{numbers[index]:05d}_{name}"  # for --parts 'part([0-9]+)_' of training
        copies = 0 if k >= count else COPIES if faint else k % 2
        if faint or not copies:
            save_picture(root / ("test" if k < count else "train") / "good" / f"{name}.png", picture)
        for copy in range(copies):
            kind = kinds[drawn % len(kinds)]
            drawn += 1
            damaged, mask = faint_damage(picture, kind, rng) if faint else damage(picture / 255.0, kind, rng)
            file = f"{name}_{copy}" if faint else name
            save_picture(root / "ground_truth" / kind / f"{file}_mask.png", mask)
            save_picture(root / "test" / kind / f"{file}.png", damaged)
        progress(k + 1, len(order))
    return root


def faint_damage(picture: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Good image uint8 (s, s, 3), name of a defect -> image uint8, mask (s, s) uint8 in {0, 255}; weakened.

    Raises:
        ValueError: if a hundred defects in a row were too small.
    """
    clean = picture / 255.0
    if kind in DEFECTS:
        pixels, mask = damage(clean, kind, rng)
        damaged = pixels / 255.0
    else:
        for _ in range(100):
            damaged, inside = FAINT_DEFECTS[kind](clean, rng)
            if inside.mean() >= SMALLEST:
                break
        else:
            raise ValueError(f"no {kind} of at least {SMALLEST:.2%} of the image came out")
        mask = inside.astype(np.uint8) * 255
    strength = math.exp(rng.uniform(math.log(WEAKEST), 0))
    return quantise(clean + strength * (damaged - clean)), mask
