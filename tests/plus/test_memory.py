"""The memory of normal patches against scipy's distances; its greedy selection: test_bench_peers.py."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from test_model import TINY, good_samples

from almrr_ref.calibrate import complete_memory, fit_features
from almrr_ref.model import ALMRR
from almrr_ref.plus.memory import COMPONENTS, NormalMemory

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


def filled(pool: torch.Tensor, count: int) -> NormalMemory:
    """A memory of 9 channels whose components are the channels themselves."""
    memory = NormalMemory((3, 4, 5), count, grid=4)
    memory.axes.copy_(torch.eye(9))
    memory.fit(pool[None], torch.zeros(1))
    return memory


def stages(b: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, c, n, n, generator=generator) for c, n in ((3, 8), (4, 4), (5, 2))]


def test_the_distance_is_that_to_the_nearest_stored_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = filled(torch.randn(50, 9, generator=generator), 7)
    stored, queries = memory.patches.double().numpy(), torch.randn(2, 6, 9, generator=generator)
    expected = np.log(cdist(queries.flatten(0, 1).double().numpy(), stored, "sqeuclidean").min(axis=1)).reshape(2, 6)
    np.testing.assert_allclose(memory.log_distance(queries).numpy(), expected, atol=1e-4)


def compressed(values: torch.Tensor) -> torch.Tensor:
    return torch.copysign(torch.log(1 + values.abs()), values)


def test_the_patches_are_3x3_means_of_all_compressed_stages_but_the_first() -> None:
    fine, coarse = (compressed(stage) for stage in stages()[1:])
    memory = NormalMemory((3, 4, 5), 2, grid=4)
    patches = memory.describe(stages())[1].unflatten(0, (4, 4))  # of the second image
    torch.testing.assert_close(patches[1, 2, :4], fine[1, :, 0:3, 1:4].mean(dim=(1, 2)))
    torch.testing.assert_close(patches[0, 0, :4], fine[1, :, :2, :2].mean(dim=(1, 2)))  # over the cells inside
    torch.testing.assert_close(patches[1, 2, 4:], coarse[1].mean(dim=(1, 2)))  # 2x2: every neighbourhood is the whole


def test_the_components_are_those_of_scikit_learn() -> None:
    memory = NormalMemory((8, 60, 93), 4, grid=8).double()
    generator = torch.Generator().manual_seed(3)
    mixing = [torch.randn(c, c, generator=generator) for c in (60, 93)]
    batches = []
    for b in (3, 5):
        drawn = [torch.randn(b, c, n, n, generator=generator).double() for c, n in ((60, 8), (93, 4))]
        mixed = [torch.einsum("dc,bchw->bdhw", m.double(), stage) + 1 for m, stage in zip(mixing, drawn)]
        batches.append([torch.zeros(b, 8, 16, 16), *mixed])
    memory.fit_axes(batches)
    patches = torch.cat([memory.describe(stages).flatten(0, 1) for stages in batches]).numpy()
    oracle = PCA(COMPONENTS, svd_solver="full").fit(patches)
    np.testing.assert_allclose(memory.centre.numpy(), oracle.mean_, atol=1e-12)
    along = np.abs((memory.axes.numpy().T * oracle.components_[::-1]).sum(axis=1))  # axes have no sign
    np.testing.assert_allclose(along, 1, atol=1e-9)
    points = memory.points(batches[0])[0].numpy()
    np.testing.assert_allclose(pdist(points), pdist(oracle.transform(patches[:64])), rtol=1e-9)


def test_few_channels_keep_all_their_distances() -> None:
    memory = NormalMemory((3, 4, 5), 4, grid=4)
    memory.fit_axes([stages(8)])
    assert memory.patches.shape == (4, 9)
    points, patches = memory.points(stages())[0], memory.describe(stages())[0]
    torch.testing.assert_close(torch.pdist(points), torch.pdist(patches), atol=1e-5, rtol=1e-4)


def test_zero_is_the_middle_of_the_good_images() -> None:
    pool = torch.randn(400, 9, generator=torch.Generator().manual_seed(2))
    memory = filled(pool, 10)
    assert abs(float((memory.log_distance(pool[None]) - memory.middle).median())) < 1e-5
    assert memory(stages()).shape == (2, 1, 4, 4)


def test_fewer_patches_than_places_are_repeated() -> None:
    memory = filled(torch.eye(9)[:3], 8)
    assert len(torch.unique(memory.patches, dim=0)) == 3
    assert float(memory.log_distance(torch.eye(9)[None, 1:2])) == pytest.approx(np.log(1e-6))


def test_rare_patches_are_stored_and_progress_is_told() -> None:
    generator = torch.Generator().manual_seed(5)
    usual, rare = torch.randn(300, 9, generator=generator), 40 * torch.eye(9)
    told: list[tuple[int, int]] = []
    memory = NormalMemory((3, 4, 5), 10, grid=4)
    memory.fit(torch.cat([usual, rare])[None], torch.zeros(1), lambda done, total: told.append((done, total)))
    assert float(memory.log_distance(rare[None]).max()) < np.log(1)
    assert told[0] == (0, 10)
    assert told[-1] == (10, 10)


def test_drawing_takes_different_patches_of_every_image() -> None:
    memory = NormalMemory((3, 4, 5), 2, grid=4)
    memory.fit_axes([stages(3)])
    drawn = memory.draw(stages(3), 6, torch.Generator().manual_seed(4))
    assert drawn.shape == (3, 6, 9)
    assert len(torch.unique(drawn.flatten(0, 1), dim=0)) == 18


def test_more_patches_than_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    memory, queries = filled(torch.randn(50, 9, generator=generator), 7), torch.randn(2, 3, 9, generator=generator)
    whole = memory.log_distance(queries)
    monkeypatch.setattr("almrr_ref.plus.memory.PART", 3)
    torch.testing.assert_close(memory.log_distance(queries), whole)


def test_patches_of_the_own_image_do_not_count() -> None:
    generator = torch.Generator().manual_seed(6)
    pool, queries = torch.randn(3, 10, 9, generator=generator), torch.randn(2, 4, 9, generator=generator)
    memory = NormalMemory((3, 4, 5), 30, grid=4)
    memory.fit(pool, torch.tensor([4, 7, 5]))  # stores all of them, in another order
    found = memory.log_distance(queries, own=torch.tensor([5, 4]))
    for image, others in ((0, pool[:2]), (1, pool[1:])):
        expected = cdist(queries[image].numpy(), others.flatten(0, 1).numpy(), "sqeuclidean").min(axis=1)
        np.testing.assert_allclose(found[image].numpy(), np.log(expected), atol=1e-4)
    assert float(memory.log_distance(pool, own=torch.tensor([4, 7, 5])).min()) > float(memory.log_distance(pool).max())


def test_a_single_image_is_compared_with_itself() -> None:
    memory = filled(torch.randn(6, 9, generator=torch.Generator().manual_seed(7)), 6)
    queries = torch.zeros(1, 2, 9)
    torch.testing.assert_close(memory.log_distance(queries, own=torch.tensor([0])), memory.log_distance(queries))


def test_the_memory_of_a_network_holds_and_sees_standardised_stages() -> None:
    model = ALMRR(dataclasses.replace(TINY, standardise="position", memory=20)).eval()
    images = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fit_features(model, good_samples(images, batch_size=4))
    good = images.float() / 255
    assert model.memory is not None
    statistics = zip(model.statistics(model.feature_mean), model.statistics(model.feature_std))
    expected = [(s - mean) / std for s, (mean, std) in zip(model.extractor.stages(good), statistics)]
    described = model.memory.points(expected).flatten(0, 1)
    stored = torch.cdist(model.memory.patches, described).amin(dim=1)
    assert float(stored.max()) < 0.01 * float(torch.pdist(described).mean())
    for network in (model, model.fuse()):
        seen: list[list[torch.Tensor]] = []
        assert network.memory is not None
        network.memory.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        network.predict(good)
        torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=1e-3)


def test_a_completed_memory_knows_the_images_kept_aside_and_measures_as_before() -> None:
    """Enough room for all patches, so every place that was good finds itself; what distances count in stays."""
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples, held_out = good_samples(images[:3], batch_size=2), images[3:]
    model = ALMRR(dataclasses.replace(TINY, standardise="channel", memory=5 * 8**2)).eval()
    fit_features(model, samples)
    memory = model.memory
    assert memory is not None
    memory.middle.fill_(1.5)
    before = {name: value.clone() for name, value in memory.named_buffers()}

    def distances(good: torch.Tensor) -> torch.Tensor:
        return memory.log_distance(memory.points(model.standardised(model.extractor.stages(good.float() / 255))))

    far, near = distances(held_out), distances(images[:3])
    complete_memory(model, held_out, samples)
    assert float(far.min()) > float(near.max()), "else they were known before"
    assert float(distances(images).max()) < float(far.min()) - 5, "all five are known now"
    for name in ("centre", "axes", "middle"):
        assert torch.equal(getattr(memory, name), before[name])
    assert set(memory.source.tolist()) == {0, 1, 2, 3, 4}


def test_without_images_kept_aside_the_memory_stays_as_it_is() -> None:
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = ALMRR(dataclasses.replace(TINY, standardise="channel", memory=30)).eval()
    fit_features(model, good_samples(images))
    assert model.memory is not None
    before = model.memory.patches.clone()
    complete_memory(model, images[:0], good_samples(images))
    assert torch.equal(model.memory.patches, before)
