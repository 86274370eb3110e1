"""The reconstruction module in training steps in which it does not learn: its folded form takes half the time.

Of what it gives the U-Net only the projection of the error learns on, so that alone keeps its weights and a gradient.
Source: ours; in the paper every step trains everything.
"""

from typing import Any

import torch
from torch import Tensor

from almrr_ref.deploy.mfrm import FusedMFRM


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
        self.error_projection = error_projection

    def inputs(self, stages: list[Tensor]) -> list[Tensor]:
        """Channel means (b, 2, h, w) and, with a projection, log(1 + error) of every stage and its projection."""
        means, errors, projected = self(stages)
        return [means] if errors is None else [means, errors.log1p(), projected]
