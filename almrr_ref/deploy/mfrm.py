"""The reconstruction module of the deployed form: fused.py, steps 2 and 3."""

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.decoder import CHUNK, FusedDecoder
from almrr_ref.deploy.folding import StageTokens, fixed
from almrr_ref.deploy.mamba import FusedVimBlock, fuse_encoder
from almrr_ref.features import resize
from almrr_ref.mfrm import MFRM


def fold_projection(mfrm: MFRM) -> tuple[Tensor, Tensor]:
    """Q and the bias of step 2 but for the position: (D, C, p, p) and (D,), float64."""
    embed, reduce = mfrm.patch_embed, mfrm.reduce
    assert embed.bias is not None
    kernel, bias = embed.weight.double(), embed.bias.double()
    if isinstance(reduce, nn.Conv2d):
        assert reduce.bias is not None
        bias = bias + torch.einsum("druv,r->d", kernel, reduce.bias.double())
        kernel = torch.einsum("druv,rc->dcuv", kernel, reduce.weight.double()[:, :, 0, 0])
    return kernel, bias


class FusedMFRM(nn.Module):
    """Reconstruction, and what the U-Net needs of it without F_hat ever being whole.

    Args:
        mfrm: the module that is folded.
        error_projection: the learned 1x1 projection of the error, for ``frm_input`` "memory".
        config: of the network.
        channels, strides: of the backbone's stages.
    """

    def __init__(
        self,
        mfrm: MFRM,
        error_projection: nn.Conv2d | None,
        config: ModelConfig,
        channels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        self.channels, self.size, self.grid, like = list(channels), config.feature_size, mfrm.grid, mfrm.pos_embed
        kernel, bias = fold_projection(mfrm)
        kernels = kernel.split(self.channels, dim=1)
        self.embed = nn.ModuleList(
            StageTokens(stage_kernel, stride // 4, self.size, like) for stage_kernel, stride in zip(kernels, strides)
        )
        self.position = fixed(mfrm.pos_embed.double() + bias, like)
        self.encoder, self.decoder = fuse_encoder(mfrm.encoder), FusedDecoder(mfrm.decoder)
        assert mfrm.restore.bias is not None
        weight = 2 * mfrm.restore.weight.double()
        offset = mfrm.restore.bias.double() - weight.sum(dim=(1, 2, 3)) / 2
        self.mean_weight, self.mean_bias = (fixed(t.mean(dim=0, keepdim=True), like) for t in (weight, offset))
        self.restore_weight = self.restore_bias = None
        if config.frm_input != "mean":
            self.restore_weight, self.restore_bias = fixed(weight, like), fixed(offset, like)
        self.error_projection = copy.deepcopy(error_projection)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Let the products with f_hat and the stages take 16 bits, but not the projection of the error."""
        self.embed.to(dtype)
        self.decoder.to(dtype)
        for block in self.encoder.modules():
            if isinstance(block, FusedVimBlock):
                block.lower_precision(dtype)
        for weight in (self.mean_weight, self.mean_bias, self.restore_weight, self.restore_bias):
            if weight is not None:
                weight.data = weight.data.to(dtype)

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[s_k] -> channel means of F_hat and F (b, 2, n, n), mean square error of every stage (b, stages, n, n) unless
        ``frm_input`` is "mean", and the projection of log(1 + error) (b, p, n, n) where there is one.
        """
        chunks = self.chunks([stage.to(self.mean_weight.dtype) for stage in stages])
        if self.restore_weight is None:
            return self.means(chunks, stages), None, None
        chunks = list(chunks)  # read twice
        stage_errors, projected = self.errors(torch.cat(chunks, dim=1), stages)
        return self.means(chunks, stages), stage_errors, projected

    def chunks(self, stages: list[Tensor]) -> Iterable[Tensor]:
        """(1 + f_hat) / 2 in chunks of channels: [s_k] in the dtype of the products -> (b, CHUNK, n, n) each."""
        projected = sum(embed(stage) for embed, stage in zip(self.embed, stages))
        tokens = projected.flatten(2).transpose(1, 2) + self.position
        encoded = self.encoder(tokens, self.grid)
        latent = encoded.transpose(1, 2).unflatten(2, self.grid).to(stages[0].dtype)
        chunks: Iterable[Tensor] = self.decoder(latent)
        return chunks

    def means(self, chunks: Iterable[Tensor], stages: list[Tensor]) -> Tensor:
        weights = self.mean_weight.split(CHUNK, dim=1)
        rebuilt = torch.stack([F.conv2d(chunk, weight) for chunk, weight in zip(chunks, weights)]).sum(dim=0)
        sums = [resize(stage.sum(dim=1, keepdim=True), self.size) for stage in stages]
        features = torch.stack(sums).sum(dim=0) / sum(self.channels)
        return torch.cat([rebuilt + self.mean_bias, features.to(rebuilt.dtype)], dim=1)

    def errors(self, hidden: Tensor, stages: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(F_hat - F)^2 stage by stage, its mean and its projection: (1 + f_hat) / 2 of (b, C1, n, n), [s_k]."""
        assert self.restore_weight is not None
        assert self.restore_bias is not None
        projection, stage_errors, projected = self.error_projection, [], []
        weights, biases = self.restore_weight.split(self.channels), self.restore_bias.split(self.channels)
        for k, (stage, weight, bias) in enumerate(zip(stages, weights, biases)):
            error = F.conv2d(hidden, weight, bias).to(self.position.dtype)
            error = error.sub_(resize(stage, self.size)).square_()
            stage_errors.append(error.mean(dim=1, keepdim=True))
            if projection is not None:
                projected.append(F.conv2d(error.log1p_(), projection.weight.split(self.channels, dim=1)[k]))
        if projection is None:
            return torch.cat(stage_errors, dim=1), None
        assert projection.bias is not None
        return torch.cat(stage_errors, dim=1), torch.stack(projected).sum(dim=0) + projection.bias[:, None, None]
