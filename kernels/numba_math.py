"""What numba lacks for the scan's kernels: a vector of channels, and exponential and logarithm of all its lanes.

`Lanes` is a type of numba's made here: LLVM maps it to the vector registers that the CPU has, and nothing is left to
its search for loops that it can vectorise. 2^x is a polynomial over [-1/2, 1/2] times a power of two made of bits. It
is right to 2 units in the last place, 0 below 2^-126 in float32, where a true exponential would still be a denormal
number, and infinite from 2^127.5 on.

Tensors are addresses here: reading a number costs one instruction, and no reference is counted.
"""

import contextlib
import hashlib
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from numpy.polynomial import Chebyshev, Polynomial

settings: Any = numba.config  # which makes its attributes as it is imported
if settings.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

LN_2, LOG2_E = math.log(2), math.log2(math.e)
WIDTH = 16  # lanes
FLAGS = ("contract",)  # a product and a sum may be rounded once
STAMP = hashlib.sha256(__name__.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
compiled: Any = numba.njit(nogil=True, error_model="numpy")
intrinsic: Any = extending.intrinsic  # its type is that of what it takes, not of what it makes
inlined: Any = numba.njit(inline="always")  # compiles faster where it is small


def entry(function: Callable[..., None]) -> Any:
    """Compile a function that Python calls, and keep the result for other processes where a folder can be written.

    numba looks at the function's own file to see whether what it kept is still right. The name brings in this one, and
    the package: a second copy of the folder, imported as `kernels`, has types of its own.
    """
    function.__qualname__ += f".{STAMP}"
    kernel = compiled(function)
    with contextlib.suppress(RuntimeError):  # no such folder: every process compiles for itself
        kernel.enable_caching()
    return kernel


class Lanes(types.Type):
    """WIDTH numbers of one dtype."""

    def __init__(self, scalar: types.Float) -> None:
        self.scalar = scalar
        super().__init__(f"Lanes({scalar})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = ir.FloatType() if lanes.scalar == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(element, WIDTH))


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [vector.element(value)] * WIDTH)


def _spread(builder: Any, vector: ir.VectorType, value: Any) -> Any:
    """A number in every lane."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


def _define(symbol: Any, instruction: str) -> None:
    """Let an operator of Python work on lanes, and on lanes and a number."""

    @infer_global(symbol)
    class Choice(AbstractTemplate):
        def generic(self, values: tuple[Any, ...], names: dict[str, Any]) -> Any:
            lanes = [t for t in values if isinstance(t, Lanes)]
            if not lanes:
                return None
            return signature(lanes[0], *(t if isinstance(t, Lanes) else lanes[0].scalar for t in values))

    def generate(context: Any, builder: Any, chosen: Any, values: Any) -> Any:
        vector = context.get_value_type(chosen.return_type)
        both = [v if isinstance(t, Lanes) else _spread(builder, vector, v) for t, v in zip(chosen.args, values)]
        return getattr(builder, instruction)(*both, flags=FLAGS)

    for kinds in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(symbol, *kinds)(generate)


_INSTRUCTIONS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
for _symbol, _instruction in _INSTRUCTIONS.items():
    _define(_symbol, _instruction)


def _pointer(context: Any, builder: Any, kind: Any, scalar: Any, address: Any, at: Any) -> Any:
    """Pointer to values of `kind` at the element `at` of a tensor."""
    element = context.get_value_type(scalar)
    place = builder.gep(builder.inttoptr(address, element.as_pointer()), [at])
    return builder.bitcast(place, context.get_value_type(kind).as_pointer())


@intrinsic
def load(context: Any, zero: Any, address: Any, at: Any) -> Any:
    """Read lanes of the dtype of `zero` from element `at` of a tensor on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _pointer(context, builder, Lanes(zero), zero, *values[1:])
        return builder.load(place, align=zero.bitwidth // 8)

    return Lanes(zero)(zero, types.intp, types.intp), generate


@intrinsic
def number(context: Any, zero: Any, address: Any, at: Any) -> Any:
    """Read one number of the dtype of `zero`, as `load`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_pointer(context, builder, zero, zero, *values[1:]))

    return zero(zero, types.intp, types.intp), generate


@intrinsic
def store(context: Any, lanes: Any, address: Any, at: Any) -> Any:
    """Write lanes, or one number, to element `at` of a tensor."""
    scalar = lanes.scalar if isinstance(lanes, Lanes) else lanes

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _pointer(context, builder, lanes, scalar, *values[1:])
        builder.store(values[0], place, align=scalar.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.intp), generate


@compiled
def copy(zero: Any, source: int, at: int, stride: int, target: int, to: int, step: int, n: int) -> None:
    """Copy n vectors by their distances; source 0 stands for zeros."""
    for i in range(n):
        store(load(zero, source, at + i * stride) if source else spread(0.0, zero), target, to + i * step)


@intrinsic
def claim(context: Any, counters: Any, i: Any) -> Any:
    """Add 1 to the i-th of the int64 at an address: -> what it was. No two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _pointer(context, builder, types.int64, types.int64, *values)
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.intp, types.intp), generate


@intrinsic
def spread(context: Any, value: Any, like: Any) -> Any:
    """A number in every lane, of the dtype of `like`."""
    lanes = like if isinstance(like, Lanes) else Lanes(like)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _spread(builder, context.get_value_type(lanes), values[0])

    return lanes(lanes.scalar, like), generate


@intrinsic
def total(context: Any, lanes: Any) -> Any:
    """The sum of all lanes, halves added to each other."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (value,), width, integer = values, WIDTH, ir.IntType(32)
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(integer, width), list(order)))
                for order in (range(width), range(width, 2 * width))
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(integer, 0))

    return lanes.scalar(lanes), generate


def _polynomial(function: Any, degree: int, low: float, high: float) -> list[float]:
    """Coefficients of a polynomial that is next to the best one over [low, high]."""
    return list(Chebyshev.interpolate(function, degree, (low, high)).convert(kind=Polynomial).coef)


def _horner(builder: Any, coefficients: list[float], x: Any) -> Any:
    value = _constant(x.type, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = builder.fadd(builder.fmul(value, x, flags=FLAGS), _constant(x.type, c), flags=FLAGS)
    return value


@intrinsic
def exp2(context: Any, lanes: Any) -> Any:
    """2^x, each lane; NaN stays NaN."""
    double = lanes.scalar == types.float64
    bits, bias, integer = (52, 1023, ir.IntType(64)) if double else (23, 127, ir.IntType(32))
    coefficients = _polynomial(np.exp2, 11 if double else 6, -0.5, 0.5)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (x,), vector = values, context.get_value_type(lanes)
        whole, (low, high) = ir.VectorType(integer, WIDTH), (_constant(vector, v) for v in (-bias, bias + 1))
        x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
        x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
        magic = _constant(vector, 1.5 * 2**bits)  # adding it rounds x and leaves the integer in the lowest bits
        rounded = builder.fadd(x, magic)
        fraction = builder.fsub(x, builder.fsub(rounded, magic))
        shift, one = (ir.Constant(whole, [v] * WIDTH) for v in (bits, bias << bits))
        power = builder.add(builder.shl(builder.bitcast(rounded, whole), shift), one)
        return builder.fmul(_horner(builder, coefficients, fraction), builder.bitcast(power, vector))

    return lanes(lanes), generate


@intrinsic
def log1p(context: Any, lanes: Any) -> Any:
    """log(1 + x) of x in [0, 1], each lane, right to its last places however small x is: 2 artanh(x / (2 + x))."""

    def series(q: Any) -> Any:
        return 2 * np.arctanh(np.sqrt(q)) / np.sqrt(q)

    coefficients = _polynomial(series, 11 if lanes.scalar == types.float64 else 5, 0, 1 / 9)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (x,) = values
        s = builder.fdiv(x, builder.fadd(x, _constant(x.type, 2)))
        return builder.fmul(s, _horner(builder, coefficients, builder.fmul(s, s)))

    return lanes(lanes), generate


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:
    """The larger one, each lane; NaN if x is NaN."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *values), values[1], values[0])

    return x(x, y), generate


@inlined
def sigmoid(x: Any) -> Any:
    return spread(1.0, x) / (exp2(x * -LOG2_E) + 1.0)


@inlined
def softplus(x: Any) -> Any:
    """log(1 + e^x), as x for large x and as e^x for small ones."""
    return larger(x, spread(0.0, x)) + log1p(exp2(larger(x, x * -1.0) * -LOG2_E))
