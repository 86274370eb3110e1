"""The encoder of the MFRM (section 3.3): Mamba, and what Tables 3 and 4 put in its place.

The paper names CNN(1x1), CNN(3x3) and Transformer and says no more: not where they stand, how deep and wide they are,
nor their blocks. Here each takes the place, width D and depth L of the Mamba encoder: tokens in, tokens out, L pre-norm
blocks with residuals, a final norm. A CNN block is group norm, two convolutions with expand * D channels between them
and SiLU; a Transformer block is ViT's, with three heads at D = 192 as in ViT-Tiny and an MLP of 4 D.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.mamba import VimEncoder


class ConvolutionBlock(nn.Module):
    """Norm, two convolutions over the token grid, residual: (b, d, h, w) -> (b, d, h, w)."""

    def __init__(self, d_model: int, expand: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, d_model)
        self.widen = nn.Conv2d(d_model, expand * d_model, kernel, padding=kernel // 2)
        self.narrow = nn.Conv2d(expand * d_model, d_model, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.silu(self.widen(self.norm(x))))


class ConvolutionEncoder(nn.Module):
    """CNN(1x1) or CNN(3x3): (b, l, d) -> (b, l, d)."""

    def __init__(self, d_model: int, depth: int, expand: int, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvolutionBlock(d_model, expand, kernel) for _ in range(depth)))
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        b, _, d = tokens.shape
        x = self.layers(tokens.transpose(1, 2).reshape(b, d, *grid))
        return self.norm_f(x.flatten(2).transpose(1, 2))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, as in ViT: (b, l, d) -> (b, l, d)."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        b, l, d = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).reshape(b, l, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, l, d / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, l, d)
        tokens = tokens + self.proj(attended)
        return tokens + self.mlp(self.norm2(tokens))


class TransformerEncoder(nn.Module):
    """Transformer blocks and a final norm: (b, l, d) -> (b, l, d)."""

    def __init__(self, d_model: int, depth: int) -> None:
        super().__init__()
        heads = 3 if d_model % 3 == 0 else 1
        self.layers = nn.Sequential(*(TransformerBlock(d_model, heads) for _ in range(depth)))
        self.norm_f = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.norm_f(self.layers(tokens))


def build_encoder(config: ModelConfig) -> nn.Module:
    """Build the encoder that the config names; it maps tokens (b, l, d) and their grid (h, w) to tokens (b, l, d)."""
    d_model, depth, expand = config.d_model, config.depth, config.expand
    if config.encoder == "mamba":
        return VimEncoder(d_model, depth, config.d_state, config.d_conv, expand, config.average_directions)
    if config.encoder == "transformer":
        return TransformerEncoder(d_model, depth)
    return ConvolutionEncoder(d_model, depth, expand, kernel=1 if config.encoder == "cnn1x1" else 3)
