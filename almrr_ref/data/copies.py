"""The same picture twice: exact copies by their pixels, near copies (saved again, resized) by a perceptual hash.

A copy on the other side of the split makes the threshold too low, and a copy in the training set counts double. Of
textures and of parts that lie alike, all pictures resemble each other; what tells one from another is what it does not
share with the rest. So the hash is of that: the fine structure of a picture without that of the mean picture. The same
part in other light is no copy: ``--parts`` is for that.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.run.text import one_line

_SIDE = 32  # of the small picture behind the hash
_BANDS, _BITS = 32, 16  # near copies agree in one band of bits at least
_ALIKE, _APART = 0.99, 6.0  # least correlation of near copies, and largest mean difference, in grey levels
_FLAT = 0.25  # grey levels of fine structure below which there is nothing to compare
_FEWEST = 8  # pictures that make a mean


def digest(images: Sequence[Tensor]) -> bytes:
    """Images of one picture, uint8 -> 16 bytes that are equal for equal ones."""
    hashed = hashlib.blake2b(digest_size=16)
    for image in images:
        hashed.update(image.contiguous().numpy().data)
    return hashed.digest()


def thumbnail(image: Tensor) -> Tensor:
    """uint8 (3, h, w) -> gray float (32, 32), what near copies are recognised by."""
    return functional.interpolate(image[None].float(), size=(_SIDE, _SIDE), mode="area")[0].mean(dim=0)


def exact_copies(digests: Sequence[bytes | None]) -> dict[int, int]:
    """Digests, None for pictures that could not be read -> number of each copy: number of the picture it repeats."""
    first: dict[bytes, int] = {}
    pairs = ((i, first.setdefault(value, i)) for i, value in enumerate(digests) if value is not None)
    return {i: original for i, original in pairs if i != original}


def near_copies(thumbnails: Tensor) -> list[tuple[int, int]]:
    """Thumbnails (n, 32, 32) -> pairs (later, earlier) of pictures that are nearly the same.

    Candidates agree in 16 of 512 signs of random projections, in one of 32 places; so the work grows with n, not with
    its square. Of fewer than 8 pictures none is found: they have no mean to tell them apart.
    """
    if len(thumbnails) < _FEWEST:
        return []
    padded = functional.pad(thumbnails[:, None], (2, 2, 2, 2), mode="reflect")
    fine = (thumbnails - functional.avg_pool2d(padded, 5, stride=1)[:, 0]).flatten(1)
    own = functional.normalize(fine, eps=1.0)
    own = functional.normalize(own - own.mean(dim=0), eps=0.05)
    textured = (fine.abs().mean(dim=1) >= _FLAT).nonzero()[:, 0].tolist()
    generator = torch.Generator().manual_seed(0)
    signs = own @ torch.randn(own.shape[1], _BANDS * _BITS, generator=generator) > 0
    keys = np.packbits(signs.numpy().reshape(len(own), _BANDS, _BITS), axis=2).view(np.uint16)[..., 0]
    pairs = set()
    for band in keys.T.tolist():
        bucket: defaultdict[int, list[int]] = defaultdict(list)
        for i in textured:
            bucket[band[i]].append(i)
        for alike in bucket.values():
            if len(alike) > 1:
                close = (own[alike] @ own[alike].T >= _ALIKE).tril(-1).nonzero().tolist()
                pairs |= {(alike[later], alike[earlier]) for later, earlier in close}
    return sorted((a, b) for a, b in pairs if (thumbnails[a] - thumbnails[b]).abs().mean() <= _APART)


def find_copies(
    digests: Sequence[bytes | None], thumbnails: Sequence[Tensor | None]
) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """What pictures are recognised by, None for broken ones -> exact copies, and near ones among the others."""
    exact = exact_copies(digests)
    compared = [(i, small) for i, small in enumerate(thumbnails) if small is not None and i not in exact]
    if not compared:
        return exact, []
    numbers, small = [i for i, _ in compared], torch.stack([small for _, small in compared])
    return exact, [(numbers[later], numbers[earlier]) for later, earlier in near_copies(small)]


def describe_copies(names: Sequence[Path], exact: dict[int, int], near: Sequence[tuple[int, int]]) -> list[str]:
    """Names of pictures and the copies among them -> one line a kind of copy."""
    lines = []
    for pairs, what in (
        (list(exact.items()), "images repeat others pixel by pixel and count once"),
        (near, "pairs of images are nearly the same and stay on one side of the split"),
    ):
        if pairs:
            later, earlier = (one_line(names[i]) for i in pairs[0])
            lines.append(f"{len(pairs)} {what} (first: {later} is {earlier})")
    return lines


def join_parts(part_ids: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Part ids and pairs of pictures that belong together -> part ids from 0, the parts of each pair being one."""
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
