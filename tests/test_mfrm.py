"""The reconstruction module: token order, sizes, all four encoders."""

import dataclasses

import pytest
import torch
from tiny_network import TINY
from torch import nn

from almrr_ref.encoders import TransformerBlock, build_encoder
from almrr_ref.mfrm import MFRM, Decoder


def test_token_of_a_cell_returns_to_that_cell() -> None:
    """Index-coded features: each cell carries its own number; any scramble of tokens and channels moves one."""
    mfrm = MFRM(TINY, in_channels=8)
    coded = torch.arange(16.0).reshape(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(1, 8, 16, 16)
    with torch.no_grad():
        nn.init.zeros_(mfrm.patch_embed.weight)
        mfrm.patch_embed.weight[:, 0, 1, 2] = 1
        mfrm.patch_embed.bias.copy_(100 * torch.arange(12.0))  # channel c of a token is its cell's number + 100 c
        mfrm.pos_embed.zero_()
    tokens = mfrm.tokens(coded)
    assert tokens[0, :, 0].tolist() == list(range(16))
    expected = torch.arange(16.0).reshape(4, 4) + 100 * torch.arange(12.0)[:, None, None]
    torch.testing.assert_close(mfrm.token_map(tokens)[0], expected)


@pytest.mark.parametrize("encoder", ["mamba", "cnn1x1", "cnn3x3", "transformer"])
@pytest.mark.parametrize("patch_size", [4, 1])
def test_reconstruction_has_the_shape_of_its_input_and_trains(encoder: str, patch_size: int) -> None:
    mfrm = MFRM(dataclasses.replace(TINY, encoder=encoder, patch_size=patch_size), in_channels=20)
    features = torch.randn(2, 20, 16, 16)
    reconstructed = mfrm(features)
    assert reconstructed.shape == features.shape
    reconstructed.square().sum().backward()
    unused = [name for name, p in mfrm.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert set(unused) <= {"decoder.deconv1.bias", "decoder.deconv2.bias"}  # instance norm removes them


def test_decoder_follows_the_sizes_16_18_20_39_64_and_keeps_signed_values() -> None:
    decoder, sizes = Decoder(d_model=6, channels=(5, 4), out_channels=3, size=(64, 64)), []
    for deconv in (decoder.deconv1, decoder.deconv2, decoder.deconv3):
        deconv.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    out = decoder(torch.randn(1, 6, 16, 16)).detach()
    assert sizes == [18, 20, 39]
    assert out.shape == (1, 3, 64, 64)
    assert -1 <= float(out.min()) < 0 < float(out.max()) <= 1


def test_transformer_block_agrees_with_pytorchs_own_layer() -> None:
    block = TransformerBlock(12, heads=3)
    layer = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    names = {"qkv.": "self_attn.in_proj_", "proj.": "self_attn.out_proj.", "mlp.0.": "linear1.", "mlp.2.": "linear2."}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            layer.get_parameter(theirs + kind).data = block.get_parameter(ours + kind)
    tokens = torch.randn(2, 7, 12)
    torch.testing.assert_close(block(tokens), layer(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("encoder", "reach"), [("cnn1x1", 1), ("cnn3x3", 25)])
def test_cnn_encoders_reach_as_far_as_their_kernels(encoder: str, reach: int) -> None:
    """One block of two 3x3 convolutions sees 5x5 cells, where group norm, whose statistics see all, is left out."""
    model = build_encoder(dataclasses.replace(TINY, encoder=encoder, depth=1))
    model.layers[0].norm = nn.Identity()
    tokens = torch.randn(1, 81, 12, requires_grad=True)
    grad = torch.autograd.grad(model(tokens, (9, 9))[0, 40].sum(), tokens)[0]
    assert int((grad.abs().sum(dim=2) > 0).sum()) == reach
