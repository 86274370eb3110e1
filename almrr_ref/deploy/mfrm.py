"""The reconstruction module of the deployed form: fused.py, steps 2, 3 and 5."""

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.base import Backbone
from almrr_ref.deploy.folding import StageTokens, fixed
from almrr_ref.deploy.mamba import fuse_encoder
from almrr_ref.deploy.packed import PackedConv2d
from almrr_ref.features import resize
from almrr_ref.kernels.checks import exporting
from almrr_ref.mfrm import MFRM, Decoder

CHUNK = 128  # channels of f_hat at a time: all of it is more than a CPU's caches hold


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
    """The decoder up to its tanh, as step 5 has it: f_lat (b, D, h, w) -> (1 + f_hat) / 2, (b, CHUNK, n, n) each."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.size, weights, taps = decoder.size, decoder.state_dict(), ([1], [2, 0])  # of y[2 i] and y[2 i + 1]
        self.convolutions, self.phases = nn.ModuleList(), nn.ModuleList()
        for name in ("deconv1", "deconv2"):
            kernel = weights[f"{name}.weight"].transpose(0, 1).flip(2, 3).contiguous()
            self.convolutions.append(PackedConv2d(kernel, weights[f"{name}.bias"], padding=(2, 2)))
        kernel, bias = 2 * weights["deconv3.weight"].transpose(0, 1), 2 * weights["deconv3.bias"]
        for y, x in ((y, x) for y in taps for x in taps):
            self.phases.append(PackedConv2d(kernel[:, :, y][:, :, :, x].contiguous(), bias))

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for convolution in self.convolutions:
            x = F.relu(F.instance_norm(convolution(x)))
        for chunk in zip(*(phase(x).split(CHUNK, dim=1) for phase in self.phases)):
            yield resize(interleave(chunk), self.size).sigmoid_()


class FusedMFRM(nn.Module):
    """Reconstruction, and what the U-Net needs of it without F_hat ever being whole.

    Args:
        error_projection: the learned 1x1 projection of the error, for ``frm_input`` "memory".
        errors: whether more than the means is needed.
    """

    def __init__(self, mfrm: MFRM, error_projection: nn.Conv2d | None, backbone: Backbone, errors: bool) -> None:
        super().__init__()
        weights, like = mfrm.state_dict(), mfrm.pos_embed
        self.channels, self.size, self.grid = list(backbone.channels), mfrm.decoder.size, mfrm.grid
        kernel, bias = weights["patch_embed.weight"].double(), weights["patch_embed.bias"].double()
        if "reduce.weight" in weights:
            bias = bias + torch.einsum("druv,r->d", kernel, weights["reduce.bias"].double())
            kernel = torch.einsum("druv,rc->dcuv", kernel, weights["reduce.weight"].double()[:, :, 0, 0])
        self.position = fixed(like.double() + bias, like)
        kernels = zip(kernel.split(self.channels, dim=1), backbone.strides)
        self.embed = nn.ModuleList(StageTokens(kernel, stride // 4, self.size, like) for kernel, stride in kernels)
        self.encoder, self.decoder = fuse_encoder(mfrm.encoder), FusedDecoder(mfrm.decoder)
        restore = 2 * weights["restore.weight"].double()
        affine = restore, weights["restore.bias"].double() - restore.sum(dim=(1, 2, 3)) / 2
        self.mean = nn.ParameterList(fixed(tensor.mean(dim=0, keepdim=True), like) for tensor in affine)
        self.restore = nn.ParameterList(fixed(tensor, like) for tensor in affine) if errors else None
        self.error_projection = copy.deepcopy(error_projection)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Let the products take 16 bits but for those of norms, step sizes, state and the projection of the error."""
        for name, module in self.named_modules():
            if isinstance(module, PackedConv2d | StageTokens | nn.ParameterList) and not name.endswith("dt_proj"):
                module.to(dtype)

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[s_k] -> channel means of F_hat and F (b, 2, n, n), mean square error of every stage (b, stages, n, n) unless
        ``frm_input`` is "mean", and the projection of log(1 + error) (b, p, n, n) where there is one.
        """
        dtype = self.mean[0].dtype
        tokens = sum(embed(stage.to(dtype)) for embed, stage in zip(self.embed, stages))
        encoded = self.encoder(tokens.flatten(2).transpose(1, 2) + self.position, self.grid)
        chunks: Iterable[Tensor] = self.decoder(encoded.transpose(1, 2).unflatten(2, self.grid).to(dtype))
        if self.restore is None:
            return self.means(chunks, stages), None, None
        chunks = list(chunks)
        return self.means(chunks, stages), *self.errors(torch.cat(chunks, dim=1), stages)

    def means(self, chunks: Iterable[Tensor], stages: list[Tensor]) -> Tensor:
        """(1 + f_hat) / 2 in chunks, [s_k] -> channel means of F_hat and F, (b, 2, n, n)."""
        weights = self.mean[0].split(CHUNK, dim=1)
        rebuilt = torch.stack([F.conv2d(chunk, weight) for chunk, weight in zip(chunks, weights)]).sum(dim=0)
        sums = [resize(stage.sum(dim=1, keepdim=True), self.size) for stage in stages]
        features = torch.stack(sums).sum(dim=0) / sum(self.channels)
        return torch.cat([rebuilt + self.mean[1], features.to(rebuilt.dtype)], dim=1)

    def errors(self, hidden: Tensor, stages: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(1 + f_hat) / 2 (b, C1, n, n), [s_k] -> mean and projection of (F_hat - F)^2, which exists stage by stage."""
        assert self.restore is not None
        projection, stage_errors, projected = self.error_projection, [], []
        affine = zip(*(tensor.split(self.channels) for tensor in self.restore))
        for k, (stage, (weight, bias)) in enumerate(zip(stages, affine)):
            error = F.conv2d(hidden, weight, bias).to(self.position.dtype)
            error = error.sub_(resize(stage, self.size)).square_()
            stage_errors.append(error.mean(dim=1, keepdim=True))
            if projection is not None:
                projected.append(F.conv2d(error.log1p_(), projection.weight.split(self.channels, dim=1)[k]))
        if projection is None:
            return torch.cat(stage_errors, dim=1), None
        assert projection.bias is not None
        return torch.cat(stage_errors, dim=1), torch.stack(projected).sum(dim=0) + projection.bias[:, None, None]
