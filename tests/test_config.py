"""Configuration: presets, and one clear line for values that cannot be."""

import dataclasses
from typing import Any

import pytest

from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, from_dict, make_configs
from almrr_ref.demo.surfaces import demo_defaults


def test_the_paper_preset_has_the_papers_values() -> None:
    model, train = make_configs("paper", {})
    assert (model.backbone, model.blocks, model.image_size, model.feature_size) == ("resnet50", (1, 2, 3), 256, 64)
    assert (model.d_model, model.depth, model.patch_size, model.reduced_channels) == (192, 8, 4, 1024)
    assert (train.lr, train.batch_size, train.epochs, train.steps, train.schedule) == (1e-4, 4, 700, None, "constant")


def test_given_values_win_over_the_preset_and_epochs_replace_its_steps() -> None:
    fields = vars(ModelConfig()) | vars(TrainConfig())
    assert all(values.keys() <= fields.keys() for values in PRESETS.values())
    model, train = make_configs("plus", {"steps": 7, "lr": 0.5, "frm_input": "mean"})
    assert (train.steps, train.lr, train.schedule, model.frm_input, model.depth) == (7, 0.5, "cosine", "mean", 4)
    assert make_configs("plus", {"epochs": 3})[1].steps is None
    assert make_configs("plus", {"epochs": 3, "steps": 7})[1].steps == 7
    stored = {**dataclasses.asdict(model), "blocks": list(model.blocks), "of_a_later_version": 1}
    assert from_dict(ModelConfig, stored) == model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": ()}, "--blocks"),
        ({"blocks": (1, 5)}, "from 1 to 4"),
        ({"image_size": 100}, "--image-size must be a multiple of 32, got 100; try 96"),
        ({"patch_size": 3}, "patch_size must divide the feature grid of 64, got 3"),
        ({"encoder": "lstm"}, "--encoder is one of mamba, transformer, .*; got 'lstm'"),
        ({"frm_input": "error"}, "--frm-input is one of mean, memory, none; got 'error'"),
        ({"tile": 8}, "--tile must be at least 32 pixels, got 8"),
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"distance_weight": float("nan")}, "distance_weight must be at least 0"),
        ({"score_kernel": 4}, "score_kernel must be odd"),
        ({"score_fraction": 1.0}, "score_fraction must be at least 0 and below 1, got 1"),
        ({"score_margin": 128}, "score_margin must be at least 0 and below 128"),
        ({"anomaly_style": "cubist"}, "anomaly_style is one of perlin, varied"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"batch_size": 0}, "--batch-size must be above 0"),
        ({"steps": 0}, "--steps"),
        ({"seed": -1}, "--seed must lie between 0 and"),
        ({"holdout": 1.0}, "--holdout must be at least 0 and below 1, got 1"),
        ({"false_positive_rate": -0.1}, "--false-positive-rate"),
        ({"parts": "part["}, "--parts 'part\\[' is no regular expression"),
        ({"parts": "part"}, "--parts needs a group"),
    ],
)
def test_impossible_values_are_refused_by_their_flag_or_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_configs("paper", values)
    with pytest.raises(ValueError, match="--preset is one of paper, plus; got 'large'"):
        make_configs("large", values)


def test_the_demo_takes_minutes_and_loose_textures_and_the_papers_preset_keeps_its_schedule() -> None:
    model, training = make_configs("plus", demo_defaults("plus", {}))
    assert (model.backbone, model.standardise) == ("efficientnet_lite0", "channel")
    assert (model.memory, training.steps) == (2000, 200)
    assert "steps" not in demo_defaults("plus", {"epochs": 3})
    assert demo_defaults("paper", {}) == {"backbone": "efficientnet_lite0"}
