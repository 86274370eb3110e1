"""Everything that is chosen: the network (ModelConfig), the training (TrainConfig), and the presets.

A checkpoint stores both as plain dictionaries and rebuilds its network from them. A field with a ``help`` text is a
flag of the commands (``image_size`` is ``--image-size``); every field can be set by ``--set NAME=VALUE``.

Source: ALMRR section 4.2 for ``paper``; ``plus`` is ours, for CPUs and a few hundred images (README, "Deviations").
"""

import dataclasses
import math
import os
import re
import reprlib
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import numpy as np

VERSION = "0.1.0"


def _field(
    default: Any, help: str = "", choices: tuple[str, ...] = (), least: float = -math.inf, below: float = math.inf
) -> Any:
    metadata = {"help": help, "choices": choices, "least": least, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


def flag_or_name(entry: dataclasses.Field[Any]) -> str:
    """The user's name of a field: --image-size if it is a flag, frm_width if it is set by ``--set``."""
    return "--" + entry.name.replace("_", "-") if entry.metadata.get("help") else entry.name


def _as_size(value: Any) -> tuple[int, int] | str:
    """A value for ``image_size`` ("auto", the side of a square, or height and width) -> "auto", or (height, width)."""
    sides = list(value) if isinstance(value, tuple | list) else [value]
    if sides == ["auto"]:
        return "auto"
    if not 1 <= len(sides) <= 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"--image-size is auto, one number, or height and width; got {value!r}")
    if any(side % 32 or side < 32 for side in sides):
        got, nearest = " ".join(map(str, sides)), " ".join(str(nearest_side(side)) for side in sides)
        raise ValueError(f"--image-size must be multiples of 32, at least 32; got {got}; try {nearest}")
    return sides[0], sides[-1]


