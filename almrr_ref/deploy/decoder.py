"""The decoder of the deployed form: fused.py, step 5."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.packed import PackedConv2d
from almrr_ref.features import resize
from almrr_ref.kernels.checks import HAS_TRITON, exporting
from almrr_ref.mfrm import Decoder

CHUNK = 128  # channels of f_hat at a time on a CPU: all of it is more than its caches hold


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


def chunked(x: Tensor) -> Sequence[Tensor]:
    """Channels as `FusedDecoder` takes them: (b, c, h, w) -> (b, CHUNK, h, w) each, on a GPU all at once."""
    return [x] if x.is_cuda and not exporting() else x.split(CHUNK, dim=1)


def has_kernel(x: Tensor) -> bool:
    """Whether triton_decoder.py takes what a decoder makes of x."""
    return x.is_cuda and x.dtype != torch.float64 and HAS_TRITON and not exporting()


class FusedDecoder(nn.Module):
    """The decoder up to its tanh, as step 5 has it: f_lat (b, D, h, w) -> (1 + f_hat) / 2, `chunked`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.size, weights, taps = decoder.size, decoder.state_dict(), ([1], [2, 0])  # of y[2 i] and y[2 i + 1]
        self.convolutions, self.phases = nn.ModuleList(), nn.ModuleList()
        for name in ("deconv1", "deconv2"):
            kernel = weights[f"{name}.weight"].transpose(0, 1).flip(2, 3).contiguous()
            self.convolutions.append(PackedConv2d(kernel, padding=(2, 2)))  # the norm takes any bias away
        kernel, bias = 2 * weights["deconv3.weight"].transpose(0, 1), 2 * weights["deconv3.bias"]
        for y, x in ((y, x) for y in taps for x in taps):
            self.phases.append(PackedConv2d(kernel[:, :, y][:, :, :, x].contiguous(), bias))

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        x = self.before_phases(x)
        for chunk in zip(*(chunked(phase(x)) for phase in self.phases)):
            yield resize(interleave(chunk), self.size).sigmoid_()

    def before_phases(self, x: Tensor) -> Tensor:
        """What the last transposed convolution takes: f_lat (b, D, h, w) -> (b, c, h + 4, w + 4)."""
        for convolution in self.convolutions:
            x = F.relu(F.instance_norm(convolution(x)))
        return x

    def mean(self, x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        """Weighted sum over the channels of what `forward` returns, by one kernel: f_lat -> (b, 1, *size).

        Args:
            weight, offset: as of a 1x1 convolution, (1, C1, 1, 1) and (1,).
        """
        from almrr_ref.deploy.triton_decoder import decoder_mean  # here, because triton is optional and slow to import

        x = self.before_phases(x).contiguous(memory_format=torch.channels_last)  # once, not in every convolution
        phases = [F.conv2d(x, phase.get_parameter("weight")) for phase in self.phases]
        return decoder_mean(phases, self.phases[0].bias, weight, offset, self.size)
