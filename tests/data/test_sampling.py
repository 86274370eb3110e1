"""Which image comes when, and what is drawn on it, by seed, purpose and number."""

from pathlib import Path

import torch
from test_train import write_images

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.split import load_good_images
from almrr_ref.data.textures import ImageTextures
from almrr_ref.run.random import sample_generator


def test_every_seed_purpose_and_number_draws_something_else() -> None:
    names = [(seed, stream, index) for seed in (0, 1, 2**22) for stream in range(4) for index in (0, 1, 2, 1000)]
    drawn = [tuple(torch.rand(4, generator=sample_generator(*name)).tolist()) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn == [tuple(torch.rand(4, generator=sample_generator(*name)).tolist()) for name in names]


def test_another_seed_keeps_other_images_aside_and_draws_other_anomalies(tmp_path: Path) -> None:
    write_images(tmp_path, 7)
    data, kept, masks = find_dataset(str(tmp_path)), [], []
    for seed in (0, 1):
        config = TrainConfig(seed=seed, clean_probability=0.0)
        good = load_good_images(data, ModelConfig(image_size=32), config)
        kept.append(good.held_out)
        drawn = TrainingSamples(good.training, ImageTextures(good.training), config, textured_anomaly)
        masks.append(torch.stack([drawn[number][2] for number in range(4)]))
    assert not torch.equal(*kept)
    assert not torch.equal(*masks)


def test_an_epoch_shows_every_image_once_in_another_order() -> None:
    samples = TrainingSamples(torch.zeros(11, 3, 8, 8, dtype=torch.uint8), None, TrainConfig(), textured_anomaly)  # type: ignore[arg-type]
    first, second = ([samples.image_index(i + 11 * epoch) for i in range(11)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
