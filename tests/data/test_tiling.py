"""Large images by tiles: coverage, seams, and images smaller than a tile."""

from itertools import pairwise

import pytest
import torch

from almrr_ref.config import ModelConfig
from almrr_ref.data.tiling import blend_tiles, cut_tiles, tile_starts
from almrr_ref.deploy.predictor import Predictor


@pytest.mark.parametrize(("length", "tile"), [(3696, 256), (257, 256), (256, 256), (31, 32), (100, 7)])
def test_tiles_cover_every_pixel_and_overlap_by_a_quarter(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - tile)
    assert all(earlier < later <= earlier + tile - tile // 4 + 1 for earlier, later in pairwise(starts))


class RedChannel(Predictor):
    """A form of the network whose map is the red channel: the blended map must then be the image itself."""

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1]


@pytest.mark.parametrize("shape", [(75, 130), (32, 32), (9, 90)])
def test_blended_tiles_reproduce_a_pointwise_map_without_seams_however_small_the_image(shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    anomaly_map = RedChannel(ModelConfig(image_size=32)).tiled_map(image, tile=32, batch_size=3)
    torch.testing.assert_close(anomaly_map, image[:1].float() / 255, rtol=0, atol=1e-6)


def test_tiles_are_resized_to_the_network() -> None:
    image = torch.full((3, 50, 64), 200, dtype=torch.uint8)
    tiles = torch.stack(list(cut_tiles(image, tile=48, size=(32, 32))))
    assert tiles.shape == (4, 3, 32, 32)
    assert tiles.unique().tolist() == [200]
    assert blend_tiles(tiles[:, 0].float(), 50, 64, 48).shape == (1, 50, 64)
