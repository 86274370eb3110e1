"""bench/latency.py and bench/sequence.py on tiny networks: what they check, count and write; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import common  # noqa: E402
import forms  # noqa: E402
import latency  # noqa: E402
import sequence  # noqa: E402

from almrr_ref.config import PRESETS  # noqa: E402
from almrr_ref.deploy.packed import PackedConv2d  # noqa: E402
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
    if sys.platform == "linux":
        assert all(row["memory_mib"] > 0 for row in first["rows"])


def test_latency_names_what_the_time_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--batch", "64", "--seconds", "1"]) == 0
    assert "left out, the time does not allow it (--seconds): CNN(1x1), fused, batch 64; " in capsys.readouterr().out


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


PEAK = """
import common, torch

def run():
    first = torch.ones(4 << 20)  # 16 MiB
    del first
    second = torch.ones(6 << 20)
    third = second + 1  # with second: 48 MiB
    del second, third

with common.exact_memory():
    run()
    print(common.peak_memory(run, torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is counted on Linux only")
def test_peak_memory_is_that_of_the_largest_moment() -> None:
    """In a process of its own: memory must not have been freed before."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=BENCH, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(48, abs=2)


def test_memory_of_the_mamba_encoder_grows_as_the_tokens(tmp_path: Path) -> None:
    file = tmp_path / "sequence.json"
    flags = ["--lengths", "4096", "8192", "--d-model", "24", "--depth", "1", "--seconds", "1", "--device", "cpu"]
    command = [sys.executable, str(BENCH / "sequence.py"), *flags, "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(file.read_text())["rows"]
    assert [(row["encoder"], row["tokens"]) for row in rows] == [
        (name, l) for name in ("Mamba", "Mamba, fused", "Transformer") for l in (4096, 8192)
    ]
    assert out.count("| Mamba | ") == 2
    if sys.platform == "linux":
        doubled = {row["encoder"]: row["memory_x2"] for row in rows if row["tokens"] == 8192}
        assert 1.9 < doubled["Mamba"] < 2.1
        assert 1.9 < doubled["Mamba, fused"] < 2.1


def test_without_matplotlib_a_plot_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    sequence.draw_plot([], tmp_path / "plot.png")
    assert "drew no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "plot.png").exists()


def test_latency_times_deployed_forms_of_one_encoder(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra export)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra export)")
    file = tmp_path / "latency.json"
    names = ["plain", "fused", "fused-bf16", "onnxruntime"]
    flags = ["--patch-sizes", "4", "--batch", "--encoders", "mamba", "--forms", *names, "--json", str(file)]
    assert latency.main([*FLAGS, *flags]) == 0
    rows = json.loads(file.read_text())["tables"][0]["rows"]
    assert [(row["encoder"], row["form"]) for row in rows] == [("Mamba", name) for name in names]
    assert all(row["of_plain"] > 0 for row in rows)
    assert 0 < rows[1]["gmac"] < rows[0]["gmac"]
    assert [row["gmac"] for row in rows[2:]] == [None, None]


@pytest.mark.parametrize("groups", [1, 2])
def test_packed_convolutions_are_counted_as_ordinary_ones(groups: int) -> None:
    conv = PackedConv2d(torch.rand(6, 4 // groups, 3, 2), padding=(1, 0), groups=groups, activation="relu")
    x, counts = torch.rand(2, 4, 7, 5), []
    added = torch.rand(2, 6, 7, 4)
    for given in ((x,), (x, added), (x.double(), added.double())):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=forms.PACKED) as counter:
            conv.to(given[0].dtype)(*given)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 6 * (4 // groups) * 3 * 2 * 2 * 7 * 4] * 3


def test_a_cuda_graph_on_a_cpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--batch", "--encoders", "mamba", "--forms", "cuda-graph"]) == 2
    assert "a CUDA graph needs it on a CUDA GPU" in capsys.readouterr().err
