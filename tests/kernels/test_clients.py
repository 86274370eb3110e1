"""Models that others wrote, run on our kernels: transformers' Mamba against its own slow path, VMamba's four routes."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from almrr_ref.kernels import mamba_ssm, selective_scan
from torch import Tensor

PACKAGES = ("mamba_ssm", "causal_conv1d")
CALLED: Counter[str] = Counter()  # how often transformers called which of our functions


@contextlib.contextmanager
def imports_of(**modules: ModuleType | None) -> Iterator[None]:
    """Let imports of the PACKAGES find these modules, None for a package that is absent."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    for name in kept:
        del sys.modules[name]
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules.update(kept)


def count_calls() -> None:
    """Put a counter before every function of the registered packages."""
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] in PACKAGES]:
        for name, function in vars(module).items():
            if callable(function) and not name.startswith("_"):
                setattr(module, name, counted(name, function))


def counted(name: str, function: Any) -> Any:
    @functools.wraps(function)  # transformers reads the signature
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED[name] += 1
        return function(*args, **kwargs)

    return call


def load_modeling(name: str) -> ModuleType:
    """Run the source of transformers' Mamba as a module of that name: it looks for the packages when it is imported."""
    source = importlib.util.find_spec("transformers.models.mamba.modeling_mamba")
    assert source is not None
    assert source.origin is not None
    spec = importlib.util.spec_from_file_location(f"transformers.models.mamba.{name}", source.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its own decorators
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A small random MambaForCausalLM on its own slow path, and the same one on our functions."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra test)")
    config = transformers.MambaConfig(
        vocab_size=53, hidden_size=24, state_size=8, num_hidden_layers=2, initializer_range=0.1, use_bias=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with imports_of(mamba_ssm=None, causal_conv1d=None):
        slow_module = load_modeling("modeling_mamba_slow")
    with imports_of():
        mamba_ssm.install_as_mamba_ssm(replace=True)
        count_calls()
        our_module = load_modeling("modeling_mamba_ours")
    torch.manual_seed(0)
    slow, ours = (module.MambaForCausalLM(config).eval() for module in (slow_module, our_module))
    with torch.no_grad():
        for parameter in slow.parameters():  # nothing hides behind a 0 or a 1
            parameter += 0.1 * torch.randn(parameter.shape)
    ours.load_state_dict(slow.state_dict())
    return slow, ours


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 53, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded() -> Tensor:
    """The attention mask of two sequences, the second of which starts with five tokens of padding."""
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, :5] = 0
    return mask


def test_logits_are_those_of_the_slow_path(models: tuple[Any, Any], tokens: Tensor, padded: Tensor) -> None:
    CALLED.clear()
    with torch.no_grad():
        expected, logits = (model(tokens, attention_mask=padded).logits for model in models)
    assert CALLED == {"selective_scan_fn": 2, "causal_conv1d_fn": 2}
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_slow_path_token_for_token(
    models: tuple[Any, Any], tokens: Tensor, padded: Tensor
) -> None:
    CALLED.clear()
    settings: dict[str, Any] = {"attention_mask": padded, "max_new_tokens": 25, "do_sample": False}
    expected, generated = (model.generate(tokens, **settings) for model in models)
    assert CALLED["selective_state_update"] == CALLED["causal_conv1d_update"] == 2 * 24
    assert len(set(expected[:, 37:].flatten().tolist())) > 3
    assert torch.equal(generated, expected)


def test_gradients_are_those_of_the_slow_path(models: tuple[Any, Any], tokens: Tensor) -> None:
    CALLED.clear()
    gradients = []
    for model in models:
        model.train()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.eval()
    assert CALLED == {"mamba_inner_fn": 2}
    for name, expected in gradients[0].items():
        assert float((gradients[1][name] - expected).abs().max()) <= 1e-4 * float(expected.abs().max()), name


def scan_plainly(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """One route of one image, one step at a time: u, delta (d, l), A (d, n), B, C (n, l), D, bias (d,) -> (d, l)."""
    h, y = torch.zeros_like(A), []
    for t in range(u.shape[1]):
        dt = torch.log1p(torch.exp(delta[:, t] + bias))
        h = torch.exp(dt[:, None] * A) * h + (dt * u[:, t])[:, None] * B[None, :, t]
        y.append(h @ C[:, t] + D * u[:, t])
    return torch.stack(y, dim=1)


def test_vmambas_four_routes_through_an_image_are_one_call_with_four_groups() -> None:
    """By rows, by columns and both backwards, each with its own d channels of A, D, delta and its own B and C."""
    b, d, n, height, width, routes = 2, 3, 4, 3, 5, 4
    generator = torch.Generator().manual_seed(0)
    l = height * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image = normal(b, d, height, width)
    by_rows, by_columns = image.flatten(2), image.transpose(2, 3).flatten(2)
    xs = torch.stack([by_rows, by_columns, by_rows.flip(2), by_columns.flip(2)], dim=1)  # (b, 4, d, l)
    dts, Bs, Cs = normal(b, routes, d, l), normal(b, routes, n, l), normal(b, routes, n, l)
    As, Ds, bias = -normal(routes * d, n).abs(), normal(routes * d), normal(routes * d)
    ys = selective_scan(xs.flatten(1, 2), dts.flatten(1, 2), As, Bs, Cs, Ds, None, bias, True)
    assert isinstance(ys, Tensor)
    for row in range(b):
        for route in range(routes):
            part = slice(route * d, (route + 1) * d)
            sequences = (one[row, route] for one in (xs, dts))
            expected = scan_plainly(*sequences, As[part], Bs[row, route], Cs[row, route], Ds[part], bias[part])
            torch.testing.assert_close(ys[row, part], expected, rtol=1e-10, atol=1e-10)


def test_flash_linear_attentions_layer_runs_its_fast_path_as_its_slow_one() -> None:
    """Whole sequences, steps from the state they leave, and training; its `forward` takes this path on CUDA only."""
    with imports_of(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        mamba_ssm.install_as_mamba_ssm(replace=True)
        mamba = pytest.importorskip("fla.layers.mamba", reason="flash-linear-attention is not installed")
        layer = mamba.Mamba(hidden_size=12, state_size=4, intermediate_size=24, layer_idx=0).eval()
    assert mamba.selective_scan_fn is mamba_ssm.selective_scan_fn
    layer.act = F.silu  # its own needs a GPU
    tokens = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    runs = (layer.slow_forward, layer.cuda_kernels_forward)
    with torch.no_grad():
        (expected, *states), (found, *our_states) = (run(tokens[:, :7], use_cache=True) for run in runs)
        torch.testing.assert_close((found, our_states), (expected, states))
        for t in (7, 8):
            caches = [dict(zip(("conv_state", "recurrent_state"), kept)) for kept in (states, our_states)]
            pairs = zip(runs, caches)
            (expected, *states), (found, *our_states) = (run(tokens[:, t : t + 1], kept) for run, kept in pairs)
            torch.testing.assert_close((found, our_states), (expected, states))
    torch.testing.assert_close(layer.train().cuda_kernels_forward(tokens)[0], layer.slow_forward(tokens)[0])
