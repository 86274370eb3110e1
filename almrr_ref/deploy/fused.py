"""The deployed form of the network: the same function of the image in evaluation mode, folded. ``ALMRR.fuse()``.

Nothing here approximates; every step is an identity of linear algebra. s_k (c_k channels, h / q_k x w / q_k) are the
maps of the chosen blocks, standardised if the config says so, R_k the bilinear resize to the grid h x w,
F = [R_k s_k]_k the features, C their channels, f_hat the C1 channels behind the decoder's tanh.

1. *Batch norm* after a convolution: g (W x + b - mu) / d + h = (g / d) W x + (g (b - mu) / d + h), d = sqrt(var + eps).
2. *Tokens.* Nothing nonlinear stands between s_k and the tokens. Reduction W_r, b_r and patch embedding P, b_p make one
   kernel Q[d,c,u,v] = sum_r P[d,r,u,v] W_r[r,c] on the grid (P where there is no reduction), and one bias:

       tokens[d,i,j] = sum_c,u,v Q[d,c,u,v] (R_k s_k)[c, p i + u, p j + v]  +  b_p + P b_r + position[i,j]

   R_k is one matrix per axis, R[y, y'], so each stage is projected at its own resolution:
   - q divides p (a token spans p / q whole pixels of s_k): R's rows for one token are the same p x (p / q + 2) matrix r
     for every token (p x p, the identity, for q = 1). So the stage's part of the tokens is a convolution by
     sum_u,v Q[d,c,u,v] r[u,a] r[v,b] with stride p / q. At the border the resize repeats the last pixel, so the
     convolution does (padding 1, replicated).
   - otherwise (block 4 at the paper's sizes): first the channels, then the resize, D p^2 channels wide at 1 / q of the
     side: tokens[d,i,j] = sum_u,y,v,x R[p i + u, y] R[p j + v, x] (Q s)[d,u,v,y,x].
3. *The U-Net's input* (``frm_input``), F_hat = W f_hat + b being the last 1x1 convolution of the MFRM:
   - mean_c F_hat = (mean_c W) f_hat + mean_c b: C1 -> 1 instead of C1 -> C.
   - mean_c F = sum_k R_k (sum_c s_k) / C: one channel is resized, not C.
   - "memory" and "none" need (F_hat - F)^2. As a quadratic form in f_hat its mean would take C1^2 products a position
     and stage, where W takes C C1, and it is a small difference of large numbers. So W stays, applied stage by stage:
     F and F_hat never exist whole.
4. *Mamba.* Both directions go through each layer at once: one causal convolution of twice the channels, the backward
   direction's taps flipped, so that its rows stand k - 1 steps behind; one x_proj and dt_proj of two groups; one scan,
   which adds both and gates the sum. Nothing is flipped in time. Vim's factor 0.5 goes into out_proj, A = -exp(A_log)
   is taken once. On a CUDA GPU each direction has a convolution of its own, which is one kernel.
5. *Decoder.* A transposed convolution with stride 1 is a convolution with the kernel flipped and padding 2; its bias
   goes, since the instance norm behind it takes away the mean of every channel. One with stride 2, padding 1 and taps
   w_0, w_1, w_2 per axis makes y[2 i] = w_1 x[i], y[2 i + 1] = w_2 x[i] + w_0 x[i + 1]: four small convolutions. tanh x
   = 2 sigmoid(2 x) - 1, and sigmoid is ten times faster than tanh in PyTorch on a CPU: the inner 2 goes into the last
   transposed convolution (the resize between is linear), the rest into W and b, which become 2 W and b - W 1. On a CUDA
   GPU one kernel takes what the four convolutions give to mean_c F_hat.

Weights and maps are channels-last: PyTorch's bilinear resize of many channels is then tens of times faster on a CPU.
Not folded: the image's normalisation (the first convolution's zero padding stands for the mean colour), and the weight
of the RMS norm (its operator is faster with one). Folded weights are computed in float64 and rounded once; 16-bit ones
are rounded after that. Step 1 is done by packed.py, 2 to 5 by mfrm.py. Source: ours; the paper treats no
deployment.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.mfrm import FusedMFRM
from almrr_ref.deploy.packed import fixed, folded
from almrr_ref.deploy.predictor import DeployedPredictor, to_image_size
from almrr_ref.plus.standardise import Standardise


class FusedStandardise(nn.Module):
    """`Standardise`, bit for bit, in the order of the stages' memory, channels-last: three times as fast on a CPU."""

    def __init__(self, standardise: Standardise) -> None:
        super().__init__()
        pairs = standardise.by_stage()
        self.mean = nn.ParameterList(fixed(mean[None], mean) for mean, _ in pairs)
        self.std = nn.ParameterList(fixed(std[None], std) for _, std in pairs)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        return [stage.sub(mean).div_(std) for stage, mean, std in zip(stages, self.mean, self.std)]


