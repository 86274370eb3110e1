"""bench/rate.py on a tiny network: it takes the steps that `train` takes; no time is asserted."""

import json
from pathlib import Path

import pytest
import rate

from almrr_ref.config import PRESETS
from almrr_ref.training import Trainer

TINY = {"reduced_channels": 16, "d_model": 12, "depth": 1, "decoder_channels": (8, 8), "frm_width": 4, "memory": 20}


def test_the_reconstruction_learns_in_every_fourth_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "plus", PRESETS["plus"] | TINY)
    spared: list[bool] = []
    step = Trainer.step

    def watched(self: Trainer, *arguments: object) -> object:
        losses = step(self, *arguments)  # type: ignore[arg-type]
        spared.append("rec" not in losses)
        assert self.model.extractor.stand_in, "the backbone is folded, as in training"
        return losses

    monkeypatch.setattr(Trainer, "step", watched)
    flags = ["--preset", "plus", "--backbone", "resnet18", "--image-size", "32", "--images", "4", "--device", "cpu"]
    assert rate.main([*flags, "--seconds", "0", "--json", str(tmp_path / "rate.json")]) == 0
    assert spared[:5] == [False, True, True, True, False]
    assert json.loads((tmp_path / "rate.json").read_text())["steps_per_second"] > 0
