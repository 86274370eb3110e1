"""A server on a free port, in a thread, and a network for it."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Client
from PIL import Image
from trust_cases import SMALLEST_FLAGS, run, write_images

from almrr_ref import Detector
from almrr_ref.serve.__main__ import listen, make_server
from almrr_ref.serve.service import Service


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_images(folder / "good", 12)
    flags = ["--data", str(folder / "good"), "--out", str(folder / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", [*flags, "--image-size", "64"], folder / "io").code == 0
    return folder / "run" / "last.pt"


@pytest.fixture
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """serve(...) -> a client of a new server, whose network is a copy of its own."""
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra [serve])")
    running: list[tuple[Any, threading.Thread]] = []

    def start(
        host: str = "127.0.0.1",
        token: str = "",
        prepare: Callable[[Service], None] = lambda service: None,
        network: Path | None = None,
        **limits: Any,
    ) -> Client:
        path = tmp_path / "run" / "last.pt"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(network or request.getfixturevalue("network"), path)
        service = Service(path, partial(Detector.load, path, "cpu"), limits.pop("max_pixels", 10**6))
        prepare(service)
        server, listener = make_server(service, host, token, **limits), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([listener],))
        running.append((server, thread))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return Client(listener.getsockname()[1], service)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    """A PNG of 40x50 pixels."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(50, 40, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    return (tmp_path / "picture.png").read_bytes()
