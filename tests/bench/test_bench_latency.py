"""bench/latency.py, sequence.py and scan.py on tiny networks: what they check, count and write; no time is asserted."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forms
import latency
import pytest
import scan
import sequence
import torch

from almrr_ref.config import PRESETS

TINY = {"reduced_channels": 16, "d_model": 12, "depth": 1, "decoder_channels": (8, 8), "frm_width": 4, "frm_levels": 2}
FLAGS = ["--backbone", "resnet18", "--image-size", "32", "--device", "cpu", "--seconds", "1"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "paper", PRESETS["paper"] | TINY)
    monkeypatch.setattr(latency, "MOST_RUNS", 3)
    monkeypatch.setattr(sequence, "MOST_RUNS", 3)


def test_latency_writes_a_table_for_each_patch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    assert latency.main([*FLAGS, "--patch-sizes", "4", "2", "--batch", "2", "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["tables"]
    assert [table["tokens"] for table in (first, second)] == [4, 16]
    paper = {"CNN(1x1)": 0.10, "CNN(3x3)": 0.13, "Transformer": 0.18, "Mamba": 0.12}
    networks = [(row["encoder"], row["form"], row["paper_s"]) for row in first["rows"]]
    assert networks == [(name, form, seconds) for name, seconds in paper.items() for form in ("plain", "fused")]
    assert [row["form"] for row in second["rows"]] == ["fused"] * 4
    for row in first["rows"]:
        assert len(row["runs_s"]) == 3
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert all(0 < row[f"{name}_ms"] <= 1e3 * max(row["runs_s"]) for name in latency.STAGES)
    assert capsys.readouterr().out.count("| Mamba | fused |") == 2


@pytest.mark.parametrize(
    ("errors", "complaint"), [([1e-4], "away from"), ([float("nan")], "not finite"), ([0.0, 1e-5], "two runs")]
)
def test_latency_times_nothing_whose_maps_are_wrong(
    errors: list[float], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(plain: Any, _: int) -> SimpleNamespace:
        runs = iter(errors)
        return SimpleNamespace(predict=lambda images: (plain.predict(images)[0] + next(runs), torch.zeros(1)))

    monkeypatch.setitem(latency.FORMS, "wrong", (wrong, 1e-5))
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--forms", "wrong"]) == 2
    assert re.search(rf"CNN\(1x1\), wrong.*{complaint}", capsys.readouterr().err)


def test_latency_times_no_form_whose_encoder_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The maps of random weights do not show it."""

    def without_encoder(plain: Any, _: int) -> Any:
        fused = plain.fuse()
        fused.mfrm.encoder.register_forward_hook(lambda module, given, tokens: torch.zeros_like(tokens))
        return fused

    monkeypatch.setitem(latency.FORMS, "hollow", (without_encoder, 1.0))
    assert latency.main([*FLAGS, "--patch-sizes", "4", "--encoders", "mamba", "--forms", "hollow"]) == 2
    assert re.search(r"Mamba, hollow: the encoder's tokens are 1\.0e\+00 away", capsys.readouterr().err)


@pytest.mark.requires_cuda
def test_on_a_gpu_replays_of_a_scan_are_timed_beside_calls(tmp_path: Path) -> None:
    flags = ["--device=cuda", "--batch=1", "--length=64", "--seconds=0.05", "--backend", "triton"]
    assert scan.main([*flags, f"--json={tmp_path / 'scan.json'}"]) == 0
    assert all(0 < row["graph_ms"] < row["ms"] for row in json.loads((tmp_path / "scan.json").read_text())["rows"])


def test_a_graph_is_recorded_for_the_batch_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []

    def record(network: Any, batch: int) -> Any:
        recorded.append(batch)
        return network

    monkeypatch.setattr(forms, "CudaGraph", record)
    assert latency.main([*FLAGS, "--patch-sizes=4", "--encoders=mamba", "--forms=cuda-graph", "--batch=3"]) == 0
    assert recorded == [3]


def test_scan_times_a_backend_only_where_it_agrees_with_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device=cpu", "--batch=1", "--length=5", "--seconds=0.01", f"--json={tmp_path / 'scan.json'}"]
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", None)  # slow to import
    assert scan.main(flags) == 0
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    backends = [row["backend"] for row in rows[::2]]
    assert [one for one in backends if one != "numba"][:3] == ["reference", "chunked", "associative_scan"]
    assert all(row["p20"] <= row["ms"] <= row["p80"] and row["error"] < 5e-6 for row in rows[::2])
    assert all(row["error"] is None for row in rows[1::2]), "which the gradients are not held to"
    assert "transformers is left out" in capsys.readouterr().out
    exact = scan.run_ours
    monkeypatch.setattr(scan, "run_ours", lambda a, backend: exact(a, backend) + 1e-3 * (a["z"].dtype == torch.float32))
    assert scan.main(flags) == 2
    assert "against the oracle" in capsys.readouterr().err


def test_sequence_sets_every_length_beside_its_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sequence.json"
    assert sequence.main(["--device=cpu", "--lengths", "64", "16", "32", "--seconds=1", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    encoders = ("Mamba", "Mamba, fused", "Transformer")
    assert [(row["encoder"], row["tokens"]) for row in rows] == [(e, l) for e in encoders for l in (16, 32, 64)]
    for half, row in pairwise(rows):
        assert row["time_x2"] == (None if row["tokens"] == 16 else pytest.approx(row["ms"] / half["ms"]))
    assert capsys.readouterr().out.count("| Mamba, fused |") == 3
