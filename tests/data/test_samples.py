"""Training samples: which image comes when, what is drawn on it, how often it stays clean, and on how many threads."""

import pytest
import torch
from scipy import stats
from tiny_network import good_images

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.config import TrainConfig
from almrr_ref.data.samples import TrainingSamples, training_sample
from almrr_ref.data.textures import ImageTextures
from almrr_ref.run.random import sample_generator

IMAGES = good_images(11, size=16)


class Noise:
    """Textures of noise; notes on how many threads it draws them."""

    def __init__(self, shape: tuple[int, ...] = (3, 16, 16)) -> None:
        self.shape, self.threads = shape, set()

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        self.threads.add(torch.get_num_threads())
        return torch.rand(self.shape, generator=generator)


def samples(**settings: object) -> TrainingSamples:
    config, part_ids = TrainConfig(**settings), torch.arange(11) // 2
    return TrainingSamples(IMAGES, ImageTextures(IMAGES), config, textured_anomaly, part_ids)


def test_every_seed_purpose_and_number_draws_something_else() -> None:
    names = [(seed, stream, index) for seed in (0, 1, 2**22) for stream in range(4) for index in (0, 1, 2, 1000)]
    drawn, again = ([tuple(torch.rand(4, generator=sample_generator(*name))) for name in names] for _ in range(2))
    assert len(set(drawn)) == len(names)
    assert drawn == again


def test_an_epoch_shows_every_image_once_in_another_order() -> None:
    runs = ((0, 0), (0, 11), (1, 0))  # seed, first sample
    first, second, other = ([samples(seed=s).image_index(i) for i in range(k, k + 11)] for s, k in runs)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(11))
    assert first != second
    assert first != other


def test_batches_hold_the_samples_of_their_steps_with_the_numbers_of_their_images() -> None:
    row = samples(batch_size=3)
    (augmented, mask, numbers), _ = row.batches(2, 4)
    for i in range(3):
        for batched, single in zip((augmented, mask, numbers), row[6 + i]):
            assert torch.equal(batched[i], single)
        index = row.image_index(6 + i)
        outside = mask[i, 0] == 0
        assert torch.equal(augmented[i][:, outside], IMAGES[index][:, outside].float() / 255)
        assert numbers[i] == index


@pytest.mark.parametrize("clean_probability", [0.0, 0.5, 1.0])
def test_the_clean_share_is_as_asked_and_a_clean_image_has_an_empty_mask(clean_probability: float) -> None:
    image, draws, clean = IMAGES[0].float() / 255, torch.Generator().manual_seed(11), 0
    for _ in range(200):
        augmented, mask = training_sample(image, Noise(), draws, clean_probability, textured_anomaly)
        assert mask.any() != torch.equal(augmented, image)
        clean += not mask.any()
    assert stats.binomtest(clean, 200, clean_probability).pvalue > 0.01


def test_samples_are_made_on_one_thread_and_the_number_of_threads_is_given_back() -> None:
    source, draws, before = Noise(), torch.Generator(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        training_sample(torch.ones(3, 16, 16), source, draws, 0.0, textured_anomaly)
        with pytest.raises(ValueError, match="texture"):
            training_sample(torch.ones(3, 16, 16), Noise((0,)), draws, 0.0, textured_anomaly)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert source.threads == {1}
