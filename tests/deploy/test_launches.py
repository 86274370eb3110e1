"""What a deployed Vim block launches on a CUDA GPU, counted without one: its operators on tensors that hold nothing.

Every operator that is no view and no bare allocation is one launch; those of kernels/ count by the kernels inside.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_network import FRM_INPUTS, build
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from almrr_ref import kernels
from almrr_ref.deploy import mfrm
from almrr_ref.deploy.cuda_graph import predict_unchecked
from almrr_ref.deploy.mfrm import FusedVimBlock
from almrr_ref.mamba import VimBlock, VimMixer

FREE = ("empty", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias")


class Launches(TorchDispatchMode):
    """Count launches by name, and keep the arguments of the last of each of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.arguments: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "aten":  # ours: what is inside counts
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        views = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in views) and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The counter, with the Triton backend chosen and its kernels counted in place of launched."""
    pytest.importorskip("triton")
    from almrr_ref.kernels import triton_conv, triton_scan

    from almrr_ref.deploy import triton_decoder

    counter = Launches()

    def launch(kernel: Any, _programs: int, _device: torch.device, _warps: int, arguments: Any, *_: Any) -> None:
        counter.counts[kernel.__name__] += 1
        counter.arguments[kernel.__name__] = arguments

    for module in (triton_conv, triton_scan, triton_decoder):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(kernels, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(FusedVimBlock, "by_layers", FusedVimBlock.by_kernels)
    monkeypatch.setattr(mfrm, "has_kernel", lambda _: True)
    return counter


class NothingFromTheHost(TorchFunctionMode):
    """Refuse tensors that are made of Python's numbers: the recording of a CUDA graph breaks off at such a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), "a copy from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
def test_a_deployed_network_can_be_recorded(frm_input: str) -> None:
    """On the device "meta" a value that the host asks for is an error, too."""
    network = build(frm_input=frm_input, standardise="position").fuse().to("meta")
    images = torch.empty(2, 3, 64, 64, device="meta")
    with torch.no_grad(), NothingFromTheHost():
        maps, scores, extrema = predict_unchecked(network, images)
    assert (maps.shape, scores.shape, extrema.shape) == ((2, 1, 64, 64), (2,), (2,))


def fused_block(dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[VimBlock, FusedVimBlock]:
    width = sizes.setdefault("d_model", 192)
    block = VimBlock(VimMixer(**sizes), width).to(dtype).eval()
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return block, FusedVimBlock(block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "chunked"), [(1, 1), (64, 0)])
def test_a_deployed_block_takes_15_launches_and_flips_nothing(
    launches: Launches, b: int, chunked: int, dtype: torch.dtype
) -> None:
    """The paper's sizes. The norm is one launch more (six before torch 2.9); the others are all that there are."""
    _, block = fused_block()
    for name, module in block.named_children():
        if name not in ("norm", "dt_proj"):  # as FusedMFRM.lower_precision
            module.to(dtype)
    block.norm = nn.Identity()
    block.to("meta")
    tokens = torch.empty(b, 256, 192, device="meta")
    with torch.no_grad(), launches:
        assert block(tokens).shape == tokens.shape
    expected = {"mm": 4, "addmm": 1, "conv_kernel": 2, "forward_kernel": 1, "add": 1, "cat": 1}
    expected |= {"chunk_ends_kernel": 1} if chunked else {}
    expected |= {"_to_copy": 2} if dtype == torch.bfloat16 else {}
    assert launches.counts == expected
    assert launches.counts.total() + 1 <= 15
    given = launches.arguments["forward_kernel"]
    for scan in (given["s"], given["s_b"]):  # what makes loads wide, and addresses few
        steps = [scan.u_step, scan.delta_step, scan.B_step, scan.C_step, given["c"].z_step, given["c"].d]
        assert [step.value for step in steps] == [384, 768, 44, 44, 768, 384]
        assert all(t.storage_offset() * t.itemsize % 16 == 0 for t in (scan.u, scan.delta, scan.B, scan.C))


def test_a_decoder_whose_channels_are_summed_writes_them_once(launches: Launches) -> None:
    """Four convolutions and the kernel behind two normalised ones; nothing is resized, copied or added up."""
    decoder = build().fuse().mfrm.decoder.to("meta")
    latent = torch.empty(2, 12, 4, 4, device="meta").to(memory_format=torch.channels_last)
    weight, offset = torch.empty(1, 8, 1, 1, device="meta"), torch.empty(1, device="meta")
    with torch.no_grad(), launches:
        assert decoder.mean(latent, weight, offset).shape == (2, 1, 16, 16)
    assert launches.counts == {
        "convolution": 6, "native_batch_norm": 2, "relu": 2, "clone": 1, "sigmoid_mean_kernel": 1
    }  # fmt: skip


@pytest.mark.parametrize("d_conv", [1, 4])
def test_both_ways_through_a_deployed_block_give_the_same(d_conv: int) -> None:
    _, block = fused_block(torch.float64, d_model=6, d_state=3, d_conv=d_conv, backend="reference")
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for one, other in zip(block.by_kernels(x), block.by_layers(x)):
            torch.testing.assert_close(list(one), list(other), rtol=1e-11, atol=1e-11)


@pytest.mark.requires_cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_on_a_gpu_the_deployed_block_is_the_plain_one(dtype: torch.dtype, bound: float) -> None:
    block, fused = fused_block()
    tokens = torch.randn(2, 256, 192, generator=torch.Generator().manual_seed(1))
    for name, module in fused.named_children():
        if name not in ("norm", "dt_proj"):
            module.to(dtype)
    with torch.no_grad():
        expected = block(tokens)
        torch.testing.assert_close(fused.cuda()(tokens.cuda()).cpu(), expected, rtol=bound, atol=bound)
