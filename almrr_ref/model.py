"""ALMRR, composed as in the paper's Fig. 2: frozen features, reconstruction, refinement. One forward pass, here.

    images -> features F -> MFRM -> F_hat;   (F, F_hat) -> FRM -> anomaly map -> image score

In training the images are the augmented ones; phi, the features of the clean ones, takes the same frozen branch
(``stages`` and ``extractor.join``). What ``plus`` adds to the paper stands behind ``if self.memory``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.config import ModelConfig
from almrr_ref.data.roi import roi_cells, roi_of
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.predictor import Predictor, to_image_size
from almrr_ref.features import FeatureExtractor
from almrr_ref.frm import FRM
from almrr_ref.mfrm import MFRM, Pointwise
from almrr_ref.plus.evidence import Evidence
from almrr_ref.plus.memory import NormalMemory
from almrr_ref.plus.standardise import Standardise
from almrr_ref.run.checkpoint import FORMAT, CheckpointError, read_checkpoint, stored_config


@dataclass(frozen=True)
class ForwardPass:
    """What one pass computed, for images of h x w and a feature grid of h' x w'; training and calibration read from it.

    features, reconstructed: F and F_hat, (b, C, h', w').
    logits: of normal and anomalous, (b, 2, h', w'); None without a U-Net.
    evidence: by kind, (b, k, h', w'); None without a memory.
    anomaly_map: (b, 1, h, w) in [0, 1].
    """

    features: Tensor
    reconstructed: Tensor
    logits: Tensor | None
    evidence: Tensor | None
    anomaly_map: Tensor


def build_extractor(config: ModelConfig, weights: str | None) -> FeatureExtractor:
    """The frozen features that a configuration asks for; ``weights`` as in `FeatureExtractor`."""
    size, roi = config.feature_size, roi_of(config)
    return FeatureExtractor(config.backbone, config.blocks, weights, size, roi, config.brightness)


class ALMRR(Predictor):
    """The whole network: images (b, 3, h, w) in [0, 1] -> everything that one pass computes, maps among it.

    Args:
        config: sizes and choices; ``config.weights`` says where the backbone's weights come from.
        seed: of the initial weights; the global generator is neither used nor changed.
        threshold, outline_offset: from a checkpoint (deploy/predictor.py).
        pretrained: whether to look for the backbone's weights; else they are NaN until a state dict is loaded.
        extractor: where the caller has it already, as the config says.
    Raises:
        ValueError: if the backbone's weights cannot be found or do not fit (backbones/weights.py), or something in the
            config is still "auto".
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        seed: int = 0,
        threshold: float | None = None,
        pretrained: bool = True,
        outline_offset: float = 0.0,
        extractor: FeatureExtractor | None = None,
    ) -> None:
        super().__init__(config or ModelConfig(), threshold, outline_offset)
        config, size, roi = self.config, self.config.feature_size, roi_of(self.config)
        if config.standardise == "auto":
            raise ValueError("--standardise auto is settled by training images; without them name one, such as channel")
        self.extractor = extractor or build_extractor(config, config.weights if pretrained else "checkpoint")
        channels = self.extractor.channels
        sizes = [(config.size[0] // stride, config.size[1] // stride) for stride in self.extractor.backbone.strides]
        sizes = sizes if config.standardise == "position" else [(1, 1)] * len(channels)
        self.standardise = Standardise(channels, sizes) if config.standardise != "none" else None
        plus = config.frm_input == "memory"
        grid = (size[0] // 2, size[1] // 2)
        cells = None if roi is None else roi_cells(roi, grid).flatten()
        self.memory = NormalMemory(channels, config.memory, grid, size, cells) if plus else None
        self.evidence = Evidence(config, roi) if plus else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mfrm = MFRM(config, sum(channels))
            self.error_projection = Pointwise(sum(channels), config.projection_channels) if plus else None
            unet_channels = 2 + (len(channels) + config.projection_channels + 1 if plus else 0)
            levels = min(config.frm_levels, min(size).bit_length() - 1)
            self.frm = FRM(unet_channels, config.frm_width, levels) if config.frm_input != "none" else None

    def stages(self, images: Tensor) -> list[Tensor]:
        """Frozen features of every block at their own size, standardised if the config says so.

        (b, 3, h, w) -> [(b, c_k, h_k, w_k)].
        """
        self.check_size(images)
        stages = self.extractor.stages(images)
        return stages if self.standardise is None else self.standardise(stages)

    def forward(
        self,
        images: Tensor | list[Tensor],
        part_ids: Tensor | None = None,
        detach_reconstruction: bool = False,
        log_distance: Tensor | None = None,
    ) -> ForwardPass:
        """Images (b, 3, h, w) in [0, 1], or their ``stages``, -> all that one pass computes.

        Args:
            part_ids: (b,), in training: the parts that the images show; stored patches of the same do not count.
            detach_reconstruction: in training: no gradient from the U-Net to the MFRM.
            log_distance: (b, places), of the stages to the memory, where the caller has it (plus/memory.py).
        """
        stages = self.stages(images) if isinstance(images, Tensor) else images
        features = self.extractor.join(stages)
        reconstructed = self.mfrm(features)
        if self.frm is None:
            distance = (reconstructed - features).float().square().mean(dim=1, keepdim=True).sqrt()
            distance = to_image_size(distance, self.config.size)
            return ForwardPass(features, reconstructed, None, None, distance / (1 + distance))
        rebuilt = reconstructed.detach() if detach_reconstruction else reconstructed
        means = [x.permute(0, 2, 3, 1).mean(dim=3).unsqueeze(1) for x in (rebuilt, features)]  # see Pointwise
        if self.memory is None:
            logits, evidence = self.frm(torch.cat(means, dim=1)), None
            combined = (logits[:, 1:] - logits[:, :1]).float()
        else:
            assert self.error_projection is not None
            assert self.evidence is not None
            with torch.autocast(features.device.type, enabled=False):  # differences need all digits
                nearest = self.memory(stages, part_ids, log_distance)
            error = rebuilt - features
            learns = error.requires_grad  # else in place
            error = error.square() if learns else error.square_()
            by_stage = error.split(list(self.extractor.channels), dim=1)
            stage_errors = torch.cat([stage.mean(dim=1, keepdim=True) for stage in by_stage], dim=1)
            projected = self.error_projection(error.log1p() if learns else error.log1p_())
            logits = self.frm(torch.cat([*means, stage_errors.log1p(), projected, nearest], dim=1))
            evidence = self.evidence.kinds(logits, stage_errors, nearest)
            combined = self.evidence(evidence)
        anomaly_map = to_image_size(combined, self.config.size).sigmoid()
        return ForwardPass(features, reconstructed, logits, evidence, anomaly_map)

    def maps(self, images: Tensor) -> Tensor:
        return self.inside_roi(self(images).anomaly_map)

    def fuse(self, dtype: torch.dtype | None = None) -> FusedALMRR:
        """The deployed form: the same function in evaluation mode, several times less work; a copy (deploy/fused.py).

        Args:
            dtype: of the products; a 16-bit one pays on GPUs, and on CPUs with units for it (AMX, AVX512-BF16).
        """
        return FusedALMRR(self, dtype)


def describe_model(model: ALMRR) -> str:
    """One line on the network: backbone, encoder, parameters, where it computes."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.items() if count)
    blocks = " ".join(map(str, model.config.blocks))
    return (
        f"network: {model.config.backbone} blocks {blocks} ({sum(model.extractor.channels)} channels), "
        f"{model.config.encoder} encoder; parameters: {counts}; on {model.device}"
    )


def restore_model(content: dict[str, Any], device: torch.device | str = "cpu") -> ALMRR:
    """Rebuild the network of a checkpoint's dictionary (run/checkpoint.py), in evaluation mode.

    Raises:
        CheckpointError: if its configuration and its weights do not make a network.
    """
    try:
        config = stored_config(ModelConfig, content["model_config"])
        threshold, outline_offset = content["threshold"], content.get("calibration", {}).get("outline_offset", 0.0)
        if not isinstance(outline_offset, int | float) or not isinstance(threshold, int | float | None):
            raise TypeError("its threshold is no number")
        model = ALMRR(config, 0, threshold, pretrained=False, outline_offset=outline_offset)
        model.load_state_dict(content["weights"])
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        older = "of an earlier version: " if content["format"] < FORMAT else ""
        reason = older + " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint's network cannot be rebuilt ({reason}); train again") from error
    return model.to(device).eval()


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> ALMRR:
    """Load a trained network from a checkpoint file; ``.config`` and ``.threshold`` come with it.

    Raises:
        CheckpointError: if the file is missing, damaged, foreign, or of a newer format.
    """
    return restore_model(read_checkpoint(path), device)
