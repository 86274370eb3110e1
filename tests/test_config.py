"""Configuration: presets, and one clear line for values that cannot be."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almrr_ref.config import DEMO, PRESETS, ModelConfig, TrainConfig, from_dict, make_configs


def test_the_paper_preset_has_the_papers_values() -> None:
    model, train = make_configs("paper", {})
    assert (model.backbone, model.blocks, model.size) == ("resnet50", (1, 2, 3), (256, 256))
    assert model.feature_size == (64, 64)
    assert (model.d_model, model.depth, model.patch_size, model.reduced_channels) == (192, 8, 4, 1024)
    assert (train.lr, train.batch_size, train.epochs, train.steps, train.schedule) == (1e-4, 4, 700, None, "constant")


def test_given_values_win_over_the_preset_and_epochs_replace_its_steps() -> None:
    fields = vars(ModelConfig()) | vars(TrainConfig())
    assert all(values.keys() <= fields.keys() for values in PRESETS.values())
    model, train = make_configs("plus", {"steps": 7, "lr": 0.5, "frm_input": "mean"})
    assert (train.steps, train.lr, train.schedule, model.frm_input, model.depth) == (7, 0.5, "cosine", "mean", 2)
    assert make_configs("plus", {"epochs": 3})[1].steps is None
    assert make_configs("plus", {"epochs": 3, "steps": 7})[1].steps == 7
    stored = {**dataclasses.asdict(model), "blocks": list(model.blocks), "of_a_later_version": 1}
    assert from_dict(ModelConfig, stored) == model


COMPLAINTS: list[tuple[str, Any, str]] = [
    ("blocks", (1, 5), "--blocks .* from 1 to 4"),
    ("blocks", (2, 1), "--blocks .* from 1 to 4"),
    ("weights", "checkpoint", "--weights checkpoint"),
    ("image_size", 100, "--image-size .*100; try 96"),
    ("patch_size", 3, "patch_size must divide the feature grid of 64x64"),
    ("encoder", "lstm", "--encoder is one of mamba, transformer, .*'lstm'"),
    ("tile", 8, "--tile must be at least 32, got 8"),
    ("distance_weight", float("nan"), "distance_weight must be at least 0"),
    ("score_kernel", 4, "score_kernel must be odd"),
    ("anomaly_style", "cubist", "anomaly_style is one of perlin, varied"),
    ("lr", float("nan"), "--lr must be at least 1e-12"),
    ("lr", 0.0, "--lr must be at least 1e-12, got 0"),
    ("clean_probability", 1.5, "clean_probability must be at most 1, got 1.5"),
    ("save_minutes", float("nan"), "save_minutes must be at least 0, got nan"),
    ("batch_size", 0, "--batch-size must be at least 1"),
    ("batch_size", 10**22, "--batch-size must be at least 1 and below 4097, got 1"),
    ("holdout", 1.0, "--holdout must be at least 0 and below 1, got 1"),
    ("parts", "part[", "--parts 'part\\[' is no regular expression"),
    ("parts", "part", "--parts needs a group"),
    ("batch_size", 2.5, "--batch-size takes int; got float 2.5"),
    ("steps", "2", r"--steps takes int \| None; got str '2'"),
    ("lr", "1e-3", "--lr takes float; got str '1e-3'"),
    ("epochs", True, "--epochs takes int; got bool True"),
    ("roi", np.zeros((4, 4)), r"--roi takes str \| None; got ndarray array"),
    ("blocks", 3, r"--blocks takes tuple\[int, ...\]; got int 3"),
    ("decoder_channels", (1, "2"), r"decoder_channels takes tuple\[int, int\]; got tuple \(1, '2'\)"),
    ("patch_size", None, "patch_size takes int; got NoneType None"),
]


@pytest.mark.parametrize(("name", "value", "message"), COMPLAINTS)
def test_an_impossible_value_is_refused_by_its_flag_or_setting(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_configs("paper", {name: value})
    with pytest.raises(ValueError, match="--preset is one of paper, plus; got 'large'"):
        make_configs("large", {})


def test_paths_and_numbers_of_numpy_become_what_a_checkpoint_holds() -> None:
    values = {"weights": Path("w.pth"), "roi": Path("roi.png"), "lr": np.float64(0.5), "seed": np.int64(3)}
    model, train = make_configs("paper", {**values, "blocks": np.array([1, 2]), "image_size": np.array([64, 32])})
    settled = (model.weights, train.roi, train.lr, train.seed, model.blocks, model.image_size)
    assert settled == ("w.pth", "roi.png", 0.5, 3, (1, 2), (64, 32))
    assert list(map(type, settled)) == [str, str, float, int, tuple, tuple]


def test_the_demo_takes_minutes_and_the_papers_preset_keeps_its_schedule() -> None:
    model, training = make_configs("plus", {}, DEMO["plus"])
    assert (model.backbone, model.standardise) == ("efficientnet_lite0", "auto")
    assert (model.memory, training.steps) == (2000, 200)
    assert make_configs("plus", {"epochs": 3}, DEMO["plus"])[1].steps is None
    assert make_configs("plus", {"memory": 9}, DEMO["plus"])[0].memory == 9
    assert make_configs("paper", {}, DEMO["paper"])[1] == TrainConfig()
