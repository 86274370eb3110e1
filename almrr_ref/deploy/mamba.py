"""The Vim block of the deployed form: fused.py, step 4. ``fuse_encoder()``."""

import copy

import torch
from torch import Tensor, nn

from almrr_ref.deploy.folding import fixed
from almrr_ref.deploy.packed import PackedConv2d, PackedLinear, as_image, as_tokens
from almrr_ref.kernels import selective_scan
from almrr_ref.mamba import VimBlock, VimEncoder


class FusedVimBlock(nn.Module):
    """A Vim block whose two directions are one sequence of twice the channels: (b, l, d) -> (b, l, d)."""

    def __init__(self, block: VimBlock) -> None:
        super().__init__()
        mixer, w = block.mixer, block.mixer.state_dict()
        like = w["D"]

        def both(name: str) -> Tensor:
            return fixed(torch.cat([w[name.format(suffix)] for suffix in ("", "_b")]), like)

        self.norm, self.backend = copy.deepcopy(block.norm), mixer.backend
        self.dt_rank, self.d_state = mixer.dt_rank, mixer.d_state
        self.in_proj = PackedLinear(w["in_proj.weight"])
        taps = both("conv1d{}.weight").unsqueeze(3)  # (2 d_inner, 1, k, 1)
        width, k = len(taps), taps.shape[2]
        self.conv = PackedConv2d(taps, both("conv1d{}.bias"), padding=(k - 1, 0), groups=width, activation="swish")
        self.x_proj = PackedLinear(both("x_proj{}.weight"), groups=2)  # to 2 (dt_rank + 2 n)
        steps = torch.block_diag(w["dt_proj.weight"], w["dt_proj_b.weight"])  # too few channels for groups to pay
        self.dt_proj = PackedLinear(steps, both("dt_proj{}.bias"))
        self.A = fixed(-both("A{}_log").double().exp(), like)
        self.D = both("D{}")
        scale = 0.5 if mixer.average_directions else 1.0
        self.out_proj = PackedLinear(fixed(w["out_proj.weight"] * scale, like))

    def forward(self, tokens: Tensor) -> Tensor:
        l, dtype = tokens.shape[1], self.in_proj.weight.dtype
        x, z = self.in_proj(self.norm(tokens).to(dtype)).chunk(2, dim=2)
        both = torch.cat([x, x.flip(1)], dim=2)  # the second half runs backwards in time from here on
        u = as_tokens(self.conv(as_image(both))[:, :, :l])  # (b, l, 2 d_inner)
        projected = self.x_proj(u).unflatten(2, (2, -1))
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=3)
        delta = self.dt_proj(low_rank.flatten(2).to(self.D.dtype))
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)  # (b, 2 d_inner, l)
        B, C = B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1)  # (b, 2, n, l)
        y = selective_scan(u, delta, self.A, B, C, self.D, delta_softplus=True, backend=self.backend)
        assert isinstance(y, Tensor)
        forward, backward = y.transpose(1, 2).chunk(2, dim=2)
        mixed = (forward + backward.flip(1)) * nn.functional.silu(z)
        if dtype == tokens.dtype:
            return self.out_proj(mixed, tokens)
        return tokens + self.out_proj(mixed)


def fuse_encoder(encoder: nn.Module) -> nn.Module:
    """Pack the Vim blocks of an encoder; the others have nothing to fold and are copied."""
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, VimEncoder):
        encoder.layers = nn.ModuleList(FusedVimBlock(block) for block in encoder.layers)  # type: ignore[arg-type]
    return encoder
