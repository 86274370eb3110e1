"""The deployed form of the network: the same function of the image in evaluation mode, folded. ``ALMRR.fuse()``.

Nothing here approximates; every step is an identity of linear algebra. s_k (c_k channels, side n / q_k) are the maps
of the chosen blocks, R_k the bilinear resize to the grid of side n, F = ([R_k s_k]_k - m) / v the features (m = 0,
v = 1 unless ``standardise`` is "channel"), C their channels, f_hat the C1 channels behind the decoder's tanh. With
``standardise`` "position", m and v are maps: that comes first, on the stages as they are, and s_k is its result.

1. *Batch norm* after a convolution: g (W x + b - mu) / d + h = (g / d) W x + (g (b - mu) / d + h), d = sqrt(var + eps).
2. *Tokens.* Nothing nonlinear stands between s_k and the tokens. Reduction W_r, b_r and patch embedding P, b_p make one
   kernel Q[d,c,u,v] = sum_r P[d,r,u,v] W_r[r,c] / v[c] on the grid (P / v where there is no reduction), and one bias:

       tokens[d,i,j] = sum_c,u,v Q[d,c,u,v] (R_k s_k)[c, p i + u, p j + v]  +  b_p + P b_r - Q m + position[i,j]

   R_k is one matrix per axis, R[y, y'], so each stage is projected at its own resolution:
   - q divides p (a token spans p / q whole pixels of s_k): R's rows for one token are the same p x (p / q + 2) matrix r
     for every token (p x p, the identity, for q = 1). So the stage's share of the tokens is a convolution by
     sum_u,v Q[d,c,u,v] r[u,a] r[v,b] with stride p / q. At the border the resize repeats the last pixel, so the
     convolution does (padding 1, replicated).
   - otherwise (block 4 at the paper's sizes): first the channels, then the resize, D p^2 channels wide at 1 / q of the
     side: tokens[d,i,j] = sum_u,y,v,x R[p i + u, y] R[p j + v, x] (Q s)[d,u,v,y,x].
3. *What the U-Net sees* (``frm_input``), F_hat = W f_hat + b being the last 1x1 convolution of the MFRM:
   - mean_c F_hat = (mean_c W) f_hat + mean_c b: C1 -> 1 instead of C1 -> C.
   - mean_c F = sum_k R_k (sum_c s_k / v) / C - mean_c (m / v): one channel is resized, not C.
   - The other inputs need mean_c (F_hat - F)^2 for every stage. As a quadratic form in f_hat it would take
     f_hat' (W_k' W_k) f_hat, C1^2 products a position and stage, where W takes C C1: more work with the paper's C1 of
     1024, little less with 128; and it is a small difference of large numbers. So W stays, applied stage by stage:
     F and F_hat never exist whole. Standardisation commutes with R_k (its rows sum to 1) and is done before it.
   - "projection": log(1 + (F_hat - F)^2) of every channel goes through a 1x1 convolution, stage by stage as well.
   For "mean", no tensor of C channels exists at any resolution.
4. *Mamba.* Vim's factor 0.5 goes into out_proj, A = -exp(A_log) is taken once, x_proj and dt_proj of both directions
   are one product each, and tokens keep the layout (b, l, d) that the scan likes.
5. *Decoder.* A transposed convolution with stride 2, padding 1 and taps w_0, w_1, w_2 per axis makes y[2 i] = w_1 x[i],
   y[2 i + 1] = w_2 x[i] + w_0 x[i + 1]: four small convolutions. tanh x = 2 sigmoid(2 x) - 1, and sigmoid is ten times
   faster than tanh in PyTorch on a CPU: the inner 2 goes into the last transposed convolution (the resize between is
   linear), the rest into W and b, which become 2 W and b - W 1. Those with stride 1 gain nothing and stay.

Weights, and so all maps, are channels-last: PyTorch's bilinear resize of many channels is then tens of times faster on
a CPU. Not folded: the image's normalisation (the first convolution's zero padding stands for the mean colour), and the
weight of the RMS norm (its operator is faster with one). Folded weights are computed in float64 and rounded once.
Steps 1 and 2 are done by folding.py. Source: ours; the paper does not treat deployment.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.folding import StageTokens, fixed, fold_batch_norms, resize
from almrr_ref.kernels import bidirectional_scan
from almrr_ref.mamba import VimBlock, VimEncoder
from almrr_ref.mfrm import MFRM, Decoder
from almrr_ref.model import ALMRR


class FusedVimBlock(nn.Module):
    """A Vim block with packed weights (step 4): (b, l, d) -> (b, l, d)."""

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

    def convolve(self, x: Tensor) -> Tensor:
        """Both directions' causal convolutions and SiLU: (b, l, d_inner) -> (2, b, l, d_inner)."""
        (b, l, d), k = x.shape, len(self.taps)
        padded = F.pad(x, (0, 0, k - 1, k - 1))
        u = self.conv_bias[:, None, None].expand(2, b, l, d).contiguous()
        for direction, first in enumerate((0, k - 1)):
            for j in range(k):
                u[direction].addcmul_(self.taps[j, direction], padded[:, first + j : first + j + l])
        return F.silu(u, inplace=True)

    def forward(self, tokens: Tensor) -> Tensor:
        b, l, _ = tokens.shape
        x, z = (self.norm(tokens) @ self.in_proj).chunk(2, dim=2)
        u = self.convolve(x)
        projected = u.flatten(1, 2) @ self.x_proj  # (2, b l, dt_rank + 2 n)
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = torch.baddbmm(self.dt_bias, low_rank, self.dt_proj).unflatten(1, (b, l))
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