class FusedALMRR(DeployedPredictor):
    """The folded network, a copy: images (b, 3, h, w) in [0, 1] -> anomaly maps (b, 1, h, w) in [0, 1].

    Args:
        network: an ALMRR (model.py).
        dtype: of the convolutions and matrix products: that of the network, or a 16-bit one. Residual and norms of the
            encoder, step sizes and state of the scan, distances and the softmax keep the network's dtype; the paper's
            other encoders keep it whole.
    """

    channel_shares: Tensor

    def __init__(self, network: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__(network.config, network.threshold, network.outline_offset)
        dtype = dtype or network.mfrm.pos_embed.dtype
        self.extractor = copy.deepcopy(network.extractor)
        self.extractor.stand_in.clear()
        self.extractor.backbone = folded(network.extractor.backbone).to(dtype)
        self.frm = None if network.frm is None else folded(network.frm).to(dtype)
        self.standardise = None if network.standardise is None else FusedStandardise(network.standardise)
        self.evidence, self.memory = copy.deepcopy(network.evidence), copy.deepcopy(network.memory)
        if self.memory is not None:
            self.memory.freeze()
        self.by_memory_alone = self.evidence is not None and self.evidence.by_memory_alone
        self.mfrm = FusedMFRM(
            network.mfrm, network.error_projection, self.extractor.backbone, self.config.frm_input != "mean"
        )
        self.mfrm.lower_precision(dtype)
        channels = network.mfrm.pos_embed.new_tensor(self.extractor.channels)
        self.register_buffer("channel_shares", channels / channels.sum(), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What an exported file computes, for any b: (b, 3, h, w) -> anomaly maps (b, 1, h, w), image scores (b,) and,
        if there is a threshold and the network sees whole images, whether each is defective (b,).

        Where an image holds NaN or infinity, which maxima may pass over, the score is NaN and the image defective.
        """
        maps = self.maps(images)
        scores = self.image_scores(maps) + (0 * images).sum(dim=(1, 2, 3))
        threshold = self.threshold_of_pass
        return (maps, scores) if threshold is None else (maps, scores, ~(scores < threshold))

    def maps(self, images: Tensor) -> Tensor:
        return self.to_map(self.evidence_of(images)[0])

    def stages(self, images: Tensor) -> list[Tensor]:
        """The stages of `ALMRR.stages`, by the folded backbone: (b, 3, h, w) -> [(b, c_k, h_k, w_k)]."""
        self.check_size(images)
        stages = self.extractor.stages(images)
        return stages if self.standardise is None else self.standardise(stages)

    def evidence_of(self, images: Tensor | list[Tensor], masks: Sequence[Tensor] = ()) -> list[Tensor]:
        """The evidence for a map, by kind: images (b, 3, h, w) in [0, 1], or their `stages` -> [(b, k, h', w')]; k is 1
        without a memory.

        Args:
            masks: (count,) each: which stored patches do not count (plus/memory.py); one result for each mask.
        """
        stages = self.stages(images) if isinstance(images, Tensor) else images
        distances: list[Tensor] = []  # to the nearest stored patch, one map for each mask
        if self.memory is not None:
            distances = self.memory.excluding(stages, masks) if masks else [self.memory(stages)]
        if self.by_memory_alone and self.evidence is not None:
            others = len(self.evidence.weights) - 1  # kinds that do not count
            return [F.pad(nearest, (0, 0, 0, 0, others, 0)) for nearest in distances]
        means, stage_errors, projected = self.mfrm(stages)
        if self.frm is None:
            return [torch.einsum("bkhw,k->bhw", stage_errors, self.channel_shares)[:, None].sqrt()]
        if self.evidence is None:
            logits = self.frm(means).float()
            return [logits[:, 1:] - logits[:, :1]]
        kinds = []
        for nearest in distances:
            logits = self.frm(torch.cat([means, stage_errors.log1p(), projected, nearest], dim=1))
            kinds.append(self.evidence.kinds(logits, stage_errors, nearest))
        return kinds

    def to_map(self, evidence: Tensor) -> Tensor:
        """Evidence (b, k, h', w') -> anomaly maps (b, 1, h, w) in [0, 1]."""
        combined = evidence if self.evidence is None else self.evidence(evidence)
        combined = to_image_size(combined, self.config.size)
        return self.inside_roi(combined / (1 + combined) if self.frm is None else combined.sigmoid())
