"""Compile the Triton kernels for GPU architectures without a GPU and print what became of them as JSON lines.

Run as `python triton_compile_report.py 80 90` in a process of its own, where TRITON_INTERPRET is unset: a kernel is
bound to the interpreter or to the compiler when its module is imported. A line holds registers and stack of a thread,
shared memory of a program, and for every loop the instructions per (channel, step, state): a layout that goes wrong
shows there first. The test beside this file asserts the limits.
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
from almrr_ref.kernels import triton_backward, triton_conv, triton_forward
from almrr_ref.kernels.triton_launch import Common, Scan
from almrr_ref.kernels.triton_scan import BACKWARD, FORWARD, MAX_REGISTERS, SAVE_STEPS, STATES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from almrr_ref.deploy import triton_decoder

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT32 = ("dsum", "dweight", "dbias", "weight", "bias")  # in 16-bit models too
PHASES = ("even_even", "even_odd", "odd_even", "odd_odd", "offset")
POINTERS = ("out", "x", "dout", *FLOAT32, *PHASES)
ALIGNED = ("d", "x_batch", "x_step", "c")
SIZES = ("z_batch", "b", "l", "g", "blocks", "chunks", "length")
KNOWN = {"d": 384, "z_step": 768, "u_step": 384, "delta_step": 384, "B_step": 44, "C_step": 44}  # a Vim block's
TILE = {"N": STATES, "K": SAVE_STEPS, **FORWARD}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.]*)(.*)$", re.MULTILINE)

Variant = tuple[str, Any, str, dict[str, Any]]
"""Label, kernel, dtype, and the arguments that are known when it is compiled, of which None is an absent tensor."""


def scan(dtype: str, **states: str) -> Scan:
    """Types of a direction with those of its states that are present."""
    value, absent = f"*{dtype}", dict.fromkeys(Scan._field_defaults, "constexpr")
    strides = {name: "constexpr" if name in KNOWN else "i32" for name in Scan._fields[7:17]}
    return Scan(value, value, "*fp32", value, value, "*fp32", "*fp32", **strides, **absent | states)


def common(dtype: str, *present: str) -> Common:
    """Types of what both directions share, with those of its tensors that are present."""
    pointers = {name: f"*{dtype}" if name in present else "constexpr" for name in ("out", "dout", "dz", "z")}
    total = "*fp32" if "total" in present else "constexpr"
    sizes = {name: "constexpr" if name in KNOWN else "i32" for name in (*SIZES, "d", "z_step")}
    return Common(**pointers, total=total, seq_idx="constexpr", scale="fp32", **sizes)


def compiled(kernel: Any, dtype: str, known: dict[str, Any], capability: int) -> Any:
    """Compile a kernel as its launch does where pointers, strides and sizes are multiples of 16."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(kind := known.get(name), tuple):
            signature[name] = kind
            constants |= {(i, j): KNOWN.get(kind._fields[j]) for j, one in enumerate(kind) if one == "constexpr"}
            aligned = [j for j, one in enumerate(kind) if one != "constexpr"]
            hints |= {(i, j): [["tt.divisibility", 16]] for j in aligned}
            continue
        if name in known:
            signature[name], constants[name] = "constexpr", known[name]
        elif name in POINTERS:
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
        if signature[name][0] == "*" or name in ALIGNED:
            hints[i,] = [["tt.divisibility", 16]]
    warps = triton_conv.WARPS if "SILU" in known else triton_decoder.WARPS if "BC" in known else 1
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    options |= {"maxnreg": MAX_REGISTERS} if "V" in known else {}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any, dtype: str, known: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, stack, local and shared memory in bytes, and the instructions of every loop."""
    made = compiled(kernel, dtype, known, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    turns = 2 if kernel is triton_forward.forward_kernel else 1  # lots of SAVE_STEPS in a loop
    work = turns * SAVE_STEPS * STATES * known.get("BD", 32) / 32  # of a lane
    return {**found, "shared": made.metadata.shared, "loops": loops(sass, work)}


def loops(sass: str, work: float) -> list[float]:
    """Instructions of every loop (what lies between a branch back and its target) per channel, step and state."""
    lines = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(sass)]
    counted = []
    for address, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < address:
            counted.append(sum(int(target[1], 16) <= one <= address for one, *_ in lines) / work)
    return [round(count, 2) for count in counted]


def variants() -> list[Variant]:
    """What is compiled."""
    even = {**TILE, "REVERSE": False, "SOFTPLUS": True, "EVEN": True}
    odd = {**even, "REVERSE": True, "EVEN": False}
    forward, backward = triton_forward.forward_kernel, triton_backward.backward_kernel
    ends = triton_forward.chunk_ends_kernel
    whole = {"FIRST": True, "LAST": True}
    conv = {
        "seq_idx": None,
        "REVERSE": False,
        "SILU": True,
        "K": 4,
        "T": triton_conv.TILE[0],
        "BD": triton_conv.TILE[1],
    }
    listed: list[Variant] = [
        ("conv", triton_conv.conv_kernel, "bf16", conv),
        ("conv slope", triton_conv.conv_slope_kernel, "bf16", conv),
    ]
    decoder = dict(zip(("P", "BC"), triton_decoder.TILE))
    listed += [("decoder", triton_decoder.sigmoid_mean_kernel, dtype, decoder) for dtype in ("fp32", "bf16")]
    for dtype in ("fp32", "bf16"):
        infer, f = {"c": common(dtype, "out", "total", "z"), "s": scan(dtype), "s_b": scan(dtype), "TWO": True}, "*fp32"
        written = {"du": f"*{dtype}", "ddelta": f"*{dtype}"} | dict.fromkeys(("dA", "dB", "dC", "dD", "dbias"), f)
        down = {"c": common(dtype, "dout", "total", "z", "dz"), "s_b": None, "TWO": False, "ADD": False}
        down["s"] = scan(dtype, saved=f, entry=f, ends=f, decays=f, leaving=f, **written)
        listed += [
            ("forward", forward, dtype, {**even, **whole, **infer}),
            ("backward", backward, dtype, {**even, **down, **BACKWARD}),
        ]
    train = {
        "c": common("fp16", "out", "total", "z"),
        "s": scan("fp16", entry=f, ends=f, decays=f, saved=f, last=f),
        "s_b": None,
        "TWO": False,
    }
    target = {"s": scan("fp32", ends=f, decays=f), "s_b": None, "TWO": False}
    listed += [
        ("forward odd", forward, "fp16", {**odd, **whole, **train}),
        ("backward odd", backward, "bf16", {**odd, **down, **BACKWARD}),
        ("ends", ends, "fp32", {**even, **target, "c": common("fp32"), "BACKWARD": False}),
        ("ends of gradient", ends, "fp32", {**odd, **target, "c": common("fp32", "dout", "z"), "BACKWARD": True}),
    ]
    return listed


if __name__ == "__main__":
    for label, kernel, dtype, known in variants():
        for capability in map(int, sys.argv[1:]):
            used = resources(kernel, dtype, known, capability)
            print(json.dumps({"kernel": label, "dtype": dtype, "sm": capability, **used}), flush=True)
