"""What all forms of the network share: the image score out of the map, and predict."""

import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_network import TINY, build_random
from torch import Tensor, nn

from almrr_ref import Detector
from almrr_ref.deploy.cuda_graph import CudaGraph, predict_unchecked
from almrr_ref.deploy.predictor import Predictor


@pytest.mark.parametrize("shape", [(64, 64), (90, 130), (27, 27)])
@pytest.mark.parametrize("changes", [{}, {"score_fraction": 0.005, "score_kernel": 1}, {"score_fraction": 0.005}])
def test_the_score_is_the_mean_of_the_highest_smoothed_pixels(changes: dict[str, Any], shape: tuple[int, int]) -> None:
    """The definition, with scipy's mean filter."""
    config = dataclasses.replace(TINY, **changes)
    highest = (
        round(config.score_fraction * 64**2) or 1
    )  # also of a tiled image, which is larger: as many as of one tile
    maps = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    count = ndimage.uniform_filter(np.ones(shape), config.score_kernel, mode="constant")
    for score, values in zip(Predictor(config).image_scores(maps).tolist(), maps[:, 0].double().numpy()):
        means = ndimage.uniform_filter(values, config.score_kernel, mode="constant") / count
        assert score == pytest.approx(np.sort(means.ravel())[-highest:].mean(), rel=1e-5)


class Brightness(Predictor):
    """A form of the network whose map is the image's brightness."""

    def maps(self, images: Tensor) -> Tensor:
        assert not self.training
        self.check_size(images)
        return images.mean(dim=1, keepdim=True)


def test_predict_resizes_with_antialiasing_keeps_the_mode_and_refuses_what_is_no_image() -> None:
    model, striped = Brightness(TINY).train(), torch.zeros(2, 3, 128, 192)
    striped[:, :, :, ::3] = 1
    maps, scores = model.predict(striped)
    assert maps.shape == (2, 1, 64, 64)
    torch.testing.assert_close(maps[:, :, :, 2:-2], torch.full((2, 1, 64, 60), 1 / 3), atol=0.05, rtol=0)
    assert torch.equal(scores, model.image_scores(maps))
    assert model.training
    for wrong in (torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images must be a floating"):
            model.predict(wrong)


def test_half_levels_go_where_a_detector_sends_them() -> None:
    """As in the mean of two frames of 8 bits that differ by one level."""
    values = (torch.arange(255) + 0.5) / 255
    model = Brightness(TINY).eval()
    images = values.repeat(17)[: 64 * 64].view(1, 1, 64, 64).expand(1, 3, 64, 64)
    assert torch.equal(model.predict(images)[0][0], Detector(model)(images[0]).network_map)


def test_a_prediction_can_be_learned_from_and_changed_in_place() -> None:
    """Tensors of PyTorch's inference mode can be neither."""
    model, wanted = Brightness(TINY).eval(), torch.rand(1, 3, 64, 64, requires_grad=True)
    maps, scores = model.predict(torch.rand(1, 3, 64, 64))
    result = Detector(model)(torch.rand(3, 64, 64))
    for given in (maps, result.network_map[None], scores):
        (wanted.mean(dim=1, keepdim=True) * given).sum().backward()
        given.mul_(255)
    result.mask.logical_not_()


def test_what_was_in_evaluation_mode_stays_so_also_after_a_failure() -> None:
    model = Brightness(TINY)
    model.frozen = nn.BatchNorm2d(3).eval()
    for size in (64, 32):
        with contextlib.suppress(ValueError):
            model.pixel_maps(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        assert (model.training, model.frozen.training) == (True, False)


def test_a_detector_computes_in_full_precision_whatever_surrounds_it() -> None:
    model, picture = build_random(frm_input="memory").fuse(), torch.rand(3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        amid = Detector(model)(picture)
    assert torch.equal(amid.network_map, Detector(model)(picture).network_map)


def test_what_a_cuda_graph_holds_is_predict_between_the_levels_and_just_outside_the_range() -> None:
    model, images = Brightness(TINY).eval(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([-9e-4, 1 + 9e-4])
    *predicted, extrema = predict_unchecked(model, images)
    assert all(torch.equal(one, other) for one, other in zip(predicted, model.predict(images), strict=True))
    assert torch.equal(extrema, torch.stack([images.min(), images.max()]))


def test_a_bright_image_in_16_bits_has_a_score() -> None:
    """The sum of its values is beyond them."""
    _, scores = build_random(frm_input="none", image_size=256).fuse(torch.float16)(torch.rand(1, 3, 256, 256).half())
    assert not scores.isnan().any()


def test_threads_that_replay_one_graph_get_results_of_their_own() -> None:
    """With a CPU's function in the graph's place."""
    graph = CudaGraph.__new__(CudaGraph)
    nn.Module.__init__(graph)
    graph.lock, graph.images, graph.recorded = threading.Lock(), torch.zeros(1, 3, 64, 64), (torch.zeros(1),)

    class Graph:
        def replay(self) -> None:
            graph.recorded[0].copy_(graph.images.mean()[None])

    graph.graph = Graph()  # type: ignore[assignment]
    means = [value / 8 for value in range(8)] * 50
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda value: float(graph._replay(torch.full((1, 3, 64, 64), value))[0]), means)
        assert list(found) == pytest.approx(means)
