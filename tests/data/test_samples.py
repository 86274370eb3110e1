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


def test_another_seed_draws_other_anomalies() -> None:
    rows = [samples(seed=seed, clean_probability=0.0) for seed in (0, 1)]
    assert not all(torch.equal(rows[0][number][2], rows[1][number][2]) for number in range(4))


def test_an_epoch_shows_every_image_once_in_another_order() -> None:
    first, second = ([samples().image_index(i + 11 * epoch) for i in range(11)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_batches_hold_the_samples_of_their_steps_with_their_parts() -> None:
    row = samples(batch_size=3)
    (clean, augmented, mask, part_ids), _ = row.batches(2, 4)
    for i in range(3):
        for batched, single in zip((clean, augmented, mask, part_ids), row[6 + i]):
            assert torch.equal(batched[i], single)
        index = row.image_index(6 + i)
        assert torch.equal(clean[i], IMAGES[index].float() / 255)
        assert part_ids[i] == index // 2
