"""The reconstruction module of the deployed form, its decoder included: fused.py, steps 2 to 5."""

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.base import Backbone
from almrr_ref.deploy.packed import PackedConv2d, PackedLinear, as_image, as_tokens, fixed
from almrr_ref.features import by_image, resize
from almrr_ref.kernels import bidirectional_scan, causal_conv1d
from almrr_ref.kernels.checks import HAS_TRITON, exporting
from almrr_ref.mamba import VimBlock, VimEncoder
from almrr_ref.mfrm import MFRM, Decoder

CHUNK = 128  # channels of f_hat at a time on a CPU: all of it is more than its caches hold


def resize_matrix(small: int, large: int) -> Tensor:
    """The bilinear resize of one axis as a matrix: (large, small), float64, rows summing to 1."""
    return F.interpolate(torch.eye(small).double()[None], size=large, mode="linear", align_corners=False)[0].T


class StageTokens(nn.Module):
    """One stage's share of the tokens, at the stage's own resolution: (b, c_k, h / q, w / q) -> (b, D, h / p, w / p).

    Args:
        kernel: Q of step 2 for the channels of this stage, (D, c_k, p, p), float64.
        ratio: q, the cells of the grid that one pixel of the stage covers per axis.
        grid: (h, w), its cells per axis.
        like: gives dtype and device.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, kernel: Tensor, ratio: int, grid: tuple[int, int], like: Tensor) -> None:
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
            for name, n in zip(("rows", "columns"), grid):
                matrix = resize_matrix(n // ratio, n).reshape(n // p, p, n // ratio)
                self.register_buffer(name, matrix.to(like), persistent=False)

    def forward(self, stage: Tensor) -> Tensor:
        if self.stride:
            padding = (self.padding,) * 4
            return self.project(F.pad(stage, padding, mode="replicate") if self.padding else stage)
        p = self.rows.shape[1]
        projected = self.project(stage).unflatten(1, (-1, p, p))  # (b, D, p, p, h, w)
        return torch.einsum("bduvyx,iuy,jvx->bdij", projected, self.rows, self.columns)


class FusedVimBlock(nn.Module):
    """A Vim block: (b, l, d) -> (b, l, d). On a CPU each layer takes both directions at once, in forward order."""

    def __init__(self, block: VimBlock) -> None:
        super().__init__()
        mixer, w = block.mixer, block.mixer.state_dict()
        like = w["D"]

        def both(name: str) -> Tensor:
            return fixed(torch.cat([w[name.format(suffix)] for suffix in ("", "_b")]), like)

        self.norm, self.backend = copy.deepcopy(block.norm), mixer.backend
        self.dt_rank, self.d_state = mixer.dt_rank, mixer.d_state
        self.in_proj = PackedLinear(w["in_proj.weight"])
        self.taps = both("conv1d{}.weight")  # (2 d_inner, 1, k)
        forward_taps, backward_taps = self.taps.chunk(2)
        kernel, self.late = torch.cat([forward_taps, backward_taps.flip(2)]).unsqueeze(3), self.taps.shape[2] - 1
        bias, padding, groups = both("conv1d{}.bias"), (self.late, 0), len(kernel)
        self.conv = PackedConv2d(kernel, bias, padding=padding, groups=groups, activation="swish")
        turned = [w[f"x_proj{suffix}.weight"].roll(2 * self.d_state, dims=0) for suffix in ("", "_b")]
        self.x_proj = PackedLinear(fixed(torch.cat(turned), like), groups=2)  # B and C begin at multiples of 16 bytes
        steps = torch.block_diag(w["dt_proj.weight"], w["dt_proj_b.weight"])  # too few channels for groups to pay
        self.dt_proj = PackedLinear(steps, both("dt_proj{}.bias"))
        self.A = fixed(-both("A{}_log").double().exp(), like)
        self.D = both("D{}")
        scale = 0.5 if mixer.average_directions else 1.0
        self.out_proj = PackedLinear(fixed(w["out_proj.weight"] * scale, like))

    def forward(self, tokens: Tensor) -> Tensor:
        dtype = self.in_proj.weight.dtype
        x, z = self.in_proj(self.norm(tokens).to(dtype)).chunk(2, dim=2)
        inputs = self.by_kernels(x) if tokens.is_cuda and not exporting() else self.by_layers(x)
        u, delta, B, C = ([t.mT for t in both] for both in inputs)
        A, D = self.A.chunk(2), self.D.chunk(2)
        forward, backward = ((u[i], delta[i], A[i], B[i], C[i], D[i]) for i in (0, 1))
        mixed = bidirectional_scan(*forward, z.mT, None, *backward, None, scale=1.0, backend=self.backend).mT.to(dtype)
        if dtype == tokens.dtype:
            return self.out_proj(mixed, tokens)
        return tokens + self.out_proj(mixed)

    def by_kernels(self, x: Tensor) -> Iterable[Sequence[Tensor]]:
        """Inputs of the scan, two of each, where kernels run backwards in time: (b, l, d_inner) -> (b, l, c) each."""
        taps, weights = self.taps.chunk(2), self.x_proj.weight.flatten(1).chunk(2)
        assert self.conv.bias is not None
        convolved, projections = [], []
        for i, bias in enumerate(self.conv.bias.chunk(2)):
            u = causal_conv1d(x.mT, taps[i], bias, reverse=i == 1)
            assert isinstance(u, Tensor)
            convolved.append(u.mT)
            projections.append(F.linear(u.mT, weights[i]).split([self.d_state, self.d_state, self.dt_rank], dim=2))
        B, C, low_rank = zip(*projections)
        return convolved, self.dt_proj(torch.cat(low_rank, dim=2).to(self.D.dtype)).chunk(2, dim=2), B, C

    def by_layers(self, x: Tensor) -> Iterable[Sequence[Tensor]]:
        """The same by layers that take both directions at once. The backward one sees what is to come, so its first
        step stands `late` steps behind the forward one's.
        """
        u = as_tokens(self.conv(as_image(torch.cat([x, x], dim=2))))  # (b, l + late, 2 d_inner)
        projected = self.x_proj(u).to(self.D.dtype).unflatten(2, (2, -1))
        B, C, low_rank = projected.split([self.d_state, self.d_state, self.dt_rank], dim=3)
        delta = self.dt_proj(low_rank.flatten(2))
        by_direction = (t.chunk(2, dim=2) for t in (u.to(self.D.dtype), delta, B.flatten(2), C.flatten(2)))
        l = x.shape[1]
        return [(forward[:, :l], backward[:, self.late :]) for forward, backward in by_direction]


def fuse_encoder(encoder: nn.Module) -> nn.Module:
    """Pack the Vim blocks of an encoder; the others have nothing to fold and are copied."""
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, VimEncoder):
        encoder.layers = nn.ModuleList(FusedVimBlock(block) for block in encoder.layers)  # type: ignore[arg-type]
    return encoder


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
        pieces = zip(*(fixed(tensor, like).split(self.channels) for tensor in affine))  # by stage
        self.restore = nn.ModuleList(PackedConv2d(*piece) for piece in pieces) if errors else None
        self.error_projection = None
        if error_projection is not None:
            shares, bias = error_projection.weight.split(self.channels, dim=1), error_projection.bias
            self.error_projection = nn.ModuleList(PackedConv2d(w, None if k else bias) for k, w in enumerate(shares))

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Let the products take 16 bits but for those of norms, step sizes, state and the projection of the error."""
        for name, module in self.named_modules():
            if name.endswith("dt_proj") or name.startswith("error_projection"):
                continue
            if isinstance(module, PackedConv2d | StageTokens | nn.ParameterList):
                module.to(dtype)

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[s_k] -> channel means of F_hat and F (b, 2, h, w), mean square error of every stage (b, stages, h, w) unless
        ``frm_input`` is "mean", and the projection of log(1 + error) (b, p, h, w) where there is one.
        """
        dtype = self.mean[0].dtype
        tokens = sum(embed(stage.to(dtype)) for embed, stage in zip(self.embed, stages))
        encoded = self.encoder(tokens.flatten(2).transpose(1, 2) + self.position, self.grid)
        latent = encoded.transpose(1, 2).unflatten(2, self.grid).to(dtype)
        compared = zip(*(self.compare(*image) for image in by_image(latent, *stages)))
        means, errors, projected = (None if images[0] is None else torch.cat(images) for images in compared)
        assert means is not None
        return means, errors, projected

    def compare(self, latent: Tensor, *stages: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `forward` returns, of f_lat (b, D, h / p, w / p) and [s_k]."""
        if self.restore is None and has_kernel(latent):
            return self.means(self.decoder.mean(latent, *self.mean), stages), None, None
        chunks: Iterable[Tensor] = self.decoder(latent)
        if self.restore is None:
            return self.means(self.rebuilt(chunks), stages), None, None
        chunks = list(chunks)
        return self.means(self.rebuilt(chunks), stages), *self.errors(torch.cat(chunks, dim=1), stages)

    def rebuilt(self, chunks: Iterable[Tensor]) -> Tensor:
        """(1 + f_hat) / 2 in chunks -> channel mean of F_hat, (b, 1, h, w)."""
        sums = [F.conv2d(chunk, weight) for chunk, weight in zip(chunks, chunked(self.mean[0]))]
        return torch.stack(sums).sum(dim=0) + self.mean[1]

    def means(self, rebuilt: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """Channel mean of F_hat (b, 1, h, w), [s_k] -> channel means of F_hat and F, (b, 2, h, w)."""
        sums = [resize(stage.sum(dim=1, keepdim=True), self.size) for stage in stages]
        features = torch.stack(sums).sum(dim=0) / sum(self.channels)
        return torch.cat([rebuilt, features.to(rebuilt.dtype)], dim=1)

    def errors(self, hidden: Tensor, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(1 + f_hat) / 2 (b, C1, h, w), [s_k] -> mean and projection of (F_hat - F)^2, which exists stage by stage."""
        assert self.restore is not None
        stage_errors, projected = [], None
        for k, stage in enumerate(stages):
            error = self.restore[k](hidden).to(self.position.dtype)
            error = error.sub_(resize(stage, self.size)).square_()
            stage_errors.append(error.mean(dim=1, keepdim=True))
            if self.error_projection is not None:
                projected = self.error_projection[k](error.add_(1).log_(), projected)  # log1p takes twice the time
        return torch.cat(stage_errors, dim=1), projected
