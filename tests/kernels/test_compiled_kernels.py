"""What Triton's compiler makes of the kernels, without a GPU."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton_process import ROOT, TRITON, needs_triton, run_python

CEILINGS = {
    "conv": (64, 0.0),
    "conv slope": (80, 0.0),
    "decoder": (72, 3.6),
    "forward": (168, 15.3),
    "forward odd": (168, 19.7),
    "backward": (168, 35.5),
    "backward odd": (168, 38.3),
    "ends": (168, 9.9),
    "ends of gradient": (168, 13.9),
}
"""Per kernel: registers of a thread; instructions of a loop per channel, step and state (Triton 3.4 to 3.8)."""
SHARED = {"conv slope": 4352, "decoder": 4096}  # bytes of a program; the others hand nothing from lane to lane so
STACK = {"backward": 104, "backward odd": 96}
"""What 168 registers do not hold; an H100 is slower with more registers."""


@needs_triton
def test_kernels_use_little_stack_few_registers_and_few_instructions_on_sm_80_and_sm_90(tmp_path: Path) -> None:
    def compile_for(capability: str) -> subprocess.CompletedProcess[str]:
        return run_python(
            ["tests/kernels/triton_compile_report.py", capability], tmp_path / capability, interpret=False
        )

    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(compile_for, ("80", "90")))
    for done in runs:
        assert done.returncode == 0, done.stderr[-4000:]
    report = [json.loads(line) for done in runs for line in done.stdout.splitlines()]
    assert {row["sm"] for row in report} == {80, 90}
    assert {row["dtype"] for row in report} == {"fp32", "bf16", "fp16"}
    for row in report:
        registers, instructions = CEILINGS[row["kernel"]]
        assert row["local"] == 0, row
        assert row["stack"] <= STACK.get(row["kernel"], 0) or TRITON < (3, 6), row  # older compilers spill a few bytes
        assert row["shared"] <= SHARED.get(row["kernel"], 0), row
        assert row["reg"] <= registers, row
        assert all(count <= instructions for count in row["loops"]), row
    readme = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    table = readme.split("| Kernel (n = 16) |")[1].split("\n\n")[0]
    listed = ("forward", "backward", "ends", "ends of gradient")
    for row in report:
        if TRITON == (3, 7) and row["sm"] == 90 and row["kernel"] in listed:
            assert {f"{row['loops'][-1]:.1f}", str(row["reg"]), str(row["stack"])} <= set(table.split()), row
