"""The Triton backend: the interpreter in a process of its own, GPU checks where there is one.

Whether a kernel is interpreted or compiled is decided once per process, when triton is imported; this process stays
as it is, so that the GPU tests below meet the compiled kernels.
"""

import os
from pathlib import Path

import pytest
import scan_cases
import torch
from almrr_ref.kernels import causal_conv1d, selective_scan
from scan_cases import Case, make_arguments
from triton_process import NUMPY, TRITON, needs_triton, run_python

LIMITS = 5e-6, 2e-5
BROKEN = NUMPY >= (2, 5) or (NUMPY >= (2, 4) and TRITON < (3, 7))  # Triton's interpreter


@needs_triton
@pytest.mark.skipif(BROKEN, reason="Triton's interpreter breaks with this NumPy")
def test_the_interpreter_agrees_with_the_oracle(tmp_path: Path) -> None:
    done = run_python(
        ["-m", "pytest", "-q", "-n", "0", "tests/kernels/interpreter_triton.py"], tmp_path, interpret=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64: expected 16-bit or float32"):
        selective_scan(**make_arguments(Case(1, 1, 2, 1, dtype=torch.float64)), backend="triton")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"u is on cpu: expected a CUDA tensor for backend=\"triton\""):
        selective_scan(**make_arguments(Case(1, 1, 2, 1)), backend="triton")
    with pytest.raises(ValueError, match="x is on cpu: expected a CUDA tensor"):
        causal_conv1d(torch.zeros(1, 1, 2), torch.zeros(1, 4), backend="triton")


GPU_CASES = [
    Case(4, 384, 256, 16),
    Case(2, 192, 1, 16),
    Case(2, 96, 197, 16, reverse=True, initial_state=True),
    Case(1, 70, 1021, 7, g=2, initial_state=True),
    Case(1, 64, 4096, 16, strided=True, reverse=True),
    Case(2, 33, 509, 64, D=False, z=False),
    Case(1, 8, 300, 256),
]


@pytest.mark.requires_cuda
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_a_gpu_scan_and_gradients_agree_with_the_oracle(case: Case) -> None:
    scan_cases.assert_scan_agrees(case, "triton", *LIMITS, device="cuda")


@pytest.mark.requires_cuda
@pytest.mark.parametrize("case", [case for case in GPU_CASES if not case.initial_state], ids=str)
def test_on_a_gpu_both_directions_agree_with_the_oracle(case: Case) -> None:
    scan_cases.assert_both_directions_agree(case, "triton", *LIMITS, device="cuda")


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_16_bit_results_are_those_of_a_float32_state(dtype: torch.dtype) -> None:
    case = Case(2, 96, 256, 16, dtype=dtype)
    scan_cases.assert_16_bit_from_a_float32_state(case, "triton", LIMITS[0], device="cuda")


@pytest.mark.requires_cuda
def test_on_a_gpu_small_cases_agree_with_the_oracle() -> None:
    """Every kernel, few elements, odd sizes, several chunks: what bench/gpu.sh runs under the sanitizers."""
    for case in (Case(1, 5, 70, 3, g=1, initial_state=True), Case(2, 33, 65, 17, reverse=True)):
        scan_cases.assert_scan_agrees(case, "triton", *LIMITS, device="cuda")
    scan_cases.assert_both_directions_agree(Case(1, 6, 100, 2), "triton", *LIMITS, device="cuda")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).cuda() for shape in ((1, 5, 37), (5, 4)))
    scan_cases.assert_convolution_agrees(x, weight, None, LIMITS, reverse=True)


@pytest.mark.requires_cuda
def test_on_a_gpu_fifty_runs_are_bit_identical() -> None:
    case = Case(4, 384, 256, 16)
    arguments = scan_cases.two_directions(case, device="cuda")
    first = scan_cases.bidirectional_and_gradients(case, arguments, "triton")
    for _ in range(50):
        again = scan_cases.bidirectional_and_gradients(case, arguments, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.requires_cuda
def test_on_a_gpu_extreme_steps_agree_with_the_oracle() -> None:
    scan_cases.assert_extreme_steps_agree(Case(2, 8, 300, 16), "triton", *LIMITS, device="cuda")


@pytest.mark.requires_cuda
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_on_a_gpu_nan_stays_in_its_own_row_and_future(name: str) -> None:
    scan_cases.assert_nan_stays_in_its_row_and_future(Case(2, 8, 300, 16), "triton", name, device="cuda")


@pytest.mark.requires_cuda
def test_on_a_gpu_offsets_past_two_to_the_31_are_right() -> None:
    b, d, l = 9, 4096, 65536  # 2.4e9 elements
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    u = torch.zeros(b, d, l, dtype=torch.bfloat16, device="cuda")
    u[-1, -4:, -300:] = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(u)
    delta = torch.full((1, 1, 1), 0.1, dtype=torch.bfloat16, device="cuda").expand(b, d, l).contiguous()
    A = torch.full((d, 1), -1.0, device="cuda")
    B = torch.ones(b, 1, l, device="cuda")
    with torch.no_grad():
        y = selective_scan(u, delta, A, B, B, backend="triton")[-1:, -4:, -300:]
    tail = (slice(-1, None), slice(-4, None), slice(-300, None))
    expected = selective_scan(
        u[tail].cpu(), delta[tail].cpu(), A[-4:].cpu(), B[-1:, :, -300:].cpu(), B[-1:, :, -300:].cpu()
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(y.cpu(), expected)


@pytest.mark.requires_cuda
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu_the_convolution_agrees_with_its_oracle(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).cuda() for shape in ((2, 384, 997), (384, 4), (384,)))
    scan_cases.assert_convolution_agrees(x, weight, bias, LIMITS, reverse=reverse)


@pytest.mark.requires_cuda
def test_on_a_gpu_torch_compile_makes_no_break() -> None:
    scan_cases.assert_compiles_without_a_break(Case(2, 16, 64, 4), "inductor", device="cuda")
