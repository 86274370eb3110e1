"""Large images by tiles: cut into overlapping squares, predict each, blend the maps.

A tile is a square of the image at its own resolution, resized to the network's input if its side differs. Neighbours
overlap by a quarter of the side, and every tile counts with a weight that falls from its centre to its border, so
that no seam shows. Where a map ends at the image's border, the last tile is moved inside: no pixel is invented unless
the image is smaller than a tile.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from almrr_ref.predictor import Predictor

OVERLAP = 0.25  # share of a tile's side


def tile_starts(length: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """First pixels of the tiles that cover ``length`` pixels, evenly spread with at least the given overlap."""
    if length <= tile:
        return [0]
    stride = max(1, round(tile * (1 - overlap)))
    count = -(-(length - tile) // stride) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tile_corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """Upper left corners (y, x) of the tiles that cover an image."""
    return [(y, x) for y in tile_starts(height, tile) for x in tile_starts(width, tile)]


def cut_tiles(image: Tensor, tile: int, size: int) -> Iterator[Tensor]:
    """Cut an image uint8 (3, h, w) into tiles, each uint8 (3, size, size); a smaller image is mirrored."""
    image = pad_to(image, tile)
    for y, x in tile_corners(image.shape[1], image.shape[2], tile):
        piece = image[:, y : y + tile, x : x + tile]
        if size != tile:
            piece = F.interpolate(piece[None].float(), size=(size, size), mode="bilinear", antialias=True)[0]
            piece = piece.round().clamp(0, 255).to(torch.uint8)
        yield piece


def pad_to(image: Tensor, tile: int) -> Tensor:
    """Continue an image (c, h, w) below and to the right up to the size of a tile, mirrored as often as needed."""
    for axis in (1, 2):
        while image.shape[axis] < tile:
            image = torch.cat([image, image.flip(axis)], dim=axis).narrow(axis, 0, min(2 * image.shape[axis], tile))
    return image


def predict_tiled(model: Predictor, image: Tensor, tile: int, batch_size: int = 8) -> Tensor:
    """Anomaly map of one large image: uint8 (3, h, w) -> (1, h, w) in [0, 1], on the CPU.

    Args:
        image: uint8 (3, h, w).
        tile: side of a tile in pixels of the image.
        batch_size: tiles at a time.
    """
    _, h, w = image.shape
    padded = pad_to(image, tile)
    corners = tile_corners(padded.shape[1], padded.shape[2], tile)
    ramp = torch.minimum(torch.arange(1, tile + 1), torch.arange(tile, 0, -1)).float()
    window = ramp[:, None] * ramp / ramp.max() ** 2
    total, weight = torch.zeros(padded.shape[1:]), torch.zeros(padded.shape[1:])
    pieces = cut_tiles(padded, tile, model.config.image_size)
    for first in range(0, len(corners), batch_size):
        batch = torch.stack([next(pieces) for _ in corners[first : first + batch_size]]).float() / 255
        maps, _ = model.predict(batch)
        maps = F.interpolate(maps, size=(tile, tile), mode="bilinear", align_corners=False).cpu()
        for (y, x), piece in zip(corners[first : first + batch_size], maps[:, 0]):
            total[y : y + tile, x : x + tile] += piece * window
            weight[y : y + tile, x : x + tile] += window
    return (total / weight)[None, :h, :w]
