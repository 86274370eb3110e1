"""A region drawn into a checkpoint: what is judged, what the network sees, what the calibration still says."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TINY, build_random, good_images
from torch import Tensor
from trust_cases import same

from almrr_ref import Detector
from almrr_ref.calibration.by_hand import set_region, set_threshold
from almrr_ref.config import TrainConfig
from almrr_ref.data.roi import draw_region, encode_roi
from almrr_ref.run.checkpoint import read_checkpoint, save_checkpoint, write_checkpoint

SEEN = torch.zeros(64, 64, dtype=torch.bool)
SEEN[8:, 4:60] = True
DRAWN = torch.zeros(64, 64, dtype=torch.bool)
DRAWN[:40, :32] = True
PNG = draw_region([[(0, 0), (0.5, 0), (0.5, 0.625), (0, 0.625)]], (64, 64))
CHANGES: dict[str, Any] = {"frm_input": "memory", "roi_png": encode_roi(SEEN)}
FIGURES = {"good_scores": [0.3, 0.2], "intervals": [[0.0, 0.5]] * 3, "simulated_scores": [[1.0, 0.9]]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One without a word on drawn regions, as earlier versions wrote them."""
    model, path = build_random(**CHANGES), tmp_path / "last.pt"
    configs = dataclasses.replace(TINY, **CHANGES), TrainConfig()
    calibration = {"images": [], "thresholds": [{"value": 0.4}], **FIGURES}
    save_checkpoint(path, configs, model.state_dict(), 0.4, {"steps": 0}, calibration)
    content = read_checkpoint(path)
    del content["model_config"]["judged_png"]
    write_checkpoint(path, content)
    (tmp_path / "calibration.json").write_text('{"threshold": 0.4}')
    return path


def maps(path: Path) -> Tensor:
    return Detector.load(path, "cpu", fuse=False).model.pixel_maps(good_images(2))


def test_a_drawn_region_is_judged_alone_and_changes_nothing_that_the_network_sees(checkpoint: Path) -> None:
    before, stored = maps(checkpoint), read_checkpoint(checkpoint)
    set_region(checkpoint, PNG)
    judged = SEEN & DRAWN
    assert bool(before[:, :, SEEN].min() > 0)
    assert maps(checkpoint).equal(before.where(judged, 0.0)), "inside to the last bit"
    plain, folded = (Detector.load(checkpoint, "cpu", fuse=fuse).model for fuse in (False, True))
    for model in (plain, folded):
        assert model.roi is not None
        assert model.roi.equal(judged)
        assert model.extractor.roi.equal(SEEN)  # type: ignore[union-attr, operator]
        assert bool(folded.smooth(before)[:, :, ~judged].isneginf().all())
    after = read_checkpoint(checkpoint)
    assert after["calibration"].pop("regions") == [None, PNG]
    assert after["model_config"].pop("judged_png") == PNG
    assert same(after, stored), "nothing else changes"


def test_the_report_says_what_a_threshold_set_by_hand_finds(checkpoint: Path) -> None:
    """Not what the earlier one found."""
    for threshold, found in ((0.95, 0.0), (0.85, 1.0)):
        set_threshold(checkpoint, threshold)
        report = json.loads((checkpoint.parent / "calibration.json").read_text())
        assert (report["threshold"], report["simulated"]) == (threshold, {"all": found, "100%": found})


def test_figures_of_another_region_are_left_out_until_it_is_back(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = checkpoint.with_name("calibration.json")
    assert FIGURES.items() <= (Detector.load(checkpoint, "cpu").calibration or {}).items()
    assert not caplog.messages
    set_region(checkpoint, PNG)
    with caplog.at_level(logging.WARNING):
        calibration = Detector.load(checkpoint, "cpu").calibration
    assert calibration is not None
    assert not FIGURES.keys() & calibration.keys()
    assert calibration["thresholds"] == [{"value": 0.4}]
    assert ["run python -m almrr_ref.calibrate" in said for said in caplog.messages] == [True]
    assert "calibrate again" in json.loads(report.read_text())["outdated"]
    set_region(checkpoint, PNG)
    set_region(checkpoint, None)
    assert FIGURES.items() <= (Detector.load(checkpoint, "cpu").calibration or {}).items()
    assert json.loads(report.read_text()) == {"threshold": 0.4, "outdated": None}
    assert read_checkpoint(checkpoint)["calibration"]["regions"] == [None, PNG, None]


def test_a_region_that_does_not_suit_leaves_the_checkpoint_as_it_is(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="has 0 white pixels"):
        set_region(checkpoint, draw_region([[(0, 0), (1, 0), (1, 0.12), (0, 0.12)]], (64, 64)))
    assert checkpoint.read_bytes() == before
    content = read_checkpoint(checkpoint)
    write_checkpoint(checkpoint, {name: value for name, value in content.items() if name != "calibration"})
    with pytest.raises(ValueError, match="no record of its good images"):
        set_region(checkpoint, PNG)
