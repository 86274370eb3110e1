"""A block run token by token is the block run at once, and one with the future masked out."""

import pytest
import torch
from almrr_ref.kernels import causal_conv1d, selective_scan
from almrr_ref.kernels.step import first_state, run_causally

from almrr_ref.mamba import VimMixer


@pytest.fixture
def mixer() -> VimMixer:
    torch.manual_seed(0)
    return VimMixer(6, d_state=3)


@torch.no_grad()
def test_the_whole_sequence_is_the_forward_direction_of_the_block(mixer: VimMixer) -> None:
    tokens = torch.randn(2, 9, 6)
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    u = causal_conv1d(x, mixer.conv1d.weight, mixer.conv1d.bias)
    low_rank, B, C = (mixer.x_proj.weight @ u).split([mixer.dt_rank, 3, 3], dim=1)
    A, bias = -mixer.A_log.exp(), mixer.dt_proj.bias
    y = selective_scan(
        u, mixer.dt_proj.weight @ low_rank, A, B, C, mixer.D, z, bias, delta_softplus=True, backend="reference"
    )
    expected = mixer.out_proj(y.transpose(1, 2))
    torch.testing.assert_close(run_causally(mixer, tokens, first_state(mixer, 2))[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
@torch.no_grad()
def test_token_by_token_equals_the_whole_sequence(mixer: VimMixer, backend: str) -> None:
    tokens, state = torch.randn(2, 9, 6), first_state(mixer, 2)
    whole, end = run_causally(mixer, tokens, state, backend)
    pieces = []
    for piece in tokens.split([1, 1, 4, 1, 2], dim=1):
        y, state = run_causally(mixer, piece, state, backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-6)


def test_a_gradient_flows_through_the_state(mixer: VimMixer) -> None:
    tokens = torch.randn(1, 4, 6, requires_grad=True)
    _, state = run_causally(mixer, tokens[:, :2], first_state(mixer, 1))
    run_causally(mixer, tokens[:, 2:], state)[0].sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[:, :2].abs().min() > 0


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_does_not_keep_the_sequence_alive(mixer: VimMixer, reverse: bool) -> None:
    _, state = run_causally(mixer, torch.randn(1, 50, 6), first_state(mixer, 1))
    _, last = causal_conv1d(torch.randn(1, 6, 50), torch.randn(6, 4), reverse=reverse, return_final_state=True)
    for kept in (*state, last):
        assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_block_that_has_more_than_is_applied_is_refused(mixer: VimMixer) -> None:
    mixer.b_layernorm = torch.nn.RMSNorm(3)  # Jamba's
    with pytest.raises(ValueError, match="the block also has b_layernorm, which run_causally does not apply"):
        run_causally(mixer, torch.randn(1, 2, 6), first_state(mixer, 1))