class FusedDecoder(nn.Module):
    """The decoder up to its tanh, as step 5 has it: f_lat (b, D, h, w) -> (1 + f_hat) / 2, (b, C1, size, size)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.size, last = decoder.size, decoder.deconv3
        self.deconv1, self.deconv2 = copy.deepcopy(decoder.deconv1), copy.deepcopy(decoder.deconv2)
        assert last.bias is not None
        self.bias = fixed(2 * last.bias, last.bias)
        taps = ([1], [2, 0])  # of y[2 i] and y[2 i + 1]
        kernel = 2 * last.weight.transpose(0, 1)
        self.kernels = nn.ParameterList(fixed(kernel[:, :, y][:, :, :, x], kernel) for y in taps for x in taps)

    def forward(self, latent: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.deconv1(latent)))
        x = F.relu(F.instance_norm(self.deconv2(x)))
        b, _, h, w = x.shape
        fine = x.new_empty(b, 2 * h - 1, 2 * w - 1, len(self.bias)).permute(0, 3, 1, 2)  # channels-last
        for i, kernel in enumerate(self.kernels):
            fine[:, :, i // 2 :: 2, i % 2 :: 2] = F.conv2d(x, kernel, self.bias)
        return resize(fine, self.size).sigmoid_()


def fold_projection(mfrm: MFRM, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Q and the bias of step 2 but for the position: (D, C, p, p) and (D,), float64."""
    embed, reduce = mfrm.patch_embed, mfrm.reduce
    assert embed.bias is not None
    kernel, bias = embed.weight.double(), embed.bias.double()
    if isinstance(reduce, nn.Conv2d):
        assert reduce.bias is not None
        bias = bias + torch.einsum("druv,r->d", kernel, reduce.bias.double())
        kernel = torch.einsum("druv,rc->dcuv", kernel, reduce.weight.double()[:, :, 0, 0])
    kernel = kernel / std[:, None, None]
    return kernel, bias - torch.einsum("dcuv,c->d", kernel, mean)


