"""The names that code written for mamba_ssm and causal_conv1d calls, with those packages' signatures, on our kernels.

    from almrr_ref.kernels.mamba_ssm import selective_scan_fn, mamba_inner_fn        # code that you can edit
    almrr_ref.kernels.mamba_ssm.install_as_mamba_ssm()                               # code that you cannot

Source of the signatures: mamba_ssm 2.3 and causal_conv1d 1.6. Deviations: everything runs on a CPU too; the last state
of a scan has a gradient; B and C vary with time; what belongs to Mamba-2 is absent.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import causal_conv1d, selective_scan
from .checks import check_cu_seqlens, check_tensor
from .operands import compute_dtype, softplus, state_dtype


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence, as `selective_scan`: (b, d, l) -> (b, d, l), and the last state (b, d, n) if asked for.

    Args:
        B, C: where A is complex, real tensors (..., 2 l) of alternating real and imaginary parts will do too.
        cu_seqlens: (k + 1,) integers from 0 to l: where each of the k sequences that a row holds begins, and l.
    """
    l, seq_idx = u.shape[-1], None
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, l, u.device)
        bounds = cu_seqlens[1:-1].contiguous()
        seq_idx = torch.bucketize(torch.arange(l, device=u.device), bounds, right=True).expand(u.shape[0], l)
    if A.is_complex():
        B, C = (_as_complex(t, l) for t in (B, C))
    scanned = u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    return selective_scan(*scanned, seq_idx=seq_idx)


