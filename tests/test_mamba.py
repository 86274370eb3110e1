"""The Vim block against an independently written float64 version driven by Vim's key names, with flips and loops."""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from almrr_ref.kernels.step import first_state, run_causally

from almrr_ref.mamba import VimBlock, VimEncoder, VimMixer, load_vim_weights

DIRECTION_KEYS = ["conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight", "dt_proj{}.bias"]
DIRECTION_KEYS += ["A{}_log", "D{}"]
VIM_MIXER_KEYS = ["in_proj.weight", "out_proj.weight", *(key.format(s) for key in DIRECTION_KEYS for s in ("", "_b"))]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def one_direction(x: np.ndarray, w: dict[str, np.ndarray], suffix: str) -> np.ndarray:
    """(l, d_inner) -> (l, d_inner): convolution, projections and state recurrence with loops over time and taps."""
    kernel = w[f"conv1d{suffix}.weight"][:, 0]
    taps = kernel.shape[1]
    u = np.zeros_like(x)
    for t in range(len(x)):
        for k in range(taps):
            if t - (taps - 1) + k >= 0:
                u[t] += kernel[:, k] * x[t - (taps - 1) + k]
    u = silu(u + w[f"conv1d{suffix}.bias"])
    A = -np.exp(w[f"A{suffix}_log"])
    rank, n = w[f"dt_proj{suffix}.weight"].shape[1], A.shape[1]
    state, y = np.zeros_like(A), np.zeros_like(u)
    for t in range(len(x)):
        projected = w[f"x_proj{suffix}.weight"] @ u[t]
        dt = np.log1p(np.exp(w[f"dt_proj{suffix}.weight"] @ projected[:rank] + w[f"dt_proj{suffix}.bias"]))
        B, C = projected[rank : rank + n], projected[rank + n :]
        state = np.exp(dt[:, None] * A) * state + (dt * u[t])[:, None] * B
        y[t] = state @ C + w[f"D{suffix}"] * u[t]
    return y


def block_oracle(tokens: np.ndarray, w: dict[str, np.ndarray], halved: bool) -> np.ndarray:
    """Vim "bimamba v2" as its authors run it: flip, run, flip back, gate each direction, halve the sum if asked."""
    normed = tokens / np.sqrt((tokens**2).mean(axis=1, keepdims=True) + 1e-5) * w["norm.weight"]
    w = {name.removeprefix("mixer."): value for name, value in w.items()}
    x, z = np.split(normed @ w["in_proj.weight"].T, 2, axis=1)
    forward = one_direction(x, w, "") * silu(z)
    backward = one_direction(x[::-1], w, "_b")[::-1] * silu(z)
    return tokens + (forward + backward) / (1 + halved) @ w["out_proj.weight"].T