class FusedMFRM(nn.Module):
    """Reconstruction and the sums over its channels: [s_k] -> what the U-Net sees, (b, 2 or more, n, n).

    For ``frm_input`` "none": the root mean square error, (b, 1, n, n).
    """

    def __init__(self, model: ALMRR) -> None:
        super().__init__()
        mfrm, config, like = model.mfrm, model.config, model.feature_mean
        self.size, self.frm_input, self.grid = config.feature_size, config.frm_input, mfrm.grid
        self.channels = model.extractor.channels
        mean, std = torch.zeros(sum(self.channels)).to(like).double(), torch.ones(sum(self.channels)).to(like).double()
        if config.standardise == "channel":
            mean, std = like.double(), model.feature_std.double()
        elif config.standardise == "position":
            self.maps_mean = nn.ParameterList(fixed(t, like) for t in model.statistics(like))
            self.maps_scale = nn.ParameterList(fixed(1 / t.double(), like) for t in model.statistics(model.feature_std))
        self.positions = config.standardise == "position"
        kernel, bias = fold_projection(mfrm, mean, std)
        self.embed = nn.ModuleList(
            StageTokens(part, stride // 4, self.size, like)
            for part, stride in zip(kernel.split(self.channels, dim=1), model.extractor.backbone.strides)
        )
        self.position = fixed(mfrm.pos_embed.double() + bias, like)
        self.encoder, self.decoder = fuse_encoder(mfrm.encoder), FusedDecoder(mfrm.decoder)
        assert mfrm.restore.bias is not None
        weight = 2 * mfrm.restore.weight.double()
        offset = mfrm.restore.bias.double() - weight.sum(dim=(1, 2, 3)) / 2
        if self.frm_input != "none":
            self.mean_weight, self.mean_bias = (fixed(t.mean(dim=0, keepdim=True), like) for t in (weight, offset))
            self.sum_weight = fixed(1 / (len(std) * std)[None, :, None, None], like)
            self.sum_bias = fixed(-(mean / std).mean(), like)
        if self.frm_input != "mean":
            self.restore_weight, self.restore_bias = fixed(weight, like), fixed(offset, like)
            self.mean, self.std = (fixed(t[:, None, None], like) for t in (mean, std))
        self.error_projection = copy.deepcopy(model.error_projection)

    def errors(self, hidden: Tensor, stages: list[Tensor]) -> Iterator[Tensor]:
        """(F_hat - F)^2, stage by stage: (1 + f_hat) / 2 of (b, C1, n, n), [s_k] -> [(b, c_k, n, n)]."""
        own = (t.split(self.channels) for t in (self.restore_weight, self.restore_bias, self.mean, self.std))
        for stage, weight, bias, mean, std in zip(stages, *own):
            difference = F.conv2d(hidden, weight, bias).sub_(resize((stage - mean) / std, self.size))
            yield difference.square_()

    def forward(self, stages: list[Tensor]) -> Tensor:
        if self.positions:
            stages = [(s - m) * scale for s, m, scale in zip(stages, self.maps_mean, self.maps_scale)]
        projected = sum(embed(stage) for embed, stage in zip(self.embed, stages))
        tokens = projected.flatten(2).transpose(1, 2) + self.position
        encoded = self.encoder(tokens, self.grid)
        hidden = self.decoder(encoded.transpose(1, 2).unflatten(2, self.grid))  # (1 + f_hat) / 2
        if self.frm_input == "none":
            sums = [error.sum(dim=1, keepdim=True) for error in self.errors(hidden, stages)]
            return (torch.stack(sums).sum(dim=0) / sum(self.channels)).sqrt()
        weights = self.sum_weight.split(self.channels, dim=1)
        sums = [resize(F.conv2d(stage, weight), self.size) for stage, weight in zip(stages, weights)]
        seen = [F.conv2d(hidden, self.mean_weight, self.mean_bias), torch.stack(sums).sum(dim=0) + self.sum_bias]
        if self.frm_input != "mean":
            projections = []
            for k, error in enumerate(self.errors(hidden, stages)):
                seen.append(error.mean(dim=1, keepdim=True).log1p())
                if self.error_projection is not None:
                    part = self.error_projection.weight.split(self.channels, dim=1)[k]
                    projections.append(F.conv2d(error.log1p_(), part))
            if self.error_projection is not None:
                bias = self.error_projection.bias
                assert bias is not None
                seen.append(torch.stack(projections).sum(dim=0) + bias[:, None, None])
        return torch.cat(seen, dim=1)


class FusedALMRR(ALMRR):
    """An ALMRR for prediction alone: images (b, 3, s, s) in [0, 1] -> anomaly maps (b, 1, s, s) in [0, 1].

    ``config``, ``threshold``, ``predict``, ``smooth`` and ``image_scores`` are those of ALMRR. It is a copy: the model
    it was made of does not change. It has no gradients and no training mode.
    """

    def __init__(self, model: ALMRR) -> None:
        nn.Module.__init__(self)  # ALMRR's would build and draw a network that nobody needs
        self.config, self.threshold = model.config, model.threshold
        self.register_buffer("feature_mean", model.feature_mean.clone())
        self.extractor, self.frm = copy.deepcopy(model.extractor), copy.deepcopy(model.frm)
        self.memory = copy.deepcopy(model.memory)
        self.mfrm = FusedMFRM(model)  # type: ignore[assignment]
        for part in (self.extractor, self.frm):
            if part is not None:
                fold_batch_norms(part)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def fuse(self) -> "FusedALMRR":
        return self

    def train(self, mode: bool = True) -> "FusedALMRR":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.config.image_size,) * 2
        if images.shape[-2:] != size:
            raise ValueError(
                f"images are {tuple(images.shape)}: expected (b, 3, {size[0]}, {size[1]}); predict resizes"
            )
        stages = self.extractor.stages(images)
        seen = self.mfrm(stages)
        if self.frm is not None:
            return self.anomaly_map(seen, stages)
        distance = self._to_image_size(seen)
        return distance / (1 + distance)
