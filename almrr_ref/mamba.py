"""The Vision Mamba (Vim) encoder: section 3.3 of the paper, Fig. 4, Eqs. (2)-(6).

    T^ = norm(T_l)                                                        (2)  VimBlock
    x, z = in_proj(T^)                                                    (3)  VimMixer
    y = SSM(SiLU(conv1d(x))), forward and backward in time                (4)
    y^ = y * SiLU(z)                                                      (5)
    T_{l+1} = out_proj((y^_forward + y^_backward) / 2) + T_l              (6)  the sum, VimBlock adds T_l

The SSM is the selective scan of kernels/:  h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t . h_t + D u_t.

    b l d     batch, length of the sequence, channels: d_model outside the mixer, d_inner = expand * d_model inside
    x z       halves of in_proj, (b, d_inner, l): what is mixed along the sequence, and its gate
    u         input of the scan, (b, d_inner, l): x after the convolution and SiLU
    delta     step size, (b, d_inner, l); the scan takes softplus(delta + delta_bias) > 0; Vim calls it dt
    dt_rank   width of the bottleneck from u to delta
    h n       state, (b, d_inner, n), and how many numbers it has for each channel (d_state)
    A         decay of the state, (d_inner, n), < 0; stored as A_log = log(-A)
    B C       what a token writes into the state and reads from it, (b, n, l)
    D         weight of u beside the state, (d_inner,)
    _b        suffix of what belongs to the backward direction

Parameters are named as in Vim's code ("bimamba v2"), so that published weights load by name. Deviations from that code:
no tensor is flipped (the backward direction convolves and scans in reversed time), and the gate is applied once, to the
sum of both directions. Neither changes a result. Vim halves that sum, Eq. (6) does not: `average_directions`.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.backbones.weights import UNREADABLE
from almrr_ref.kernels import bidirectional_scan, causal_conv1d
from almrr_ref.kernels.operands import widened


class VimMixer(nn.Module):
    """Mix tokens along the sequence in both directions: (b, l, d) -> (b, l, d). Eqs. (3)-(6) without T_l.

    Args:
        d_model, d_state, d_conv, expand: width, n, taps of the convolution, d_inner / d_model.
        average_directions: halve the sum of the two directions.
        backend: of the scan: "auto", "reference", "chunked", "numba" or "triton".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        average_directions: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 16)
        self.average_directions, self.backend = average_directions, backend
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        for suffix in ("", "_b"):
            # Vim's parameters, never called: `causal_conv1d` takes them, and pads
            self.add_module(f"conv1d{suffix}", nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner))
            dt_proj = nn.Linear(self.dt_rank, d_inner)  # PyTorch's default weights are Vim's: uniform(+-dt_rank^-0.5)
            _initialise_steps(dt_proj.bias)
            self.add_module(f"x_proj{suffix}", nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", dt_proj)
            A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(d_inner, 1)  # (d_inner, n)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(A.log()))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(d_inner)))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 3:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}: expected (b, l, d_model)")
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # Eq. (3)
        u, delta, A, B, C, D, delta_bias = self._direction(x, "")
        scale = 0.5 if self.average_directions else 1.0
        y = bidirectional_scan(  # Eqs. (4) and (5), and the sum of (6)
            u, delta, A, B, C, D, z, delta_bias, *self._direction(x, "_b"), scale=scale, backend=self.backend
        )
        return self.out_proj(y.transpose(1, 2))

    def _direction(self, x: Tensor, suffix: str) -> tuple[Tensor, ...]:
        """Eq. (4) of one direction up to the scan: x (b, d_inner, l) -> u, delta, A, B, C, D, delta_bias."""
        names = f"conv1d{suffix}", f"x_proj{suffix}", f"dt_proj{suffix}", f"A{suffix}_log", f"D{suffix}"
        conv1d, x_proj, dt_proj, A_log, D = (getattr(self, name) for name in names)
        u = causal_conv1d(x, conv1d.weight, conv1d.bias, reverse=suffix == "_b")
        assert isinstance(u, Tensor)
        projected = _project(x_proj.weight, u)  # (b, dt_rank + 2 n, l)
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        delta = _project(dt_proj.weight, low_rank)
        return u, delta, -torch.exp(widened(A_log)), B, C, widened(D), widened(dt_proj.bias)


@torch.no_grad()
def _initialise_steps(bias: Tensor) -> None:
    """Make the first steps log-uniform in [1e-3, 1e-1]: the bias (d_inner,) is their inverse softplus."""
    step = (torch.rand(bias.shape) * math.log(0.1 / 0.001) + math.log(0.001)).exp().clamp(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply every step by weight (r, d): (b, d, l) -> (b, r, l), laid out in memory as x is."""
    if x.stride(1) < x.stride(2):  # channels side by side, as in_proj leaves them: a CPU scans the other order slowly
        return F.linear(x.transpose(1, 2), weight).transpose(1, 2)
    return weight @ x


class VimBlock(nn.Module):
    """Norm, mixer, residual: T_l (b, l, d) -> T_{l+1} (b, l, d). Eqs. (2), (6)."""

    def __init__(self, mixer: VimMixer, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = mixer

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mixer(self.norm(tokens))  # float32 tokens keep the residual in float32 under autocast


class VimEncoder(nn.Module):
    """Vim blocks and a final norm: (b, l, d) -> (b, l, d). Arguments as in ModelConfig."""

    def __init__(
        self,
        d_model: int,
        depth: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        average_directions: bool = True,
    ) -> None:
        super().__init__()
        mixers = [VimMixer(d_model, d_state, d_conv, expand, average_directions) for _ in range(depth)]
        for mixer in mixers:
            mixer.out_proj.weight.data /= math.sqrt(depth)  # Vim: keeps the residual's variance whatever the depth
        self.layers = nn.ModuleList(VimBlock(mixer, d_model) for mixer in mixers)
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm_f(tokens)


def load_vim_weights(encoder: VimEncoder, path: str | Path) -> list[str]:
    """Load as many layers as the encoder has from a published Vim checkpoint -> the file's keys that were not used.

    Raises:
        ValueError: if the file is none, lacks a parameter of the encoder, or has one of another shape.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Vim stores its command line beside the weights
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = dict(checkpoint.get("model", checkpoint))
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a Vim checkpoint ({type(error).__name__})") from error
    expected = encoder.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name}; a Vim checkpoint of {len(encoder.layers)} layers or more is needed")
        if weights[name].shape != value.shape:
            raise ValueError(f"{path}: {name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}")
    encoder.load_state_dict({name: weights[name] for name in expected})
    return sorted(set(weights) - set(expected))