def nearest_side(length: float) -> int:
    """A length in pixels -> the nearest that an image may have: a multiple of 32."""
    return max(32, round(length / 32) * 32)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number is a number, too, but True is none."""
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(kind)[0]) for one in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def _settle_fields(config: "ModelConfig | TrainConfig") -> None:
    """Turn paths and numpy into what a checkpoint holds; raise a ValueError for a value that cannot be."""
    for entry in dataclasses.fields(config):
        given, name, limits = getattr(config, entry.name), flag_or_name(entry), entry.metadata
        value = os.fspath(given) if isinstance(given, os.PathLike) else given
        value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        value = tuple(value) if isinstance(value, list) else value
        if entry.name == "image_size":
            value = _as_size(value)
        object.__setattr__(config, entry.name, value)
        if not _fits(value, entry.type):
            kind, came = entry.type.__name__ if isinstance(entry.type, type) else entry.type, reprlib.repr(given)
            raise ValueError(f"{name} takes {kind}; got {type(given).__name__} {' '.join(came.split())}")
        if not limits or value is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{name} is one of {', '.join(limits['choices'])}; got {value!r}")
        if isinstance(value, int | float) and not limits["least"] <= value < limits["below"]:
            below = "" if limits["below"] == math.inf else f" and below {limits['below']:g}"
            raise ValueError(f"{name} must be at least {limits['least']:g}{below}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The network; the defaults are the paper's sizes. ValueError if a value cannot be or two do not fit together."""

    backbone: str = _field("resnet50", "frozen network: resnet18, resnet34, resnet50, vgg19, efficientnet_lite0")
    weights: str | None = _field(
        None, "file with the backbone's ImageNet weights, or 'random'; without it: torch hub's cache, then a download"
    )
    blocks: tuple[int, ...] = _field((1, 2, 3), "blocks of the backbone to use, 1 to 4; the memory skips the first")
    encoder: str = _field("mamba", "encoder of the reconstruction module", ("mamba", "transformer", "cnn1x1", "cnn3x3"))
    image_size: tuple[int, int] | str = _field(
        (256, 256),
        "height and width in pixels to which images are resized, multiples of 32; one number for a square; auto: the "
        "median shape of the training images, at the area of --pixels",
    )
    pixels: int = _field(256, "with --image-size auto: side in pixels of the square of the same area", least=32)
    tile: int | None = _field(
        None,
        "for images much larger than that: side in pixels of the overlapping squares that are cut from them, for "
        "example 256; without it every image is resized whole",
        least=32,
    )
    bits: int | None = _field(
        None,
        "significant bits of 16-bit images, such as 10, 12 or 14 (default: found from the training images)",
        least=8,
        below=17,
    )
    float_white: float | None = _field(None, least=1e-9)  # white of float images; found from the training images
    standardise: str = _field(
        "none",
        "give features mean 0 and deviation 1 over the good training images: per channel, or per channel and "
        "position, which is right for parts that always lie alike in the image; auto: as the training images show",
        ("none", "channel", "position", "auto"),
    )
    level_brightness: bool = False  # bring every image to the brightness of the training images first, but no tiles
    brightness: float | None = _field(None, least=0)  # which one, in 0..1; found from the training images
    reduced_channels: int = _field(1024, least=1)  # C1; fewer input channels than this need no reduction
    patch_size: int = _field(4, least=1)  # side of a token in cells of the feature grid; 4 gives 256 tokens
    d_model: int = _field(192, least=1)
    depth: int = _field(8, least=1)
    d_state: int = _field(16, least=1)
    d_conv: int = _field(4, least=1)
    expand: int = _field(2, least=1)
    average_directions: bool = True  # halve the sum of both scan directions, as Vim's code does
    decoder_channels: tuple[int, int] = (256, 512)
    frm_input: str = _field(
        "mean",
        "input of the refinement U-Net: the channel means of F and F_hat (paper); 'memory': also their error and the "
        "distance to a memory of good patches; 'none': no U-Net, the map is the feature distance (Table 5)",
        ("mean", "memory", "none"),
    )
    # The next five hold for frm_input "memory" alone.
    projection_channels: int = _field(32, least=1)  # of the learned 1x1 projection of the error
    memory: int = _field(24000, least=1)  # patches of good images to store
    memory_weight: float = _field(0.5, least=0)  # of the log distance to the nearest patch; the U-Net's is 1
    distance_weight: float = _field(0.2, least=0)  # of the log feature distance
    balance: bool = True  # first give every kind of evidence mean 0 and deviation 1 over the peaks of good images
    frm_width: int = _field(64, least=1)
    frm_levels: int = _field(5, least=1)  # poolings in the U-Net, fewer if the feature grid is too small for them
    score_kernel: int = _field(9, least=1)  # side in pixels of the mean filter over the map before the image score
    score_fraction: float = _field(0.0, least=0, below=1)  # score: mean of this fraction, the highest; 0: the maximum
    shapes: tuple[float, ...] = _field(())  # least and greatest height / width of the training images, if known
    roi_png: str | None = _field(None)  # the mask of --roi at the network's size, as a PNG in base64 (data/roi.py)
    judged_png: str | None = _field(None)  # of the region that was drawn after training: nothing else is judged

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the network sees: ``image_size`` once it is no longer "auto"."""
        if isinstance(self.image_size, str):
            raise ValueError("--image-size auto is settled by training images; without them give numbers, such as 256")
        return self.image_size

    @property
    def feature_size(self) -> tuple[int, int]:
        """(height, width) of the common feature grid: the backbone's first block, 64x64 for images of 256x256."""
        return self.size[0] // 4, self.size[1] // 4

    def __post_init__(self) -> None:
        _settle_fields(self)
        if not self.blocks or list(self.blocks) != sorted({1, 2, 3, 4} & set(self.blocks)):
            raise ValueError(f"--blocks are rising numbers from 1 to 4, such as 1 2 3; got {list(self.blocks)}")
        if self.weights == "checkpoint":  # to the backbones: none yet, a state dict comes
            raise ValueError("--weights checkpoint: no such weights; write ./checkpoint for a file of that name")
        if self.image_size != "auto":
            (height, width), (h, w) = self.size, self.feature_size
            if h % self.patch_size or w % self.patch_size:
                raise ValueError(f"patch_size must divide the feature grid of {h}x{w}, got {self.patch_size}")
            if self.tile and height != width:
                raise ValueError(f"--tile cuts squares, so --image-size must be one number, got {height}x{width}")
        if self.score_kernel % 2 == 0:
            raise ValueError(f"score_kernel must be odd, got {self.score_kernel}")
        if len(self.decoder_channels) != 2 or min(self.decoder_channels) < 1:
            raise ValueError(f"decoder_channels are two numbers above 0, like (256, 512); got {self.decoder_channels}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's (4.2) where it states them. ValueError if a value cannot be."""

    data: str = _field("demo", "folder with images (any layout of README's list, or good images), or 'demo'")
    anomaly_source: str | None = _field(
        None, "folder with textures (such as DTD) for anomalies; without it they are made from the images and noise"
    )
    anomaly_style: str = _field("perlin", choices=("perlin", "varied"))  # varied: half are lines, soft, or faint
    roi: str | None = _field(
        None,
        "mask file, white where images are judged and black elsewhere, drawn over one of them: nothing outside is "
        "simulated, calibrated with or scored; the network keeps it",
    )
    epochs: int = _field(700, "passes over the training images", least=1)
    steps: int | None = _field(
        None,
        "number of optimiser steps, in place of --epochs; with 0 the memory of good patches judges alone, untrained",
        least=0,
    )
    batch_size: int = _field(4, "images a step, of all processes together under torchrun", least=1, below=4097)
    lr: float = _field(1e-4, "learning rate of Adam", least=1e-12)
    schedule: str = _field("constant", choices=("constant", "cosine"))  # of the learning rate
    warmup: int = _field(0, least=0)  # steps over which the learning rate rises from 0
    seed: int = _field(0, "seed of everything random", least=0, below=2**23)
    rec_loss: str = _field("l2", choices=("l2", "mse"))  # Eq. (7): mean length of the error vectors, or mean square
    rec_every: int = _field(1, least=1)  # steps from one update of the reconstruction module to the next
    detach_reconstruction: bool = False  # keep the gradient of L_ref out of the reconstruction module
    focal_gamma: float = _field(2.0, least=0)
    clean_probability: float = _field(0.5, least=0)  # of a sample to stay without an anomaly
    holdout: float | None = _field(
        None,
        "fraction of the good images not trained on: they tell what it learned of the others (default: 0.1, and 0.25 "
        "with --parts, where the parts kept aside alone tell of new ones)",
        least=0,
        below=1,
    )
    parts: str | None = _field(
        None,
        "regular expression whose first group says which part a file shows, such as 'part([0-9]+)_', where several "
        "images show the same part: whole parts are then kept aside, and no image is compared with another of its own "
        "part while training; it is searched in the path below --data",
    )
    false_positive_rate: float | None = _field(
        None,
        "fraction of good images that the threshold may call defective (default: 0.01, but 0.02, 0.05 or 0.1 where "
        "less would find less than half of the simulated defects)",
        least=0,
        below=1,
    )
    calibrate_for: str = _field(
        "auto",
        "whose images the threshold is for: parts like those 'seen', other images of which were trained on, or 'new' "
        "parts; auto: new with --parts, else seen",
        ("auto", "seen", "new"),
    )
    workers: int = _field(0, "processes that prepare samples beside each process that trains", least=0, below=257)
    amp: bool = _field(False, "compute in bfloat16 where that is safe")
    save_minutes: float = _field(5.0, least=0)  # time between checkpoints

    def __post_init__(self) -> None:
        _settle_fields(self)
        if self.clean_probability > 1:
            raise ValueError(f"clean_probability must be at most 1, got {self.clean_probability}")
        if self.parts is not None:
            check_parts(self.parts)

    @property
    def share_aside(self) -> float:
        """`holdout`, or its default."""
        return self.holdout if self.holdout is not None else 0.1 if self.parts is None else 0.25


SETTINGS = {entry.name for config in (ModelConfig, TrainConfig) for entry in dataclasses.fields(config)}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "plus": {
        "image_size": "auto", "standardise": "auto", "level_brightness": True, "score_fraction": 0.005,
        "reduced_channels": 128, "d_model": 96, "depth": 2, "decoder_channels": (128, 128),
        "frm_input": "memory", "frm_width": 16, "frm_levels": 3, "anomaly_style": "varied",
        "steps": 2000, "lr": 1e-3, "schedule": "cosine", "warmup": 50, "rec_every": 4, "detach_reconstruction": True,
    },
}  # fmt: skip
# What --data demo means where nothing else is said: weights that pip brings and, with `plus`, minutes on two cores.
DEMO: dict[str, dict[str, Any]] = {
    "paper": {"backbone": "efficientnet_lite0"},
    "plus": {"backbone": "efficientnet_lite0", "memory": 2000, "steps": 200},
}
Config = TypeVar("Config", ModelConfig, TrainConfig)


def check_parts(pattern: str) -> None:
    """Raise a ValueError that names what is wrong unless ``--parts`` is a regular expression with a group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"--parts '{pattern}' is no regular expression: {error}") from error
    if not groups:
        raise ValueError(f"--parts needs a group in parentheses, such as 'part([0-9]+)_'; got '{pattern}'")


def make_configs(
    preset: str, given: dict[str, Any], unless_given: dict[str, Any] | None = None
) -> tuple[ModelConfig, TrainConfig]:
    """Combine the defaults, a preset, ``unless_given`` and what the user has given, the last winning.

    Raises:
        ValueError: if the preset is unknown or a value is out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset is one of {', '.join(PRESETS)}; got {preset!r}")
    values = {**PRESETS[preset], **(unless_given or {}), **given}
    if "epochs" in given and "steps" not in given:
        values["steps"] = None
    return from_dict(ModelConfig, values), from_dict(TrainConfig, values)


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config from a dictionary, taking the fields it knows."""
    names = {entry.name for entry in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in names})
