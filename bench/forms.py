"""The networks that bench/latency.py times: every encoder in every form, built, checked and run.

A new form is one entry of FORMS; it needs ``predict`` alone, images (b, 3, s, s) in [0, 1] -> maps (b, 1, s, s), scores
(b,). Stages, parameters and GMAC are known of the networks that consist of PyTorch modules, and print as dashes for the
others (another runtime, a captured graph).
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import common  # noqa: F401 (finds the package in a checkout)
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from almrr_ref.config import ModelConfig
from almrr_ref.deploy.cuda_graph import CudaGraph
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.onnx import OnnxModel, to_onnx
from almrr_ref.model import ALMRR

NAMES = {"cnn1x1": "CNN(1x1)", "cnn3x3": "CNN(3x3)", "transformer": "Transformer", "mamba": "Mamba"}
STAGES = ("features", "encoder", "decoder", "FRM")


# A form: how to build it from the plain network for a batch, and how far its maps may lie from the plain ones. Those of
# random weights hardly depend on the encoder, so its tokens are held, too, where they can be seen.
FORMS: dict[str, tuple[Callable[[ALMRR, int], Any], float]] = {
    "plain": (lambda plain, batch: plain, 0.0),
    "fused": (lambda plain, batch: plain.fuse(), 1e-5),
    "fused-bf16": (lambda plain, batch: plain.fuse(torch.bfloat16), 0.05),
    "cuda-graph": (lambda plain, batch: CudaGraph(plain.fuse(), batch), 1e-5),
    "cuda-graph-bf16": (lambda plain, batch: CudaGraph(plain.fuse(torch.bfloat16), batch), 0.05),
    "onnxruntime": (lambda plain, batch: OnnxModel(to_onnx(plain.fuse()), plain.device.type), 1e-4),
}
TOKENS_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the largest token, by the precision of the products
CUDA_ALLOWED = 1e-4  # of a float32 form there: cuDNN chooses how to sum by the shapes


def has_stages(model: object) -> bool:
    """Whether the network is made of the modules extractor, mfrm and frm, which can be timed and shared."""
    return type(model) in (ALMRR, FusedALMRR)


def packed_flops(*shapes: Any, out_shape: torch.Size, **_: Any) -> int:
    """Of PyTorch's packed convolution, (x, weight, ...) or (x, added, weight, ...), which its counter does not know."""
    weight = shapes[2] if len(shapes[2] or ()) > 1 else shapes[1]
    return 2 * math.prod(out_shape) * math.prod(weight) // out_shape[1]


PACKED = {torch.ops.mkldnn._convolution_pointwise: packed_flops} if torch.backends.mkldnn.is_available() else {}


@dataclasses.dataclass
class Row:
    """One network: its name, its size (None: unknown), and what was measured, in seconds."""

    encoder: str
    form: str
    model: Any
    timed: bool  # or only there to compare with
    parameters: int | None = None
    gmac: float | None = None
    totals: list[float] = dataclasses.field(default_factory=list)
    stages: list[list[float]] = dataclasses.field(default_factory=list)
    received: list[Tensor] = dataclasses.field(default_factory=list)  # pinned memory for maps and scores, of a GPU

    @property
    def name(self) -> str:
        return f"{NAMES[self.encoder]}, {self.form}"


class Clock:
    """Time between the stages of one run; on a GPU by events, which do not make it wait."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.cuda, self.marks, self.hooks = device.type == "cuda", [], []  # type: bool, list[Any], list[Any]
        if has_stages(model) and model.memory is None:  # which each form searches in a stage of its own
            before, encoder = model.mfrm.register_forward_pre_hook, model.mfrm.encoder.register_forward_hook
            self.hooks = [before(self.mark), encoder(self.mark), model.mfrm.register_forward_hook(self.mark)]

    def mark(self, *_: Any) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def stages(self) -> list[float]:
        """Seconds between the marks, or [] if the model's stages cannot be told apart; takes the hooks away."""
        for hook in self.hooks:
            hook.remove()
        if len(self.marks) != len(STAGES) + 1:
            return []
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in zip(self.marks, self.marks[1:])]


