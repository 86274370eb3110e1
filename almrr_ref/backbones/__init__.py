"""Frozen backbones: `build_backbone(name, blocks, weights)`.

Source: ALMRR section 3.2 (ResNet-50, blocks 1 to 3), Table 6 (VGG19, ResNet-18, -34, -50), Table 7 (blocks).
Deviation: EfficientNet-Lite0 is added, since its ImageNet weights can be had through pip alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from almrr_ref.backbones.base import Backbone
from almrr_ref.backbones.efficientnet_lite import EfficientNetLite0
from almrr_ref.backbones.resnet import BasicBlock, Bottleneck, ResNet
from almrr_ref.backbones.vgg import VGG19
from almrr_ref.backbones.weights import fill_weights

BACKBONES: dict[str, Callable[[Sequence[int]], Backbone]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "vgg19": VGG19,
    "efficientnet_lite0": EfficientNetLite0,
}


def build_backbone(name: str, blocks: Sequence[int], weights: str | Path | None = None) -> Backbone:
    """Build a frozen backbone: its name in `BACKBONES` -> module in eval mode that requires no gradient.

    Args:
        blocks: rising numbers out of 1..4; no layer after the last of them is built.
        weights: a file; or None: the official weights, downloaded if need be; or "random": from a fixed seed, with a
            warning; or "checkpoint": NaN, for a caller who loads a state dict next, so that a forgotten load shows. A
            file of one of these two names is given as "./random".
    Raises:
        ValueError: for an unknown name or block.
        WeightsError: a ValueError; if the weights cannot be had, read or used.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)}")
    # Built without storage: no time spent on an initialisation that is overwritten, no draw from the global generator.
    with torch.device("meta"):
        backbone = BACKBONES[name](blocks)
    backbone._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))  # to_empty would import sympy, which takes a second
    fill_weights(backbone, name, weights)
    return backbone.requires_grad_(False).eval()
