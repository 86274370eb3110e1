"""A network and a receiver for the tests of a watched folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from receiver import Receiver
from trust_cases import SMALLEST_FLAGS, run, write_images


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
