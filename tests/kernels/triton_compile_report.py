"""Compile the Triton kernels for GPU architectures without a GPU and print their resources as JSON lines.

Run as `python triton_compile_report.py 80 90` in a process of its own, where TRITON_INTERPRET is unset: a kernel is
bound to the interpreter or to the compiler when its module is imported. The test beside this file asserts the limits.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if importlib.util.find_spec("almrr_ref") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

import triton
from almrr_ref.kernels import triton_backward, triton_carry, triton_conv, triton_forward
from almrr_ref.kernels.triton_launch import BACKWARD_REGISTERS, BACKWARD_STEPS, FORWARD_REGISTERS, TILE_STEPS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STATES = ("halves", "ungated", "ends", "starts", "exits", "decays", "states")
GRADIENTS = ("dA", "dB", "dC", "dD", "ddelta_bias", "dsum", "dweight", "dbias")
FLOAT32 = (*STATES, *GRADIENTS, "A", "D", "delta_bias", "weight", "bias")  # in 16-bit models too
UNALIGNED = ("l", "z_batch", "z_channel", "x_batch", "x_channel")
SIZES = ("d", "padded", "n", "g", "chunks", "slots", "blocks", "slabs", "walk", "slab_size", "elements", "tiles")


Variant = tuple[str, Any, str, dict[str, Any], bool, int | None]
"""Label, kernel, dtype, compile-time arguments, aligned, register limit."""


def signature_of(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Give every argument of a kernel its type, by its name: pointer of `dtype` unless it is known to be another."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in (*UNALIGNED, *SIZES):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name.removesuffix("_b") in FLOAT32 else f"*{dtype}"
    return signature


def resources(
    kernel: Any, dtype: str, capability: int, constants: dict[str, Any], aligned: bool, registers: int | None
) -> dict[str, int]:
    """Compile one variant as its launch does and read registers, stack and local memory from its machine code.

    Where l is not `aligned`, neither are the strides of z and x; padded rows always are.
    """
    signature = signature_of(kernel, dtype, constants)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and (aligned or name not in UNALIGNED))
    }
    source = ASTSource(kernel, signature, constants, divisible)
    options: dict[str, Any] = {"num_warps": constants.get("BD", 4), "enable_fp_fusion": True}
    options |= {"maxnreg": registers} if registers else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}


def variants() -> list[Variant]:
    """What is compiled."""
    one = {"REVERSE": True, "TWO": False, "SOFTPLUS": True, "BD": 4, "T": TILE_STEPS}
    both = {**one, "REVERSE": False, "TWO": True}
    odd = {**both, "T": BACKWARD_STEPS}  # the tile of rows that are not a multiple of 16
    short = {"starts": None, "starts_b": None}  # one chunk, no initial state: the case of a Vim block
    infer = {**short, "halves": None, "halves_b": None, "ungated": None}
    halved, whole = {"HALVES": True}, {"HALVES": False, "exits": None, "exits_b": None}
    forward, backward = triton_forward.forward_kernel, triton_backward.backward_kernel
    ends, onward = triton_carry.chunk_ends_kernel, {"BACKWARD": False, "dout": None}
    conv = {"REVERSE": False, "SILU": True, "K": 4, "BD": 4, "T": triton_conv.TILE_STEPS}
    listed: list[Variant] = [
        ("carry", triton_carry.carry_kernel, "fp32", {"E": 16, "CHUNKS": 32}, True, None),
        ("forward reverse", forward, "fp32", one, True, FORWARD_REGISTERS),
        ("backward reverse", backward, "fp32", {**one, **halved}, True, BACKWARD_REGISTERS),
        ("forward odd", forward, "fp32", odd, False, FORWARD_REGISTERS),
        ("forward ends odd", ends, "fp32", {**odd, **onward}, False, None),
        ("backward odd", backward, "fp32", {**odd, "HALVES": False}, False, BACKWARD_REGISTERS),
        ("backward odd short", backward, "fp32", {**odd, **short, **whole}, False, BACKWARD_REGISTERS),
        ("backward odd", backward, "bf16", {**odd, "HALVES": False}, False, BACKWARD_REGISTERS),
    ]
    for dtype in ("fp32", "bf16", "fp16"):
        listed += [
            ("forward long", forward, dtype, both, True, FORWARD_REGISTERS),
            ("backward long", backward, dtype, {**both, **halved}, True, BACKWARD_REGISTERS),
        ]
    for dtype in ("fp32", "bf16"):
        listed += [
            ("forward", forward, dtype, {**both, **infer}, True, FORWARD_REGISTERS),
            ("forward ends", ends, dtype, {**both, **onward}, True, None),
            ("backward ends", ends, dtype, {**both, "BACKWARD": True}, True, None),
            ("conv", triton_conv.conv_kernel, dtype, conv, True, None),
            ("conv slope", triton_conv.conv_slope_kernel, dtype, conv, True, None),
        ]
    return listed


if __name__ == "__main__":
    for label, kernel, dtype, constants, aligned, registers in variants():
        for capability in map(int, sys.argv[1:]):
            used = resources(kernel, dtype, capability, constants, aligned, registers)
            print(json.dumps({"kernel": label, "dtype": dtype, "sm": capability, **used}), flush=True)