def _as_complex(projection: Tensor, l: int) -> Tensor:
    """(..., 2 l) real -> (..., l) complex; other tensors as they are."""
    if projection.is_complex() or projection.shape[-1] != 2 * l:
        return projection
    return torch.view_as_complex(projection.unflatten(-1, (l, 2)).contiguous())


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a Mamba block between its first projection and its result: (b, 2 d, l) -> (b, l, d_model).

    Args:
        xz: x and its gate z, one above the other.
        conv1d_weight, conv1d_bias: (d, 1, k) and (d,), of the causal convolution, after which SiLU follows.
        x_proj_weight, delta_proj_weight: (r + 2 n, d) and (d, r): from u to the low rank of delta, B and C; with twice
            the n of a complex A.
        out_proj_weight, out_proj_bias: (d_model, d) and (d_model,).
        A, D, delta_bias, delta_softplus: as for `selective_scan`.
        B, C: as for `selective_scan`; None takes them from `x_proj_weight`.
        B_proj_bias, C_proj_bias: (n,), added to B and C that are taken so.
        checkpoint_lvl: what mamba_ssm computes again in its backward pass; without effect here.
        b_rms_weight, c_rms_weight, dt_rms_weight: (n,), (n,), (d,): weights of an RMSNorm of B, C and delta.
        b_c_dt_rms_eps: of these norms.
    """
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(x, conv1d_weight, conv1d_bias)
    assert isinstance(u, Tensor)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)  # (b, l, r + 2 n)
    r, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    low_rank, B_rows, C_rows = projected[..., :r], projected[..., r : r + n], projected[..., -n:]
    delta = F.linear(low_rank, delta_proj_weight)
    if dt_rms_weight is not None:
        delta = F.rms_norm(delta, (delta.shape[2],), dt_rms_weight, b_c_dt_rms_eps)
    made = []
    for t, rows, bias, weight in ((B, B_rows, B_proj_bias, b_rms_weight), (C, C_rows, C_proj_bias, c_rms_weight)):
        if t is None:
            rows = rows if bias is None else rows + bias.to(rows.dtype)
            if A.is_complex():  # real and imaginary parts side by side
                rows = torch.view_as_complex(rows.unflatten(2, (-1, 2)).contiguous())
            t = rows.transpose(1, 2)  # (b, n, l)
        if weight is not None:
            t = F.rms_norm(t.transpose(-1, -2), (n,), weight, b_c_dt_rms_eps).transpose(-1, -2)
        made.append(t)
    y = selective_scan(u, delta.transpose(1, 2), A, made[0], made[1], D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2).to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


selective_scan_ref, mamba_inner_ref = selective_scan_fn, mamba_inner_fn  # mamba_ssm's second forms of the same


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Take one step of the scan and write the state in place: (b, d) -> (b, d), in x's dtype.

    With a head axis, which mamba_ssm's later models have, `state` is (b, heads, d, n), and x, dt, z are (b, heads, d),
    A (heads, d, n), B, C (b, groups, n), D, dt_bias (heads, d).

    Args:
        state: (b, d, n), the state before the step; afterwards the one after it.
        x, dt, z: (b, d), of one step.
        A, D, dt_bias, dt_softplus: as for `selective_scan`.
        B, C: (b, n).
        state_batch_indices: (b,): which entry of a larger `state` each row has; -1 leaves all as it is and gives 0.
    """
    dtype = compute_dtype(state, x, dt, A, B, C, D, z, dt_bias)
    rows = state if state_batch_indices is None else state[state_batch_indices.clamp(min=0)]
    axes = "bd" if x.dim() == 2 else "bhd"
    sizes, of_each = {**dict(zip(axes, x.shape)), "n": state.shape[-1]}, axes[1:]
    checked = ("state", rows, f"{axes}n"), ("dt", dt, axes), ("A", A, f"{of_each}n"), ("D", D, of_each), ("z", z, axes)
    for name, value, letters in (*checked, ("dt_bias", dt_bias, of_each)):
        if value is not None:
            check_tensor(name, value, letters, sizes, x.device, name in ("state", "A"))
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = softplus(step) if dt_softplus else step
    wide = state_dtype(A, dtype)
    B, C = (_per_channel(name, t, x).to(wide) for name, t in (("B", B), ("C", C)))
    h = torch.exp(step[..., None] * A.to(wide)) * rows.to(wide) + (step * x.to(dtype))[..., None] * B
    y = (h * C).sum(dim=-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if state_batch_indices is None:
        state.copy_(h.detach())
    else:
        present = state_batch_indices >= 0
        state[state_batch_indices[present]] = h[present].detach().to(state.dtype)
        y = y.masked_fill(~present.view(-1, *[1] * (y.dim() - 1)), 0)
    return y.to(x.dtype)


def _per_channel(name: str, projection: Tensor, x: Tensor) -> Tensor:
    """B or C of one step for every channel of x (b, d) or (b, heads, d): -> (b, 1, n) or (b, heads, 1, n)."""
    if projection.dim() != x.dim():
        raise ValueError(
            f"{name} has shape {tuple(projection.shape)}: expected (b, n) for x (b, d), or (b, groups, n) for x "
            f"(b, heads, d); x has shape {tuple(x.shape)}"
        )
    if projection.dim() == 3:
        groups, heads = projection.shape[1], x.shape[1]
        if heads % groups:
            raise ValueError(f"{name} has {groups} groups: expected (b, groups, n) where groups divides {heads} heads")
        projection = projection.repeat_interleave(heads // groups, dim=1)
    return projection[..., None, :]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve causally, as `causal_conv1d`: (b, d, l) -> (b, d, l), and the last k - 1 steps (b, d, k - 1) of x.

    `final_states_out`, if given, is where those steps are written.
    """
    states: dict[str, Any] = {"initial_state": initial_states, "return_final_state": return_final_states}
    result = causal_conv1d(x, weight, bias, activation=activation, seq_idx=seq_idx, **states)
    if final_states_out is None or not isinstance(result, tuple):
        return result
    return result[0], final_states_out.copy_(result[1])


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next step or steps and write the state in place: (b, d) or (b, d, steps) -> the same shape.

    Args:
        x: (b, d) or (b, d, steps).
        conv_state: (b, d, s), the s steps before x, s at least k - 1; afterwards the last s steps.
        weight, bias, activation: as for `causal_conv1d_fn`.
        cache_seqlens: (b,) steps taken so far: makes `conv_state` a ring whose next entry is cache_seqlens mod s.
        conv_state_indices: (b,): which entry of a larger `conv_state` each row has; below 0: a padded row, result 0.
    """
    steps = x[..., None] if x.dim() == 2 else x
    l, s, width = steps.shape[2], conv_state.shape[2], weight.shape[-1] - 1
    if s < width:
        raise ValueError(f"conv_state has shape {tuple(conv_state.shape)}: expected (b, d, s) with s at least {width}")
    entries = None if conv_state_indices is None else conv_state_indices.long()
    state = conv_state if entries is None else conv_state[entries.clamp(min=0)]
    check_tensor("conv_state", state, "bds", {"b": x.shape[0], "d": x.shape[1], "s": s}, x.device)
    if cache_seqlens is None:
        before = state[:, :, s - width :]
        after = torch.cat([state, steps.to(state.dtype)], dim=2)[:, :, l:]
    else:
        entry = cache_seqlens.long()[:, None] + torch.arange(-width, l, device=x.device)  # of the steps before and now
        entry = entry.remainder(s)[:, None].expand(-1, x.shape[1], -1)
        before = state.gather(2, entry[:, :, :width])
        after = state.scatter(2, entry[:, :, width:], steps.to(state.dtype))
    y = causal_conv1d(steps, weight, bias, activation=activation, initial_state=before)
    assert isinstance(y, Tensor)
    if entries is None:
        conv_state.copy_(after.detach())
    else:
        conv_state[entries[entries >= 0]] = after[entries >= 0].detach()
        y = torch.where((entries >= 0)[:, None, None], y, 0.0)
    return y.view_as(x)


_SCAN: dict[str, Any] = {"selective_scan_fn": selective_scan_fn, "mamba_inner_fn": mamba_inner_fn}
_SECOND_FORMS: dict[str, Any] = {"selective_scan_ref": selective_scan_ref, "mamba_inner_ref": mamba_inner_ref}
_CONVOLUTION: dict[str, Any] = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
_MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm": _SCAN | {"__version__": "1.2.2+almrr.ref"},  # the last before Mamba-2, which is not here
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN | _SECOND_FORMS,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "causal_conv1d": _CONVOLUTION | {"__version__": "1.6.1+almrr.ref"},
    "causal_conv1d.causal_conv1d_interface": _CONVOLUTION,
}


def install_as_mamba_ssm(replace: bool = False) -> None:
    """Register these functions in `sys.modules` as mamba_ssm and causal_conv1d, for code that imports those packages.

    Call it before that code is imported. What the packages hold beyond Mamba-1's scan and convolution is absent.

    Args:
        replace: hide packages of these names that are installed, for this process.
    Raises:
        ValueError: if such a package is installed and `replace` is False.
    """
    for name in ("mamba_ssm", "causal_conv1d"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin != __name__ and not replace:
            raise ValueError(f"{name} is installed at {spec.origin}: pass replace=True to hide it in this process")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        del sys.modules[name]
    for name, members in _MODULES.items():
        module = ModuleType(name, "Registered by almrr_ref.kernels.mamba_ssm.install_as_mamba_ssm().")
        is_package = any(other.startswith(f"{name}.") for other in _MODULES)
        module.__spec__ = ModuleSpec(name, loader=None, origin=__name__, is_package=is_package)
        if is_package:
            module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
