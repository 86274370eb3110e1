"""bench/latency.py and bench/sequence.py on tiny networks: what they check, count and write; no time is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import common  # noqa: E402
import latency  # noqa: E402
import sequence  # noqa: E402

from almrr_ref.config import PRESETS  # noqa: E402
from almrr_ref.model import ALMRR  # noqa: E402

TINY = {"reduced_channels": 16, "d_model": 12, "depth": 1, "decoder_channels": (8, 8), "frm_width": 4, "frm_levels": 2}
FLAGS = ["--preset", "small", "--backbone", "resnet18", "--image-size", "32", "--device", "cpu", "--runs", "2"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", {**PRESETS["small"], **TINY})


def test_latency_writes_a_table_for_each_patch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    assert latency.main([*FLAGS, "--patch-sizes", "4", "2", "--batch", "2", "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["tables"]
    assert [table["tokens"] for table in (first, second)] == [4, 16]
    assert [(row["encoder"], row["form"]) for row in first["rows"]] == [
        (name, form) for name in ("CNN(1x1)", "CNN(3x3)", "Transformer", "Mamba") for form in ("plain", "fused")
    ]
    assert [row["form"] for row in second["rows"]] == ["fused"] * 4
    for row in first["rows"]:
        assert len(row["runs_s"]) == 2
        assert row["images_per_second"]["2"] > 0
        stages = sum(row[f"{name}_ms"] for name in latency.STAGES)
        assert stages == pytest.approx(row["median_ms"], rel=0.9)
    paper = {row["encoder"]: row["paper_s"] for row in first["rows"]}
    assert paper == {"CNN(1x1)": 0.10, "CNN(3x3)": 0.13, "Transformer": 0.18, "Mamba": 0.12}
    out = capsys.readouterr().out
    assert out.count("| Mamba | fused |") == 2
    assert "left out" not in out


def test_latency_names_what_the_time_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--batch", "64", "--seconds", "1"]) == 0
    assert "batch 64 is left out, the time does not allow it (--seconds): CNN(1x1), fused" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["far", "nan", "changing"])
def test_latency_times_nothing_whose_maps_are_wrong(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong:
        def __init__(self, plain: ALMRR) -> None:
            self.plain, self.runs = plain, 0

        def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            maps, scores = self.plain.predict(images)
            self.runs += 1
            wrong = {"far": 1e-4, "nan": float("nan"), "changing": 1e-5 * (self.runs > 1)}[fault]
            return maps + wrong, scores

    monkeypatch.setitem(latency.FORMS, "wrong", (Wrong, 1e-5))
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--batch", "--forms", "wrong"]) == 2
    error = capsys.readouterr().err
    assert "CNN(1x1), wrong" in error
    assert {"far": "away from", "nan": "not finite", "changing": "two runs"}[fault] in error


def test_a_form_without_stages_and_counts_gets_dashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a network in another runtime."""

    class Foreign:
        def __init__(self, plain: ALMRR) -> None:
            self.predict = plain.predict

    monkeypatch.setitem(latency.FORMS, "foreign", (Foreign, 0.0))
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--batch", "--forms", "plain", "foreign"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| Mamba | foreign"))
    assert row.count("| - ") == len(latency.STAGES) + 2  # and parameters, GMAC


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is counted on Linux only")
def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def run() -> None:
        first = torch.ones(4 << 20)  # 16 MiB
        del first
        second = torch.ones(8 << 20)
        third = second + 1  # with second: 64 MiB
        del second, third

    with common.exact_memory():
        run()
        peak = common.peak_memory(run, torch.device("cpu"))
    assert peak == pytest.approx(64, abs=2)


def test_memory_of_the_mamba_encoder_grows_as_the_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sequence.json"
    flags = ["--lengths", "4096", "8192", "--d-model", "24", "--depth", "1", "--seconds", "1", "--device", "cpu"]
    assert sequence.main([*flags, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["encoder"], row["tokens"]) for row in rows] == [
        (name, l) for name in ("Mamba", "Mamba, fused", "Transformer") for l in (4096, 8192)
    ]
    assert capsys.readouterr().out.count("| Mamba | ") == 2
    if sys.platform == "linux":
        doubled = {row["encoder"]: row["memory_x2"] for row in rows if row["tokens"] == 8192}
        assert doubled["Mamba"] < 2.1
        assert doubled["Mamba, fused"] < 2.1


def test_without_matplotlib_a_plot_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    sequence.draw_plot([], tmp_path / "plot.png")
    assert "drew no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "plot.png").exists()
