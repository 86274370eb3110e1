"""ALMRR, composed as in the paper's Fig. 2: frozen features, reconstruction, refinement.

    images -> features F -> MFRM -> F_hat;   (F, F_hat) -> FRM -> anomaly map -> image score

The clean branch of training (phi) is ``features`` of the clean images: both branches share the frozen backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.config import ModelConfig
from almrr_ref.features import FeatureExtractor, resize
from almrr_ref.frm import FRM
from almrr_ref.mfrm import MFRM
from almrr_ref.plus.evidence import Evidence
from almrr_ref.plus.memory import NormalMemory


class ALMRR(nn.Module):
    """The whole network: images (b, 3, s, s) in [0, 1] -> anomaly maps (b, 1, s, s) in [0, 1].

    Args:
        config: sizes and choices; ``config.weights`` says where the backbone's weights come from.
        seed: of the initial weights; the global generator is neither used nor changed.

    Raises:
        ValueError: if the backbone's weights cannot be found or do not fit (backbones/weights.py).
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: ModelConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.threshold: float | None = None  # of the image score; set by training (README, "Threshold")
        self.extractor = FeatureExtractor(config.backbone, config.blocks, config.weights, config.feature_size)
        channels = sum(self.extractor.channels)
        length = sum(c * n * n for c, n in self._statistics_shape())
        self.register_buffer("feature_mean", torch.zeros(length))  # of all stages, flat: see statistics()
        self.register_buffer("feature_std", torch.ones(length))
        self.memory = (
            NormalMemory(self.extractor.channels, config.memory, config.feature_size // 2) if config.memory else None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mfrm = MFRM(config, channels)
            self.error_projection = (
                nn.Conv2d(channels, config.projection_channels, 1)
                if config.frm_input in ("projection", "memory")
                else None
            )
            self.frm = (
                FRM(
                    self._frm_channels(), config.frm_width, min(config.frm_levels, config.feature_size.bit_length() - 1)
                )
                if config.frm_input != "none"
                else None
            )
        self.evidence = Evidence(config)

    def _frm_channels(self) -> int:
        stages, projected = len(self.config.blocks), self.config.projection_channels
        return {
            "mean": 2,
            "error": 2 + stages,
            "projection": 2 + stages + projected,
            "memory": 2 + stages + projected + 1,
        }[self.config.frm_input]

    def _statistics_shape(self) -> list[tuple[int, int]]:
        """Channels and side of every stage's statistics: its own side, or 1 where positions are not told apart."""
        strides, size = self.extractor.backbone.strides, self.config.image_size
        sides = [size // stride if self.config.standardise == "position" else 1 for stride in strides]
        return list(zip(self.extractor.channels, sides))

    def statistics(self, flat: Tensor) -> list[Tensor]:
        """``feature_mean`` or ``feature_std`` -> one map per stage, (c_k, h_k, w_k) or (c_k, 1, 1)."""
        shapes = self._statistics_shape()
        parts = flat.split([c * n * n for c, n in shapes])
        return [part.view(c, n, n) for part, (c, n) in zip(parts, shapes)]

    def standardised(self, stages: list[Tensor]) -> list[Tensor]:
        """Stages [(b, c_k, h_k, w_k)] with mean 0 and deviation 1 over the good images, if the config says so."""
        if self.config.standardise == "none":
            return stages
        mean, std = self.statistics(self.feature_mean), self.statistics(self.feature_std)
        return [(stage - m) / v for stage, m, v in zip(stages, mean, std)]

    def features(self, images: Tensor) -> Tensor:
        """Frozen multi-scale features, standardised if the config says so: (b, 3, s, s) -> F (b, C, h, w)."""
        return self.extractor.join(self.standardised(self.extractor.stages(images)))

    def nearest(self, stages: list[Tensor], own: Tensor | None = None) -> Tensor | None:
        """Standardised stages -> log distance to the nearest stored patch, (b, 1, h, w), or None without a memory.

        In training ``own`` (b,) says which parts they show, as `NormalMemory.fit` knew them: theirs do not count.
        """
        return None if self.memory is None else resize(self.memory(stages, own), self.config.feature_size)

    def frm_view(self, features: Tensor, reconstructed: Tensor, nearest: Tensor | None = None) -> Tensor:
        """What the U-Net sees of F and F_hat, each (b, C, h, w): (b, 2, h, w), or more with the error (config).

        Channels: the means of F_hat and F; but for "mean" log(1 + mean square error) of every stage; for "projection"
        and "memory" a learned 1x1 projection of log(1 + square error) of every channel; for "memory" ``nearest``.
        """
        seen = [reconstructed.mean(dim=1, keepdim=True), features.mean(dim=1, keepdim=True)]
        if self.config.frm_input != "mean":
            error = (reconstructed - features).square()
            stages = error.split(list(self.extractor.channels), dim=1)
            seen += [stage.mean(dim=1, keepdim=True).log1p() for stage in stages]
            if self.error_projection is not None:
                seen.append(self.error_projection(error.log1p()))
        return self.with_nearest(torch.cat(seen, dim=1), nearest)

    def with_nearest(self, seen: Tensor, nearest: Tensor | None) -> Tensor:
        """Add `nearest` to what the U-Net sees, if the config wants it."""
        if self.config.frm_input != "memory":
            return seen
        assert nearest is not None
        return torch.cat([seen, nearest], dim=1)

    def refine(self, seen: Tensor) -> Tensor:
        """What the U-Net sees (`frm_view`) -> logits of normal and anomalous at the image's size, (b, 2, s, s)."""
        assert self.frm is not None
        return self._to_image_size(self.frm(seen))

    def evidence_maps(self, seen: Tensor, nearest: Tensor | None) -> Tensor:
        """What the U-Net sees, and `nearest` -> evidence by kind (b, k, h, w), for `Evidence`.

        The U-Net's logit; where the config gives it a weight the log of the feature distance (mean over the stages);
        where there is a memory the log of the distance to its nearest patch. Training sees the first alone.
        """
        assert self.frm is not None
        logits = self.frm(seen).float()
        kinds = [logits[:, 1:] - logits[:, :1]]
        if self.config.distance_weight:
            errors = seen[:, 2 : 2 + len(self.config.blocks)].float().expm1()
            kinds.append(errors.clamp(min=1e-6).log().mean(dim=1, keepdim=True))
        if nearest is not None:
            kinds.append(nearest)
        return torch.cat(kinds, dim=1)

    def anomaly_map(self, seen: Tensor, nearest: Tensor | None) -> Tensor:
        """What the U-Net sees, and `nearest` -> map (b, 1, s, s): sigmoid of the evidence."""
        return self._to_image_size(self.evidence(self.evidence_maps(seen, nearest))).sigmoid()

    def _to_image_size(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps.float(), size=(self.config.image_size,) * 2, mode="bilinear", align_corners=False)

    def distance_map(self, features: Tensor, reconstructed: Tensor) -> Tensor:
        """The map without refinement (Table 5): d / (1 + d) of the root mean square error -> (b, 1, s, s) in [0, 1)."""
        distance = self._to_image_size((reconstructed - features).float().square().mean(dim=1, keepdim=True).sqrt())
        return distance / (1 + distance)

    def forward(self, images: Tensor) -> Tensor:
        return self.defect_maps(images)

    def defect_maps(self, images: Tensor, own: Tensor | None = None) -> Tensor:
        """The maps; of training images without their part's patches in the memory, if ``own`` says which parts."""
        stages = self.standardised(self.extractor.stages(images))
        features = self.extractor.join(stages)
        reconstructed = self.mfrm(features)
        if self.frm is None:
            return self.distance_map(features, reconstructed)
        nearest = self.nearest(stages, own)
        return self.anomaly_map(self.frm_view(features, reconstructed, nearest), nearest)

    def image_scores(self, maps: Tensor) -> Tensor:
        """The highest pixel of the smoothed map, or the mean of the highest share (config): (b, 1, s, s) -> (b,).

        Without the margin (config): good images vary most at the border, where features see the padding.
        """
        m, share = self.config.score_margin, self.config.score_share
        smoothed = self.smooth(maps)[:, :, m : maps.shape[2] - m, m : maps.shape[3] - m]
        if not share:
            return smoothed.amax(dim=(1, 2, 3))
        count = max(1, round(share * self.config.image_size**2))  # of a tiled image as many as of one tile
        return smoothed.flatten(1).topk(min(count, smoothed[0].numel())).values.mean(dim=1)

    def smooth(self, maps: Tensor) -> Tensor:
        """Mean filter of side ``score_kernel`` (at the border over the pixels inside): (b, 1, h, w) -> (b, 1, h, w).

        First down the columns, then along the rows: the same mean for 2 k sums a pixel instead of k^2.
        """
        k = self.config.score_kernel
        down = F.avg_pool2d(maps, (k, 1), stride=1, padding=(k // 2, 0), count_include_pad=False)
        return F.avg_pool2d(down, (1, k), stride=1, padding=(0, k // 2), count_include_pad=False)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores of images of any size, without gradients and in evaluation mode.

        Args:
            images: (b, 3, h, w) in [0, 1]; resized to the network's input size if they have another.

        Returns:
            maps (b, 1, s, s) in [0, 1] with s = ``config.image_size``, and scores (b,) in [0, 1].

        Raises:
            ValueError: if images is not a floating (b, 3, h, w) tensor.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be a floating (b, 3, h, w) tensor in [0, 1]; got {images.dtype} {tuple(images.shape)}"
            )
        size = (self.config.image_size,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        was_training = self.training
        self.eval()
        maps = self(images.to(self.feature_mean.device))
        self.train(was_training)
        return maps, self.image_scores(maps)

    def fuse(self, dtype: torch.dtype | None = None) -> "ALMRR":
        """The deployed form: the same function in evaluation mode, several times less work; a copy (fused.py).

        Args:
            dtype: of the products; a 16-bit one pays on GPUs, and on CPUs with units for it (AMX, AVX512-BF16).
        """
        from almrr_ref.deploy.fused import FusedALMRR  # here, because fused.py builds on this module

        return FusedALMRR(self, dtype)


def parameter_counts(model: ALMRR) -> dict[str, int]:
    """Number of parameters by module: extractor (frozen), mfrm, frm."""
    return {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}


def describe_model(model: ALMRR) -> str:
    """One line on the network: backbone, encoder, parameters, where it computes."""
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameter_counts(model).items())
    blocks = " ".join(map(str, model.config.blocks))
    return (
        f"network: {model.config.backbone} blocks {blocks} ({sum(model.extractor.channels)} channels), "
        f"{model.config.encoder} encoder; parameters: {counts}; on {model.feature_mean.device}"
    )
