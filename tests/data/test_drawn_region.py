"""A region that is drawn after training: which pixels lie inside of polygons, and what is refused."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from almrr_ref.config import ModelConfig
from almrr_ref.data.roi import MOST_CORNERS, draw_region, encode_roi, judged_of, require_region

SIZE = (32, 64)
X, Y = (torch.arange(64)[None] + 0.5) / 64, (torch.arange(32)[:, None] + 0.5) / 32  # the middles of the pixels
TRIANGLE = [(0.1, 0.2), (0.93, 0.05), (0.4, 0.97)]
TWICE_ROUND = [(0, 0), (1, 0), (1, 0.5), (0, 0.5), (0, 0), (0.3, 0.1), (0.3, 0.4), (0.7, 0.4), (0.7, 0.1), (0.3, 0.1)]
SQUARE = [(0, 0), (0.5, 0), (0.5, 0.5), (0, 0.5)]


def in_triangle() -> Tensor:
    sides = zip(TRIANGLE, [*TRIANGLE[1:], TRIANGLE[0]])
    return torch.stack([(bx - ax) * (Y - ay) > (by - ay) * (X - ax) for (ax, ay), (bx, by) in sides]).all(dim=0)


def judged(*polygons: Any, **changes: Any) -> Tensor:
    region = judged_of(ModelConfig(image_size=SIZE, judged_png=draw_region(polygons, SIZE), **changes))
    assert region is not None
    return region


def test_a_pixel_lies_inside_if_its_middle_does_in_any_of_the_polygons() -> None:
    frame = (Y < 0.5) & ~((X > 0.3) & (X < 0.7) & (Y > 0.1) & (Y < 0.4))  # even-odd: twice round is outside
    assert judged(TRIANGLE).equal(in_triangle())
    assert judged(TRIANGLE[::-1]).equal(in_triangle())
    assert judged(TWICE_ROUND).equal(frame)
    assert judged(TWICE_ROUND, TRIANGLE).equal(frame | in_triangle())
    assert draw_region([], SIZE) is None
    assert draw_region([[(0, 0), (1, 0), (1, 1), (0, 1)]], SIZE) is None, "that is all of the picture"


def test_only_what_the_network_sees_is_judged() -> None:
    seen = encode_roi(in_triangle())
    assert judged(SQUARE, roi_png=seen).equal(in_triangle() & (X < 0.5) & (Y < 0.5))


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([SQUARE, SQUARE[:2]], "polygon 2 is no list of 3 or more corners"),
        (["abc"], "polygon 1 is no list"),
        ([{"x": 1}], "polygon 1 is no list"),
        ([[*SQUARE, (0.5, 1.01)]], "polygon 1, corner 5: expected [x, y], each within 0 and 1; got (0.5, 1.01)"),
        ([[*SQUARE, (-0.01, 0.5)]], "corner 5: expected"),
        ([[*SQUARE, (math.nan, 0.5)]], "got (nan, 0.5)"),
        ([[*SQUARE, (0.5, math.inf)]], "got (0.5, inf)"),
        ([[*SQUARE, (0.5, "1")]], "got (0.5, '1')"),
        ([[*SQUARE, (0.5, True)]], "got (0.5, True)"),
        ([[*SQUARE, (0.5,)]], "got (0.5,)"),
        ([[*SQUARE, "ab" * 99]], "got 'abab"),
        ([SQUARE] * (MOST_CORNERS // 4 + 1), f"at most {MOST_CORNERS} corners in all"),
    ],
)
def test_what_is_no_polygon_is_named(polygons: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{re.escape(message)}[^\n]*$") as caught:
        draw_region(polygons, SIZE)
    assert len(str(caught.value)) < 150


def test_what_a_network_cannot_have_is_refused() -> None:
    config, small = ModelConfig(image_size=SIZE), draw_region([SQUARE], SIZE)
    require_region(config, small)
    require_region(config, None)
    corner = draw_region([[(0, 0), (0.11, 0), (0.11, 0.28), (0, 0.28)]], SIZE)  # 7 x 9 pixels
    with pytest.raises(ValueError, match=r"has 63 white pixels at 32 x 64 pixels; at least 64 are judged"):
        require_region(config, corner)
    outside = ModelConfig(image_size=SIZE, roi_png=encode_roi(X.expand(SIZE) > 0.5))
    with pytest.raises(ValueError, match=r"has 0 white pixels .* inside the mask of the training \(--roi\)"):
        require_region(outside, small)
    with pytest.raises(ValueError, match="sees tiles of 64 pixels"):
        require_region(ModelConfig(image_size=64, tile=64), draw_region([SQUARE], (64, 64)))
    with pytest.raises(ValueError, match=r"judged_png is \(64, 64\), .* draw it anew"):
        require_region(config, draw_region([SQUARE], (64, 64)))
