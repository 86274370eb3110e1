"""The HTTP API: what the detector says, in JSON and as maps; limits; a decoder that crashes; the watched folder."""

import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from client import Client
from PIL import Image
from trust_cases import processor_time, read_scores, run, slow_to_decode, write_images

from almrr_ref import Detector
from almrr_ref.calibration.drift import Drift
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.serve.service import Service
from almrr_ref.watch.station import Station

api = pytest.importorskip("almrr_ref.serve.api", reason="needs the extra [serve]", exc_type=ImportError)
Serve = Callable[..., Client]


def test_it_says_what_the_detector_says_also_to_many_at_once(serve: Serve, network: Path, tmp_path: Path) -> None:
    client, detector = serve(), Detector.load(network, "cpu", threshold=0.0)
    client.json("/threshold", json.dumps({"value": 0.0}))
    write_images(tmp_path / "many", 16, seed=3, size=48)
    pictures = [path.read_bytes() for path in sorted((tmp_path / "many").iterdir())]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda data: client.json("/judge", data), pictures))
    expected = detector.batch(pictures)
    assert [answer["score"] for answer in answers] == pytest.approx([r.score for r in expected], abs=1e-6)
    for answer, result in zip(answers, expected):
        assert (answer["verdict"], answer["size"], tuple(answer["box"])) == ("defective", [48, 48], result.box)
        assert [tuple(region["box"]) for region in answer["regions"]] == [region.box for region in result.regions]
    for ask in ({"path": "/judge?map=tiff"}, {"path": "/judge", "Accept": "image/tiff"}):
        answer = client(body=pictures[0], **ask)
        values = np.array(Image.open(io.BytesIO(answer.content)))  # type: ignore[attr-defined]
        assert values == pytest.approx(expected[0].network_map[0].numpy(), abs=1e-6)
        assert float(answer.headers["X-Almrr-Score"]) == pytest.approx(expected[0].score, abs=1e-6)
    png = np.array(Image.open(io.BytesIO(client("/judge?map=png", pictures[0]).content)))  # type: ignore[attr-defined]
    assert png / 255 == pytest.approx(values, abs=0.51 / 255)
    lines = client("/metrics").content.decode().splitlines()  # type: ignore[attr-defined]
    assert all(re.fullmatch(r'# .*|\w+(\{\w+="[^"]+"\})? -?[\d.e+-]+', line) for line in lines)
    assert 'almrr_pictures_total{verdict="defective"} 19' in lines
    assert "almrr_judging_seconds_count 19" in lines


def test_what_is_no_picture_too_large_or_too_much_is_refused_with_a_reason(
    serve: Serve, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(max_bytes=20_000)
    cases = [
        (b"junk", 422, "not an image"), (picture[:900], 422, "broken"), (b"", 400, "empty"),
        (bytes(20_001), 413, "20000 bytes"), (b"P6 2000 2000 255\n" + bytes(100), 422, "1000000 pixels"),
    ]  # fmt: skip
    for body, status, reason in cases:
        answer = client("/judge", body)
        assert (answer.status, reason in json.loads(answer.content)["error"]) == (status, True)  # type: ignore[attr-defined]
    chunked = client("/judge", iter([bytes(15_000), bytes(15_000)]))
    assert chunked.status == 413
    assert client("/judge?map=jpeg", picture).status == 400
    form = client("/judge", picture, Content_Type="multipart/form-data; boundary=x")
    assert (form.status, "not a form" in json.loads(form.content)["error"]) == (415, True)  # type: ignore[attr-defined]
    assert b"expected JSON such as" in client("/threshold", b"").content  # type: ignore[attr-defined]
    monkeypatch.setattr(api, "BODY_TIMEOUT", 0.1)

    def slow() -> Iterator[bytes]:
        yield picture[:100]
        time.sleep(0.4)
        yield picture[100:]

    assert client("/judge", slow()).status == 408
    assert client("/judge", picture).status == 200
    for path in ("/../setup.cfg", "/page.py", "/service.py", "/recent/1.jpg", "//etc/passwd", "/run/last.pt"):
        assert client(path).status == 404
    assert client("/judge").status == client("/health", b"x").status == 405


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("shapes differ"), 500), (RuntimeError("CUDA out of memory"), 503)]
)
def test_only_a_want_of_memory_is_worth_another_try(
    serve: Serve, picture: bytes, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, status: int
) -> None:
    client = serve()
    monkeypatch.setattr(client.service, "judged", Mock(side_effect=error))
    answer = client("/judge", picture)
    assert (answer.status, answer.headers["Retry-After"] is None) == (status, status == 500)
    assert json.loads(answer.content) == {"error": str(error)}  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process at work by /proc")
