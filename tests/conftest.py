"""What all tests share: the package on the path of a bare checkout, the optional real data, the CUDA skip."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(str(ROOT))  # appended, not inserted: another package named "kernels" stays visible


torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine for seconds


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
