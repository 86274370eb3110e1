"""The encoder of the reconstruction module, and the paper's alternatives to Mamba (Tables 3 and 4).

The paper names CNN(1x1), CNN(3x3) and Transformer without saying more. Ours share Mamba's place, width and depth:
tokens in, tokens out, pre-norm blocks with residuals, a final norm. A CNN block is two convolutions over twice the
width; a Transformer block is ViT's.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.mamba import VimEncoder


class ConvolutionBlock(nn.Module):
    """Norm, two convolutions over the grid of tokens, residual: (b, d, h, w) -> (b, d, h, w)."""

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
    """A stack of Transformer blocks: (b, l, d) -> (b, l, d)."""

    def __init__(self, d_model: int, depth: int) -> None:
        super().__init__()
        heads = 3 if d_model % 3 == 0 else 1  # ViT-Tiny's three heads at the paper's width of 192
        self.layers = nn.Sequential(*(TransformerBlock(d_model, heads) for _ in range(depth)))
        self.norm_f = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.norm_f(self.layers(tokens))


def build_encoder(config: ModelConfig) -> nn.Module:
    """The encoder that the config names; its forward maps tokens (b, l, d) and their grid (h, w) to (b, l, d)."""
    if config.encoder == "mamba":
        return VimEncoder(
            config.d_model, config.depth, config.d_state, config.d_conv, config.expand, config.average_directions
        )
    if config.encoder == "transformer":
        return TransformerEncoder(config.d_model, config.depth)
    return ConvolutionEncoder(
        config.d_model, config.depth, config.expand, kernel=1 if config.encoder == "cnn1x1" else 3
    )
