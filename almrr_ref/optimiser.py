"""The optimiser, and the learning rate of a step."""

import math
from inspect import unwrap
from typing import Any

import torch

from almrr_ref.config import TrainConfig

_ADAM: Any = torch.optim.Adam


class Adam(torch.optim.Adam):
    """PyTorch's Adam without the decorators that import PyTorch's compiler, which costs a training 1.6 s."""

    add_param_group = unwrap(_ADAM.add_param_group)
    zero_grad = unwrap(_ADAM.zero_grad)
    state_dict = unwrap(_ADAM.state_dict)
    load_state_dict = unwrap(_ADAM.load_state_dict)
    step = torch.no_grad()(unwrap(_ADAM.step))


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of one step: a linear warm-up, then constant or half a cosine down to 1% of the rate."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
    return rate
