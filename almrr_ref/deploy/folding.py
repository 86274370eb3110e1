"""Folding linear steps into one: batch norms into convolutions, and resize and patch embedding into one projection.

The algebra stands in fused.py, steps 1 and 2.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.packed import PackedConv2d


def fixed(value: Tensor, like: Tensor) -> nn.Parameter:
    """A folded weight in the dtype of ``like``, contiguous, without gradient."""
    return nn.Parameter(value.detach().to(like.dtype).contiguous(), requires_grad=False)


def fold_batch_norms(module: nn.Module) -> None:
    """Put every batch norm of a module into the convolution registered just before it, in place (step 1).

    A SameConv2d leaves its new bias out until `pack_convolutions` replaces it.
    """
    for parent in list(module.modules()):
        for (_, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                moments = {name: value.double() for name, value in norm.state_dict().items()}
                scale = moments["weight"] / (moments["running_var"] + norm.eps).sqrt()
                before = 0 if conv.bias is None else conv.bias.double()
                conv.bias = fixed((before - moments["running_mean"]) * scale + moments["bias"], conv.weight)
                conv.weight = fixed(conv.weight.double() * scale[:, None, None, None], conv.weight)
                setattr(parent, norm_name, nn.Identity())


def resize_matrix(small: int, large: int) -> Tensor:
    """The bilinear resize of one axis as a matrix: (large, small), float64, rows summing to 1."""
    return F.interpolate(torch.eye(small).double()[None], size=large, mode="linear", align_corners=False)[0].T


class StageTokens(nn.Module):
    """One stage's share of the tokens, at the stage's own resolution: (b, c_k, n / q, n / q) -> (b, D, n / p, n / p).

    Args:
        kernel: Q of step 2 for the channels of this stage, (D, c_k, p, p), float64.
        ratio: q, the cells of the grid that one pixel of the stage covers per axis.
        grid: n, cells per axis.
        like: gives dtype and device.
    """

    rows: Tensor

    def __init__(self, kernel: Tensor, ratio: int, grid: int, like: Tensor) -> None:
        super().__init__()
        d, c, p, _ = kernel.shape
        self.stride, self.padding = p // ratio, min(1, ratio - 1)
        if p % ratio == 0:
            third = resize_matrix(3 * self.stride, 3 * p)[p : 2 * p]  # the middle token of three
            r = third[:, self.stride - self.padding : 2 * self.stride + self.padding].to(kernel.device)
            weight = fixed(torch.einsum("dcuv,ua,vb->dcab", kernel, r, r), like)
            self.project = PackedConv2d(weight, stride=(self.stride, self.stride))
        else:
            self.stride = 0
            self.project = PackedConv2d(fixed(kernel.permute(0, 2, 3, 1).reshape(d * p * p, c, 1, 1), like))
            rows = resize_matrix(grid // ratio, grid).reshape(grid // p, p, grid // ratio)
            self.register_buffer("rows", rows.to(like), persistent=False)

    def forward(self, stage: Tensor) -> Tensor:
        if self.stride:
            padding = (self.padding,) * 4
            return self.project(F.pad(stage, padding, mode="replicate") if self.padding else stage)
        p = self.rows.shape[1]
        projected = self.project(stage).unflatten(1, (-1, p, p))  # (b, D, p, p, h, w)
        return torch.einsum("bduvyx,iuy,jvx->bdij", projected, self.rows, self.rows)
