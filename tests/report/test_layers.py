"""What the page draws of a picture: levels that are exact at the threshold, and nothing lost by reducing them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import build

from almrr_ref.report.layers import layers_name, map_levels, picture_layers, write_layers
from almrr_ref.report.result import Result, highest_and_median, region_levels


def result_of(network_map: torch.Tensor, threshold: float | None, size: tuple[int, int]) -> Result:
    h, w = network_map.shape[1:]
    pixels = torch.full((3, h, w), 90, dtype=torch.uint8)
    return Result(0.9, threshold, [], size, pixels, network_map, torch.zeros(h, w, dtype=torch.bool))


def decoded(content: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content[name].partition(",")[2]))))


def test_levels_are_exact_at_the_outlines_of_the_threshold_and_a_step_off_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    network_map = torch.rand(1, 40, 60, generator=generator)
    model = build(threshold=0.45)
    model.outline_offset = 0.2
    content = picture_layers(model, result_of(network_map, 0.45, (80, 60)))
    smoothed = model.smooth(network_map[None])[0, 0].numpy()
    levels, exact = decoded(content, "levels"), smoothed >= region_levels(*highest_and_median(smoothed), 0.45, 0.2)[0]
    assert 0 < exact.mean() < 1
    assert ((levels >= 128) == exact).all()
    assert (content["size"], content["mask"]) == ([80, 60], None)
    values = content["centre"] + 0.1 * (levels.astype(float) - 127.5)
    assert np.abs(values - np.log(smoothed / (1 - smoothed))).max() < 0.0501
    assert map_levels(np.array([0.0, 1.0, 0.3, np.nextafter(0.3, 0)]), 0.3).tolist() == [1, 255, 128, 127]


@pytest.mark.parametrize(("shape", "reduced"), [((2050, 300), (1024, 150)), ((1, 1), (1, 1))])
def test_a_single_pixel_of_a_large_map_and_mask_is_kept(
    tmp_path: Path, shape: tuple[int, int], reduced: tuple[int, int]
) -> None:
    model, truth = build(score_kernel=1), torch.zeros(shape)
    truth[-1, -1] = 1
    write_layers(tmp_path, 1234, model, result_of(truth[None], None, shape), truth)
    text = (tmp_path / layers_name(1234)).read_text()
    assert layers_name(1234) == "layers/1/234.js"
    content = json.loads(text.removeprefix("layers(").removesuffix(")\n"))
    assert content["reduced"] == (shape != reduced)
    for name in ("levels", "mask"):
        plane = decoded(content, name)
        assert plane.shape == reduced
        assert plane[-1, -1] == plane.max() > 0
        assert np.count_nonzero(plane == plane.max()) == 1
    assert decoded(content, "picture").shape == (*reduced, 3)
