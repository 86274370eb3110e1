"""The page in a real browser: pictures dropped and judged, a threshold saved, the watched folder live."""

import base64
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Client
from PIL import Image
from trust_cases import read_scores, run, write_images

from almrr_ref import Detector
from almrr_ref.serve.service import Service
from almrr_ref.watch.station import Station

ODD = "<img src=x onerror=alert(1)>.png"  # a file's name that must stay text


def drop(page: Any, pictures: dict[str, bytes]) -> None:
    """Drop files on the page, as from the desktop."""
    files = [[name, base64.b64encode(data).decode()] for name, data in pictures.items()]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, text] of files) {
                transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
            }
            return transfer;
        }""",
        files,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_dropped_pictures_get_verdicts_and_a_saved_threshold_predicts(
    open_page: Callable[..., Any], serve: Callable[..., Client], tmp_path: Path
) -> None:
    client = serve()
    write_images(tmp_path / "in", 2, size=48)
    paths = sorted((tmp_path / "in").iterdir())
    page = open_page(client.url)
    drop(page, {"a.png": paths[0].read_bytes(), ODD: paths[1].read_bytes(), "broken.png": b"junk", "empty.png": b""})
    page.wait_for_selector("#results article:nth-child(4)", timeout=20_000)
    said = {card.query_selector("span").inner_text(): card for card in page.query_selector_all("#results article")}
    assert set(said) == {"a.png", ODD, "broken.png", "empty.png"}
    results = Detector.load(client.service.path, "cpu").batch(paths)
    for name, result in zip(("a.png", ODD), results):
        badge, score = (node.inner_text() for node in said[name].query_selector_all("b"))
        assert badge == ("defective" if result.defective else "good")
        assert float(score) == pytest.approx(result.score, abs=1e-4)
        assert said[name].query_selector("canvas").evaluate("c => [c.width, c.height]") == [320, 320]
    assert "not an image" in said["broken.png"].inner_text()
    assert "the file is empty" in said["empty.png"].inner_text()
    assert "2 unreadable" in page.inner_text("#tally")

    value = min(result.score for result in results) - 1e-3
    page.click("nav a[href='#threshold']")
    page.wait_for_selector("#chart rect.good")
    page.fill("#value", repr(value))
    page.dispatch_event("#value", "change")
    assert page.inner_text("#promise").count("%") >= 2
    page.click("#save")
    page.wait_for_selector("#saved:has-text('saved: ')")
    assert len(page.query_selector_all("#history tr")) == 2
    flags = ["--checkpoint", str(client.service.path), "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert run("predict", [*flags, "--no-maps", "--no-overlays"], tmp_path / "io").code == 0
    assert [row["label"] for row in read_scores(tmp_path / "out")] == ["1", "1"]
    page.click("nav a[href='#about']")
    page.wait_for_selector("#facts:has-text('resnet18')")


def test_thresholds_near_0_and_1_are_told_from_them_and_one_beyond_is_not_taken(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes
) -> None:
    client = serve()
    page = open_page(client.url + "#threshold")
    page.wait_for_selector("#chart rect.good")
    for typed in ("1e-7", "0.99999"):
        page.fill("#value", typed)
        page.dispatch_event("#value", "change")
        page.click("#save")
        page.wait_for_selector("#saved:has-text('saved: ')")
        shown = page.input_value("#value"), page.inner_text("#saved").split()[1], page.inner_text("#history tr td")
        assert all(float(text) == pytest.approx(float(typed), rel=1e-9) for text in shown), shown
    for typed in ("2", "-0.5", ""):
        page.fill("#value", typed)
        page.dispatch_event("#value", "change")
        assert float(page.input_value("#value")) == pytest.approx(0.99999, rel=1e-9)
    page.route("**/judge?*", lambda route: route.fulfill(json={**route.fetch().json(), "score": 0.999987}))
    drop(page, {"a.png": picture})
    page.wait_for_selector("#results article canvas")
    assert page.inner_text("#results article h3 b:nth-child(2)") == "0.99998700"


def test_a_threshold_that_is_chosen_while_another_is_saved_stays_and_can_be_saved(
    open_page: Callable[..., Any], serve: Callable[..., Client]
) -> None:
    page = open_page(serve().url + "#threshold")
    page.wait_for_selector("#chart rect.good")
    answered = """([threshold, then]) => {
        choose(then ?? chosen);
        useCalibration({...calibration, threshold});
        return [chosen, $("save").disabled];
    }"""
    assert page.evaluate(answered, [0.2, None]) == [0.2, True]
    assert page.evaluate(answered, [0.4, 0.3]) == [0.3, False]
    assert page.evaluate(answered, [0.3, None]) == [0.3, True]


def test_a_picture_that_arrives_in_the_watched_folder_comes_up_by_itself(
    open_page: Callable[..., Any], serve: Callable[..., Client], tmp_path: Path
) -> None:
    camera = tmp_path / "camera"
    write_images(tmp_path / "in", 1)
    camera.mkdir()

    def watch(service: Service) -> None:
        options: dict[str, Any] = {"drift": service.drift, "on_row": service.add_row}
        service.station = Station(lambda: service.detector, camera, tmp_path / "out", lambda *_: None, **options)

    page = open_page(serve(prepare=watch).url + "#watch")
    page.wait_for_selector("#folder-name:has-text('camera')")
    os.replace(tmp_path / "in" / "000.png", camera / ODD.replace("/", "-"))
    start = time.monotonic()
    page.wait_for_selector("#rows img", timeout=20_000)
    assert page.inner_text("#rows article span") == ODD
    assert page.inner_text("#counts") in ("1 good", "1 defective")
    assert page.is_hidden("#earlier")
    assert time.monotonic() - start < 15


def test_what_the_server_cannot_take_for_a_while_waits_and_is_judged_later(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes
) -> None:
    page = open_page(serve().url)
    page.wait_for_selector("#health:has-text('ok')")
    page.context.set_offline(True)
    page.wait_for_selector("#health:has-text('the server does not answer')")
    drop(page, {"a.png": picture})
    page.click("nav a[href='#threshold']")
    assert page.is_hidden("#save"), "no threshold is known that could be saved"
    page.wait_for_timeout(3500)
    page.context.set_offline(False)
    page.wait_for_selector("#chart rect.good")
    drop(page, {"b.png": b"junk"})  # on another view: its result is shown
    page.wait_for_selector("#results article:nth-child(2)")
    assert page.inner_text("#tally") in ("1 good, 1 unreadable", "1 defective, 1 unreadable")


def test_a_refusal_in_plain_text_is_shown_as_it_is_and_a_region_says_what_cannot_be_drawn_on(
    open_page: Callable[..., Any], serve: Callable[..., Client]
) -> None:
    page = open_page(serve().url + "#region")
    page.wait_for_selector("#region-canvas")
    page.set_input_files("#region-file", [{"name": "x.png", "mimeType": "image/png", "buffer": b"junk"}])
    page.wait_for_selector("#region-said:has-text('x.png: not an image')")
    page.route("**/health", lambda route: route.fulfill(status=401, content_type="text/plain", body="open the address"))
    page.wait_for_selector("#health:has-text('not well: open the address')")


def test_a_picture_that_the_server_cannot_judge_is_not_called_unreadable_nor_asked_for_without_end(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes
) -> None:
    page, asked = open_page(serve().url), []

    def refuse(route: Any) -> None:
        asked.append(route)
        status, error = (503, "out of memory") if len(asked) <= 3 else (500, "shapes differ")
        route.fulfill(status=status, json={"error": error})

    page.route("**/judge?*", refuse)
    for count, name in enumerate(("a.png", "b.png"), start=1):
        drop(page, {name: picture})
        page.wait_for_selector(f"#results article:nth-child({count})", timeout=10_000)
    assert len(asked) == 4
    assert page.inner_text("#tally") == "2 not judged"
    assert "shapes differ" in page.inner_text("#results article:nth-child(1)")
    assert "out of memory" in page.inner_text("#results article:nth-child(2)")


def test_judge_warns_of_an_outdated_threshold_and_shows_long_and_tiny_pictures_whole(
    open_page: Callable[..., Any], serve: Callable[..., Client]
) -> None:
    client = serve()
    page = open_page(client.url, viewport={"width": 1000, "height": 700})
    assert page.is_hidden("#outdated")
    for shape in ((20, 400), (5, 4)):
        buffer = io.BytesIO()
        Image.new("RGB", shape).save(buffer, "PNG")
        drop(page, {"x.png": buffer.getvalue()})
    page.wait_for_selector("#results article:nth-child(2) canvas", timeout=20_000)
    sizes = page.evaluate("[...document.querySelectorAll('#results canvas')].map(c => [c.offsetHeight, c.height])")
    assert max(shown for shown, _ in sizes) <= 560
    assert min(pixels for _, pixels in sizes) >= 256
    client.json("/region", b'{"polygons": [[[0, 0], [1, 0], [0, 1]]]}')
    page.click("nav a[href='#about']")
    page.click("nav a[href='#judge']")
    page.wait_for_selector("#outdated:has-text('not calibrated')")
    assert page.get_attribute("nav a[href='#judge']", "aria-current") == "page"


def test_a_camera_that_is_asked_for_twice_runs_once_and_stops(
    open_page: Callable[..., Any], serve: Callable[..., Client]
) -> None:
    page = open_page(serve().url)
    page.evaluate(
        """() => {
            globalThis.streams = [];
            navigator.mediaDevices.getUserMedia = async () => {
                const canvas = document.createElement('canvas');
                canvas.getContext('2d').fillRect(0, 0, 9, 9);
                streams.push(canvas.captureStream());
                return streams.at(-1);
            };
        }"""
    )
    states = "streams.map(stream => stream.getTracks()[0].readyState)"
    for count in (1, 2):
        page.click("#camera")
        page.wait_for_selector("#live:visible")
        assert page.evaluate(states) == [*["ended"] * (count - 1), "live"]
    page.click("#stop")
    assert page.evaluate(states) == ["ended", "ended"]


def test_a_folder_dropped_or_chosen_gives_each_picture_with_its_path_and_says_what_cannot_be_read(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes, tmp_path: Path
) -> None:
    for kind in ("dent", "hole"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        (tmp_path / "test" / kind / "000.png").write_bytes(picture)
    (tmp_path / "test" / ".hidden").write_bytes(b"")
    page = open_page(serve().url)

    def named(count: int) -> list[str]:
        page.wait_for_selector(f"#results article:nth-child({count})", timeout=20_000)
        return sorted(page.locator("#results article h3 span").all_inner_texts())

    browser, data = page.context.new_cdp_session(page), {"items": [], "files": [str(tmp_path / "test")]}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 300, "y": 120, "data": {**data, "dragOperationsMask": 1}}
        browser.send("Input.dispatchDragEvent", event)
    assert named(2) == ["test/dent/000.png", "test/hole/000.png"]
    page.set_input_files("#folder", tmp_path / "test")
    assert named(4) == 2 * ["test/dent/000.png"] + 2 * ["test/hole/000.png"]
    page.evaluate(
        """() => {
            const shut = {name: 'shut', fullPath: '/shut', isDirectory: true, createReader: () => reader};
            const reader = {readEntries: (_, refuse) => refuse(new Error('not permitted'))};
            return dropped({preventDefault() {}, dataTransfer: {items: [{webkitGetAsEntry: () => shut}]}});
        }"""
    )
    assert named(5)[0] == "shut"
    assert "not permitted" in page.inner_text("#results article:first-child")


def test_no_long_name_makes_a_narrow_page_wider(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes
) -> None:
    client, long = serve(), "n" * 200
    client.service.failure = f"the folder is no longer watched: {long}"
    page = open_page(client.url, viewport={"width": 390, "height": 800})
    drop(page, {f"{long}.png": picture, f"{long}-broken.png": b"junk"})
    page.wait_for_selector("#results article:nth-child(2)")
    page.wait_for_selector("#health:has-text('no longer watched')")
    for view in ("judge", "region", "watch"):
        page.click(f"nav a[href='#{view}']")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        if view == "region":
            page.set_input_files("#region-file", [{"name": f"{long}.gif", "mimeType": "image/gif", "buffer": b"junk"}])
            page.wait_for_selector("#region-said:has-text('.gif')")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_of_a_large_picture_by_tiles_only_what_is_drawn_is_kept(
    open_page: Callable[..., Any], serve: Callable[..., Client], picture: bytes
) -> None:
    """A map by tiles has the picture's size: hundreds of them, decoded, would be gigabytes."""
    client, buffer = serve(), io.BytesIO()
    Image.new("L", (3000, 2000), 255).save(buffer, "PNG")
    large = {
        **client.json("/judge", picture),
        "size": [2000, 3000],
        "map": base64.b64encode(buffer.getvalue()).decode(),
    }
    page = open_page(client.url)
    page.route("**/judge?*", lambda route: route.fulfill(json=large))
    drop(page, {"a.png": picture})
    page.wait_for_selector("#results article canvas")
    sizes = page.evaluate("[results[0].glow, results[0].picture].map(kept => [kept.width, kept.height])")
    assert sizes == 2 * [[1200, 800]]
