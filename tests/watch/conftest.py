"""A network, a camera's folder and a receiver for the tests of a watched folder; waits are short."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from receiver import Receiver
from trust_cases import SMALLEST_FLAGS, run, write_images

from almrr_ref.watch import arrivals, station, webhook


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_images(folder / "good", 12)
    flags = ["--data", str(folder / "good"), "--out", str(folder / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", flags, folder / "io").code == 0
    return folder / "run" / "last.pt"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "INTERVAL", 0.03)
    monkeypatch.setattr(arrivals, "REST", 0.1)
    monkeypatch.setattr(arrivals, "PATIENCE", 0.2)
    monkeypatch.setattr(arrivals._Rest.__init__, "__defaults__", (0.1, False))
    monkeypatch.setattr(station, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(webhook, "FIRST_PAUSE", 0.05)


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"