@pytest.mark.parametrize(("b", "l", "d", "halved"), [(2, 7, 12, True), (1, 1, 6, False), (3, 17, 5, True)])
def test_block_agrees_with_a_float64_version_written_from_vim(b: int, l: int, d: int, halved: bool) -> None:
    mixer = VimMixer(d, d_state=5, average_directions=halved)
    block, generator = VimBlock(mixer, d), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():  # away from the start: nothing hides behind a 0, a 1, a symmetry
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokens = 2 * torch.randn(b, l, d, generator=generator)
    weights = {name: value.double().numpy() for name, value in block.state_dict().items()}
    expected = np.stack([block_oracle(row, weights, halved) for row in tokens.double().numpy()])
    np.testing.assert_allclose(block(tokens).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_vims_name_and_gets_a_gradient() -> None:
    encoder = VimEncoder(d_model=12, depth=2)
    names = {f"layers.{i}.mixer.{key}" for i in range(2) for key in VIM_MIXER_KEYS}
    assert set(encoder.state_dict()) == names | {"layers.0.norm.weight", "layers.1.norm.weight", "norm_f.weight"}
    encoder(torch.randn(2, 6, 12)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in encoder.parameters())


def test_parameters_may_be_any_tensors_as_under_torch_func_and_parametrizations() -> None:
    torch.manual_seed(0)
    mixers, tokens = [VimMixer(8, d_state=2) for _ in range(3)], torch.randn(2, 5, 8)
    stacked, _ = torch.func.stack_module_state(mixers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, that vmap runs one after the other
        y = torch.func.vmap(lambda values: torch.func.functional_call(mixers[0], values, (tokens,)))(stacked)
    torch.testing.assert_close(y, torch.stack([mixer(tokens) for mixer in mixers]))
    mixer, expected = mixers[0], mixers[0](tokens)
    causal = run_causally(mixer, tokens, first_state(mixer, 2))[0]
    torch.nn.utils.parametrizations.weight_norm(mixer.conv1d)
    torch.testing.assert_close(mixer(tokens), expected)
    torch.testing.assert_close(run_causally(mixer, tokens, first_state(mixer, 2))[0], causal)
    with pytest.raises(ValueError, match=r"tokens have shape \(5, 8\): expected \(b, l, d_model\)"):
        mixer(tokens[0])


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_compiled_blocks_gradients_are_the_plain_ones(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = VimMixer(8, d_state=2, backend="chunked")
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = [torch.randn(2, 6, 8, requires_grad=True), *mixer.parameters()]
    found, expected = (torch.autograd.grad(run(leaves[0]).square().sum(), leaves) for run in (compiled, mixer))
    torch.testing.assert_close(found, expected)


def test_sizes_initial_steps_and_output_scale_are_those_of_vim_tiny() -> None:
    mixer = VimEncoder(192, depth=9).layers[0].mixer
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    assert shapes["in_proj.weight"] == (768, 192)
    assert shapes["x_proj.weight"] == (12 + 16 + 16, 384)
    assert shapes["dt_proj_b.weight"] == (384, 12)
    assert shapes["conv1d.weight"] == (384, 1, 4)
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert 1e-3 * 0.999 <= float(steps.min()) < float(steps.max()) <= 0.1001
    assert 0.007 < float(steps.log().mean().exp()) < 0.014  # log-uniform in [1e-3, 1e-1] has its middle at 1e-2
    torch.testing.assert_close(mixer.A_b_log[3].exp(), torch.arange(1.0, 17.0))
    assert 0.9 < float(mixer.out_proj.weight.detach().abs().max()) * 384**0.5 * 3 <= 1 + 1e-6


def test_published_weights_load_by_name_and_others_are_refused_by_name(tmp_path: Path) -> None:
    """A file laid out like Vim's: weights under "model", a Namespace beside them, an embedding and a head."""
    weights = {name: torch.randn_like(value) for name, value in VimEncoder(12, depth=3).state_dict().items()}
    weights |= {"pos_embed": torch.zeros(1, 197, 12), "head.weight": torch.zeros(10, 12)}
    path, encoder = tmp_path / "vim.pth", VimEncoder(12, depth=2)
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, path)
    unused = load_vim_weights(encoder, path)
    torch.testing.assert_close(encoder.layers[1].mixer.A_b_log, weights["layers.1.mixer.A_b_log"])
    assert {"pos_embed", "head.weight", "layers.2.norm.weight"} <= set(unused)
    with pytest.raises(ValueError, match=r"lacks layers\.3\..*4 layers or more"):
        load_vim_weights(VimEncoder(12, depth=4), path)
    with pytest.raises(ValueError, match=r"layers\.0.*expected"):
        load_vim_weights(VimEncoder(24, depth=1), path)


@pytest.mark.parametrize("content", [None, b"junk", [1, 2]])
def test_a_file_that_is_no_vim_checkpoint_is_named(content: object, tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"vim\.pth cannot be read as a Vim checkpoint"):
        load_vim_weights(VimEncoder(12, depth=1), path)
