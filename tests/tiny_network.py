"""A tiny network, good images and training samples for the tests."""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.textures import ImageTextures
from almrr_ref.model import ALMRR, ForwardPass

FRM_INPUTS = ("mean", "memory", "none")
SIZES: dict[str, Any] = {"image_size": 64, "reduced_channels": 8, "d_model": 12, "depth": 2, "d_state": 4}
SIZES |= {"decoder_channels": (10, 6), "memory": 5, "frm_width": 4, "frm_levels": 2}
TINY = ModelConfig(backbone="resnet18", weights="random", **SIZES)


def build(seed: int = 0, threshold: float | None = None, **changes: Any) -> ALMRR:
    """A tiny network in evaluation mode, as it is before training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the backbone's weights are random
        return ALMRR(dataclasses.replace(TINY, **changes), seed, threshold).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move all that starts at 0 or 1 away from it: biases, norms, running statistics, A, D, statistics, memory."""
    generator = torch.Generator().manual_seed(3)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.ndim <= 1 and t.is_floating_point()]
    tensors += [p for name, p in model.named_parameters() if name.endswith("_log")]
    if isinstance(model, ALMRR) and model.evidence is not None:
        tensors += [model.evidence.border_scale, model.evidence.border_shift, model.evidence.level]
    for tensor in tensors:
        tensor += 0.4 * torch.rand(tensor.shape, generator=generator) - 0.1  # variances and deviations stay above 0
    if isinstance(model, ALMRR) and model.memory is not None:
        model.memory.axes.normal_(std=0.1, generator=generator)
        model.memory.patches.normal_(std=0.3, generator=generator)
        model.memory.patch_parts.copy_(torch.arange(len(model.memory.patches)) % 3)


def build_random(**changes: Any) -> ALMRR:
    """A tiny network with no parameter, statistic or stored patch left where it starts."""
    model = build(**changes)
    randomise(model)
    if model.evidence is not None:
        model.evidence.weigh(memory_alone=False)
    return model


def good_images(count: int, seed: int = 0, size: int | tuple[int, int] = 64) -> Tensor:
    """Noise, uint8 (count, 3, h, w); one number for a square."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def good_samples(images: Tensor, **settings: Any) -> TrainingSamples:
    """Training samples of good images, uint8 (n, 3, h, w), each of a part of its own."""
    return TrainingSamples(images, ImageTextures(images), TrainConfig(**settings), textured_anomaly)


def leave_only(model: ALMRR, *names: str) -> None:
    """From now on every forward pass gives NaN for all its values but these."""

    def poisoned(_module: nn.Module, _inputs: tuple[Any, ...], result: ForwardPass) -> ForwardPass:
        unused = {name: value for name, value in vars(result).items() if name not in names and value is not None}
        return dataclasses.replace(result, **{name: value * torch.nan for name, value in unused.items()})

    model.register_forward_hook(poisoned)
