"""Autograd's corners: one function for each row of the table in kernels/README.md, which says what it gives.

A function raises where the corner is refused, and returns pairs (found, expected) where it is right. `backend` is that
of the scan; expected is the float64 reference on the plain road.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from almrr_ref.kernels import causal_conv1d, selective_scan
from scan_cases import Case, make_arguments, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CASE = Case(2, 2, 3, 1)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
Pairs = list[tuple[Tensor, Tensor]]


def values(l: int = CASE.l, b: int = CASE.b) -> list[Tensor]:
    """The arguments of a scan, without gradients."""
    return [t.detach() for t in make_arguments(Case(b, CASE.d, l, CASE.n)).values()]


def block(backend: str) -> Callable[..., Tensor]:
    """Convolution and scan as a function of NAMES -> (b, d, l)."""

    def run(u: Tensor, *others: Tensor) -> Tensor:
        weight = torch.tensor([[0.5, -0.2, 0.3], [0.1, 0.4, -0.6]], dtype=u.dtype)
        u = causal_conv1d(u, weight, backend="triton" if backend == "triton" else "reference")
        y = selective_scan(u, *others, delta_softplus=True, backend=backend)
        assert isinstance(y, Tensor)
        return y

    return run


def loss(backend: str) -> Callable[..., Tensor]:
    """A number that is not linear in y."""
    run = block(backend)
    return lambda *arguments: run(*arguments).square().sum()


def derivatives(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """The function's value and its gradient for every argument, by the plain road."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def oracle(arguments: list[Tensor], function: Callable[[str], Callable[..., Tensor]] = loss) -> list[Tensor]:
    """`derivatives` of the float64 reference."""
    return derivatives(function("reference"), [t.double() for t in arguments])


