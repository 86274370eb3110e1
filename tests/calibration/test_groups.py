"""Near-identical images are found to be one part; images of one texture are not."""

import pytest
import torch
from tiny_network import build

from almrr_ref.calibration import groups
from almrr_ref.calibration.groups import find_groups

SHOTS = 3


def test_shots_of_one_part_are_grouped_and_single_images_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has marks of its own; a shot adds light and noise."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(12, 1, 3, 8, 8, generator=generator).expand(-1, SHOTS, -1, -1, -1).flatten(0, 1)
    parts = torch.nn.functional.interpolate(marks, (96, 96), mode="bilinear")
    light = 0.97 + 0.03 * torch.rand(len(parts), 1, 1, 1, generator=generator)
    shots = (parts * light + 0.02 * torch.rand(parts.shape, generator=generator)).clamp(0, 1)
    model = build()
    assert find_groups(model, list(shots)) == [i // SHOTS for i in range(12 * SHOTS)]
    alone, *others = find_groups(model, [b"not a picture", *shots])
    assert others == [i // SHOTS for i in range(12 * SHOTS)]
    assert alone not in others
    single = torch.rand(40, 3, 96, 96, generator=generator)
    assert find_groups(model, list(single)) == list(range(40))
    assert find_groups(model, list(shots[:6])) == list(range(6)), "too few to tell"
    monkeypatch.setattr(groups, "MOST", 30)
    assert find_groups(model, list(shots)) == list(range(36)), "too many to compare"
