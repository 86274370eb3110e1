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
4. *Mamba.* The backward direction is a forward one of the tokens in reverse order. So both are one sequence of twice
   the channels: one causal convolution, one x_proj and dt_proj of two groups, one scan whose halves have B and C of
   their own. Vim's factor 0.5 goes into out_proj, A = -exp(A_log) is taken once.
5. *Decoder.* A transposed convolution with stride 1 is a convolution with the kernel flipped and padding 2. One with
   stride 2, padding 1 and taps w_0, w_1, w_2 per axis makes y[2 i] = w_1 x[i], y[2 i + 1] = w_2 x[i] + w_0 x[i + 1]:
   four small convolutions. tanh x = 2 sigmoid(2 x) - 1, and sigmoid is ten times faster than tanh in PyTorch on a CPU:
   the inner 2 goes into the last transposed convolution (the resize between is linear), the rest into W and b, which
   become 2 W and b - W 1.

Weights, and so all maps, are channels-last: PyTorch's bilinear resize of many channels is then tens of times faster on
a CPU. There, convolutions keep their weights in oneDNN's own layout (packed.py). Not folded: the image's normalisation
(the first convolution's zero padding stands for the mean colour), and the weight of the RMS norm (its operator is
faster with one). Folded weights are computed in float64 and rounded once; 16-bit ones are rounded after that.
Steps 1 and 2 are done by folding.py, step 4 by fused_mamba.py, step 5 by fused_decoder.py. Source: ours; the paper does
not treat deployment.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.decoder import PART, FusedDecoder
from almrr_ref.deploy.folding import StageTokens, fixed, fold_batch_norms
from almrr_ref.deploy.mamba import FusedVimBlock, fuse_encoder
from almrr_ref.deploy.packed import pack_convolutions
from almrr_ref.features import resize
from almrr_ref.mfrm import MFRM
from almrr_ref.model import ALMRR
from almrr_ref.plus.memory import PackedMemory


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

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Let the products take 16 bits: all of f_hat and of the stages, but for the errors' projection."""
        self.embed.to(dtype)
        self.decoder.to(dtype)
        for block in self.encoder.modules():
            if isinstance(block, FusedVimBlock):
                block.lower_precision(dtype)
        for name in ("mean_weight", "mean_bias", "sum_weight", "restore_weight", "restore_bias"):
            if hasattr(self, name):
                getattr(self, name).data = getattr(self, name).data.to(dtype)

    def errors(self, hidden: Tensor, stages: list[Tensor]) -> Iterator[Tensor]:
        """(F_hat - F)^2, stage by stage: (1 + f_hat) / 2 of (b, C1, n, n), [s_k] -> [(b, c_k, n, n)]."""
        own = (t.split(self.channels) for t in (self.restore_weight, self.restore_bias, self.mean, self.std))
        for stage, weight, bias, mean, std in zip(stages, *own):
            rebuilt = F.conv2d(hidden, weight, bias).to(mean.dtype)
            yield rebuilt.sub_(resize((stage - mean) / std, self.size)).square_()

    def features_mean(self, stages: list[Tensor]) -> Tensor:
        """mean_c F: [s_k] -> (b, 1, n, n)."""
        weights = self.sum_weight.split(self.channels, dim=1)
        sums = [resize(F.conv2d(stage, weight), self.size) for stage, weight in zip(stages, weights)]
        return torch.stack(sums).sum(dim=0) + self.sum_bias

    def forward(self, stages: list[Tensor]) -> Tensor:
        if self.positions:
            own = zip(stages, self.maps_mean, self.maps_scale)
            stages = [((stage - mean) * scale).to(stage.dtype) for stage, mean, scale in own]
        projected = sum(embed(stage) for embed, stage in zip(self.embed, stages))
        tokens = projected.flatten(2).transpose(1, 2) + self.position
        encoded = self.encoder(tokens, self.grid)
        latent = encoded.transpose(1, 2).unflatten(2, self.grid).to(stages[0].dtype)
        parts = self.decoder(latent)  # of (1 + f_hat) / 2
        if self.frm_input == "mean":
            weights = self.mean_weight.split(PART, dim=1)
            rebuilt = torch.stack([F.conv2d(part, weight) for part, weight in zip(parts, weights)]).sum(dim=0)
            return torch.cat([rebuilt + self.mean_bias, self.features_mean(stages)], dim=1)
        hidden = torch.cat(list(parts), dim=1)
        if self.frm_input == "none":
            sums = [error.sum(dim=1, keepdim=True) for error in self.errors(hidden, stages)]
            return (torch.stack(sums).sum(dim=0) / sum(self.channels)).sqrt()
        seen = [F.conv2d(hidden, self.mean_weight, self.mean_bias), self.features_mean(stages)]
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

    ``config``, ``threshold``, ``predict``, ``smooth`` and ``image_scores`` are those of ALMRR. It is a copy: the
    model it was made of does not change. It has no gradients and no training mode.

    Args:
        model: what is folded.
        dtype: of the convolutions and matrix products: that of the model, or a 16-bit one. Residual and norms of the
            encoder, step sizes and state of the scan, distances and the softmax keep the model's dtype; the paper's
            other encoders keep it whole.
    """

    def __init__(self, model: ALMRR, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # ALMRR's would build and draw a network that nobody needs
        self.config, self.threshold = model.config, model.threshold
        self.register_buffer("feature_mean", model.feature_mean.clone())  # also says on which device it is
        self.register_buffer("feature_std", model.feature_std.clone())
        self.extractor, self.frm = copy.deepcopy(model.extractor), copy.deepcopy(model.frm)
        self.memory = None if model.memory is None else PackedMemory(model.memory)
        self.evidence = copy.deepcopy(model.evidence)
        self.dtype = dtype or model.feature_mean.dtype
        for part in (self.extractor.backbone, self.frm):
            if part is not None:
                fold_batch_norms(part)
                pack_convolutions(part)
                part.to(self.dtype)
        mfrm = FusedMFRM(model)
        mfrm.lower_precision(self.dtype)
        self.mfrm = mfrm  # type: ignore[assignment]
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().train(False)

    def fuse(self, dtype: torch.dtype | None = None) -> "FusedALMRR":
        """Itself.

        Raises:
            ValueError: if another dtype is asked for than it has.
        """
        if dtype not in (None, self.dtype):
            raise ValueError(f"the network is folded in {self.dtype} already; fold the plain one in {dtype}")
        return self

    def train(self, mode: bool = True) -> "FusedALMRR":
        """Stay in evaluation mode."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        size = (self.config.image_size,) * 2
        if images.shape[-2:] != size:
            raise ValueError(
                f"images are {tuple(images.shape)}: expected (b, 3, {size[0]}, {size[1]}); predict resizes"
            )
        stages = self.extractor.stages(images)
        seen = self.mfrm(stages)
        if self.frm is not None:
            nearest = None if self.memory is None else self.nearest(self.standardised(stages))
            return self.anomaly_map(self.with_nearest(seen, nearest), nearest)
        distance = self._to_image_size(seen)
        return distance / (1 + distance)
