"""The scripts in bench/ as modules, started from their folder as a user does; and a data set in MVTec's layout."""

import sys
from pathlib import Path

import pytest

from almrr_ref.demo.surfaces import write_demo

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category with a name of the paper's: the demo's textures at 64x64 pixels, with a scratch and a stain."""
    root = tmp_path_factory.mktemp("data") / "grid"
    write_demo(root, size=64, n_train=5, n_test_good=3, n_defects=2)
    return root
