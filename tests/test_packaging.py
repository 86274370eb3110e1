"""The owner's commands from a bare checkout and from an installed copy, beside a foreign package named ``kernels``."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the children of these tests are forks")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder on the path that holds somebody else's ``kernels``."""
    package = tmp_path / "foreign" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("OWNER = 'somebody else'\n")
    return package.parent


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What an install puts into site-packages, by the mapping in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = config["options"]
    folders = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    site = tmp_path / "site"
    for package in options["packages"].split():
        target = site / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folders.get(package, package.replace(".", "/"))).glob("*.*"):
            shutil.copy(file, target)
    return site


def run(code: str, *arguments: str, cwd: Path, path: list[Path]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-c", code, *arguments)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH_IN_A_CHILD = """\
import os, runpy, sys
import scipy.ndimage, sklearn.metrics, torch.export, torch.nn.parallel, torch.utils.data  # once for all
for name in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
    elif name.endswith(".py"):  # as Python starts a script: with its folder first on the path
        sys.path.insert(0, os.path.dirname(name))
        runpy.run_path(name, run_name="imported")
        break
    else:
        sys.argv = [name, "--help"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


ASK = "import almrr_ref.kernels, kernels; print(almrr_ref.kernels.__file__, kernels.OWNER)"
COMMANDS = [f"almrr_ref.{name}" for name in ("train", "evaluate", "predict", "export", "demo")]


def test_an_installed_copy_takes_no_top_level_name_but_its_own(installed: Path, foreign: Path, tmp_path: Path) -> None:
    assert [entry.name for entry in installed.iterdir()] == ["almrr_ref"]
    path = [installed, foreign]
    assert f"{installed / 'almrr_ref/kernels/__init__.py'} somebody else" in run(ASK, cwd=tmp_path, path=path)
    out = run(EACH_IN_A_CHILD, *COMMANDS, cwd=tmp_path, path=path)
    assert all(f"usage: python -m {command}" in out for command in COMMANDS)


def test_a_checkout_finds_its_own_kernels_and_leaves_a_foreign_package_alone(foreign: Path, tmp_path: Path) -> None:
    """It stands behind the foreign package on the path, as where tests/conftest.py appends it, or is the folder."""
    assert f"{ROOT / 'kernels/__init__.py'} somebody else" in run(ASK, cwd=tmp_path, path=[foreign, ROOT])
    out = run(EACH_IN_A_CHILD, *COMMANDS, cwd=ROOT, path=[foreign])
    assert all(f"usage: python -m {command}" in out for command in COMMANDS)


def test_bench_scripts_find_the_package_in_a_checkout(tmp_path: Path) -> None:
    run(EACH_IN_A_CHILD, *map(str, sorted(ROOT.glob("bench/*.py"))), cwd=tmp_path, path=[])


def test_importing_has_no_side_effects() -> None:
    """No thread count, default type or global seed changes, and no Triton kernel is loaded."""
    code = (
        "import sys, torch\n"
        "state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())\n"
        "before = state()\n"
        "import almrr_ref.train, almrr_ref.predict, almrr_ref.export\n"
        "assert before == state()\n"
        "assert not any(name.startswith('almrr_ref.kernels.triton') for name in sys.modules)"
    )
    run(code, cwd=ROOT, path=[])