def test_a_decoder_that_is_killed_at_work_costs_its_picture_alone(
    serve: Serve, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MOST_IN_FLIGHT", 1)
    client = serve()
    for _ in client.service.decoders.processes:  # each in turn: it has started
        assert client("/judge", picture).status == 200
    before = {decoder.process.pid: processor_time(decoder.process.pid) for decoder in client.service.decoders.processes}
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(client, "/judge", slow_to_decode())
        while not (at_work := [pid for pid, ticks in before.items() if processor_time(pid) > ticks + 3]):
            assert not killed.done()
            time.sleep(0.005)
        busy = client("/judge", picture)
        assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
        os.kill(at_work[0], signal.SIGKILL)
        answer = killed.result()
    assert (answer.status, client("/health").status) == (422, 200)
    assert "decoder crashed" in json.loads(answer.content)["error"]  # type: ignore[attr-defined]
    for process in [decoder.process for decoder in client.service.decoders.processes]:
        os.kill(process.pid, signal.SIGKILL)  # idle: no picture is to blame
        process.wait()
    assert [client("/judge", picture).status for _ in range(3)] == [200, 200, 200]
    assert client("/health").status == 200


def test_drift_of_what_is_posted_is_in_the_metrics_and_told_to_the_page(serve: Serve, picture: bytes) -> None:
    """Calibration's good scores lie below those of the pictures that come."""

    def prepare(service: Service) -> None:
        service.drift = Drift([0.001 * i for i in range(1, 60)])
        service._detector = Detector(service.detector.model, 1.0)

    client = serve(prepare=prepare)
    assert client.json("/recent")["drift"] == []
    assert b"almrr_drift_warning 0" in client("/metrics").content  # type: ignore[attr-defined]
    score = client.json("/judge", picture)["score"]
    assert score > 0.06
    posted = 1
    while not client.json("/recent")["drift"] and posted < 60:
        assert client.json("/judge", picture)["verdict"] == "good"
        posted += 1
    assert posted > 5
    assert "higher" in client.json("/recent")["drift"]
    lines = client("/metrics").content.decode().splitlines()  # type: ignore[attr-defined]
    assert "almrr_drift_warning 1" in lines
    assert next(float(line.split()[1]) for line in lines if 'kind="higher"' in line) >= 1


def test_a_saved_threshold_is_judged_by_at_once_and_by_predict(serve: Serve, picture: bytes, tmp_path: Path) -> None:
    client = serve()
    path, before = client.service.path, client.json("/calibration")
    score = client.json("/judge", picture)["score"]
    for value, verdict in ((score - 1e-3, "defective"), (score + 1e-3, "good")):
        assert client.json("/threshold", json.dumps({"value": value}))["threshold"] == value
        assert client.json("/judge", picture)["verdict"] == verdict
        flags = ["--checkpoint", str(path), "--input", str(tmp_path / "picture.png"), "--no-maps", "--no-overlays"]
        assert run("predict", [*flags, "--out", str(tmp_path / verdict)], tmp_path / "io").code == 0
        assert read_scores(tmp_path / verdict)[0]["label"] == {"defective": "1", "good": "0"}[verdict]
    history = [entry["value"] for entry in read_checkpoint(path)["calibration"]["thresholds"]]
    assert history == [before["threshold"], score - 1e-3, score + 1e-3]
    for body, status in ((b"{}", 400), (b'{"value": "x"}', 400), (b'{"value": NaN}', 409), (b'{"value": 2}', 409)):
        assert client("/threshold", body).status == status
    assert client.json("/about")["threshold"] == score + 1e-3
    for damaged in ("[1]", "{"):  # the checkpoint is what counts
        path.with_name("calibration.json").write_text(damaged)
        assert client.json("/threshold", b'{"value": 0.25}')["threshold"] == 0.25


def test_what_another_program_does_to_the_network_is_noticed_and_a_broken_file_is_not_taken(
    serve: Serve, picture: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve()
    path, score = client.service.path, client.json("/judge", picture)["score"]
    for value, verdict in ((score - 1e-3, "defective"), (score + 1e-3, "good")):
        assert run("calibrate", ["--checkpoint", str(path), "--threshold", str(value)], tmp_path / "io").code == 0
        assert client.json("/judge", picture)["verdict"] == verdict
        assert client.json("/calibration")["threshold"] == client.json("/about")["threshold"] == value
    path.write_bytes(b"not a network")
    assert client.json("/judge", picture)["threshold"] == score + 1e-3
    assert client("/threshold", b'{"value": 0.5}').status == 409
    about = client.json("/about")
    assert "is not a checkpoint" in about["file now"]
    assert about["threshold"] == score + 1e-3
    assert [record.message for record in caplog.records if "judging by the earlier network" in record.message]


def test_the_watched_folder_is_shown_counted_and_compared_with_the_calibration(serve: Serve, tmp_path: Path) -> None:
    camera = tmp_path / "camera"
    write_images(camera, 2)
    (camera / "<b>.png").write_bytes((camera / "000.png").read_bytes())

    told: list[Any] = []

    def watch(service: Service) -> None:
        def tell(*row: Any) -> None:
            told.append(row)
            service.add_row(*row)

        save = lambda result, name: None  # noqa: E731
        service.station = Station(
            lambda: service.detector, camera, tmp_path / "out", save, drift=service.drift, on_row=tell
        )

    client = serve(prepare=watch)
    while len(rows := client.json("/recent?after=0")["rows"]) < 3:
        time.sleep(0.05)
    assert {row["path"] for row in rows} == {"000.png", "001.png", "<b>.png"}
    assert {row["verdict"] for row in rows} == {"good"}
    answer = client.json(f"/recent?after={rows[1]['number']}")
    assert (answer["rows"], answer["counts"]["good"], sum(answer["counts"].values())) == (rows[2:], 3, 3)
    later = Service(client.service.path, lambda: client.service.detector, 10**6)
    later.add_row(*told[0])
    assert later.rows_after(rows[2]["number"]), "an open page would not see the rows of the next server"
    with Image.open(io.BytesIO(client(f"/recent/{rows[2]['number']}.jpg").content)) as overlay:  # type: ignore[attr-defined]
        assert overlay.format == "JPEG"
    assert len(client.service.drift.reference) > 11
    assert b'almrr_pictures_total{verdict="good"} 3' in client("/metrics").content  # type: ignore[attr-defined]
    assert threading.active_count() < 40
    camera.rename(tmp_path / "away")
    while (health := client.json("/health"))["status"] == "ok":
        time.sleep(0.05)
    assert (health["status"], "cannot read" in health["error"]) == ("trouble", True)
    (tmp_path / "away").rename(camera)
    while client.json("/health")["status"] != "ok":
        time.sleep(0.05)
