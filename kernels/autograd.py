"""Gradients of the operators: their own for the first derivative, the oracle's for all further ones.

An operator is a pair of `torch.library` operators, forward and backward. torch.compile takes either as one call. Two
autograd functions stand around the pair, so that `torch.func.grad` and `vmap` see through it. A second derivative
differentiates the plain recurrence instead of the fast backward pass: slow, but right.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

# Code that looks for the package `kernels` from a checkout's root finds this folder: that second copy has operators of
# its own.
NAMESPACE = "almrr_ref" if __package__ == "almrr_ref.kernels" else f"almrr_ref_{__package__.replace('.', '_')}"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(fake: Callable[..., Any], schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator torch.ops.almrr_ref.<name>; `fake` allocates its results.

    `torch.library.custom_op` would do, but its first call imports the whole compiler, which takes seconds.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__.lstrip("_")
        LIBRARY.define(name + (schema or torch.library.infer_schema(function, mutates_args=())))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return register


def without_base(view: Tensor) -> Tensor:
    """The same memory as no view of anything: autograd lets a user change no view that an operator has returned."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


class Rule(NamedTuple):
    """How one mapping is computed and differentiated; tensors may be None or of integers, flags are plain numbers.

    The first of the tensors has the shape of the first of the outputs.
    """

    forward: Callable[..., tuple[Tensor, ...]]  # (*tensors, *flags) -> (*outputs, *saved)
    # (*gradients of outputs, *saved, *tensors, *flags) -> that of each real or complex tensor
    backward: Callable[..., Any]
    oracle: Callable[..., tuple[Tensor, ...]]  # (*tensors, *flags) -> outputs, differentiable
    outputs: int


RULES: dict[str, Rule] = {}


def run(name: str, tensors: tuple[Tensor | None, ...], flags: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run the operator RULES[name]: -> its outputs."""
    rule = RULES[name]
    outputs: tuple[Tensor, ...]
    # dynamo would hand over a context unasked; an autograd function that records nothing takes time for nothing
    direct = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    if direct and not needs_gradient(tensors):
        outputs = rule.forward(*tensors, *flags)
    else:
        outputs = _Value.apply(name, flags, *tensors)
    return outputs[: rule.outputs]


def _differentiable(tensors: Sequence[Tensor | None]) -> list[int]:
    """Places of the tensors that have a gradient."""
    return [i for i, t in enumerate(tensors) if t is not None and (t.is_floating_point() or t.is_complex())]


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is to be expected, and what it needs worth keeping."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Value(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, flags: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return RULES[name].forward(*tensors, *flags)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.flags, *tensors = inputs
        saved = output[RULES[ctx.name].outputs :]
        ctx.saves = len(saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # or autograd would fill zeros as large as what is saved
        ctx.save_for_backward(*saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        everything = ctx.saved_tensors  # once: a checkpoint computes them for a single reading
        saved, tensors = everything[: ctx.saves], everything[ctx.saves :]
        first, *others = gradients[: RULES[ctx.name].outputs]
        if first is None:  # only another output was used
            first = torch.zeros_like(tensors[0])
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        arguments = first, *others, *saved, *tensors
        if torch.compiler.is_compiling():  # without further derivatives
            computed = RULES[ctx.name].backward(*arguments, *ctx.flags)
        else:
            computed = _Gradients.apply(ctx.name, ctx.flags, ctx.saves, *arguments)
        for i, gradient in zip(_differentiable(tensors), computed):
            of_tensors[i] = gradient
        return None, None, *of_tensors


class _Gradients(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, flags: tuple[Any, ...], saves: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(RULES[name].backward(*tensors, *flags))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.flags, ctx.saves, *tensors = inputs
        outputs = RULES[ctx.name].outputs
        ctx.save_for_backward(*tensors[:outputs], *tensors[outputs + ctx.saves :])

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Any, ...]:
        """Differentiate the oracle's gradients, weighted by `weights`, for the gradients of outputs and the tensors."""
        rule, everything = RULES[ctx.name], list(ctx.saved_tensors)
        count, places = rule.outputs, _differentiable(everything)
        of_outputs, of_tensors = [i for i in places if i < count], [i for i in places if i >= count]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            def outputs(*tensors: Tensor) -> list[Tensor]:
                arguments = everything[count:]
                for i, tensor in zip(of_tensors, tensors):
                    arguments[i - count] = tensor
                results = rule.oracle(*arguments, *ctx.flags)
                return [results[i] for i in of_outputs]

            return torch.func.vjp(outputs, *values[len(of_outputs) :])[1](list(values[: len(of_outputs)]))

        results: list[Any] = [None] * len(everything)
        for i, gradient in zip(places, torch.func.vjp(gradients, *(everything[i] for i in places))[1](weights)):
            results[i] = gradient
        return None, None, None, *results[:count], *[None] * ctx.saves, *results[count:]
