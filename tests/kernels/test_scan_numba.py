"""The compiled scan around its kernels: threads, forks, memory, what is kept. Its numbers: test_scan_chunked.py."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from almrr_ref.kernels import selective_scan
from scan_cases import Case, make_arguments, needs_numba, scan_and_gradients, to_double, two_directions

pytestmark = needs_numba
if importlib.util.find_spec("numba") is not None:
    from almrr_ref.kernels import numba_scan, threads

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(2, 70, 20, 3, initial_state=True)


@pytest.fixture(params=["PyTorch's", "Python's"])
def three_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    if request.param == "Python's":
        monkeypatch.setattr(threads, "_openmp", lambda process: None)
    elif threads._openmp(os.getpid()) is None:
        pytest.skip("the OpenMP that PyTorch has here cannot be called")
    monkeypatch.setattr(numba_scan, "GRAIN", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    arguments = make_arguments(CASE)
    three = scan_and_gradients(CASE, arguments, "numba")
    torch.set_num_threads(1)
    one = scan_and_gradients(CASE, arguments, "numba")
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.usefixtures("three_threads")
def test_all_threads_work_at_once() -> None:
    meet, seen = threading.Barrier(3), []

    def work() -> None:
        seen.append(meet.wait(60))

    threads.run_together(work, 3, alive=None)
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.usefixtures("three_threads")
def test_eight_threads_at_once_get_what_each_alone_gets() -> None:
    arguments = [make_arguments(CASE, seed) for seed in range(8)]
    alone = [scan_and_gradients(CASE, one, "numba") for one in arguments]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = pool.map(lambda one: scan_and_gradients(CASE, one, "numba"), arguments)
            for found, expected in zip(together, alone):
                assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("three_threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    arguments = {name: t.detach() for name, t in make_arguments(CASE).items()}
    expected = selective_scan(**arguments, backend="numba")  # starts this process's threads
    child = os.fork()
    if child == 0:
        code = 2
        signal.alarm(60)  # rather than wait for threads that the parent alone has
        try:
            code = int(not torch.equal(selective_scan(**arguments, backend="numba"), expected))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_may_fork_between_pytorchs_threads_and_its_first_scan() -> None:
    """In a process of its own, for this one has scanned: its child would wait for threads that it does not have."""
    program = """
import os, signal
import torch
from almrr_ref.kernels import selective_scan
torch.set_num_threads(2)
torch.ones(1_000_000).exp()
child = os.fork()
if child == 0:
    signal.alarm(60)
    u, B = torch.ones(1, 32, 32), torch.ones(1, 256, 32)
    selective_scan(u, u, -torch.ones(32, 256), B, B, backend="numba")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result


def test_a_scan_at_the_interpreters_end_needs_no_new_thread() -> None:
    """Where threads are Python's: they start none any more then, as when a script's own thread scans to the last."""
    program = """
import atexit
import torch
from almrr_ref.kernels import selective_scan, threads
threads._openmp = lambda process: None
torch.set_num_threads(2)
u, B = torch.ones(1, 32, 32), torch.ones(1, 256, 32)
def scan():
    return selective_scan(u, u, -torch.ones(32, 256), B, B, backend="numba")
expected = scan()
atexit.register(lambda: print(torch.equal(scan(), expected)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.stdout.split() == ["True"], result


@pytest.mark.parametrize("pool", ["PyTorch's", "Python's"])
def test_an_interrupt_leaves_threads_the_tensors_that_they_write_to(pool: str) -> None:
    """In a process of its own, for what fails is a crash: the exception frees what a thread has addresses of."""
    program = """
import signal, sys
import torch
from almrr_ref.kernels import numba_scan, selective_scan, threads
if sys.argv[1] == "Python's":
    threads._openmp = lambda process: None
torch.set_num_threads(2)
tensors = torch.ones(3, 16, 40000), torch.ones(3, 16, 40000), -torch.ones(16, 16), *2 * [torch.ones(3, 16, 40000)]
expected = selective_scan(*tensors, backend="numba")
signal.signal(signal.SIGALRM, signal.default_int_handler)
run_together = numba_scan.run_together
def interrupted(*call, **more):
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    run_together(*call, **more)
numba_scan.run_together = interrupted
for _ in range(4):
    try:
        selective_scan(*tensors, backend="numba")
    except KeyboardInterrupt:
        print("interrupted")