def draw_images(count: int, config: ModelConfig) -> Tensor:
    """Noise: 8-bit images (count, 3, h, w)."""
    shape = (count, 3, *config.size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def random_network(config: ModelConfig) -> ALMRR:
    """A network whose backbone may have random weights, which do for times, without the warning of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random.*")
        return ALMRR(config)


def build_rows(
    config: ModelConfig, encoders: list[str], forms: list[str], batch: int, device: torch.device
) -> list[Row]:
    """The encoders in the forms, for a batch, sharing backbone and refinement network within each form.

    The plain form always comes first. For patches finer than the paper's it is only there to compare with.
    """
    rows: list[Row] = []
    first: dict[str, Any] = {}
    for encoder in encoders:
        plain = random_network(dataclasses.replace(config, encoder=encoder)).to(device).eval()
        for form in dict.fromkeys(["plain", *forms]):
            model = FORMS[form][0](plain, batch)
            timed = form in forms and (form != "plain" or config.patch_size >= 4 or set(forms) == {"plain"})
            row = Row(encoder, form, model, timed)
            if has_stages(model):
                donor = first.setdefault(form, model)
                model.extractor, model.frm = donor.extractor, donor.frm
                row.parameters = sum(parameter.numel() for parameter in model.parameters())
            rows.append(row)
    return rows


def one_run(row: Row, images: Tensor, device: torch.device) -> tuple[float, list[float], Tensor]:
    """Predict images uint8 (b, 3, s, s) on the CPU; return seconds, seconds by stage, and the maps on the CPU."""
    clock = Clock(row.model, device)
    start = time.perf_counter()
    clock.mark()
    results: Sequence[Tensor] = row.model.predict(images.to(device, non_blocking=True).float() / 255)
    clock.mark()
    if device.type == "cuda":
        results = receive(row, results)
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, clock.stages(), results[0].clone()


def receive(row: Row, results: Sequence[Tensor]) -> list[Tensor]:
    """Start to copy maps and scores into the row's pinned memory, which the next run writes over."""
    row.received = row.received or [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
    for target, result in zip(row.received, results):
        target.copy_(result, non_blocking=True)
    return row.received


def tokens_of(row: Row, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Maps of a run, and what the encoder gave (b, l, d); nothing where it is no module."""
    seen: list[Tensor] = []
    if not has_stages(row.model):
        return one_run(row, images, device)[2], torch.empty(0)
    hook = row.model.mfrm.encoder.register_forward_hook(lambda *given: seen.append(given[-1].float().cpu()))
    maps = one_run(row, images, device)[2]
    hook.remove()
    return maps, seen[0]


def check(rows: list[Row], images: Tensor, device: torch.device) -> float:
    """Check every network's maps, and count GMAC; return the largest difference from a plain network.

    Raises:
        ValueError: naming the network, if its maps are not finite, not the same twice, or its maps or the tokens of its
            encoder not those of the plain one.
    """
    largest, plain, plain_tokens = 0.0, torch.empty(0), torch.empty(0)
    for row in rows:
        maps, tokens = tokens_of(row, images, device)
        if row.form == "plain":
            plain, plain_tokens = maps, tokens
        apart = float((tokens - plain_tokens).abs().max() / plain_tokens.abs().max()) if len(tokens) else 0.0
        if apart > TOKENS_ALLOWED[torch.bfloat16 if row.form.endswith("bf16") else torch.float32]:
            raise ValueError(f"{row.name}: the encoder's tokens are {apart:.1e} away from plain ones")
        difference, allowed = float((maps - plain).abs().max()), FORMS[row.form][1]
        if device.type == "cuda" and row.form != "plain":
            allowed = max(allowed, CUDA_ALLOWED)
        if not bool(torch.isfinite(maps).all()):
            raise ValueError(f"{row.name}: the maps are not finite")
        if difference > allowed:
            raise ValueError(f"{row.name}: the maps are {difference:.1e} away from plain ones, allowed {allowed:.0e}")
        if row.timed and float((one_run(row, images, device)[2] - maps).abs().max()) > 1e-6:
            raise ValueError(f"{row.name}: two runs on the same images give different maps")
        largest = max(largest, difference)
        if row.timed and row.form in ("plain", "fused"):  # counted operator by operator, which not every form allows
            with FlopCounterMode(display=False, custom_mapping=PACKED) as counter, sdpa_kernel(SDPBackend.MATH):
                one_run(row, images, device)
            row.gmac = counter.get_total_flops() / 2e9 / len(images)
    return largest
