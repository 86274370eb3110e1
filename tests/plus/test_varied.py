"""The simulated anomalies beyond the paper's: what they change, where, and how they are drawn."""

import torch
from scipy import ndimage
from torch import Tensor

from almrr_ref.plus import varied


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class White:
    """A texture of ones, which counts how often it is drawn."""

    draws = 0

    def sample(self, generator: torch.Generator) -> Tensor:
        self.draws += 1
        return torch.ones(3, 64, 64)


def test_half_are_the_papers_and_none_is_empty_or_changes_anything_far_from_its_mask() -> None:
    """A texture of ones shows in all of the paper's anomalies and in a quarter of the others: 0.5 + 0.5 / 4."""
    image, source = ((80 + 60 * torch.rand(1, 64, 64, generator=generator(0))) / 255).expand(3, -1, -1), White()
    for seed in range(300):
        augmented, mask = varied.varied_anomaly(image, source, generator(seed))
        assert mask.any()
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert 0 <= float(augmented.min()) <= float(augmented.max()) <= 1
        assert ((augmented - image).abs().amax(dim=0) > 0)[mask[0] > 0].float().mean() > 0.95
        far = ndimage.distance_transform_edt(mask[0].numpy() == 0) > 12  # a soft border is not longer
        visible = (augmented - image).abs().mean(dim=0)[torch.from_numpy(far)] > 0.1
        assert visible.sum() < 128  # a second blob of a soft region may stay faint and unmasked
    assert 0.55 < source.draws / 300 < 0.72


def test_lines_are_thin() -> None:
    for seed in range(30):
        line = varied.draw_line((128, 128), generator(seed))[0] > 0.5
        assert line.sum() >= 8
        inside = ndimage.distance_transform_edt(line.numpy())
        assert ndimage.median(inside[line.numpy()]) <= 3


def test_softening_keeps_the_peak_and_spreads_the_border() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:44, 20:44] = 1
    soft = varied.soften(mask, 3)[0, 32]
    assert float(soft.max()) > 0.999
    assert 0 == float(soft[60]) < float(soft[46]) < float(soft[42]) < 1
    square = mask = (torch.rand(1, 24, 40, generator=generator(1)) > 0.8).float()
    for _ in range(3):
        square = torch.nn.functional.avg_pool2d(square, 7, 1, 3, count_include_pad=False)
    torch.testing.assert_close(varied.soften(mask, 3), square / square.max())