def second(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The squared gradient as a function of the same arguments: its gradient is a second derivative."""

    def squared(*arguments: Tensor) -> Tensor:
        first = torch.autograd.grad(function(*arguments), arguments, create_graph=True)
        return sum((g.square().sum() for g in first), torch.zeros(()))

    return squared


def second_derivative(backend: str) -> Pairs:
    found = derivatives(second(loss(backend)), values())
    return list(zip(found, oracle(values(), lambda name: second(loss(name))), strict=True))


def third_derivative(backend: str) -> Pairs:
    found = derivatives(second(second(loss(backend))), values(l=2))
    return list(zip(found, oracle(values(l=2), lambda name: second(second(loss(name)))), strict=True))


def func_grad(backend: str) -> Pairs:
    found = torch.func.grad(loss(backend), argnums=tuple(range(len(NAMES))))(*values())
    return list(zip(found, oracle(values())[1:], strict=True))


def func_jacrev_of_grad(backend: str) -> Pairs:
    def curvature(name: str, dtype: torch.dtype) -> Tensor:
        u, *others = (t.to(dtype) for t in values(b=1))
        found = torch.func.jacrev(torch.func.grad(loss(name)))(u, *others)
        assert isinstance(found, Tensor)
        return found

    u, *others = (t.double() for t in values(b=1))
    expected = torch.autograd.functional.hessian(lambda x: loss("reference")(x, *others), u)
    return [(curvature(backend, torch.float32), expected)]


def func_vmap(backend: str) -> Pairs:
    arguments = values()
    many = [torch.stack([t, 0.5 * t]) for t in arguments]
    found = torch.func.vmap(block(backend))(*many)
    with torch.inference_mode():
        judged = torch.func.vmap(block(backend))(*many)
    expected = [block("reference")(*(t[i].double() for t in many)) for i in range(2)]
    return [(y[i], expected[i]) for y in (found, judged) for i in range(2)]


def func_vmap_of_grad(backend: str) -> Pairs:
    u, *others = values()
    found = torch.func.vmap(torch.func.grad(loss(backend)), in_dims=(0, *[None] * 7))(torch.stack([u, 2 * u]), *others)
    return [(found[i], oracle([(i + 1) * u, *others])[1]) for i in range(2)]


def func_grad_of_vmap(backend: str) -> Pairs:
    u, *others = values()

    def both(factor: Tensor) -> Tensor:
        return torch.func.vmap(lambda f: loss(backend)(f * u, *others))(factor).sum()

    found = torch.func.grad(both)(torch.tensor([1.0, 2.0]))
    return [(found[i], (oracle([(i + 1.0) * u, *others])[1] * u).sum()) for i in range(2)]


def func_jvp(backend: str) -> Pairs:
    u, *others = values()
    _, found = torch.func.jvp(lambda x: loss(backend)(x, *others), (u,), (u,))
    return [(found, (oracle([u, *others])[1] * u).sum())]


def compiled(backend: str, dynamic: bool, compiler: str = "aot_eager") -> Pairs:
    torch._dynamo.reset()
    function = torch.compile(loss(backend), fullgraph=True, dynamic=dynamic or None, backend=compiler)
    pairs: Pairs = []
    for l in (5, 7) if dynamic else (2,):
        pairs += zip(derivatives(function, values(l)), oracle(values(l)), strict=True)
    if dynamic and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1:
        raise RuntimeError("compiled again for every length")
    return pairs


def compile_whole(backend: str) -> Pairs:
    return compiled(backend, dynamic=False)


def compile_any_length(backend: str) -> Pairs:
    torch._dynamo.utils.counters.clear()
    return compiled(backend, dynamic=True)


def export_any_size(backend: str) -> Pairs:
    class Block(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return block(backend)(*arguments)

    b, l = torch.export.Dim("b", min=1, max=64), torch.export.Dim("l", min=2, max=64)
    whole, none = {0: b, 2: l}, {}
    shapes = {"arguments": tuple(whole if name in ("u", "delta", "B", "C", "z") else none for name in NAMES)}
    program = torch.export.export(Block(), tuple(values()), dynamic_shapes=shapes).module()
    return [
        (program(*values(l, b)), block("reference")(*(t.double() for t in values(l, b)))) for b, l in ((1, 2), (3, 7))
    ]


def checkpointed(backend: str, reentrant: bool) -> Pairs:
    def function(*arguments: Tensor) -> Tensor:
        result = checkpoint(loss(backend), *arguments, use_reentrant=reentrant)
        assert isinstance(result, Tensor)
        return result

    leaves = [t.clone().requires_grad_() for t in values()]
    function(*leaves).backward()
    return [(t.grad, expected) for t, expected in zip(leaves, oracle(values())[1:], strict=True) if t.grad is not None]


def checkpoint_reentrant(backend: str) -> Pairs:
    return checkpointed(backend, True)


def checkpoint_non_reentrant(backend: str) -> Pairs:
    return checkpointed(backend, False)


def autocast(backend: str) -> Pairs:
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(loss(backend), values())
    return list(zip(found, oracle(values()), strict=True))


def copied(backend: str) -> Pairs:
    from almrr_ref.mamba import VimMixer

    torch.manual_seed(0)
    mixer, tokens = VimMixer(2, d_state=1, d_conv=3, expand=1, backend=backend), torch.randn(1, 3, 2)
    return [(m(tokens), mixer(tokens).double()) for m in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)))]


def table() -> dict[str, dict[str, str]]:
    """What kernels/README.md says of every corner, by backend."""
    text = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
    section = text.partition("## Autograd's corners")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    backends = [name.strip("`") for name in rows[0][1:]]
    return {name: dict(zip(backends, cells, strict=True)) for name, *cells in rows[2:]}


def assert_corner(name: str, backend: str) -> None:
    """Hold a backend to what the table says of a corner."""
    said = table()[name][backend]
    if said == "refused":
        with pytest.raises((RuntimeError, NotImplementedError, torch._dynamo.exc.UserError)) as caught:
            CORNERS[name](backend)
        assert str(caught.value).splitlines()[0]
        return
    if said == "-":
        pytest.skip("nobody compiles the oracle: every step of the loop would be unrolled")
    assert said == "right"
    pairs = CORNERS[name](backend)
    assert pairs
    for found, expected in pairs:
        assert relative_error(found, expected) < 1e-5


CORNERS: dict[str, Callable[[str], Any]] = {
    "second derivative": second_derivative,
    "third derivative": third_derivative,
    "`torch.func.grad`": func_grad,
    "`jacrev` of `grad`": func_jacrev_of_grad,
    "`vmap`": func_vmap,
    "`vmap` of `grad`": func_vmap_of_grad,
    "`grad` of `vmap`": func_grad_of_vmap,
    "`jvp`": func_jvp,
    "`torch.compile`, whole": compile_whole,
    "`torch.compile`, any l": compile_any_length,
    "`torch.export`, any b and l": export_any_size,
    "checkpoint, reentrant": checkpoint_reentrant,
    "checkpoint, not reentrant": checkpoint_non_reentrant,
    "autocast": autocast,
    "deepcopy and pickle of `VimMixer`": copied,
}
