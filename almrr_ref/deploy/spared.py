"""The reconstruction module in training steps in which it does not learn: its folded form takes half the time.

Only the projection of the error goes on learning, so it alone keeps its weights and a gradient.
Source: ours; in the paper every step trains everything.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.mfrm import FusedMFRM


class PartialPointwise(nn.Module):
    """A 1x1 convolution that still learns, of some of its input channels: x (b, c, h, w) -> (b, out, h, w)."""

    def __init__(self, convolution: nn.Conv2d, channels: slice, bias: bool) -> None:
        super().__init__()
        self.convolution, self.channels, self.bias = convolution, channels, bias

    def forward(self, x: Tensor, added: Tensor | None) -> Tensor:
        weight, bias = self.convolution.weight[:, self.channels, 0, 0], self.convolution.bias if self.bias else None
        y = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        return y if added is None else added + y


class SparedMFRM(FusedMFRM):
    """Stages [s_k] -> what the U-Net takes of the reconstruction, as `ALMRR.forward` joins it, by the weights of now.

    Args:
        network: an ALMRR (model.py); its projection of the error, if it has one, learns on.
        dtype: of the products; a 16-bit one, or that of the network.
    """

    def __init__(self, network: Any, dtype: torch.dtype | None = None) -> None:
        error_projection = network.error_projection
        super().__init__(network.mfrm, None, network.extractor.backbone, errors=error_projection is not None)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.lower_precision(dtype or network.mfrm.pos_embed.dtype)
        if error_projection is not None:
            ends = itertools.accumulate(self.channels)
            slices = [slice(end - count, end) for end, count in zip(ends, self.channels)]
            self.error_projection = nn.ModuleList(PartialPointwise(error_projection, s, s.start == 0) for s in slices)

    def inputs(self, stages: list[Tensor]) -> list[Tensor]:
        """Channel means (b, 2, h, w) and, with a projection, log(1 + error) of every stage and its projection."""
        means, errors, projected = self(stages)
        return [means] if errors is None else [means, errors.log1p(), projected]
