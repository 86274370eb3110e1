"""The owner's commands from a bare checkout and from an installed copy, beside a foreign package named ``kernels``."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
        source = ROOT / folders.get(package, package.replace(".", "/"))
        target = site / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.py"):
            shutil.copy(file, target)
    return site


def run(*command: str, cwd: Path, path: list[Path]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = "import almrr_ref.kernels, kernels; print(almrr_ref.kernels.__file__, kernels.OWNER, almrr_ref.__file__)"


def test_an_installed_copy_takes_no_top_level_name_but_its_own(installed: Path, foreign: Path, tmp_path: Path) -> None:
    assert [entry.name for entry in installed.iterdir()] == ["almrr_ref"]
    out = run(sys.executable, "-c", ASK, cwd=tmp_path, path=[installed, foreign])
    assert str(installed / "almrr_ref" / "kernels") in out
    assert "somebody else" in out


def test_a_checkout_finds_its_own_kernels_and_leaves_a_foreign_package_alone(foreign: Path, tmp_path: Path) -> None:
    """The checkout stands behind the foreign package, as where tests/conftest.py appends it, and before an install."""
    out = run(sys.executable, "-c", ASK, cwd=tmp_path, path=[foreign, ROOT])
    assert f"{ROOT / 'kernels' / '__init__.py'} somebody else" in out


@pytest.mark.parametrize("where", ["checkout", "installed"])
def test_commands_answer_from_a_checkout_and_from_an_install(
    where: str, installed: Path, foreign: Path, tmp_path: Path
) -> None:
    cwd, path = (ROOT, [foreign]) if where == "checkout" else (tmp_path, [installed, foreign])
    for command in ("train", "evaluate", "predict", "export"):
        out = run(sys.executable, "-m", f"almrr_ref.{command}", "--help", cwd=cwd, path=path)
        assert f"python -m almrr_ref.{command}" in out
        assert "example" in out


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "bench").glob("*.py")))
def test_bench_scripts_find_the_package_in_a_checkout(script: str, tmp_path: Path) -> None:
    """As Python starts a script: with its folder first on the path."""
    folder = ROOT / "bench"
    start = f"sys.path.insert(0, {str(folder)!r}); runpy.run_path({str(folder / script)!r}, run_name='imported')"
    code = f"import runpy, sys; {start}"
    run(sys.executable, "-c", code, cwd=tmp_path, path=[])


def test_importing_has_no_side_effects() -> None:
    """No thread count, default type or global seed changes, and no Triton kernel is loaded."""
    code = (
        "import sys, torch\n"
        "state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())\n"
        "before = state()\n"
        "import almrr_ref.train, almrr_ref.predict\n"
        "assert before == state()\n"
        "assert not any(name.startswith('almrr_ref.kernels.triton') for name in sys.modules)"
    )
    run(sys.executable, "-c", code, cwd=ROOT, path=[])
