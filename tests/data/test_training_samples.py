"""One training sample: how often it stays clean, what is drawn otherwise, and on how many threads."""

import pytest
import torch
from scipy import stats

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.data.samples import training_sample
from almrr_ref.train import DRAW


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Noise:
    """Textures of noise; notes on how many threads it draws them."""

    def __init__(self, shape: tuple[int, ...] = (3, 16, 16)) -> None:
        self.shape, self.threads = shape, set()

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        self.threads.add(torch.get_num_threads())
        return torch.rand(self.shape, generator=generator)


@pytest.mark.parametrize("clean_probability", [0.0, 0.5, 1.0])
def test_the_clean_share_is_as_asked_and_a_clean_image_has_an_empty_mask(clean_probability):
    image, draws, clean = torch.rand(3, 16, 16, generator=generator(10)), generator(11), 0
    for _ in range(400):
        augmented, mask = training_sample(image, Noise(), draws, clean_probability, textured_anomaly)
        assert mask.any() != torch.equal(augmented, image)
        clean += not mask.any()
    assert stats.binomtest(clean, 400, clean_probability).pvalue > 0.01


def test_the_style_decides_what_is_drawn():
    image, masks = torch.rand(3, 32, 32, generator=generator(1)), []
    for style in DRAW:
        drawn = [training_sample(image, Noise(), generator(seed), 0.0, DRAW[style])[1] for seed in range(12)]
        masks.append(torch.stack(drawn))
    assert not torch.equal(*masks)


def test_samples_are_made_on_one_thread_and_the_number_of_threads_is_given_back():
    source, before = Noise(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        training_sample(torch.ones(3, 16, 16), source, generator(), 0.0, textured_anomaly)
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="texture"):
            training_sample(torch.ones(3, 16, 16), Noise((0,)), generator(), 0.0, textured_anomaly)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert source.threads == {1}
