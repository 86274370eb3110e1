"""The simulated anomalies beyond the paper's: what they change, where, and how they are drawn."""

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from almrr_ref.plus import varied


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGE = ((80 + 60 * torch.rand(1, 64, 64, generator=generator(0))) / 255).expand(3, -1, -1).contiguous()


class White:
    """A texture of ones, which counts how often it is drawn."""

    draws = 0

    def sample(self, generator: torch.Generator) -> Tensor:
        self.draws += 1
        return torch.ones(3, 64, 64)


def test_the_mask_is_never_empty_and_nothing_changes_far_from_it() -> None:
    for seed in range(60):
        augmented, mask = varied.varied_anomaly(IMAGE, White(), generator(seed))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()
        assert float(augmented.min()) >= 0
        assert float(augmented.max()) <= 1
        changed = (augmented - IMAGE).abs().amax(dim=0) > 0
        assert changed[mask[0] > 0].float().mean() > 0.95
        visible = (augmented - IMAGE).abs().mean(dim=0) > 0.1
        far = ndimage.distance_transform_edt(mask[0].numpy() == 0) > 12  # a soft border is not longer
        assert not visible[torch.from_numpy(far)].any()


def test_half_of_the_anomalies_are_the_papers() -> None:
    """A texture of ones shows in all of the paper's anomalies and in a quarter of the others: 0.5 + 0.5 / 4."""
    source = White()
    for seed in range(300):
        varied.varied_anomaly(IMAGE, source, generator(seed))
    assert 0.55 < source.draws / 300 < 0.72


def test_the_generator_alone_decides_what_is_drawn() -> None:
    state = torch.get_rng_state()
    first, again, other = (varied.varied_anomaly(IMAGE, White(), generator(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_lines_are_thin() -> None:
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
