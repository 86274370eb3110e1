"""Large images by tiles: cut an image into overlapping squares, and blend their maps into one.

A tile's weight falls from its centre to its border, so that no seam shows. The last tile of a row ends at the image's
border: only an image smaller than a tile is padded.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from almrr_ref.data.images import resize_image


def tile_starts(length: int, tile: int) -> list[int]:
    """First pixels of the tiles that cover `length` pixels, evenly spread, overlapping by at least a quarter."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // max(1, round(0.75 * tile))) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tile_corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """Upper left corners (y, x) of the tiles that cover an image."""
    return [(y, x) for y in tile_starts(height, tile) for x in tile_starts(width, tile)]


def cut_tiles(image: Tensor, tile: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Cut an image uint8 (3, h, w) into its tiles, in the order of `tile_corners`, each resized to (3, *size)."""
    image = pad_to(image, tile)
    for y, x in tile_corners(image.shape[1], image.shape[2], tile):
        cut = image[:, y : y + tile, x : x + tile]
        yield cut if size == (tile, tile) else resize_image(cut, size)


def pad_to(image: Tensor, tile: int) -> Tensor:
    """Pad an image (c, h, w) below and on the right to the size of a tile, mirrored as often as needed."""
    for axis in (1, 2):
        while image.shape[axis] < tile:
            image = torch.cat([image, image.flip(axis)], dim=axis).narrow(axis, 0, min(2 * image.shape[axis], tile))
    return image


def blend_tiles(maps: Iterable[Tensor], height: int, width: int, tile: int) -> Tensor:
    """Blend the maps of an image's tiles, each (h, w), in the order of `tile_corners`: -> (1, height, width)."""
    ramp = torch.minimum(torch.arange(1, tile + 1), torch.arange(tile, 0, -1)).float()
    window = ramp[:, None] * ramp / ramp.max() ** 2
    total = torch.zeros(max(height, tile), max(width, tile))
    weight = torch.zeros_like(total)
    for (y, x), tile_map in zip(tile_corners(total.shape[0], total.shape[1], tile), maps, strict=True):
        resized = functional.interpolate(tile_map[None, None], size=(tile, tile), mode="bilinear", align_corners=False)
        total[y : y + tile, x : x + tile] += resized[0, 0] * window
        weight[y : y + tile, x : x + tile] += window
    return (total / weight)[None, :height, :width]