numba_scan.run_together = run_together
assert torch.equal(selective_scan(*tensors, backend="numba"), expected)
"""
    command = [sys.executable, "-c", program, pool]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result
    assert result.stdout.split() == ["interrupted"] * 4


def test_tensors_of_any_layout_are_read_where_they_lie() -> None:
    """Time or channels side by side, broadcast, every other one, a view that is negated only when it is read."""
    case = Case(2, 32, 6, 2)
    plain = {name: t.detach() for name, t in to_double(make_arguments(case)).items()}
    plain["delta"] = plain["delta"][:, :, :1].expand(-1, -1, 6)
    odd = dict(plain)
    odd["u"] = plain["u"].mT.contiguous().mT
    odd["z"] = torch.stack([plain["z"], plain["z"]], dim=3)[..., 0]
    odd["B"] = torch.complex(torch.zeros_like(plain["B"]), -plain["B"]).conj().imag
    assert odd["B"].is_neg()
    assert torch.equal(*(selective_scan(**one, backend="numba") for one in (plain, odd)))


def test_pytorchs_own_check_of_the_operators() -> None:
    case = Case(1, 18, 3, 2, g=2, initial_state=True)
    u, delta, A, B, C, D, z, bias, h = (t.detach() for t in make_arguments(case).values())
    arguments = u, delta, A, B, C, D, bias, *[None] * 7, z, h, None, True, True, 0.5, True, True
    y, last, *saved = torch.ops.almrr_ref.numba_scan(*arguments)
    torch.library.opcheck(torch.ops.almrr_ref.numba_scan.default, arguments)
    torch.library.opcheck(torch.ops.almrr_ref.numba_scan_backward.default, (y, last, *saved, *arguments))


def test_memory_grows_with_a_sixteenth_of_the_states() -> None:
    case = Case(1, 32, 320, 16)
    tensors = two_directions(case)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    whole = [tensors[f"{name}{suffix}"].detach() for suffix in ("", "_b") for name in names]
    whole[3::7], whole[4::7] = ([t[:, None] for t in whole[i::7]] for i in (3, 4))
    flags = tensors["z"].detach(), None, None, False, True, 0.5, False
    saved = [torch.ops.almrr_ref.numba_scan(*whole, *flags, keep)[2:] for keep in (True, False)]
    elements = [[t.numel() for t in one] for one in saved]
    assert elements == [[2 * case.d * case.l * case.n // numba_scan.STEPS, case.d * case.l], [0, 0]]


@pytest.mark.parametrize("cached", [False, True])
def test_a_long_compilation_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cached: bool
) -> None:
    """Once; reading what another process has compiled is none, however long it takes."""
    hits = Counter[str]()
    kernel = SimpleNamespace(__name__="forward", stats=SimpleNamespace(cache_hits=hits, cache_path="here"))
    kernel.compile = lambda _: hits.update(["signature"] if cached else [])
    monkeypatch.setattr(numba_scan, "SECONDS", 0.0)
    monkeypatch.setattr(numba_scan, "_ENTRIES", {})
    with caplog.at_level(logging.INFO, logger="almrr_ref"):
        for _ in range(2):
            numba_scan._compile(kernel, torch.float32, ())
    told = [] if cached else ["numba compiled the scan (forward, torch.float32) in 0 s; kept in here"]
    assert [record.getMessage() for record in caplog.records] == told


def test_another_process_reads_what_this_one_has_compiled() -> None:
    selective_scan(**make_arguments(CASE), backend="numba")
    if not numba_scan.forward.stats.cache_path:
        pytest.skip("numba finds no folder that it can write to")
    script = """
import torch
from almrr_ref.kernels import numba_scan, selective_scan
u = torch.ones(1, 1, 2)
selective_scan(u, u, -torch.ones(1, 1), u, u, backend="numba")
print(sum(numba_scan.forward.stats.cache_hits.values()), sum(numba_scan.forward.stats.cache_misses.values()))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]


def test_a_numba_that_may_not_compile_is_one_that_cannot_be_imported() -> None:
    script = """
import torch
from almrr_ref.kernels import selective_scan
u = torch.ones(1, 1, 2)
selective_scan(u, u, -torch.ones(1, 1), u, u)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "numba cannot be imported, using the slower chunked backend: NUMBA_DISABLE_JIT is set" in done.stderr
