"""Configuration: presets, flags from fields, and one clear line for values that cannot be."""

import argparse
import dataclasses

import pytest

from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, demo_defaults, from_dict, make_configs
from almrr_ref.run.cli import add_flags


def test_paper_preset_has_the_papers_values() -> None:
    model, train = make_configs("paper", {})
    assert (model.backbone, model.blocks, model.image_size, model.feature_size) == ("resnet50", (1, 2, 3), 256, 64)
    assert (model.d_model, model.depth, model.patch_size, model.reduced_channels) == (192, 8, 4, 1024)
    assert (train.lr, train.batch_size, train.epochs, train.steps, train.schedule) == (1e-4, 4, 700, None, "constant")


def test_given_values_win_over_the_preset_and_epochs_replace_its_steps() -> None:
    _, train = make_configs("small", {"epochs": 3})
    assert (train.epochs, train.steps) == (3, None)
    _, train = make_configs("small", {"steps": 7, "lr": 0.5})
    assert (train.steps, train.lr) == (7, 0.5)


def test_another_input_of_the_u_net_drops_the_presets_distance_weight() -> None:
    assert make_configs("small", {})[0].distance_weight > 0
    assert make_configs("small", {"frm_input": "mean"})[0].distance_weight == 0
    with pytest.raises(ValueError, match="needs --frm-input error"):
        make_configs("paper", {"distance_weight": 1.0})


def test_every_preset_names_existing_fields() -> None:
    fields = {f.name for config in (ModelConfig, TrainConfig) for f in dataclasses.fields(config)}
    for values in PRESETS.values():
        assert set(values) <= fields


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": ()}, "--blocks"),
        ({"blocks": (1, 5)}, "from 1 to 4"),
        ({"blocks": (2, 2)}, "distinct"),
        ({"image_size": 100}, "multiple of 32, got 100; try 96"),
        ({"patch_size": 3}, "--patch-size must divide"),
        ({"encoder": "lstm"}, "mamba, transformer"),
        ({"tile": 8}, "--tile"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"steps": 0}, "--steps"),
        ({"holdout": 1.0}, "--holdout"),
        ({"false_positive_rate": -0.1}, "--false-positive-rate"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_impossible_values_are_refused_with_their_flag(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_configs("paper", values)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="paper, small"):
        make_configs("large", {})


def test_flags_come_from_the_fields_and_absent_ones_stay_absent() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    add_flags(parser, ModelConfig)
    given = vars(
        parser.parse_args(["--blocks", "1", "2", "--steps", "9", "--amp", "--lr", "1e-3", "--encoder", "cnn3x3"])
    )
    assert given == {"blocks": [1, 2], "steps": 9, "amp": True, "lr": 1e-3, "encoder": "cnn3x3"}
    model, _ = make_configs("paper", given)
    assert model.blocks == (1, 2)
    assert "--tile" in parser.format_help()


def test_a_config_survives_the_way_through_a_dictionary() -> None:
    model, _ = make_configs("small", {"blocks": [2, 3]})
    stored = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(model).items()}
    assert from_dict(ModelConfig, {**stored, "of_a_later_version": 1}) == model


def test_the_demo_takes_minutes_and_loose_textures_unless_told_otherwise() -> None:
    """A flag that is given wins, and the paper's preset keeps the paper's schedule."""
    chosen = {**demo_defaults("plus", {}), "weights": "random"}
    model, training = make_configs("plus", chosen)
    assert (model.standardise, model.memory, training.steps) == ("channel", 2000, 200)
    assert demo_defaults("small", {}) == {"backbone": "efficientnet_lite0", "steps": 200}
    assert "steps" not in demo_defaults("plus", {"epochs": 3})
    assert demo_defaults("paper", {}) == {"backbone": "efficientnet_lite0"}
    kept = demo_defaults("plus", {"memory": 7}) | {"memory": 7}
    assert kept["memory"] == 7
