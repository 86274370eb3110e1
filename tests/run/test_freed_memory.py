"""Freed memory is used again without the system's help."""

import argparse
import platform
import subprocess
import sys

import pytest
from trust_cases import ROOT

from almrr_ref.run import cli

CODE = """
import resource
import numpy as np
from almrr_ref.run.memory import keep_freed_memory
keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(25_000_000, np.uint8) for _ in range(4)]
    blocks.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_costs_no_page_fault_again() -> None:
    """Without it half of all processes, by where their heap happens to lie, get 24,000 pages anew each time."""
    for _ in range(8):
        ended = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(ended.stdout) < 100


def test_every_command_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: done.append("kept"))
    assert cli.run_command(lambda _: done.append("run") or 0, argparse.ArgumentParser(), []) == 0
    assert done == ["kept", "run"]
