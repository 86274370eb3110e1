"""What all tests share: the package on the path of a bare checkout, the optional data, a browser, the CUDA skip."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(str(ROOT))  # appended, not inserted: another package named "kernels" stays visible


_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--no-first-run"]  # fmt: skip

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine for seconds


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a third of the time a test waits for processes, files and clocks."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; none is available")
    for item in items:
        if "requires_cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real images and weights for development; they are not part of the project."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the development data folder ../shared is absent")
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser of playwright: the system's chromium, no download."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra [test])")
    program = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if program is None:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """open_page(path or URL, **options of playwright's new_context) -> its page; an error in its script fails the test.

    Only files and this machine can be reached; whatever else a page asks for fails the test, too.
    """
    contexts, errors = [], []

    def watch(route: Any) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:", "http://localhost:")):
            route.continue_()
        else:
            errors.append(f"asks for {route.request.url}")
            route.abort()

    def open_one(address: str | Path, **options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.route("**/*", watch)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address.as_uri() if isinstance(address, Path) else address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not errors
