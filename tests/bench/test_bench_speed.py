"""bench/speed.py on a tiny network: what it times, counts and writes; no time is asserted."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import speed
from PIL import Image
from tiny_network import good_images

from almrr_ref.config import PRESETS

TINY: dict[str, Any] = {"reduced_channels": 16, "d_model": 12, "depth": 1, "decoder_channels": (8, 8), "memory": 20}
TINY |= {"frm_width": 4, "frm_levels": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five good images, and tiny networks that are timed once."""
    monkeypatch.setitem(PRESETS, "plus", PRESETS["plus"] | TINY)
    monkeypatch.setattr(speed, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(speed, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "good").mkdir()
    for number, image in enumerate(good_images(5)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "good" / f"{number}.png")
    return tmp_path / "good"


def test_every_method_and_every_part_of_a_step_is_timed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "speed.json"
    flags = ["--data", str(folder), "--image-size", "32", "--batch", "2", "--seconds", "0", "--json", str(out)]
    assert speed.main(flags) == 0
    found = json.loads(out.read_text())
    rows = {row["method"]: row for row in found["judging, batch 2"]}
    methods = ["backbone alone", "PaDiM", "PatchCore 1%", "PatchCore 10%", "plus", "plus, memory alone"]
    assert list(rows) == [*methods, "plus, bfloat16", "PaDiM, bfloat16 backbone"]
    assert rows["backbone alone"]["ratio"] == 1
    assert all(0 < row["p20"] <= row["ms"] <= row["p80"] for row in rows.values())
    assert sum(rows["plus"]["shares"].values()) == pytest.approx(1)
    assert {"extractor.backbone", "mfrm", "memory", "frm", "rest"} == rows["plus"]["shares"].keys()
    step = found["training"]
    assert step.pop("a step with the reconstruction") > 0
    assert step.pop("a step") == pytest.approx(sum(step.values()))
    assert {"features", "search", "forward, the rest", "backward", "Adam"} == step.keys()
    assert "| plus, memory alone |" in capsys.readouterr().out


def test_whole_trainings_are_extrapolated_from_a_short_one_by_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 s without steps and 2 s a step at the other commit; half of both here."""
    turned: list[list[str]] = []
    spent = [0.0]

    def run(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == "git":
            turned.append(command)
        else:
            steps, share = int(command[command.index("--steps") + 1]), 1 + (cwd == speed.ROOT)
            spent[0] += (5 + 2 * steps) / share
            out = Path(command[command.index("--out") + 1])
            out.mkdir()
            lines = [{"images_per_second": rate} for rate in [0.1] * 6 + [2 * share] * 4]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(speed.resource, "getrusage", lambda _: SimpleNamespace(ru_utime=spent[0], ru_stime=0.0))
    other, this = speed.against("REV", ["--data", str(folder)], 3, {"REV": 100, "this": 50})
    assert (other["step"], other["without steps"], other["whole"]) == (2, 5, 205)
    assert (this["step"], this["without steps"], this["whole"]) == (1, 2.5, 52.5)
    assert [command[2] for command in turned] == ["add", "remove"]


def test_a_commit_that_git_does_not_know_is_refused_before_anything_is_timed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(["--data", str(folder), "--image-size", "32", "--against", "no-such-commit"]) == 2
    said = capsys.readouterr()
    assert "--against no-such-commit: git knows no such commit" in said.err
    assert not said.out
