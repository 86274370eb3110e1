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
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from almrr_ref.kernels import triton_backward, triton_forward

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT32_NAMES = ("halves", "ungated", "ends", "starts", "exits", "decays", "states", "slab", "dA", "dD", "dbias")
PARAMETERS = ("A", "D", "bias", "weight")  # float32 in 16-bit models too
SCALARS = ("d", "l", "padded", "n", "g", "k", "chunks", "slots", "exit_slots", "blocks", "slabs", "walk", "slab_size",
           "z_batch", "z_channel", "elements", "tiles", "x_batch", "x_channel")  # fmt: skip


def signature_of(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Give every argument of a kernel its type, by its name: pointer of `dtype` unless it is known to be another."""
    signature = {}
    for name in kernel.arg_names:
        base = name.removesuffix("_b")
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in SCALARS:
            signature[name] = "i32"
        else:
            wide = base.startswith(FLOAT32_NAMES) or base in PARAMETERS
            signature[name] = "*fp32" if wide else f"*{dtype}"
    return signature


def resources(kernel: Any, dtype: str, capability: int, constants: dict[str, Any], aligned: bool) -> dict[str, int]:
    """Compile one variant and read registers, stack and shared memory from its machine code."""
    signature = signature_of(kernel, dtype, constants)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or (kind == "i32" and aligned)
    }
    source = ASTSource(kernel, signature, constants, divisible)
    options = {"num_warps": constants.get("BD", 4), "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL")}


def variants() -> list[tuple[str, Any, str, dict[str, Any], bool]]:
    """The variants that are compiled: label, kernel, dtype, compile-time arguments, aligned."""
    scan = {"REVERSE": False, "TWO": True, "SOFTPLUS": True, "BD": 4, "T": 256}
    short = {"starts": None, "starts_b": None}  # one chunk, no initial state: the case of a Vim block
    forward, backward = triton_forward.forward_kernel, triton_backward.backward_kernel
    listed = [("carry", triton_forward.carry_kernel, "fp32", {"E": 16, "CHUNKS": 32}, True)]
    for dtype in ("fp32", "bf16", "fp16"):
        listed += [
            ("forward", forward, dtype, {**scan, **short}, True),
            ("forward long", forward, dtype, scan, True),
            ("forward ends", triton_forward.chunk_ends_kernel, dtype, scan, True),
            ("backward", backward, dtype, {**scan, **short, "exits": None, "exits_b": None}, True),
            ("backward long", backward, dtype, scan, True),
            ("backward ends", triton_backward.backward_ends_kernel, dtype, scan, True),
        ]
    listed += [("forward odd", forward, "fp32", scan, False), ("backward odd", backward, "fp32", scan, False)]
    return listed


if __name__ == "__main__":
    for label, kernel, dtype, constants, aligned in variants():
        for capability in map(int, sys.argv[1:]):
            found = resources(kernel, dtype, capability, constants, aligned)
            print(json.dumps({"kernel": label, "dtype": dtype, "sm": capability, **found}), flush=True)
