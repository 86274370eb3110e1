"""Everything that is chosen: the network (ModelConfig), the training (TrainConfig), and the presets.

A checkpoint stores both as plain dictionaries, so that it can rebuild its network by itself. A field with a ``help``
text is also a command-line flag (``image_size`` is ``--image-size``; cli.py makes them); the rest is set by a preset or
from Python.

Source: ALMRR section 4.2 for the values of ``paper``; ``small`` and ``plus`` are ours, for CPUs and small
sets (README, "Deviations").
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

ENCODERS = ("mamba", "transformer", "cnn1x1", "cnn3x3")
REC_LOSSES = ("l2", "mse")
FRM_INPUTS = ("mean", "error", "projection", "memory", "none")
STANDARDISE = ("none", "channel", "position")
ANOMALY_STYLES = ("perlin", "varied")
SCHEDULES = ("constant", "cosine")


def _flag(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The network; the defaults are the paper's sizes.

    Raises:
        ValueError: if a value is out of its range or two values do not fit together.
    """

    backbone: str = _flag(
        "resnet50", "frozen network that supplies the features: resnet18, resnet34, resnet50, vgg19, efficientnet_lite0"
    )
    weights: str | None = _flag(
        None, "file with the backbone's ImageNet weights, or 'random'; without it: torch hub's cache, then a download"
    )
    blocks: tuple[int, ...] = _flag((1, 2, 3), "blocks of the backbone whose outputs are used, 1 to 4")
    encoder: str = _flag("mamba", "encoder of the reconstruction module", ENCODERS)
    image_size: int = _flag(256, "side in pixels to which images are resized")
    tile: int | None = _flag(
        None,
        "for images much larger than that: side in pixels of the overlapping squares that are cut from "
        "them, for example 256; without it every image is resized whole",
    )
    standardise: str = _flag(
        "none",
        "give features mean 0 and deviation 1 over the good training images: per channel, or per channel and "
        "position, which is right for parts that always lie alike in the image",
        STANDARDISE,
    )
    reduced_channels: int = 1024  # C1; fewer input channels than this need no reduction
    patch_size: int = _flag(4, "side of a token in cells of the feature grid (paper: 4, which gives 256 tokens)")
    d_model: int = 192
    depth: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    average_directions: bool = True  # halve the sum of both scan directions, as Vim's code does
    decoder_channels: tuple[int, int] = (256, 512)
    frm_input: str = _flag(
        "mean",
        "what the refinement U-Net sees: channel means of both feature blocks (paper); also the "
        "squared error per stage; also a learned projection of the error; also the distance to the memory's nearest "
        "patch (needs --memory); or 'none': no U-Net, the bare feature distance (Table 5)",
        FRM_INPUTS,
    )
    distance_weight: float = _flag(
        0.0,
        "weight of the log feature distance in the map's evidence, beside the U-Net's 1; needs --frm-input "
        "error or more",
    )
    memory: int = _flag(
        0, "patches of good images to store; how far an image is from the nearest joins the map's evidence (memory.py)"
    )
    memory_weight: float = _flag(1.0, "weight of the logarithm of that distance, beside the U-Net's 1")
    balance: bool = _flag(
        False, "before the weights, give every kind of evidence mean 0 and deviation 1 over the peaks of good images"
    )
    projection_channels: int = 32  # of the error, for frm_input "projection" and "memory"
    frm_width: int = 64
    frm_levels: int = 5  # poolings in the U-Net, fewer if the feature grid is too small for them
    score_kernel: int = 9  # side in pixels of the mean filter over the map before the image score
    score_share: float = _flag(
        0.0, "image score: mean of this share of the smoothed map's pixels, the highest; 0: the highest one"
    )
    score_margin: int = _flag(0, "pixels at the border of the map that the image score leaves out")

    @property
    def feature_size(self) -> int:
        """Side of the common feature grid: that of the backbone's first block, 64 for images of 256 pixels."""
        return self.image_size // 4

    def __post_init__(self) -> None:
        _check_choice("encoder", self.encoder, ENCODERS)
        _check_choice("frm-input", self.frm_input, FRM_INPUTS)
        _check_choice("standardise", self.standardise, STANDARDISE)
        if (
            not self.blocks
            or any(b not in (1, 2, 3, 4) for b in self.blocks)
            or len(set(self.blocks)) < len(self.blocks)
        ):
            raise ValueError(f"--blocks are distinct numbers from 1 to 4, such as 1 2 3; got {list(self.blocks)}")
        if self.image_size % 32 or self.image_size < 32:
            raise ValueError(
                f"--image-size must be a multiple of 32, got {self.image_size}; "
                f"try {max(32, round(self.image_size / 32) * 32)}"
            )
        if self.tile is not None and self.tile < 32:
            raise ValueError(f"--tile must be at least 32 pixels, got {self.tile}")
        if self.patch_size < 1 or self.feature_size % self.patch_size:
            raise ValueError(f"--patch-size must divide the feature grid of {self.feature_size}; got {self.patch_size}")
        if not 0 <= self.distance_weight < float("inf"):
            raise ValueError(f"--distance-weight must be 0 or more, got {self.distance_weight}")
        if self.memory < 0 or not 0 < self.memory_weight < float("inf"):
            raise ValueError(f"--memory and --memory-weight are above 0, got {self.memory} and {self.memory_weight}")
        if self.memory and self.frm_input == "none":
            raise ValueError("the memory adds to the U-Net's map, and --frm-input none has no U-Net")
        if not self.memory and self.frm_input == "memory":
            raise ValueError("--frm-input memory needs patches: give --memory, such as 48000")
        if self.distance_weight and self.frm_input in ("mean", "none"):
            raise ValueError(f"--distance-weight {self.distance_weight} needs --frm-input error, not {self.frm_input}")
        if not 0 <= self.score_share < 1:
            raise ValueError(f"--score-share is a share from 0 up to 1, got {self.score_share}")
        if not 0 <= self.score_margin < self.image_size / 2:
            raise ValueError(f"--score-margin leaves nothing of {self.image_size} pixels: {self.score_margin}")
        if self.score_kernel < 1 or self.score_kernel % 2 == 0:
            raise ValueError(f"score_kernel must be odd and above 0, got {self.score_kernel}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's (section 4.2) where it states them.

    Raises:
        ValueError: if a value is out of its range.
    """

    data: str = _flag("demo", "folder with images (MVTec, BTAD, MT-Defect, NanoTWICE, or just good images), or 'demo'")
    anomaly_source: str | None = _flag(
        None,
        "folder with texture images (such as DTD) to draw anomalies from; without it "
        "they are made from the training images and noise",
    )
    anomaly_style: str = _flag(
        "perlin",
        "simulated anomalies: Perlin-shaped regions of texture (paper), or half of them lines, soft regions "
        "and faint changes of tone",
        ANOMALY_STYLES,
    )
    epochs: int = _flag(700, "passes over the training images")
    steps: int | None = _flag(None, "number of optimiser steps, in place of --epochs")
    batch_size: int = _flag(4, "images a step, of all processes together under torchrun")
    lr: float = _flag(1e-4, "learning rate of Adam")
    schedule: str = _flag("constant", "course of the learning rate", SCHEDULES)
    warmup: int = 0  # steps over which the learning rate rises from 0
    seed: int = _flag(0, "seed of everything random")
    rec_loss: str = _flag("l2", "form of Eq. (7): mean length of the error vectors, or mean square", REC_LOSSES)
    detach_reconstruction: bool = False  # keep the gradient of L_ref out of the reconstruction module
    focal_gamma: float = 2.0
    focal_alpha: float | None = None
    clean_probability: float = 0.5  # share of the samples left without an anomaly
    rotate_probability: float = 0.0  # share of the clean images rotated by up to 90 degrees, borders reflected
    holdout: float = _flag(0.1, "share of the good training images kept aside to set the threshold")
    parts: str | None = _flag(
        None,
        "regular expression whose first group says which part a file shows, such as 'part([0-9]+)_', where "
        "several images show the same part: then whole parts are kept aside, and no image is compared with another of "
        "its own part while training; it is searched in the path below --data",
    )
    false_positive_rate: float = _flag(0.01, "share of good images that the threshold may call defective")
    workers: int = _flag(0, "processes that prepare samples beside each process that trains")
    amp: bool = _flag(False, "compute in bfloat16 where that is safe")
    save_minutes: float = 5.0  # time between checkpoints

    def __post_init__(self) -> None:
        _check_choice("anomaly-style", self.anomaly_style, ANOMALY_STYLES)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("rec-loss", self.rec_loss, REC_LOSSES)
        for name in ("epochs", "batch_size", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**23:
            raise ValueError(f"--seed must lie between 0 and {2**23 - 1}, got {self.seed}")
        if self.parts is not None:
            check_parts(self.parts)
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, got {self.workers}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout is a share from 0 up to 1, got {self.holdout}")
        if not 0 <= self.false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate is a share from 0 up to 1, got {self.false_positive_rate}")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "standardise": "channel",
        "reduced_channels": 128,
        "d_model": 96,
        "depth": 4,
        "decoder_channels": (128, 128),
        "frm_input": "error",
        "distance_weight": 2.0,
        "frm_width": 16,
        "steps": 2000,
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup": 50,
        "detach_reconstruction": True,
    },
}
PRESETS["plus"] = PRESETS["small"] | {
    "standardise": "position",
    "frm_input": "memory",
    "anomaly_style": "varied",
    "distance_weight": 0.4,
    "memory": 48000,
    "memory_weight": 0.6,
    "balance": True,
    "score_share": 0.005,
    "score_margin": 12,
    "steps": 2000,
}
Config = TypeVar("Config", ModelConfig, TrainConfig)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} is one of {', '.join(choices)}; got {value!r}")


def check_parts(pattern: str) -> None:
    """Refuse a ``--parts`` that is no regular expression with a group.

    Raises:
        ValueError: naming what is wrong.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"--parts '{pattern}' is no regular expression: {error}") from error
    if not groups:
        raise ValueError(f"--parts needs a group in parentheses, such as 'part([0-9]+)_'; got '{pattern}'")


def demo_defaults(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """What --data demo means where nothing else is said: weights that pip brings, and minutes on two cores.

    Its textures lie otherwise in every image: features are standardised per channel, not per position.
    """
    defaults: dict[str, Any] = {"backbone": "efficientnet_lite0"}
    if preset == "plus":
        defaults |= {"standardise": "channel", "memory": 2000}
    if preset != "paper" and "epochs" not in given:
        defaults["steps"] = 200
    return defaults


def make_configs(preset: str, given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """Combine defaults, a preset and the values given by the user, the last winning.

    Raises:
        ValueError: if the preset is unknown or a value is out of its range.
    """
    _check_choice("preset", preset, tuple(PRESETS))
    values = {**PRESETS[preset], **given}
    if "epochs" in given and "steps" not in given:
        values["steps"] = None
    if given.get("frm_input", "error") in ("mean", "none") and "distance_weight" not in given:
        values["distance_weight"] = 0.0
    if given.get("frm_input") == "none":
        values["memory"] = 0
    return from_dict(ModelConfig, values), from_dict(TrainConfig, values)


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config from a dictionary, taking the fields it knows; lists become tuples."""
    names = {entry.name for entry in dataclasses.fields(config_class)}
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    return config_class(**known)
