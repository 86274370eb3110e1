"""The Vision-Mamba (Vim) encoder: ALMRR section 3.3, Fig. 4 and Eqs. (2)-(6), and Vim's parameter names.

The names are those of Vim's "bimamba v2", so that published Vim weights load by name (``load_vim_weights``). Per
direction there are an own convolution, x_proj, dt_proj, A and D (the backward ones end in ``_b``); in_proj, the gate
z, out_proj and the norm are shared.

Deviations from Vim's code, none of which changes a result: no tensor is flipped (the backward direction convolves and
scans in reversed time), and the gate, which both directions share, is applied once to their sum. Vim halves that sum
before out_proj; the paper's Eq. (6) does not say so: ``average_directions``.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.kernels import bidirectional_scan, causal_conv1d


class VimMixer(nn.Module):
    """Mix tokens along the sequence in both directions: (b, l, d) -> (b, l, d). Eqs. (3)-(6), without norm and
    residual.

    Args:
        d_model: width of a token.
        d_state: size n of the state of each channel.
        d_conv: taps of the depthwise convolution.
        expand: inner width as a multiple of d_model.
        dt_rank: width of the bottleneck that yields the step size; None for ceil(d_model / 16).
        average_directions: halve the sum of the two directions.
        backend: of the scan: "auto", "reference", "chunked" or "triton".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        average_directions: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.d_state, self.average_directions, self.backend = d_state, average_directions, backend
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
            dt_proj = nn.Linear(self.dt_rank, d_inner)  # PyTorch's default weights are Vim's: uniform(+-dt_rank^-0.5)
            self._initialise_steps(dt_proj)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", dt_proj)
            A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(d_inner, 1)  # (d_inner, n)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(A.log()))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(d_inner)))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    @torch.no_grad()
    def _initialise_steps(self, dt_proj: nn.Linear) -> None:
        """Set the bias so that the first steps are log-uniform in [1e-3, 1e-1]: it is their inverse softplus."""
        log_step = torch.rand(dt_proj.bias.shape) * math.log(0.1 / 0.001) + math.log(0.001)
        step = log_step.exp().clamp(min=1e-4)
        dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def _direction(self, x: Tensor, suffix: str) -> tuple[Tensor, ...]:
        """One direction's operands of the scan: u, delta, A, B, C, D, delta_bias."""
        own = self.get_parameter
        taps, bias = own(f"conv1d{suffix}.weight"), own(f"conv1d{suffix}.bias")
        u = causal_conv1d(x, taps, bias, reverse=suffix == "_b")  # (b, d_inner, l)
        projected = _project(own(f"x_proj{suffix}.weight"), u)  # (b, dt_rank + 2 n, l)
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        delta = _project(own(f"dt_proj{suffix}.weight"), low_rank)  # (b, d_inner, l)
        A = -torch.exp(own(f"A{suffix}_log").float())
        return u, delta, A, B, C, own(f"D{suffix}").float(), own(f"dt_proj{suffix}.bias").float()

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # each (b, d_inner, l)
        u, delta, A, B, C, D, bias = self._direction(x, "")
        mixed = bidirectional_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            bias,
            *self._direction(x, "_b"),
            scale=0.5 if self.average_directions else 1.0,
            backend=self.backend,
        )
        return self.out_proj(mixed.transpose(1, 2))


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply every step by (r, d): (b, d, l) -> (b, r, l), in x's order in memory, which is the one the scan likes.

    A CPU's is channels side by side, as in_proj leaves them; in the other order its cost grows faster than l.
    """
    if x.stride(1) < x.stride(2):
        return F.linear(x.transpose(1, 2), weight).transpose(1, 2)
    return weight @ x


class VimBlock(nn.Module):
    """Norm, mixer, residual: (b, l, d) -> (b, l, d). Eqs. (2), (6)."""

    def __init__(self, mixer: VimMixer, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = mixer

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mixer(self.norm(tokens))  # float32 tokens keep the residual in float32 under autocast


class VimEncoder(nn.Module):
    """A stack of Vim blocks and a final norm: (b, l, d) -> (b, l, d).

    Args:
        d_model, depth, d_state, d_conv, expand, average_directions: as in ModelConfig.
    """

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
        mixers = [
            VimMixer(d_model, d_state, d_conv, expand, average_directions=average_directions) for _ in range(depth)
        ]
        self.layers = nn.ModuleList(VimBlock(mixer, d_model) for mixer in mixers)
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)
        with torch.no_grad():
            for mixer in mixers:
                mixer.out_proj.weight /= math.sqrt(depth)  # Vim: keeps the residual's variance independent of the depth

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm_f(tokens)


def load_vim_weights(encoder: VimEncoder, path: str | Path) -> list[str]:
    """Load a published Vim checkpoint into an encoder by name, as many layers as the encoder has.

    Returns:
        The keys of the file that were not used (embeddings, head, deeper layers).
    Raises:
        ValueError: if the file lacks a parameter of the encoder, or one has another shape.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # Vim stores its command line beside the weights
        stored = torch.load(path, map_location="cpu", weights_only=True)
    weights = stored.get("model", stored)
    own = encoder.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise ValueError(
                f"{path} lacks {name}; a Vim checkpoint with at least {len(encoder.layers)} layers is needed"
            )
        if weights[name].shape != value.shape:
            raise ValueError(f"{path}: {name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}")
    encoder.load_state_dict({name: weights[name] for name in own})
    return sorted(set(weights) - set(own))
