"""The memory of normal patches against scipy's distances and scikit-learn's components."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from tiny_network import build, good_images, good_samples
from torch import Tensor
from torch.nn import functional

from almrr_ref import features as features_module
from almrr_ref.calibration.good_features import complete_memory, fit_features
from almrr_ref.calibration.good_scores import left_out
from almrr_ref.data.split import Good
from almrr_ref.plus import memory as memory_module
from almrr_ref.plus.memory import COMPONENTS, NormalMemory, block_means


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stages(b: int = 2) -> list[Tensor]:
    return [noise(b, c, n, n, seed=n) for c, n in ((3, 8), (4, 4), (5, 2))]


def filled(pool: Tensor, count: int, part_ids: list[int]) -> NormalMemory:
    """A memory of patches (images, m, 9) whose components are the channels themselves."""
    memory = NormalMemory((3, 4, 5), count, grid=(4, 4), size=(8, 8))
    memory.axes.copy_(torch.eye(9))
    memory.fit(pool, torch.tensor(part_ids))
    return memory


@pytest.mark.parametrize("chunk", [memory_module.CHUNK, 3])
def test_the_distance_is_that_to_the_nearest_stored_patch_of_another_part(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "CHUNK", chunk)
    pool, queries = noise(3, 10, 9, seed=6), noise(2, 4, 9)
    memory = filled(pool, 30, [4, 7, 5])  # stores all of them, in another order
    of_others = memory.log_distance(queries, torch.tensor([5, 4]))
    of_all = memory.log_distance(queries)
    for image, others in ((0, pool[:2]), (1, pool[1:])):
        for distance, stored in ((of_others, others), (of_all, pool)):
            expected = cdist(queries[image].double(), stored.flatten(0, 1).double(), "sqeuclidean").min(axis=1)
            np.testing.assert_allclose(distance[image].numpy(), np.log(expected), atol=1e-4)
    assert float(memory.log_distance(pool, torch.tensor([4, 7, 5])).min()) > float(memory.log_distance(pool).max())
    single = filled(pool[:1], 6, [0])
    with_own = single.log_distance(queries, torch.tensor([0, 0]))
    torch.testing.assert_close(with_own, single.log_distance(queries), msg="one part alone is compared with itself")


def test_the_farthest_places_are_compared_with_every_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four places that one block mean stands for; the mean leaves it without its nearest patch."""
    monkeypatch.setattr(memory_module, "SHORTLIST", ((2, 1),))
    memory = NormalMemory((3, 4, 5), 2, grid=(2, 2), size=(2, 2))
    points = torch.zeros(1, 4, 9)
    points[0, 3, 0] = 9
    memory.patches[0, 0] = 8
    assert memory.shortlist(points, *memory._stored())[0].equal(memory.patches[None, 1:])
    assert memory._search(points, *memory._stored())[0, 3] == 0


def test_the_distance_of_a_place_that_is_stored_is_not_what_rounding_leaves_of_it() -> None:
    """That differs between plain and folded network and onnxruntime by any factor, and its log by several units."""
    pool, points = 30 * noise(3, 10, 9, seed=6), 30 * noise(1, 16, 9)
    points[0, :10] = pool[1]
    memory = filled(pool, 30, [0, 1, 2])
    expected = (1e-6 * pool[1].square().sum(dim=1)).log()
    torch.testing.assert_close(memory.log_distance(points)[0, :10], expected)
    assert float(memory.log_distance(points)[0, 10:].min()) > float(expected.max())


def test_patches_that_do_not_count_leave_the_shortlist_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SHORTLIST", ((2, 3),))
    memory = NormalMemory((3, 4, 5), 8, grid=(2, 2), size=(2, 2))
    memory.patches[5:, 0] = torch.tensor([2.0, 3.0, 4.0])
    memory.patch_parts[:5] = 1  # as many at the places themselves as the shortlist holds, and more
    found = memory.log_distance(torch.zeros(1, 4, 9), torch.tensor([1]))
    torch.testing.assert_close(found, torch.full((1, 4), 4.0).log())


