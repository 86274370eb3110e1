"""Multi-scale features of a frozen backbone: images -> phi or F.

Source: ALMRR section 3.2 and 4.2: the maps of the chosen blocks, "resized and concatenated", at 64x64.
Deviations from the authors' code (the paper leaves them open):

- RGB with the normalisation that the backbone's weights were trained with, not BGR divided by 255.
- One bilinear resize per map, straight to the feature size (align_corners=False). The authors enlarge every map to
  256x256 with align_corners=True and average 4x4 pixels. That takes 0.3 s of CPU per image, and stretches every map by
  its own factor (4.05 pixels per step for block 1, 17 for block 3, where the network's steps are 4 and 16): towards the
  border the maps no longer lie over each other.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones import build_backbone
from almrr_ref.data.roi import roi_cells
from almrr_ref.kernels.checks import exporting

CELLS = 32  # a side of the grid whose median is an image's brightness
DARK = 0.05  # added to brightness before it is compared: what is nearly black is hardly scaled


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait for the device, which takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, without aligned corners: (b, c, h, w) -> (b, c, *size); `x` itself if it has the size."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def by_image(*batches: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Batches (b, ...) of the same images, cut into single ones (1, ...) on a CPU, whose caches then hold what is made
    of them; whole on a GPU and in an export.
    """
    return [batches] if batches[0].is_cuda or exporting() else zip(*(batch.split(1) for batch in batches))


def brightness(images: Tensor, roi: Tensor | None = None, inside: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The median brightness of the cells of a grid, (b, 3, h, w) -> (b,): a lamp moves it, a stain hardly.

    Args:
        roi: bool (h, w): cells outside do not count, and of the others what lies in the region.
        inside: `cells_inside` of the roi, where the caller has it.
    """
    grey, side = images.mean(dim=1, keepdim=True), _cell(images)
    cells = F.avg_pool2d(grey if roi is None else grey.where(roi, 0), side).flatten(1)
    if roi is not None:
        numbers, shares = cells_inside(roi) if inside is None else inside
        cells = cells[:, numbers] / shares
    return cells.topk((cells.shape[1] + 1) // 2, dim=1).values[:, -1]


def cells_inside(roi: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the cells of `brightness` that a region, bool (h, w), touches, and the share of each inside it."""
    shares = F.avg_pool2d(roi[None].float(), _cell(roi)).flatten()
    numbers = shares.nonzero()[:, 0]
    return numbers, shares[numbers]


def _cell(images: Tensor) -> tuple[int, int]:
    return max(1, images.shape[-2] // CELLS), max(1, images.shape[-1] // CELLS)


class FeatureExtractor(nn.Module):
    """Frozen features: RGB images in [0, 1], (b, 3, h, w) -> (b, sum(channels), *feature_size).

    No gradient is recorded: the outputs do not require one. `channels` holds the channels of each stage, in order.

    Args:
        backbone, blocks, weights: see `build_backbone`; one stage per block.
        feature_size: (height, width) of the output in pixels (64x64 in the paper).
        roi: bool (h, w): outside of it images have the mean colour to the backbone, whatever is there (data/roi.py).
        brightness: which every image is brought to first, so that lighting does not count; None: none. Ours.
    Raises:
        ValueError: for an unknown backbone or block, or unusable weights.
    """

    mean: Tensor
    std: Tensor
    roi: Tensor | None
    inside: Tensor | None
    shares: Tensor | None

    def __init__(
        self,
        backbone: str,
        blocks: Sequence[int],
        weights: str | Path | None,
        feature_size: tuple[int, int],
        roi: Tensor | None = None,
        brightness: float | None = None,
    ) -> None:
        super().__init__()
        self.brightness = brightness
        self.backbone = build_backbone(backbone, blocks, weights)
        # Channels-last: the backbone is up to 1.5 times as fast on a CPU, and the resize of many channels many times.
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stand_in: list[nn.Module] = []  # computes in the backbone's place, float32; in a list, for it has no state
        self.channels = self.backbone.channels
        self.feature_size = feature_size
        # Not persistent: they follow from the backbone's name, and a state dict holds weights only.
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("roi", roi, persistent=False)
        inside, shares = (None, None) if roi is None else cells_inside(roi)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("shares", shares, persistent=False)  # OpenVINO cannot load what computes them, in 16 bits

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[Tensor]:
        """Compute the maps at native resolution: (b, 3, h, w) -> [(b, c_k, h / s_k, w / s_k), ...], one per block.

        Args:
            images: RGB in [0, 1], floating point, (b, 3, h, w).
        Raises:
            ValueError: for another shape or an integer type.
        """
        if not images.is_floating_point():
            raise ValueError(f"expected floating-point images in [0, 1], got {images.dtype}; divide by 255 first")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (b, 3, h, w), got {tuple(images.shape)}; convert them to RGB")
        roi, size = self.roi, images.shape[-2:]
        inside = None if self.inside is None or self.shares is None else (self.inside, self.shares)
        if roi is not None and roi.shape != size:
            roi, inside = roi_cells(roi, (images.shape[2], images.shape[3])), None
        if self.brightness is not None:
            scale = (self.brightness + DARK) / (brightness(images, roi, inside) + DARK)
            images = images * scale[:, None, None, None]
        normalised = (images - self.mean) / self.std
        if roi is not None:
            normalised = normalised.where(roi, 0)
        backbone: nn.Module = self.backbone
        if self.stand_in and not torch.is_autocast_enabled(images.device.type):
            backbone = self.stand_in[0]
        maps: list[Tensor] = backbone(normalised.to(next(backbone.parameters()).dtype))
        return maps

    @torch.no_grad()
    def join(self, stages: Sequence[Tensor]) -> Tensor:
        """Resize every stage and concatenate: [(b, c_k, h_k, w_k)] -> (b, sum(c_k), *feature_size)."""
        return torch.cat([resize(stage, self.feature_size) for stage in stages], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Run the backbone and join its stages, see `stages`: -> (b, sum(channels), *feature_size)."""
        return self.join(self.stages(images))


class FeatureCache:
    """The features of the training images, computed once: image numbers -> stages [(b, c_k, h_k, w_k)].

    Images pass the backbone one by one, so that a stage is the same, bit for bit, whether it was kept or is computed
    anew. What the budget does not hold is computed at every call.

    Args:
        images: uint8 (n, 3, h, w).
        device: where the stages are computed and wanted.
        budget: bytes to keep.
    """

    def __init__(self, images: Tensor, device: torch.device, budget: int = 2 * 2**30) -> None:
        self.images, self.device, self.room = images, device, budget
        self.cached: dict[int, list[Tensor]] = {}

    def stages(self, numbers: Sequence[int], compute: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Stages of some images; ``compute`` maps images (1, 3, h, w) in [0, 1] to theirs."""
        per_image = [self.cached.get(number) or self._computed(number, compute) for number in numbers]
        return [torch.cat(stage) for stage in zip(*per_image)]

    def holds_all(self, stages: list[Tensor]) -> bool:
        """Whether the budget is enough for the stages of every image, which are as large as these, (1, ...) each."""
        return len(self.images) * sum(stage.nbytes for stage in stages) <= self.room

    def _computed(self, number: int, compute: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        stages = compute(to_device(self.images[number : number + 1], self.device).float() / 255)
        size = sum(stage.nbytes for stage in stages)
        if size <= self.room:
            self.cached[number] = stages
            self.room -= size
        return stages

    def change(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Replace what is kept by a function of it, image by image: the standardised stages once they can be had."""
        for number, stages in self.cached.items():  # one by one: two of all would be twice the budget
            self.cached[number] = function(stages)
