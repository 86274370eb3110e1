"""The doctor: what is here is ok, what is damaged is bad, and every need of setup.cfg is looked at."""

import configparser
import re
import sys
from pathlib import Path

import pytest
import torch

from almrr_ref import doctor

ROOT = Path(__file__).resolve().parent.parent


def test_it_looks_at_what_setup_cfg_requires() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = dict(re.findall(r"^([\w-]+)>=([\d.]+)", config["options"]["install_requires"], re.MULTILINE))
    assert required == doctor.NEEDED | {"triton": required["triton"]}
    assert doctor.numbers("2.13.0+cpu") > doctor.numbers("2.8") == doctor.numbers("2.8rc1") > doctor.numbers("1.24")


def test_what_it_says_to_install_can_be_installed_in_any_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    remedies = {finding.subject: finding.remedy for finding in doctor.packages()}
    assert remedies["scipy"] == 'pip install "scipy>=1.10"'
    assert "triton" in remedies
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    assert "triton" not in {finding.subject for finding in doctor.packages()}


def test_a_damaged_file_of_weights_is_bad_and_all_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"half of it")
    assert doctor.main(["--device", "cpu"]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert lines["resnet18"].startswith("bad")
    assert "delete it, so that it is fetched again" in lines["resnet18"]
    assert lines["resnet50"].startswith("warn")
    assert [line for line in lines.values() if line.startswith("bad")] == [lines["resnet18"]]
    assert re.search(r"ms by (chunked|numba), .* ms by reference, \de-\d\d apart", lines["scan"])
    assert "2000 steps take about" in lines["training"]
    assert "pictures of 256x256 a second" in lines["judging"]


def test_a_numba_that_cannot_be_imported_is_named_and_the_scan_is_not_said_to_be_its(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0")
    monkeypatch.setattr(doctor, "HAS_NUMBA", True)
    monkeypatch.setattr("almrr_ref.kernels.checks.HAS_NUMBA", True)
    monkeypatch.setitem(sys.modules, "almrr_ref.kernels.numba_scan", None)
    [numba] = [finding for finding in doctor.packages() if finding.subject == "numba"]
    assert numba.state == "warn"
    assert numba.text.startswith("1.0, but it cannot be imported: ")
    with pytest.warns(UserWarning, match="the slower chunked backend"):
        scan = next(doctor.speed(torch.device("cpu")))
    assert "ms by chunked, " in scan.text
