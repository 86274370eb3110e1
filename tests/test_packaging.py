"""The owner's commands from a bare checkout and from an installed copy, beside a foreign package named ``kernels``."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [f"almrr_ref.{name}" for name in ("train", "evaluate", "predict", "export", "demo", "doctor")]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the children of these tests are forks")

# Which kernels are found, without a side effect of the import; then every command and script in a child of its own.
PROGRAM = """\
import gc, os, runpy, sys
import scipy.ndimage, sklearn.metrics, torch.export, torch.nn.parallel, torch.utils.data  # once for all
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
before = state()
if not sys.argv[1].endswith(".py"):
    import almrr_ref.train, almrr_ref.predict, almrr_ref.export, kernels
    print(almrr_ref.kernels.__file__, getattr(kernels, "OWNER", ""))
    assert before == state()
    assert not any(name.startswith("almrr_ref.kernels.triton") for name in sys.modules)
gc.freeze()  # or every child goes through all that is imported once more when it ends
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


def run(*arguments: str, cwd: Path, path: list[Path]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-c", PROGRAM, *arguments)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder on the path that holds somebody else's ``kernels``."""
    (tmp_path / "foreign" / "kernels").mkdir(parents=True)
    (tmp_path / "foreign" / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    return tmp_path / "foreign"


def test_an_installed_copy_takes_no_top_level_name_but_its_own(foreign: Path, tmp_path: Path) -> None:
    """What an install puts into site-packages, by the mapping in setup.cfg."""
    config, site = configparser.ConfigParser(), tmp_path / "site"
    config.read(ROOT / "setup.cfg")
    folders = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    for package in config["options"]["packages"].split():
        target = site / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folders.get(package, package.replace(".", "/"))).glob("*.*"):
            shutil.copy(file, target)
    assert [entry.name for entry in site.iterdir()] == ["almrr_ref"]
    out = run(*COMMANDS, cwd=tmp_path, path=[site, foreign])
    assert f"{site / 'almrr_ref/kernels/__init__.py'} somebody else" in out
    assert all(f"usage: python -m {command}" in out for command in COMMANDS)


def test_pages_styles_and_scripts_are_in_the_wheel() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packed = {package: patterns.split(", ") for package, patterns in config["options.package_data"].items()}
    files = [file for kind in ("html", "css", "js") for file in ROOT.glob(f"almrr_ref/**/*.{kind}")]
    assert {"report/colours.css", "serve/page.html"} < {f.relative_to(ROOT / "almrr_ref").as_posix() for f in files}
    for file in files:
        package = ".".join(file.parent.relative_to(ROOT).parts)
        assert any(file.match(pattern) for pattern in packed.get(package, [])), file


def test_a_checkout_finds_its_own_kernels_and_leaves_a_foreign_package_alone(foreign: Path, tmp_path: Path) -> None:
    """It stands behind the foreign package on the path, as where tests/conftest.py appends it, or is the folder."""
    out = run(COMMANDS[0], cwd=tmp_path, path=[foreign, ROOT])
    assert f"{ROOT / 'kernels/__init__.py'} somebody else" in out
    out = run(*COMMANDS, cwd=ROOT, path=[foreign])
    assert all(f"usage: python -m {command}" in out for command in COMMANDS)


def test_bench_scripts_find_the_package_in_a_checkout(tmp_path: Path) -> None:
    run(*map(str, sorted(ROOT.glob("bench/*.py"))), cwd=tmp_path, path=[])
