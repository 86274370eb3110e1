"""Convolutions and linear layers whose weights are packed for the CPU once, with sum and activation in one operator.

On a CPU, PyTorch hands a convolution to oneDNN, which first reorders the weights, in every call. At batch 1 that takes
a good part of the time. Here it is done once, at the first call. The operators are those that torch.compile uses,
which PyTorch does not document. If a build lacks them or oneDNN lacks the precision, and in an export, the ordinary
convolution gives the same result. On a GPU, cuDNN does convolution, sum and ReLU in one launch.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.base import Backbone
from almrr_ref.backbones.efficientnet_lite import InvertedResidual, SameConv2d, same_padding
from almrr_ref.backbones.resnet import BasicBlock, Bottleneck
from almrr_ref.kernels.checks import exporting


def can_pack(x: Tensor) -> bool:
    """Whether oneDNN's packed convolution takes this input."""
    if x.device.type != "cpu" or exporting() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if x.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return x.dtype == torch.float32


def can_join(x: Tensor) -> bool:
    """Whether cuDNN takes sum and ReLU into the convolution of this input."""
    cudnn = torch.backends.cudnn  # its is_acceptable() refuses bfloat16
    wanted = x.is_cuda and x.dtype != torch.float64 and not exporting()
    return wanted and torch.version.cuda is not None and cudnn.enabled and cudnn.is_available()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": nn.Identity(),
    "relu": F.relu,
    "hardtanh": F.relu6,
    "swish": F.silu,
}  # oneDNN's names
LIMITS = {"hardtanh": [0.0, 6.0]}
RELUS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "hardtanh"}


def fixed(value: Tensor, like: Tensor) -> nn.Parameter:
    """A folded weight in the dtype of ``like``, contiguous, without gradient."""
    return nn.Parameter(value.detach().to(like.dtype).contiguous(), requires_grad=False)


class PackedConv2d(nn.Module):
    """Convolution, weight (out, in / groups, kh, kw), and activation: (b, in, h, w) -> (b, out, h', w'), channels-last.

    Args:
        stride, padding: per axis.
        activation: one of ACTIVATIONS.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        groups: int = 1,
        activation: str = "none",
    ) -> None:
        super().__init__()
        weight = weight.detach().contiguous(memory_format=torch.channels_last)  # a GPU else copies it in every call
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.stride, self.padding, self.groups, self.activation = stride, padding, groups, activation
        self.packed: Tensor | None = None
        self.packed_for: torch.Size | None = None  # (h, w): weights packed for another size can be ten times slower

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedConv2d":
        """Forget the packed weights when the weights change dtype or device."""
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack again: the packed layout cannot be copied."""
        return {**self.__dict__, "packed": None}

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Convolve, add ``added`` of the result's shape, apply the activation."""
        if not can_pack(x):
            if self.activation == "relu" and can_join(x):
                return self._by_cudnn(x, added)
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
            return ACTIVATIONS[self.activation](y if added is None else y + added)
        x = x.contiguous(memory_format=torch.channels_last)
        sizes = (self.padding, self.stride, (1, 1), self.groups)
        if self.packed is None or self.packed_for != x.shape[2:]:
            self.packed_for = x.shape[2:]
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *sizes, x.shape)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if added is None:
            return convolve(x, self.packed, self.bias, *sizes, self.activation, LIMITS.get(self.activation, []), "")
        after = None if self.activation == "none" else self.activation
        return convolve(x, added, self.packed, self.bias, *sizes, "add", 1.0, after, [], None)

    def _by_cudnn(self, x: Tensor, added: Tensor | None) -> Tensor:
        """The same as one launch of cuDNN, in place of up to four."""
        sizes = (self.stride, self.padding, (1, 1), self.groups)
        if added is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *sizes)
        return torch.cudnn_convolution_add_relu(x, self.weight, added, 1.0, self.bias, *sizes)


class PackedLinear(PackedConv2d):
    """Linear layer by weight (out, in / groups) over tokens, one for each group of channels: (b, l, in) -> (b, l, out).

    To oneDNN it is a 1x1 convolution of an image one pixel wide; in float32 that takes half the time of PyTorch's own
    product on AMD's CPUs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> None:
        super().__init__(weight[:, :, None, None], bias, groups=groups)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Multiply, add ``added`` of the result's shape."""
        if can_pack(x):
            return as_tokens(super().forward(as_image(x), None if added is None else as_image(added)))
        if self.groups == 1:
            y = F.linear(x, self.weight[:, :, 0, 0], self.bias)
            return y if added is None else y + added
        weight = self.weight[:, :, 0, 0].unflatten(0, (self.groups, -1))
        y = (x.unflatten(2, (self.groups, -1)).transpose(1, 2) @ weight.mT).transpose(1, 2).flatten(2)
        y = y if self.bias is None else y + self.bias
        return y if added is None else y + added


