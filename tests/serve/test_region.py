"""A region of interest, drawn on the page or sent: from then on it alone is judged, also by predict."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Client
from PIL import Image
from test_station_page import drop
from trust_cases import read_scores
from woven_cloth import GOOD, SIZE, SMALL, cloth

from almrr_ref import Detector, calibrate, fit, predict
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.serve.service import Service

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")
Serve = Callable[..., Client]
LEFT = [[0, 0], [0.4, 0], [0.4, 1], [0, 1]]
LEFT_MASK = np.arange(SIZE[1]) < 0.4 * SIZE[1]


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


DEFECT_LEFT = png(cloth(101, (slice(12, 20), slice(8, 16))))
DEFECT_RIGHT = png(cloth(102, (slice(12, 20), slice(46, 54))))


@pytest.fixture(scope="module")
def woven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("woven")
    fit.train_detector(GOOD, out=folder / "run", steps=0, **SMALL)
    return folder / "run" / "last.pt"


def verdicts(client: Client) -> list[str]:
    return [client.json("/judge", data)["verdict"] for data in (DEFECT_LEFT, DEFECT_RIGHT)]


def predicted(path: Path, folder: Path) -> list[str]:
    """What the command predict says of the same two pictures."""
    (folder / "in").mkdir(exist_ok=True)
    for name, data in (("a", DEFECT_LEFT), ("b", DEFECT_RIGHT)):
        (folder / "in" / f"{name}.png").write_bytes(data)
    flags = ["--checkpoint", str(path), "--input", str(folder / "in"), "--out", str(folder / "found"), "--overwrite"]
    assert predict.main([*flags, "--no-maps", "--no-overlays"]) == 0
    return [{"1": "defective", "0": "good"}[row["label"]] for row in read_scores(folder / "found")]


def judged_mask(client: Client) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(client("/region.png").content)))  # type: ignore[attr-defined]


def test_what_is_sent_is_judged_alone_from_then_on_also_by_predict_and_calibrate(
    serve: Serve, woven: Path, tmp_path: Path
) -> None:
    client = serve(network=woven)
    path = client.service.path
    assert judged_mask(client).all()
    assert client.json("/region") == {"share": 1, "outdated": False, "fixed": ""}
    assert verdicts(client) == ["defective", "defective"]
    said = client.json("/region", json.dumps({"polygons": [LEFT]}))
    assert said == {"share": pytest.approx(LEFT_MASK.mean()), "outdated": True, "fixed": ""}
    assert (judged_mask(client) == LEFT_MASK).all()
    assert verdicts(client) == predicted(path, tmp_path) == ["defective", "good"]
    assert client.json("/calibration")["good_scores"] == []
    assert len(client.service.drift.reference) == 1, "the one good picture since"
    assert client.json("/about")["region of interest"] == "41% of a picture"

    for number, picture in enumerate(GOOD):
        (tmp_path / "good").mkdir(exist_ok=True)
        spoilt = picture.copy()
        spoilt[:, 45:] = 255  # nobody judges it
        Image.fromarray(spoilt).save(tmp_path / "good" / f"{number}.png")
    assert calibrate.main(["--checkpoint", str(path), "--good", str(tmp_path / "good"), "--device", "cpu"]) == 0
    assert len((Detector.load(path, "cpu").calibration or {})["good_scores"]) == 12
    assert predicted(path, tmp_path) == ["defective", "good"]
    assert read_checkpoint(path)["threshold"] < 0.8
    assert client.json("/region", b'{"polygons": []}')["share"] == 1
    assert verdicts(client) == predicted(path, tmp_path) == ["defective", "defective"]


def test_what_is_no_region_is_refused_in_a_line_and_changes_nothing(serve: Serve, woven: Path) -> None:
    client = serve(network=woven)
    before = client.service.path.read_bytes()
    for body, status, reason in (
        (b"", 400, "expect"), (b"{}", 400, 'expected JSON such as {"polygons"'), (b'{"polygons": 3}', 400, "expected"),
        (b"[" * 999, 400, "expected"), (bytes(50_001), 413, "50000"), (b'{"polygons": "abc"}', 409, "3 or more"),
        (b'{"polygons": [[[0, 0], [1, 1]]]}', 409, "3 or more"),
        (b'{"polygons": [[[0, 0], [NaN, 0], [1, 1]]]}', 409, "nan"),
        (b'{"polygons": [[[0, 0], [1, 0], [0, 1e999]]]}', 409, "inf"),
        (b'{"polygons": [[[0, 0], [0.2, 0], [0, 0.2]]]}', 409, "at least 64"),
    ):  # fmt: skip
        answer = client("/region", body)
        error = json.loads(answer.content)["error"]  # type: ignore[attr-defined]
        assert (answer.status, reason in error, "\n" in error) == (status, True, False), error
    assert client("/region", b"{}", method="PUT").status == client("/region.png", b"{}").status == 405
    assert client.service.path.read_bytes() == before
    assert verdicts(client) == ["defective", "defective"]


def test_an_exported_network_keeps_its_region(woven: Path) -> None:
    service = Service(woven.with_suffix(".onnx"), partial(Detector.load, woven, "cpu"), None)
    for change in (lambda: service.set_region([LEFT]), lambda: service.set_threshold(0.5)):
        with pytest.raises(ValueError, match="exported network; change its last"):
            change()
    assert "exported" in service.region()["fixed"]
    assert "exported" in service.calibration()["fixed"]


def test_a_region_drawn_with_the_mouse_is_saved_and_judged_by(
    open_page: Callable[..., Any], serve: Serve, woven: Path, tmp_path: Path
) -> None:
    client = serve(network=woven)
    page = open_page(client.url, viewport={"width": 1280, "height": 900})
    drop(page, {"left.png": DEFECT_LEFT})
    page.click("nav a[href='#region']")
    page.wait_for_selector("#region-name:has-text('left.png')")
    assert page.inner_text("#judged") == "All of a picture is judged."
    canvas = page.locator("#region-canvas")
    box = canvas.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(SIZE[1] / SIZE[0], rel=0.02)

    def click(x: float, y: float, **options: Any) -> None:
        canvas.click(position={"x": x * (box["width"] - 1), "y": y * (box["height"] - 1)}, **options)

    click(0.9, 0.9)
    canvas.press("Escape")
    for corner in ([0, 0], [0.4, 0], [0.4, 1], [0.7, 0.5]):
        click(*corner)
    canvas.press("Backspace")
    assert page.is_disabled("#save-region")
    click(0, 1, click_count=2)
    page.click("#save-region")
    page.wait_for_selector("#region-saved:has-text('saved')")
    assert page.inner_text("#judged").startswith("41% of a picture is judged. The threshold is not calibrated")
    assert (judged_mask(client) == LEFT_MASK).all()
    dark = "place => { const c = document.getElementById('region-canvas'); return Math.max(...c.getContext('2d')"
    dark += ".getImageData(place * c.width, 0.2 * c.height, 60, 60).data.filter((_, i) => i % 4 < 3)); }"
    assert page.evaluate(dark, 0.6) < 110 < page.evaluate(dark, 0.2)
    page.click("nav a[href='#judge']")
    drop(page, {"right.png": DEFECT_RIGHT})
    page.wait_for_selector("#results article:nth-child(2)")
    assert page.locator("#results article .badge").all_inner_texts() == ["good", "defective"]
    assert predicted(client.service.path, tmp_path) == ["defective", "good"]
    page.click("nav a[href='#threshold']")
    page.wait_for_selector("#none:has-text('almrr_ref.calibrate')")


def test_it_is_drawn_with_keys_and_by_touch_on_a_phone(
    open_page: Callable[..., Any], serve: Serve, woven: Path
) -> None:
    client = serve(network=woven)
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "color_scheme": "dark"}
    page = open_page(client.url + "#region", **phone)
    page.wait_for_selector("#judged:has-text('All')")
    page.focus("#region-canvas")
    for keys in (["Shift+ArrowUp"] * 6, ["Shift+ArrowLeft"] * 6, ["Shift+ArrowDown"] * 11, ["Shift+ArrowRight"] * 4):
        for key in (*keys, "Space"):
            page.keyboard.press(key)
    assert page.inner_text("#region-said") == "Corner 4 at 40% from the left, 100% from the top."
    page.keyboard.press("Backspace")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.click("#save-region")
    page.wait_for_selector("#region-saved:has-text('saved')")
    x, y = (np.arange(64) + 0.5) / 64, (np.arange(32)[:, None] + 0.5) / 32
    assert (judged_mask(client) == (x < 0.5 - 0.1 * y)).all()
    box = page.locator("#region-canvas").bounding_box()
    for x, y in ((0.1, 0.1), (0.9, 0.1), (0.5, 0.9), (0.1, 0.12)):  # the last closes it
        page.touchscreen.tap(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.tap("#save-region")
    page.wait_for_selector("#judged:has-text('32%')")
    page.tap("#whole")
    page.wait_for_selector("#judged:has-text('All')")
    assert page.is_disabled("#whole")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(paper) < 60, "the colours are there"
