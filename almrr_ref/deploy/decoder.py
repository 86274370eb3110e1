"""The decoder of the deployed form: fused.py, step 5."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.packed import PackedConv2d
from almrr_ref.features import resize
from almrr_ref.kernels.checks import exporting
from almrr_ref.mfrm import Decoder

CHUNK = 128  # channels of f_hat at a time


def interleave(phases: Sequence[Tensor]) -> Tensor:
    """y[2 i, 2 j], y[2 i, 2 j + 1], y[2 i + 1, 2 j] and y[2 i + 1, 2 j + 1] -> y (b, c, 2 h - 1, 2 w - 1)."""
    b, c, h, w = phases[0].shape
    if exporting():  # strided writes would become scatters
        padded = [F.pad(phase, (0, w - phase.shape[3], 0, h - phase.shape[2])) for phase in phases]
        y = torch.stack(padded).unflatten(0, (2, 2)).permute(2, 3, 4, 0, 5, 1)  # (b, c, h, 2, w, 2)
        return y.flatten(4).flatten(2, 3)[:, :, : 2 * h - 1, : 2 * w - 1]
    y = phases[0].new_empty(b, 2 * h - 1, 2 * w - 1, c).permute(0, 3, 1, 2)  # channels-last
    for i, phase in enumerate(phases):
        y[:, :, i // 2 :: 2, i % 2 :: 2] = phase
    return y


class FusedDecoder(nn.Module):
    """The decoder up to its tanh, as step 5 has it: f_lat (b, D, h, w) -> (1 + f_hat) / 2, (b, C1, size, size).

    It comes in chunks of CHUNK channels: all of f_hat is more than a CPU's caches hold.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.size, first, second, last = decoder.size, decoder.deconv1, decoder.deconv2, decoder.deconv3
        kernels = [deconv.weight.transpose(0, 1).flip(2, 3).contiguous() for deconv in (first, second)]
        self.conv1 = PackedConv2d(kernels[0], first.bias, padding=(2, 2))
        self.conv2 = PackedConv2d(kernels[1], second.bias, padding=(2, 2))
        assert last.bias is not None
        kernel, bias = 2 * last.weight.transpose(0, 1), 2 * last.bias
        taps = ([1], [2, 0])  # of y[2 i] and y[2 i + 1]
        self.phases = nn.ModuleList(
            PackedConv2d(kernel[:, :, y][:, :, :, x].contiguous(), bias) for y in taps for x in taps
        )

    def forward(self, latent: Tensor) -> Iterator[Tensor]:
        x = F.relu(F.instance_norm(self.conv1(latent)))
        x = F.relu(F.instance_norm(self.conv2(x)))
        for chunk in zip(*(phase(x).split(CHUNK, dim=1) for phase in self.phases)):
            yield resize(interleave(chunk), self.size).sigmoid_()