def as_image(tokens: Tensor) -> Tensor:
    """(b, l, d) -> (b, d, l, 1), channels-last: the same memory."""
    return tokens.transpose(1, 2).unsqueeze(3)


def as_tokens(image: Tensor) -> Tensor:
    """(b, d, l, 1) -> (b, l, d)."""
    return image.squeeze(3).transpose(1, 2)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every batch norm of a module into the convolution registered just before it, in place: fused.py, step 1.

    A SameConv2d ignores its new bias until `pack_convolutions` replaces it.
    """
    for parent in list(module.modules()):
        for (_, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                moments = {name: value.double() for name, value in norm.state_dict().items()}
                scale = moments["weight"] / (moments["running_var"] + norm.eps).sqrt()
                before = 0 if conv.bias is None else conv.bias.double()
                conv.bias = fixed((before - moments["running_mean"]) * scale + moments["bias"], conv.weight)
                conv.weight = fixed(conv.weight.double() * scale[:, None, None, None], conv.weight)
                setattr(parent, norm_name, nn.Identity())


class PackedUnit(nn.Module):
    """A residual unit of ResNet without its batch norms, which are folded: F.relu(convolutions(x) + shortcut(x))."""

    def __init__(self, unit: BasicBlock | Bottleneck) -> None:
        super().__init__()
        convolutions = [packed(conv, "relu") for name, conv in unit.named_children() if name.startswith("conv")]
        self.first, self.last = nn.Sequential(*convolutions[:-1]), convolutions[-1]
        self.shortcut = nn.Identity() if unit.downsample is None else packed(unit.downsample[0])
        if isinstance(self.shortcut, PackedConv2d):  # cuDNN takes a bias only together with a ReLU
            self.last.get_parameter("bias").add_(self.shortcut.get_parameter("bias"))
            self.shortcut.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x), self.shortcut(x))


class PackedInvertedResidual(nn.Module):
    """A unit of EfficientNet-Lite without its batch norms, which are folded."""

    def __init__(self, unit: InvertedResidual) -> None:
        super().__init__()
        before = [unit._expand_conv, unit._depthwise_conv] if unit.expands else [unit._depthwise_conv]
        self.first = nn.Sequential(*(packed(conv, "hardtanh") for conv in before))
        self.last, self.adds_input = packed(unit._project_conv), unit.adds_input

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x), x if self.adds_input else None)


def packed(conv: nn.Module, activation: str = "none") -> nn.Module:
    """A packed copy of a square convolution; sides before a stride are even, so "SAME" padding is known here."""
    assert isinstance(conv, nn.Conv2d)
    kernel, stride, before = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    before, after = same_padding(2 * kernel, kernel, stride) if isinstance(conv, SameConv2d) else (before, before)
    padding = before if before == after else 0
    packed_conv = PackedConv2d(conv.weight, conv.bias, (stride,) * 2, (padding,) * 2, conv.groups, activation)
    if before == after:
        return packed_conv
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), packed_conv)


def pack_convolutions(module: nn.Module) -> None:
    """Replace every convolution of a module, in place; a ReLU behind one moves into it where they run one by one.

    `fold_batch_norms` comes before it.
    """
    for parent in list(module.modules()):
        children = [(name, child) for name, child in parent.named_children() if not isinstance(child, nn.Identity)]
        for (name, child), (next_name, after) in pairwise([*children, ("", nn.Identity())]):
            if isinstance(child, BasicBlock | Bottleneck):
                setattr(parent, name, PackedUnit(child))
            elif isinstance(child, InvertedResidual):
                setattr(parent, name, PackedInvertedResidual(child))
            elif isinstance(child, nn.Conv2d):
                in_turn = isinstance(parent, nn.Sequential | Backbone)
                activation = RELUS.get(type(after), "none") if in_turn else "none"
                setattr(parent, name, packed(child, activation))
                if activation != "none":
                    setattr(parent, next_name, nn.Identity())


def folded(module: nn.Module) -> nn.Module:
    """A copy that computes the same in evaluation mode, its batch norms folded and its convolutions packed."""
    module = copy.deepcopy(module)
    fold_batch_norms(module)
    pack_convolutions(module)
    return module
