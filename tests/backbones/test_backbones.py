"""Backbones against independent forwards in float64, torchvision's names and sizes, and their frozen state."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_network import randomise
from torch import Tensor, nn

from almrr_ref.backbones import BACKBONES, Backbone, build_backbone

State = dict[str, Tensor]
ALL = (1, 2, 3, 4)
RESNET_DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
VGG19_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
# stride, channels in and out of every unit of EfficientNet-Lite0, written out
LITE0_UNITS = (
    (1, 32, 16), (2, 16, 24), (1, 24, 24), (2, 24, 40), (1, 40, 40), (2, 40, 80), (1, 80, 80), (1, 80, 80),
    (1, 80, 112), (1, 112, 112), (1, 112, 112), (2, 112, 192), (1, 192, 192), (1, 192, 192), (1, 192, 192),
    (1, 192, 320),
)  # fmt: skip


def build_quietly(name: str, blocks: tuple[int, ...]) -> Backbone:
    with pytest.warns(UserWarning, match="random weights"):
        return build_backbone(name, blocks, "random")


def norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def resnet_forward(state: State, depths: tuple[int, ...], x: Tensor) -> list[Tensor]:
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)).clamp(min=0)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)  # zeros are neutral after a ReLU
    maps = []
    for layer, depth in enumerate(depths, 1):
        for unit in range(depth):
            name = f"layer{layer}.{unit}"
            stride = 2 if layer > 1 and unit == 0 else 1
            bottleneck = f"{name}.conv3.weight" in state
            plan = [(0, 1), (1, stride), (0, 1)] if bottleneck else [(1, stride), (1, 1)]
            out = x
            for index, (padding, step) in enumerate(plan, 1):
                out = F.conv2d(out, state[f"{name}.conv{index}.weight"], stride=step, padding=padding)
                out = norm(state, f"{name}.bn{index}", out)
                if index < len(plan):
                    out = out.clamp(min=0)
            if f"{name}.downsample.0.weight" in state:
                x = F.conv2d(x[..., ::stride, ::stride], state[f"{name}.downsample.0.weight"])
                x = norm(state, f"{name}.downsample.1", x)
            x = (out + x).clamp(min=0)
        maps.append(x)
    return maps


def vgg19_forward(state: State, x: Tensor) -> list[Tensor]:
    maps = []
    for layer in VGG19_CONVOLUTIONS:
        if f"features.{layer - 2}.weight" not in state and layer > 0:
            x = F.max_pool2d(x, 2)
            maps.append(x)
        x = F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1).clamp(min=0)
    return [*maps[1:], F.max_pool2d(x, 2)]


def same_conv(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's "SAME" convolution by its definition: enough zeros, the odd one after."""
    sides = (x.shape[3], x.shape[2])
    totals = [max((math.ceil(side / stride) - 1) * stride + weight.shape[-1] - side, 0) for side in sides]
    x = F.pad(x, [pad for total in totals for pad in (total // 2, math.ceil(total / 2))])
    return F.conv2d(x, weight, stride=stride, groups=groups)


def lite0_forward(state: State, x: Tensor) -> list[Tensor]:
    x = norm(state, "_bn0", same_conv(x, state["_conv_stem.weight"], 2), 1e-3).clamp(0, 6)
    maps = []
    for index, (stride, inputs, outputs) in enumerate(LITE0_UNITS):
        name, out = f"_blocks.{index}", x
        if index > 0:
            out = norm(state, f"{name}._bn0", F.conv2d(out, state[f"{name}._expand_conv.weight"]), 1e-3).clamp(0, 6)
        out = same_conv(out, state[f"{name}._depthwise_conv.weight"], stride, groups=out.shape[1])
        out = norm(state, f"{name}._bn1", out, 1e-3).clamp(0, 6)
        out = norm(state, f"{name}._bn2", F.conv2d(out, state[f"{name}._project_conv.weight"]), 1e-3)
        x = out + x if stride == 1 and inputs == outputs else out
        if index in (2, 4, 10, 15):
            maps.append(x)
    return maps


@pytest.mark.parametrize("name", list(BACKBONES))
def test_maps_equal_an_independent_forward_in_float64_and_nothing_more_is_built(name: str) -> None:
    """The forward reads every weight by torchvision's name. Odd and even sides meet every kernel and stride."""
    whole, generator = build_quietly(name, ALL).double(), torch.Generator().manual_seed(2)
    randomise(whole)  # every batch norm and bias matters
    images, state = torch.randn(1, 3, 37, 50, generator=generator).double(), whole.state_dict()
    forwards = {"vgg19": vgg19_forward, "efficientnet_lite0": lite0_forward}
    expected = forwards[name](state, images) if name in forwards else resnet_forward(state, RESNET_DEPTHS[name], images)
    maps = whole(images)
    for actual, wanted in zip(maps, expected, strict=True):
        assert wanted.std() > 1e-3
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
    chosen = build_backbone(name, (1, 3), "checkpoint").double()
    chosen.load_state_dict({key: state[key] for key in chosen.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(chosen(images), (maps[0], maps[2]), strict=True))
    assert chosen.channels == (whole.channels[0], whole.channels[2])
    assert chosen.strides == (4, 16)
    assert {chosen.block_of(key) for key in chosen.state_dict()} == {0, 1, 2, 3}
    assert {whole.block_of(key) for key in set(state) - set(chosen.state_dict())} == {4}


# Channels of blocks 1 to 3 as in the paper; torchvision's totals of the whole network less its classifier: fc, or VGG's
# three linear layers. Lite0's are those of its package without the head.
@pytest.mark.parametrize(
    ("name", "channels", "tensors", "parameters"),
    [
        ("resnet18", 448, 120, 11_689_512 - 513_000),
        ("resnet34", 448, 216, 21_797_672 - 513_000),
        ("resnet50", 1792, 318, 25_557_032 - 2_049_000),
        ("vgg19", 896, 32, 143_667_240 - (25_088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000)),
        ("efficientnet_lite0", 176, 288, 4_652_008 - (320 * 1280 + 2 * 1280) - (1280 * 1000 + 1000)),
    ],
)
def test_sizes_are_those_of_the_published_networks(name: str, channels: int, tensors: int, parameters: int) -> None:
    backbone = build_backbone(name, ALL, "checkpoint")
    assert sum(backbone.channels[:3]) == channels
    assert backbone.strides == (4, 8, 16, 32)
    shapes = [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 32, 64))]
    assert shapes == [(1, c, 32 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert (len(backbone.state_dict()), sum(p.numel() for p in backbone.parameters())) == (tensors, parameters)
    lite = name == "efficientnet_lite0"
    assert backbone.mean == ((127 / 255,) * 3 if lite else (0.485, 0.456, 0.406))
    assert backbone.std == ((128 / 255,) * 3 if lite else (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])  # VGG19 has no batch norms
def test_random_weights_repeat_and_stay_frozen_and_the_global_generator_is_left_alone(name: str) -> None:
    images, global_state = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    backbone, untouched = build_quietly(name, (1, 2)), build_quietly(name, (1, 2)).state_dict()
    assert torch.equal(global_state, torch.get_rng_state())
    maps = nn.Sequential(backbone).train()(images)
    assert all(m.std() > 1e-3 for m in maps)
    assert not any(tensor.requires_grad for tensor in (*backbone.parameters(), *maps))
    assert all(torch.equal(value, untouched[key]) for key, value in backbone.state_dict().items())


def test_names_and_blocks_are_checked_and_weights_of_a_checkpoint_are_nan_until_loaded() -> None:
    assert build_backbone("resnet18", (1,), "checkpoint")(torch.zeros(1, 3, 8, 8))[0].isnan().all()
    with pytest.raises(ValueError, match="unknown backbone 'resnet101'; choose from resnet18, resnet34, resnet50,"):
        build_backbone("resnet101", ALL)
    for blocks in ((), (0, 1), (1, 5), (2, 1), (1, 1), ("1",)):
        with pytest.raises(ValueError, match=r"choose at least one of \(1, 2, 3, 4\), in rising order"):
            build_backbone("resnet18", blocks, "checkpoint")
