"""Everything that is chosen: the network (ModelConfig), the training (TrainConfig), and the presets.

A checkpoint stores both as plain dictionaries and rebuilds its network from them. A field with a ``help`` text is a
flag of the commands (``image_size`` is ``--image-size``); every field can be set by ``--set NAME=VALUE``.

Source: ALMRR section 4.2 for ``paper``; ``plus`` is ours, for CPUs and a few hundred images (README, "Deviations").
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

VERSION = "0.1.0"
ENCODERS = ("mamba", "transformer", "cnn1x1", "cnn3x3")
RECONSTRUCTION_LOSSES = ("l2", "mse")
FRM_INPUTS = ("mean", "memory", "none")
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
        "for images much larger than that: side in pixels of the overlapping squares that are cut from them, for "
        "example 256; without it every image is resized whole",
    )
    standardise: str = _flag(
        "none",
        "give features mean 0 and deviation 1 over the good training images: per channel, or per channel and "
        "position, which is right for parts that always lie alike in the image",
        STANDARDISE,
    )
    reduced_channels: int = 1024  # C1; fewer input channels than this need no reduction
    patch_size: int = 4  # side of a token in cells of the feature grid; 4 gives 256 tokens
    d_model: int = 192
    depth: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    average_directions: bool = True  # halve the sum of both scan directions, as Vim's code does
    decoder_channels: tuple[int, int] = (256, 512)
    frm_input: str = _flag(
        "mean",
        "input of the refinement U-Net: the channel means of F and F_hat (paper); 'memory': also their error and the "
        "distance to a memory of good patches; 'none': no U-Net, the map is the feature distance (Table 5)",
        FRM_INPUTS,
    )
    # The next six hold for frm_input "memory" alone.
    projection_channels: int = 32  # of the learned 1x1 projection of the error
    memory: int = 48000  # patches of good images to store
    memory_weight: float = 0.6  # of the log distance to the nearest patch in the map's evidence; the U-Net's is 1
    distance_weight: float = 0.4  # of the log feature distance in the map's evidence
    balance: bool = True  # first give every kind of evidence mean 0 and deviation 1 over the peaks of good images
    frm_width: int = 64
    frm_levels: int = 5  # poolings in the U-Net, fewer if the feature grid is too small for them
    score_kernel: int = 9  # side in pixels of the mean filter over the map before the image score
    score_fraction: float = (
        0.0  # image score: mean of this fraction of the smoothed pixels, the highest; 0: the maximum
    )
    score_margin: int = 0  # pixels at the border of the map that the image score leaves out

    @property
    def feature_size(self) -> int:
        """Side of the common feature grid: that of the backbone's first block, 64 for images of 256 pixels."""
        return self.image_size // 4

    def __post_init__(self) -> None:
        _check_choice("--encoder", self.encoder, ENCODERS)
        _check_choice("--frm-input", self.frm_input, FRM_INPUTS)
        _check_choice("--standardise", self.standardise, STANDARDISE)
        if not self.blocks or not set(self.blocks) <= {1, 2, 3, 4} or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"--blocks are distinct numbers from 1 to 4, such as 1 2 3; got {list(self.blocks)}")
        if self.image_size % 32 or self.image_size < 32:
            raise ValueError(
                f"--image-size must be a multiple of 32, got {self.image_size}; "
                f"try {max(32, round(self.image_size / 32) * 32)}"
            )
        if self.tile is not None and self.tile < 32:
            raise ValueError(f"--tile must be at least 32 pixels, got {self.tile}")
        if self.patch_size < 1 or self.feature_size % self.patch_size:
            raise ValueError(f"patch_size must divide the feature grid of {self.feature_size}, got {self.patch_size}")
        _check_range("memory", self.memory, 1, float("inf"))
        _check_range("memory_weight", self.memory_weight, 0, float("inf"))
        _check_range("distance_weight", self.distance_weight, 0, float("inf"))
        _check_range("score_fraction", self.score_fraction, 0, 1)
        _check_range("score_margin", self.score_margin, 0, self.image_size / 2)
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
        "folder with texture images (such as DTD) to draw anomalies from; without it they are made from the training "
        "images and noise",
    )
    anomaly_style: str = "perlin"  # or "varied": half of the anomalies are lines, soft regions, faint changes of tone
    epochs: int = _flag(700, "passes over the training images")
    steps: int | None = _flag(None, "number of optimiser steps, in place of --epochs")
    batch_size: int = _flag(4, "images a step, of all processes together under torchrun")
    lr: float = _flag(1e-4, "learning rate of Adam")
    schedule: str = "constant"  # or "cosine": of the learning rate
    warmup: int = 0  # steps over which the learning rate rises from 0
    seed: int = _flag(0, "seed of everything random")
    rec_loss: str = "l2"  # Eq. (7) as the mean length of the error vectors; or "mse", the mean square
    detach_reconstruction: bool = False  # keep the gradient of L_ref out of the reconstruction module
    focal_gamma: float = 2.0
    clean_probability: float = 0.5  # of a sample to stay without an anomaly
    holdout: float = _flag(0.1, "fraction of the good training images kept aside to set the threshold")
    parts: str | None = _flag(
        None,
        "regular expression whose first group says which part a file shows, such as 'part([0-9]+)_', where several "
        "images show the same part: whole parts are then kept aside, and no image is compared with another of its own "
        "part while training; it is searched in the path below --data",
    )
    false_positive_rate: float = _flag(0.01, "fraction of good images that the threshold may call defective")
    workers: int = _flag(0, "processes that prepare samples beside each process that trains")
    amp: bool = _flag(False, "compute in bfloat16 where that is safe")
    save_minutes: float = 5.0  # time between checkpoints

    def __post_init__(self) -> None:
        _check_choice("anomaly_style", self.anomaly_style, ANOMALY_STYLES)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("rec_loss", self.rec_loss, RECONSTRUCTION_LOSSES)
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
        _check_range("--holdout", self.holdout, 0, 1)
        _check_range("--false-positive-rate", self.false_positive_rate, 0, 1)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "plus": {
        "standardise": "position",
        "reduced_channels": 128,
        "d_model": 96,
        "depth": 4,
        "decoder_channels": (128, 128),
        "frm_input": "memory",
        "frm_width": 16,
        "anomaly_style": "varied",
        "score_fraction": 0.005,
        "score_margin": 12,
        "steps": 2000,
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup": 50,
        "detach_reconstruction": True,
    },
}
Config = TypeVar("Config", ModelConfig, TrainConfig)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        limit = "" if high == float("inf") else f" and below {high:g}"
        raise ValueError(f"{name} must be at least {low:g}{limit}, got {value}")


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


def make_configs(preset: str, given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """Combine defaults, a preset and the values given by the user, the last winning.

    Raises:
        ValueError: if the preset is unknown or a value is out of its range.
    """
    _check_choice("--preset", preset, tuple(PRESETS))
    values = {**PRESETS[preset], **given}
    if "epochs" in given and "steps" not in given:
        values["steps"] = None
    return from_dict(ModelConfig, values), from_dict(TrainConfig, values)


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config from a dictionary, taking the fields it knows; lists become tuples."""
    names = {entry.name for entry in dataclasses.fields(config_class)}
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    return config_class(**known)
