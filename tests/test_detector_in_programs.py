"""A detector inside another program: arrays of cameras, processes, a threshold that is set, what the log says."""

import json
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import build_random

from almrr_ref import Detector
from almrr_ref.data.images import Remarks
from almrr_ref.model import ALMRR

SMALL: dict[str, Any] = {"image_size": 32, "blocks": (1,), "encoder": "cnn1x1", "frm_input": "none"}
TILES = (None, 48)


@pytest.fixture(scope="module")
def models() -> dict[int | None, ALMRR]:
    """A network that sees whole images, and one that sees tiles."""
    return {tile: build_random(**SMALL, tile=tile) for tile in TILES}


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("one", [drawn(40, 40), drawn(40, 40)[..., 0], torch.zeros(3, 40, 40)])
def test_one_array_is_no_list_of_its_rows(models: dict[int | None, ALMRR], one: Any) -> None:
    with pytest.raises(ValueError, match="this is one picture; call the detector with it, or give a list"):
        Detector(models[None]).batch(one)
    assert len(Detector(models[None]).batch(np.stack([drawn(40, 40)] * 2))) == 2


def test_the_threshold_can_be_set_and_stays_a_plain_number(models: dict[int | None, ALMRR]) -> None:
    detector = Detector(models[None], threshold=np.float32(0.25))  # type: ignore[arg-type]
    assert json.dumps(detector(drawn(40, 40)).threshold) == "0.25"
    with pytest.raises(ValueError, match="a threshold lies within 0 and 1, as scores do; got 50"):
        detector.threshold = 50
    for threshold, verdict in ((0.0, True), (1.0, False), (None, None)):
        detector.threshold = threshold
        assert detector(drawn(40, 40)).defective is verdict


@pytest.mark.parametrize("tile", TILES)
def test_a_camera_may_fill_the_same_array_again_and_a_kept_result_is_alone(
    models: dict[int | None, ALMRR], tile: int | None
) -> None:
    frames, detector = [drawn(50, 60, seed) for seed in range(6)], Detector(models[tile])
    buffer = np.empty_like(frames[0])
    tensor = torch.from_numpy(buffer).permute(2, 0, 1)

    def camera(buffer: Any) -> Iterator[Any]:
        for frame in frames:
            tensor.copy_(torch.from_numpy(frame).permute(2, 0, 1))
            yield buffer

    expected = [detector(frame).score for frame in frames]
    for given in (buffer, tensor):
        results = detector.batch(camera(given))
        assert [result.score for result in results] == pytest.approx(expected, abs=1e-6)
        for kept in (results[0].network_map, results[0].pixels, results[0].mask):
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.itemsize


def test_between_processes_nothing_is_sent_as_an_open_file(models: dict[int | None, ALMRR]) -> None:
    """Of which a system allows 1,024, and a detector has hundreds of tensors."""
    detector, picture = Detector(models[None], threshold=0.0), drawn(50, 60)
    result = detector(picture)
    sent = [bytes(ForkingPickler.dumps(each)) for each in (detector, result)]
    assert not any(b"rebuild_storage" in each for each in sent)
    other, received = map(pickle.loads, sent)
    assert other(picture).score == received.score == result.score
    assert received.regions == result.regions
    for name in ("pixels", "network_map", "mask"):
        assert torch.equal(getattr(received, name), getattr(result, name))


def test_what_is_left_out_of_pictures_is_logged_once(
    models: dict[int | None, ALMRR], caplog: pytest.LogCaptureFixture
) -> None:
    """As the commands print it: values of 12 bits are nearly black to a network trained on 8."""
    detector, deep = Detector(models[None]), drawn(40, 40)[..., 0].astype(np.uint16) << 4
    for _ in range(2):
        detector(deep)
        detector.batch([deep, deep])
    assert caplog.messages == ["picture: 16-bit values taken to use all 16 bits; said once"]
    list(detector.stream([Image.new("RGBA", (9, 9), (1, 2, 3, 4))], remarks=Remarks()))
    assert len(caplog.messages) == 1


def test_what_was_judged_before_a_source_fails_is_not_lost(models: dict[int | None, ALMRR]) -> None:
    def camera() -> Iterator[Any]:
        yield from (drawn(40, 40, seed) for seed in range(20))
        raise OSError("unplugged")

    results: list[Any] = []
    with pytest.raises(OSError, match="unplugged"):
        results.extend(Detector(models[None]).stream(camera()))
    assert len(results) == 20


def test_a_picture_of_another_shape_than_the_training_images_is_said(
    models: dict[int | None, ALMRR], caplog: pytest.LogCaptureFixture
) -> None:
    detector = Detector(build_random(**SMALL, shapes=(0.8, 1.1)))
    detector(drawn(40, 40))
    detector(drawn(45, 36))
    assert not caplog.messages
    for shape in ((40, 90), (90, 40), (90, 41)):
        detector(drawn(*shape))
    assert caplog.messages == [
        "picture: of another shape than the training images, and so squashed in another way: scores may be wrong; "
        "said once"
    ]
    noted = Remarks()
    list(Detector(models[48]).stream([drawn(400, 90)], remarks=noted))
    assert not noted.lines(), "tiles keep their shape"
