"""The Vim block of the deployed form: fused.py, step 4. ``fuse_encoder()``."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.folding import fixed
from almrr_ref.kernels import bidirectional_scan
from almrr_ref.mamba import VimBlock, VimEncoder


class FusedVimBlock(nn.Module):
    """A Vim block with packed weights: (b, l, d) -> (b, l, d)."""

    def __init__(self, block: VimBlock) -> None:
        super().__init__()
        mixer, w = block.mixer, block.mixer.state_dict()
        like = w["D"]

        def both(name: str) -> Tensor:
            return torch.stack([w[name.format(suffix)] for suffix in ("", "_b")])

        self.norm, self.backend = copy.deepcopy(block.norm), mixer.backend
        self.dt_rank, self.d_state = mixer.dt_rank, mixer.d_state
        self.in_proj = fixed(w["in_proj.weight"].T, like)
        taps = both("conv1d{}.weight").squeeze(2).permute(2, 0, 1)  # (k, 2, d_inner)
        self.taps = fixed(torch.stack([taps[:, 0], taps[:, 1].flip(0)], dim=1), like)
        self.conv_bias = fixed(both("conv1d{}.bias"), like)
        self.x_proj = fixed(both("x_proj{}.weight").transpose(1, 2), like)  # (2, d_inner, dt_rank + 2 n)
        self.dt_proj = fixed(both("dt_proj{}.weight").transpose(1, 2), like)  # (2, dt_rank, d_inner)
        self.dt_bias = fixed(both("dt_proj{}.bias")[:, None], like)
        self.A = fixed(-both("A{}_log").double().exp(), like)
        self.D = fixed(both("D{}"), like)
        self.out_proj = fixed(w["out_proj.weight"].T * (0.5 if mixer.average_directions else 1.0), like)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Let the products that cost time take 16 bits; residual, norm, step sizes, A, D and the state keep theirs."""
        for weight in (self.in_proj, self.taps, self.conv_bias, self.x_proj, self.out_proj):
            weight.data = weight.data.to(dtype)

    def convolve(self, x: Tensor) -> Tensor:
        """Both directions' causal convolutions and SiLU: (b, l, d_inner) -> (2, b, l, d_inner)."""
        l, k = x.shape[1], len(self.taps)
        padded = F.pad(x, (0, 0, k - 1, k - 1))
        convolved = []
        for direction, first in enumerate((0, k - 1)):
            u = self.conv_bias[direction]
            for j in range(k):
                u = torch.addcmul(u, self.taps[j, direction], padded[:, first + j : first + j + l])
            convolved.append(u)
        return F.silu(torch.stack(convolved))

    def forward(self, tokens: Tensor) -> Tensor:
        b, l, _ = tokens.shape
        x, z = (self.norm(tokens).to(self.in_proj.dtype) @ self.in_proj).chunk(2, dim=2)
        u = self.convolve(x)
        projected = u.flatten(1, 2) @ self.x_proj  # (2, b l, dt_rank + 2 n)
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = torch.baddbmm(self.dt_bias, low_rank.to(self.dt_proj.dtype), self.dt_proj).unflatten(1, (b, l))
        u, delta = u.transpose(2, 3), delta.transpose(2, 3)  # (2, b, d_inner, l)
        B, C = (t.unflatten(1, (b, l)).transpose(2, 3) for t in (B, C))  # (2, b, n, l)
        forward, backward = ((u[i], delta[i], self.A[i], B[i], C[i], self.D[i]) for i in (0, 1))
        mixed = bidirectional_scan(*forward, z.transpose(1, 2), None, *backward, None, scale=1.0, backend=self.backend)
        return tokens + mixed.transpose(1, 2) @ self.out_proj


def fuse_encoder(encoder: nn.Module) -> nn.Module:
    """Pack the Vim blocks of an encoder; the others have nothing to fold and are copied."""
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, VimEncoder):
        encoder.layers = nn.ModuleList(FusedVimBlock(block) for block in encoder.layers)  # type: ignore[arg-type]
    return encoder
