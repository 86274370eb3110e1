"""The Mamba feature reconstruction module (MFRM), section 3.3: rebuilds features as if the surface had no defect.

    F (b, C, 64, 64) -> 1x1 conv -> f (b, C1, 64, 64) -> 4x4 patches + positions -> tokens (b, 256, D) -> encoder
      -> f_lat (b, D, 16, 16) -> three transposed convs, resize, tanh -> f_hat (b, C1, 64, 64) -> 1x1 conv -> F_hat
      (b, C, 64, 64)

Where the paper is silent: the transposed convolutions are 3x3, strides 1, 1, 2 (16 -> 18 -> 20 -> 39), followed by a
bilinear step to 64; reaching 64 by strides costs four to eight times the work. Instance norm and ReLU stand only
between them, as the text says, so that tanh sees signed values. With at most C1 input channels the first 1x1
convolution is left out (section 4.4); the last one stays, since tanh bounds f_hat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.encoders import build_encoder


class Pointwise(nn.Conv2d):
    """1x1 convolution (b, in, h, w) -> (b, out, h, w), on a CPU as a product over channels that lie side by side.

    So its result is channels-last as well, like the features that it is compared with: a CPU is slow at differences of
    tensors of different layouts.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # in TF32, where all convolutions are
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Three transposed convolutions: f_lat (b, D, h, w) -> f_hat (b, C1, *size) in [-1, 1]."""

    def __init__(self, d_model: int, channels: tuple[int, int], out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.deconv1 = nn.ConvTranspose2d(d_model, channels[0], 3)
        self.deconv2 = nn.ConvTranspose2d(channels[0], channels[1], 3)
        self.deconv3 = nn.ConvTranspose2d(channels[1], out_channels, 3, stride=2, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.deconv1(latent)))
        x = F.relu(F.instance_norm(self.deconv2(x)))
        x = self.deconv3(x).contiguous(memory_format=torch.channels_last)  # a CPU resizes it many times faster so
        x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        return torch.tanh(x)


class MFRM(nn.Module):
    """Reconstruct features: F (b, C, h, w) -> F_hat (b, C, h, w), where C is in_channels; h x w: `feature_size`."""

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        reduced = min(config.reduced_channels, in_channels)
        height, width = config.feature_size
        self.grid = height // config.patch_size, width // config.patch_size
        self.reduce = Pointwise(in_channels, reduced) if reduced < in_channels else nn.Identity()
        self.patch_embed = nn.Conv2d(reduced, config.d_model, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.encoder = build_encoder(config)
        self.decoder = Decoder(config.d_model, config.decoder_channels, reduced, config.feature_size)
        self.restore = Pointwise(reduced, in_channels)

    def tokens(self, features: Tensor) -> Tensor:
        """Reduce and embed: (b, C, h, w) -> (b, l, D), tokens in reading order (row by row)."""
        return self.patch_embed(self.reduce(features)).flatten(2).transpose(1, 2) + self.pos_embed

    def token_map(self, tokens: Tensor) -> Tensor:
        """Put tokens back on their grid: (b, l, D) -> f_lat (b, D, h, w)."""
        b, _, d = tokens.shape
        return tokens.transpose(1, 2).reshape(b, d, *self.grid)

    def forward(self, features: Tensor) -> Tensor:
        encoded = self.encoder(self.tokens(features), self.grid)
        return self.restore(self.decoder(self.token_map(encoded)))
