"""Which image comes when, and what is drawn on it, by seed, purpose and number."""

import torch

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.config import TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.textures import ImageTextures
from almrr_ref.run.random import sample_generator

IMAGES = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def samples(**settings: object) -> TrainingSamples:
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    return TrainingSamples(IMAGES, ImageTextures(IMAGES), config, textured_anomaly, torch.arange(11) // 2)


def test_every_seed_purpose_and_number_draws_something_else() -> None:
    names = [(seed, stream, index) for seed in (0, 1, 2**22) for stream in range(4) for index in (0, 1, 2, 1000)]
    drawn = [tuple(torch.rand(4, generator=sample_generator(*name)).tolist()) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn == [tuple(torch.rand(4, generator=sample_generator(*name)).tolist()) for name in names]


def test_an_epoch_shows_every_image_once_in_another_order() -> None:
    runs = ((0, 0), (0, 11), (1, 0))  # seed, first sample
    first, second, other = ([samples(seed=s).image_index(i) for i in range(k, k + 11)] for s, k in runs)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(11))
    assert first != second
    assert first != other


def test_batches_hold_the_samples_of_their_steps_with_their_parts() -> None:
    row = samples(batch_size=3)
    (clean, augmented, mask, part_ids), _ = row.batches(2, 4)
    for i in range(3):
        for batched, single in zip((clean, augmented, mask, part_ids), row[6 + i]):
            assert torch.equal(batched[i], single)
        index = row.image_index(6 + i)
        assert torch.equal(clean[i], IMAGES[index].float() / 255)
        assert part_ids[i] == index // 2
