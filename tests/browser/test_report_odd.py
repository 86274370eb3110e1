"""The report's page in a real browser where input is odd: typed thresholds, pictures of extreme shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import build

from almrr_ref.report.layers import picture_layers, write_layers
from almrr_ref.report.page import write_page
from almrr_ref.report.result import Result, find_regions
from almrr_ref.report.scores import ScoresWriter


@pytest.fixture
def three(open_page: Any, tmp_path: Path) -> Any:
    """A page of three rows without pictures, at a threshold of 0.4."""
    with ScoresWriter(tmp_path / "scores.csv") as table:
        for name, score in {"a.png": 0.1, "b.png": 0.5, "c.png": 0.9}.items():
            table.write(name, score, 0.4, 0)
    write_page(tmp_path, "three", [], 0.4, pictures=False, commands={"once": "predict --threshold"})
    return open_page(tmp_path / "index.html")


@pytest.mark.parametrize(
    ("typed", "threshold"),
    [("0.6", 0.6), ("1e-7", 1e-7), ("0", 0), ("1", 1), ("1e-200", 1e-200)]
    + [(refused, 0.4) for refused in ("2", "-1", "0,6", "", "x")],
)
def test_a_typed_threshold_is_one_that_the_commands_take_or_none(three: Any, typed: str, threshold: float) -> None:
    three.fill("#threshold", typed)
    three.press("#threshold", "Enter")
    assert float(three.inner_text("#command").split()[-1]) == threshold
    assert float(three.input_value("#threshold")) == pytest.approx(threshold)
    assert three.inner_text("#counts").count("defective") == (threshold < 1)


@pytest.mark.parametrize("size", [(400, 40), (40, 400)])
def test_an_outline_is_equally_thick_on_all_sides_where_the_map_is_squashed(three: Any, size: tuple[int, int]) -> None:
    """The map is square, the picture is not: as for a strip before a network that sees squares."""
    rows, columns = three.evaluate(
        """([width, height]) => {
            const inside = at => at >= 100 && at < 300 && at % 20 >= 5 && at % 20 < 15;
            const levels = new Uint8Array(400).map((_, at) => 200 * inside(at));
            const map = {w: 20, h: 20, levels, centre: 0, picture: new OffscreenCanvas(20, 20)};
            const canvas = Object.assign(document.createElement("canvas"), {width, height});
            draw(canvas, map, findRegions(map, 128, 128), {opacity: 0, outlines: true}, facts);
            const context = canvas.getContext("2d");
            return [[width / 2, 0, 1, height], [0, height / 2, width, 1]].map(line =>
                context.getImageData(...line).data.reduce((sum, value, at) => sum + (at % 4 === 3) * value / 255, 0));
        }""",
        size,
    )
    assert rows == pytest.approx(4, abs=0.1)  # two lines of two pixels
    assert columns == pytest.approx(4, abs=0.1)


def test_a_picture_shown_large_stays_while_its_outcome_changes_and_the_filter_with_it(three: Any) -> None:
    three.select_option("#outcome", "bad")
    three.locator("article", has_text="b.png").click()
    move = "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }"
    for place, outcome in ((1000, "good"), (0, "defective"), (1000, "good")):
        three.locator("dialog .slider").evaluate(move, place)
        assert three.inner_text("dialog h3").split() == [outcome, "0.5000", "b.png"]
    three.click("#close")
    three.wait_for_selector("#shown:has-text('0 pictures')")


@pytest.mark.parametrize(("side", "text"), [(64, "1 region, in pixels: "), (2000, "1 region, in pixels, about: ")])
def test_figures_of_a_region_are_said_to_be_inexact_where_the_map_is_reduced(
    open_page: Any, tmp_path: Path, side: int, text: str
) -> None:
    model, network_map, size = build(threshold=0.4, score_kernel=1), torch.zeros(1, side, side), (side, side)
    network_map[:, 20:51, 20:51] = 0.9
    mask, regions = find_regions(model, network_map, 0.4, size)
    pixels = torch.full((3, side, side), 90, dtype=torch.uint8)
    write_layers(tmp_path, 0, model, Result(0.9, 0.4, regions, size, pixels, network_map, mask))
    with ScoresWriter(tmp_path / "scores.csv") as table:
        table.write("a.png", 0.9, 0.4, regions[0].area, regions[0].box)
    write_page(tmp_path, "one", [], 0.4)
    page = open_page(tmp_path / "index.html")
    page.locator("article").click()
    page.wait_for_selector(f"#regions:has-text('{text}')")
    assert ("31 x 31 at (20, 20), area 961" in page.inner_text("#regions")) == (side == 64)


@pytest.mark.parametrize("threshold", [0.7, 0.0])
def test_regions_of_the_page_are_those_of_the_table_to_a_bit_of_the_map_and_half_a_pixel(
    three: Any, threshold: float
) -> None:
    model, network_map, size = build(threshold=threshold, score_kernel=1), torch.full((1, 20, 20), 0.5), (10, 10)
    network_map[:, 2:4, 2:7] = 0.99  # 10 pixels of the map, 2.5 of the picture
    network_map[:, 12, 12] = 0.7  # as 32 bits this is less
    network_map[:, 16:] = 0
    mask, regions = find_regions(model, network_map, threshold, size)
    pixels = torch.full((3, 20, 20), 90, dtype=torch.uint8)
    layers = picture_layers(model, Result(0.9, threshold, regions, size, pixels, network_map, mask))
    found = """async ([layers, threshold]) => {
        const map = await decode(layers);
        return inPixels(map, regionsAt(map, 0.9, threshold, facts).regions);
    }"""
    for moved in (threshold, 0.0):
        _, expected = find_regions(model, network_map, moved, size)
        assert three.evaluate(found, [layers, moved]) == [{"box": list(r.box), "area": r.area} for r in expected]
        assert [region.area for region in expected] == [3 if moved else 100]
