"""The same picture twice: exact copies by their pixels, near copies (saved again, resized) by a perceptual hash.

A copy on the other side of the split makes the threshold too low, and a copy in the training set counts double.
Pictures of one texture, or of parts that lie alike, all resemble each other. What identifies a picture is how its fine
structure differs from that of the mean picture, so this difference is hashed. The same part in other light is no copy:
``--parts`` is for that.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.run.text import counted, one_line

_SIDE = 32  # of the small picture behind the hash
_BANDS, _BITS = 32, 16  # near copies agree in one band of bits at least
_ALIKE, _APART = 0.99, 6.0  # least correlation of near copies, and largest mean difference, in grey levels
_FLAT = 0.25  # grey levels of fine structure below which there is nothing to compare
_FEWEST = 8  # pictures that make a mean


def digest(images: Sequence[Tensor]) -> bytes:
    """The images of one picture, uint8 (3, h, w) each -> 16 bytes, equal for equal images."""
    hashed = hashlib.blake2b(digest_size=16)
    for image in images:
        hashed.update(image.contiguous().numpy().data)
    return hashed.digest()


def thumbnail(image: Tensor) -> Tensor:
    """uint8 (3, h, w) -> gray float (32, 32), by which near copies are recognised."""
    return functional.interpolate(image[None].float(), size=(_SIDE, _SIDE), mode="area")[0].mean(dim=0)


def near_copies(thumbnails: Tensor) -> list[tuple[int, int]]:
    """Thumbnails (n, 32, 32) -> pairs (later, earlier) of pictures that are nearly the same.

    Candidates agree in one of 32 bands of 16 signs of random projections: the work grows with n, not with its square.
    Of fewer than 8 pictures none is reported: their mean says too little.
    """
    if len(thumbnails) < _FEWEST:
        return []
    padded = functional.pad(thumbnails[:, None], (2, 2, 2, 2), mode="reflect")
    fine = (thumbnails - functional.avg_pool2d(padded, 5, stride=1)[:, 0]).flatten(1)
    features = functional.normalize(fine, eps=1.0)
    features = functional.normalize(features - features.mean(dim=0), eps=0.05)
    textured = (fine.abs().mean(dim=1) >= _FLAT).nonzero()[:, 0].tolist()
    generator = torch.Generator().manual_seed(0)
    signs = features @ torch.randn(features.shape[1], _BANDS * _BITS, generator=generator) > 0
    keys = np.packbits(signs.numpy().reshape(len(features), _BANDS, _BITS), axis=2).view(np.uint16)[..., 0]
    pairs = set()
    for band in keys.T.tolist():
        bucket: defaultdict[int, list[int]] = defaultdict(list)
        for i in textured:
            bucket[band[i]].append(i)
        for alike in bucket.values():
            if len(alike) > 1:
                close = (features[alike] @ features[alike].T >= _ALIKE).tril(-1).nonzero().tolist()
                pairs |= {(alike[later], alike[earlier]) for later, earlier in close}
    return sorted((a, b) for a, b in pairs if (thumbnails[a] - thumbnails[b]).abs().mean() <= _APART)


def find_copies(
    digests: Sequence[bytes | None], thumbnails: Sequence[Tensor | None]
) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Find the copies among pictures by their digests and thumbnails, None for broken pictures.

    Returns:
        The exact copies, number of the copy: number of the picture that it repeats; and the pairs (later, earlier) of
        near copies among the others.
    """
    first: dict[bytes, int] = {}
    pairs = ((i, first.setdefault(value, i)) for i, value in enumerate(digests) if value is not None)
    exact = {i: original for i, original in pairs if i != original}
    compared = [(i, small) for i, small in enumerate(thumbnails) if small is not None and i not in exact]
    if not compared:
        return exact, []
    numbers, small = [i for i, _ in compared], torch.stack([small for _, small in compared])
    return exact, [(numbers[later], numbers[earlier]) for later, earlier in near_copies(small)]


def describe_copies(names: Sequence[Path], exact: dict[int, int], near: Sequence[tuple[int, int]]) -> list[str]:
    """Names of pictures and the copies among them -> one line for each kind of copy."""
    lines = []
    for pairs, what, unit in (
        (list(exact.items()), "the same pixels, which count once", "repeat"),
        (near, "nearly the same, on one side of the split", "pair"),
    ):
        if pairs:
            later, earlier = (one_line(names[i]) for i in pairs[0])
            lines.append(f"{what}: {counted(len(pairs), unit)} of images (first: {later} is {earlier})")
    return lines


def join_parts(part_ids: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Part ids of pictures, and pairs of pictures -> new part ids from 0, with the parts of each pair joined."""
    parent = {part_id: part_id for part_id in part_ids}

    def root(part_id: int) -> int:
        while parent[part_id] != part_id:
            part_id = parent[part_id]
        return part_id

    for a, b in pairs:
        roots = root(part_ids[a]), root(part_ids[b])
        parent[max(roots)] = min(roots)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(part_id), len(numbers)) for part_id in part_ids]