def test_where_there_are_too_few_patches_copies_fill_the_memory_but_crowd_none_out_of_the_shortlist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "SHORTLIST", ((4, 30),))
    pool, queries = noise(3, 10, 9, seed=6), noise(2, 16, 9)
    memory = filled(pool, 300, [4, 7, 5])
    expected = [cdist(image.double(), pool.flatten(0, 1).double(), "sqeuclidean").min(axis=1) for image in queries]
    np.testing.assert_allclose(memory.log_distance(queries).numpy(), np.log(expected), atol=1e-4)
    assert memory.patch_parts.unique(return_counts=True)[1].tolist() == [270, 10, 10, 10]
    model: Any = SimpleNamespace(memory=memory)
    assert len(left_out(model, Good("", 4, 0, True), {4: 0, 5: 0, 7: 0})) == 1, "none remains"


@pytest.mark.parametrize("whole", [False, True], ids=["image by image", "as a GPU takes them"])
def test_the_shortlist_holds_the_nearest_patches_of_near_and_far_blocks(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places side by side are alike; a corner is far from every patch, and its nearest must not be crowded out."""
    monkeypatch.setattr(memory_module, "SHORTLIST", ((4, 120), (2, 80)))
    monkeypatch.setattr(memory_module, "LEADING", 6)
    monkeypatch.setattr(features_module, "exporting", lambda: whole)
    memory = NormalMemory((3, 4, 5), 400, grid=(8, 8), size=(8, 8))
    places = functional.interpolate(noise(2, 9, 2, 2), (8, 8), mode="bilinear").flatten(2).mT
    memory.patches.copy_(torch.cat([places.flatten(0, 1), 2 * noise(272, 9, seed=1)]) + 0.1 * noise(400, 9, seed=2))
    places.unflatten(1, (8, 8))[:, :4, :4] += 5 * noise(9, seed=3)
    for tensor in (memory.patches, places):  # as principal components are: the last vary most
        tensor *= torch.tensor([0.1, 0.1, 0.1, 1, 1, 1, 1, 1, 1])
    monkeypatch.setattr(memory, "points", lambda stages: stages[0])
    monkeypatch.setattr(memory, "relative_map", lambda log_distance: log_distance)
    mask = torch.arange(400) % 4 == 0
    memory.patch_parts.copy_(mask)
    found = [*memory.excluding([places], [mask & ~mask, mask]), memory([places])]
    found.append(memory([places], torch.ones(2)))
    stored_for = (memory.patches, memory.patches[~mask], memory.patches, memory.patches[~mask])
    for maps, stored in zip(found, stored_for, strict=True):
        for image, points in zip(maps, places):
            expected = cdist(points.double(), stored.double(), "sqeuclidean").min(axis=1)
            np.testing.assert_allclose(image.numpy(), np.log(expected), atol=1e-3)


def test_the_patches_are_3x3_means_of_all_compressed_stages_but_the_first() -> None:
    fine, coarse = (torch.copysign(torch.log(1 + stage.abs()), stage) for stage in stages()[1:])
    memory = NormalMemory((3, 4, 5), 2, grid=(4, 4), size=(8, 8))
    patches = memory.neighbourhoods(stages())[1].unflatten(0, (4, 4))  # of the second image
    torch.testing.assert_close(patches[1, 2, :4], fine[1, :, 0:3, 1:4].mean(dim=(1, 2)))
    torch.testing.assert_close(patches[0, 0, :4], fine[1, :, :2, :2].mean(dim=(1, 2)))  # over the cells inside
    torch.testing.assert_close(patches[1, 2, 4:], coarse[1].mean(dim=(1, 2)))  # 2x2: every neighbourhood is the whole


def test_the_components_are_those_of_scikit_learn() -> None:
    memory = NormalMemory((8, 60, 93), 4, grid=(8, 8), size=(8, 8)).double()
    mixing = [noise(c, c, seed=c).double() for c in (60, 93)]
    batches = []
    for b in (3, 5):
        drawn = [noise(b, c, n, n, seed=b).double() for c, n in ((60, 8), (93, 4))]
        mixed = [torch.einsum("dc,bchw->bdhw", m, stage) + 1 for m, stage in zip(mixing, drawn)]
        batches.append([torch.zeros(b, 8, 16, 16), *mixed])
    memory.fit_axes(batches)
    patches = torch.cat([memory.neighbourhoods(batch).flatten(0, 1) for batch in batches]).numpy()
    oracle = PCA(COMPONENTS, svd_solver="full").fit(patches)
    np.testing.assert_allclose(memory.centre.numpy(), oracle.mean_, atol=1e-12)
    along = np.abs((memory.axes.numpy().T * oracle.components_[::-1]).sum(axis=1))  # axes have no sign
    np.testing.assert_allclose(along, 1, atol=1e-9)
    points = memory.points(batches[0])[0].numpy()
    np.testing.assert_allclose(pdist(points), pdist(oracle.transform(patches[:64])), rtol=1e-9)


def test_a_completed_memory_knows_the_images_kept_aside_and_measures_as_before() -> None:
    """Enough room for all patches, so every place that was good finds itself; what distances count in stays."""
    images = good_images(5)
    samples, held_out = good_samples(images[:3], batch_size=2), images[3:]
    model = build(frm_input="memory", standardise="channel", memory=5 * 8**2)
    fit_features(model, samples)
    memory = model.memory
    assert memory is not None
    before = {name: value.clone() for name, value in memory.named_buffers()}

    def distances(good: Tensor) -> Tensor:
        return memory.log_distance(memory.points(model.stages(good / 255)))

    far, near = distances(held_out), distances(images[:3])
    complete_memory(model, held_out[:0], samples, torch.arange(3))
    assert all(torch.equal(value, before[name]) for name, value in memory.named_buffers()), "nothing was kept aside"
    complete_memory(model, held_out, samples, torch.tensor([4, 0, 2, 1, 3]))
    assert float(far.min()) > float(near.max()), "else they were known before"
    assert float(distances(images).max()) < float(far.min()) - 5, "all five are known now"
    assert all(torch.equal(getattr(memory, name), before[name]) for name in ("centre", "axes", "middle"))
    assert set(memory.patch_parts.tolist()) == {0, 1, 2, 3, 4}


def test_patches_and_axes_are_those_of_the_cells_that_are_learned_from() -> None:
    cells = torch.zeros(16, dtype=torch.bool)
    cells[4:7] = True
    part, whole = (NormalMemory((3, 4, 5), 2, (4, 4), (8, 8), chosen) for chosen in (cells, None))
    for memory in (part, whole):
        memory.fit_axes([stages(9)])
    torch.testing.assert_close(part.centre, part.neighbourhoods(stages(9))[:, cells].flatten(0, 1).mean(dim=0))
    assert not part.axes.abs().allclose(whole.axes.abs(), atol=1e-2)
    drawn = part.draw(stages(), 10, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3, 9)
    assert {tuple(patch) for patch in drawn[0].tolist()} == {tuple(p) for p in part.points(stages())[0, cells].tolist()}


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_block_means_are_those_of_the_places_inside(grid: tuple[int, int]) -> None:
    points = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    image = points.view(2, *grid, 3)
    expected = [
        image[:, y : y + 4, x : x + 4].mean(dim=(1, 2)) for y in range(0, grid[0], 4) for x in range(0, grid[1], 4)
    ]
    torch.testing.assert_close(block_means(points, grid, 4), torch.stack(expected, dim=1), rtol=1e-5, atol=1e-6)
