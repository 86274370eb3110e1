"""The simulated anomalies beyond the paper's: what they change, where, and how they are drawn."""

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from almrr_ref.config import TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.textures import ImageTextures, MixedTextures, TextureFolder, texture_source
from almrr_ref.plus import varied
from almrr_ref.train import DRAW


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gray_images(count: int = 3, size: int = 64) -> Tensor:
    noise = torch.rand(count, 1, size, size, generator=generator(0))
    return (80 + 60 * noise).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


class White:
    """A texture of ones, which counts how often it is drawn."""

    def __init__(self) -> None:
        self.draws = 0

    def sample(self, generator: torch.Generator) -> Tensor:
        self.draws += 1
        return torch.ones(3, 64, 64)


def test_the_mask_is_never_empty_and_nothing_changes_far_from_it() -> None:
    image = gray_images()[0].float() / 255
    for seed in range(60):
        augmented, mask = varied.varied_anomaly(image, ImageTextures(gray_images()), generator(seed))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()
        assert float(augmented.min()) >= 0
        assert float(augmented.max()) <= 1
        changed = (augmented - image).abs().amax(dim=0) > 0
        assert changed[mask[0] > 0].float().mean() > 0.95
        visible = (augmented - image).abs().mean(dim=0) > 0.1
        far = ndimage.distance_transform_edt(mask[0].numpy() == 0) > 12  # a soft border is not longer
        assert not visible[torch.from_numpy(far)].any()


def test_the_same_generator_draws_the_same_anomaly() -> None:
    image, source = gray_images()[0].float() / 255, ImageTextures(gray_images())
    for first, second in zip(*(varied.varied_anomaly(image, source, generator(5)) for _ in range(2))):
        assert torch.equal(first, second)


def test_half_of_the_anomalies_are_the_papers() -> None:
    """A texture of ones shows in all of the paper's anomalies and in a quarter of the others: 0.5 + 0.5 / 4."""
    image, source = gray_images()[0].float() / 255, White()
    for seed in range(300):
        varied.varied_anomaly(image, source, generator(seed))
    assert 0.55 < source.draws / 300 < 0.72


def test_lines_are_thin_and_as_wide_as_said() -> None:
    """A line of half width w covers at most 2 w + 2 pixels across: its distance transform stays below that."""
    for seed in range(30):
        line = varied.draw_line((128, 128), generator(seed))[0] > 0.5
        assert line.sum() >= 8
        inside = ndimage.distance_transform_edt(line.numpy())
        assert ndimage.median(inside[line.numpy()]) <= 3


def test_softening_keeps_the_peak_and_spreads_the_border() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:44, 20:44] = 1
    soft = varied.soften(mask, 3)
    assert float(soft.max()) == pytest.approx(1)
    assert 0 < float(soft[0, 32, 46]) < float(soft[0, 32, 42]) < 1
    assert float(soft[0, 32, 60]) == 0


def test_the_style_of_the_config_decides_what_is_drawn() -> None:
    images = gray_images()
    rows = {}
    for style in ("perlin", "varied"):
        config = TrainConfig(anomaly_style=style, clean_probability=0.0)
        samples = TrainingSamples(images, ImageTextures(images), config, DRAW[style])
        rows[style] = [samples[number][2] for number in range(12)]
    same = [torch.equal(a, b) for a, b in zip(rows["perlin"], rows["varied"])]
    assert not all(same)


def test_gray_images_get_gray_textures_from_a_folder_only_where_sources_are_mixed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "red.png")
    mixed = texture_source(str(tmp_path), gray_images(), 64, mixed=True)
    plain = texture_source(str(tmp_path), gray_images(), 64, mixed=False)
    assert isinstance(mixed, MixedTextures)
    assert isinstance(mixed.sources[0], TextureFolder)
    assert mixed.sources[0].gray
    assert isinstance(plain, TextureFolder)
    assert not plain.gray
    assert isinstance(texture_source(None, gray_images(), 64, mixed=True), ImageTextures)
    colourful = gray_images().clone()
    colourful[0, 0] = 255
    with_colour = texture_source(str(tmp_path), colourful, 64, mixed=True)
    assert isinstance(with_colour, MixedTextures)
    assert isinstance(with_colour.sources[0], TextureFolder)
    assert not with_colour.sources[0].gray
