"""Python in a process of its own: whether a kernel is interpreted or compiled is decided when triton is imported."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
NUMPY, TRITON = (tuple(map(int, VERSIONS.get(name, "0.0").split(".")[:2])) for name in ("numpy", "triton"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_python(arguments: list[str], cache: Path, interpret: bool) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout with or without Triton's interpreter and with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
