"""How the kinds of evidence are weighed against each other."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_network import TINY

from almrr_ref.plus.evidence import BORDER, LEAST_STD, MOST_DEVIATIONS, TAKEN_OFF, Evidence, image_peaks, rings_of

GRID = TINY.feature_size
WEIGHTS = {"distance_weight": 0.5, "memory_weight": 2.0}


def evidence(**changes: object) -> Evidence:
    return Evidence(dataclasses.replace(TINY, **{**WEIGHTS, **changes}))  # type: ignore[arg-type]


def test_unbalanced_evidence_is_the_weighted_mean_and_a_weight_of_0_leaves_a_kind_out() -> None:
    kinds = torch.tensor([8.0, -2.0, 4.0])[None, :, None, None].expand(1, 3, *GRID)
    expected = torch.full((1, 1, *GRID), (8 - 0.5 * 2 + 2 * 4) / 3.5)
    torch.testing.assert_close(evidence(balance=False)(kinds), expected)
    logits, errors, nearest = torch.zeros(1, 2, *GRID), torch.ones(1, 3, *GRID), torch.full((1, 1, *GRID), 7.0)
    without_distance = evidence(distance_weight=0.0)
    torch.testing.assert_close(without_distance.kinds(logits, errors, nearest)[0, :, 0, 0], torch.tensor([0.0, 7.0]))
    assert without_distance.weights.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_balanced_evidence_counts_in_deviations_of_the_peaks() -> None:
    """Whatever unit a kind has, it says the same: peaks of good images have mean 0 and deviation 1 in each."""
    peaks = np.random.default_rng(0).normal(size=(40, 3)) * (0.3, 5, 40) + (1, -7, 300)
    balanced = evidence()
    balanced.fit(torch.from_numpy(peaks).float(), torch.zeros(40, 3))
    kinds = np.random.default_rng(1).normal(size=(2, 3, *GRID)) * 10
    scaled = (kinds - peaks.mean(axis=0)[:, None, None]) / peaks.std(axis=0)[:, None, None]
    expected = np.average(scaled, axis=1, weights=[1, 0.5, 2])[:, None]
    np.testing.assert_allclose(balanced(torch.from_numpy(kinds).float()).numpy(), expected, rtol=1e-4, atol=1e-4)
    balanced.fit(torch.ones(1, 3), torch.zeros(1, 3))
    assert balanced.std.tolist() == pytest.approx([LEAST_STD] * 3), "equal peaks would drown the other kinds"


def test_an_image_higher_in_all_its_cells_is_brought_down_as_far_as_good_images_differ() -> None:
    """Of two good images alike but for their distance, the higher is no more suspect; quiet or strange ones stay so."""
    rng = np.random.default_rng(0)
    good = rng.normal(size=(41, 3, *GRID)) * 0.1 + np.linspace(-2, 2, 41)[:, None, None, None]
    kinds, levelled = torch.from_numpy(good).float(), evidence()
    levelled.fit(torch.zeros(41, 3), levelled.image_levels(kinds))
    quietest = np.sort(good.reshape(41, 3, -1), axis=2)[:, :, : GRID[0] * GRID[1] // 4].mean(axis=2)
    middle, width = quietest.mean(), quietest.std(axis=0).mean()

    def mean(heights: torch.Tensor) -> float:
        return LEAST_STD * float(levelled(heights[None, :, None, None].expand(1, 3, *GRID)).mean())

    most = MOST_DEVIATIONS * width
    for height in (-50.0, -1.0, 0.0, 1.5, 50.0):  # the U-Net's own stay; the others weigh 2.5 of 3.5
        taken = TAKEN_OFF * min(max(0, height - middle), most)
        assert mean(torch.full((3,), height)) == pytest.approx(height - 2.5 / 3.5 * taken, abs=0.02)
        assert mean(torch.tensor([height, middle, middle])) == pytest.approx((height + 2.5 * middle) / 3.5, abs=0.02)
    levelled.weigh(memory_alone=True)
    levelled.fit(torch.zeros(41, 3), levelled.image_levels(kinds))
    apart = levelled(torch.full((1, 3, *GRID), 1.5)) - levelled(torch.zeros(1, 3, *GRID))
    assert LEAST_STD * float(apart.mean()) == pytest.approx(1.5), "the memory alone keeps its level"


def test_a_checkpoint_of_an_earlier_version_is_not_levelled() -> None:
    generator = torch.Generator().manual_seed(0)
    new, older, kinds = evidence(), evidence(), 5 + 5 * torch.randn(2, 3, *GRID, generator=generator)
    new.fit(torch.zeros(3, 3), torch.randn(3, 3, generator=generator) - 5)
    older.load_state_dict({name: value for name, value in new.state_dict().items() if name != "level"})
    torch.testing.assert_close(older(kinds), (kinds / LEAST_STD * older.weights[:, None, None]).sum(1, keepdim=True))
    assert not older(kinds).allclose(new(kinds))


def test_logits_are_subtracted_in_32_bits() -> None:
    logits = torch.tensor([0.00390625, 1.0078125])[None, :, None, None].expand(1, 2, *GRID).bfloat16()
    kinds = evidence().kinds(logits, torch.ones(1, 3, *GRID), torch.zeros(1, 1, *GRID))
    assert kinds[0, 0, 0, 0] == 1.00390625


def test_a_peak_is_the_mean_of_the_highest_half_percent() -> None:
    kinds = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    expected = np.sort(kinds.flatten(2).numpy(), axis=2)[:, :, -4:].mean(axis=2)  # 0.5% of 900, rounded to even
    np.testing.assert_allclose(image_peaks(kinds).numpy(), expected, rtol=1e-6)
    assert image_peaks(kinds[:, :, :3, :3]).equal(kinds[:, :, :3, :3].amax((2, 3)))
    roi = torch.zeros(120, 120, dtype=torch.bool)
    roi[:17, 3:12] = True  # cells of 4 x 4 pixels that a region touches
    assert image_peaks(kinds, roi).equal(kinds[:, :, :5, :3].amax((2, 3)))


def test_the_border_is_brought_to_what_good_images_show_inside() -> None:
    """A kind whose two outermost rings lie higher and spread more, as padding makes them; the others are alike."""
    wide = evidence(image_size=128)
    rng = np.random.default_rng(0)
    good = rng.normal(size=(12, 3, 32, 32))
    padded = np.ones((32, 32), dtype=bool)
    padded[2:-2, 2:-2] = False
    good[:, 1, padded] = 5 + 2 * good[:, 1, padded]
    images = [torch.from_numpy(batch).float() for batch in np.split(good, 4)]
    wide.fit_border(images)
    level = wide.border_evened(torch.cat(images)).numpy()
    assert abs(level[:, 1, padded].mean() - level[:, 1, ~padded].mean()) < 0.05
    assert abs(level[:, 1, padded].std() - level[:, 1, ~padded].std()) < 0.1
    np.testing.assert_array_equal(level[:, :, 4:-4, 4:-4], good[:, :, 4:-4, 4:-4].astype(np.float32))
    before, after = (float((kinds[:, 1].reshape(12, -1).argmax(1)[:, None] == np.flatnonzero(padded)).any(1).mean())
                     for kinds in (good, level))  # fmt: skip
    assert before == 1.0
    assert after < 0.6
    stored = evidence(image_size=128)
    stored.load_state_dict(wide.state_dict())
    torch.testing.assert_close(stored(images[0]), wide(images[0]))


def test_the_edge_of_a_region_is_a_border_and_outside_of_it_nothing_is_measured() -> None:
    roi = torch.zeros(64, 96, dtype=torch.bool)
    roi[:, 32:] = True
    region, whole = rings_of((16, 24), roi), rings_of((16, 24))
    rows, columns = np.ogrid[:16, :24]
    edges = np.broadcast_arrays(rows, 15 - rows, columns, 23 - columns)
    np.testing.assert_array_equal(whole.numpy(), np.minimum.reduce(edges).clip(max=BORDER))
    assert region[:, 8:].equal(rings_of((16, 16)))
    assert (region[:, :8] == BORDER + 1).all()
    config = dataclasses.replace(TINY, image_size=(64, 96))
    part, cut = Evidence(config, roi), evidence(image_size=(64, 64))
    kinds = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    part.fit_border([kinds * torch.where(torch.arange(24) < 8, 100.0, 1.0)])
    cut.fit_border([kinds[:, :, :, 8:]])
    torch.testing.assert_close(part.border_scale, cut.border_scale)
    torch.testing.assert_close(part.border_shift, cut.border_shift)
    assert part.border_evened(kinds)[:, :, :, :8].equal(kinds[:, :, :, :8])
    quietest = np.sort(kinds[:, :, :, 8:].flatten(2).numpy(), axis=2)[:, :, :64]
    np.testing.assert_allclose(part.image_levels(kinds).numpy(), quietest.mean(axis=2), rtol=1e-5)
