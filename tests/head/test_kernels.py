"""The element-wise kernels of the head, torch's and Triton's (in its interpreter), against log_softmax in fp64."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpo_megatron.head import kernels as torch_kernels

INTERPRET = "TRITON_INTERPRET"


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The module with the two functions."""
    if request.param == "torch":
        return torch_kernels
    if os.environ.get(INTERPRET) != "1":
        pytest.skip("runs in a process of its own: test_triton_in_its_interpreter")
    return importlib.import_module("simpo_megatron.head.triton_kernels")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get(INTERPRET) == "1", reason="this is the inner process")
def test_triton_in_its_interpreter() -> None:
    """Triton decides on import whether it interprets, and torch may have imported it: this needs a new process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    result = subprocess.run(command, env={**os.environ, INTERPRET: "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets (the first and the last column among them), and a weight for each row."""
    generator = torch.Generator().manual_seed(columns)
    logits = 5 * torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[0], targets[-1] = 0, columns - 1
    return logits, targets, torch.randn(rows, dtype=torch.float64, generator=generator)


def one_rounding(kernels: Any) -> float:
    """The relative error of one rounding to bf16. Triton's interpreter cuts the bits off instead."""
    return 4.1e-3 if kernels is torch_kernels else 7.9e-3


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The logits of a model with a cap, in fp64."""
    return logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """The gradient of sum(weights * log p(target)) in fp64."""
    logits = logits.double().requires_grad_()
    logps = capped(logits, softcap).log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    (gradient,) = torch.autograd.grad((weights * logps).sum(), logits)
    return gradient


@pytest.mark.parametrize(
    "columns, softcap", [*((columns, None) for columns in (1, 7, 4096, 4097, 10_000, 262_144)), (7, 3.0), (4097, 9.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradient(kernels: Any, columns: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits, targets, weights = problem(3, columns)
    logits = logits.to(dtype)
    wanted, bounded = oracle(logits, targets, weights, softcap), capped(logits, softcap)
    lse, target = kernels.row_statistics(logits, targets, softcap)
    torch.testing.assert_close(lse, torch.logsumexp(bounded, 1).float(), rtol=1e-6, atol=1e-5)
    exact = 0 if softcap is None else 2e-6
    torch.testing.assert_close(target, bounded.gather(1, targets[:, None])[:, 0].float(), rtol=exact, atol=exact)
    assert (target <= lse).all()
    kernels.write_gradient_(logits, targets, lse, weights.float(), softcap)
    # fp32 probabilities carry the error of exp at arguments of 20 and more
    torch.testing.assert_close(
        logits.double(), wanted, rtol=one_rounding(kernels) if dtype is torch.bfloat16 else 2e-5, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_beyond_the_cap(kernels: Any, dtype: torch.dtype) -> None:
    """They are the cap, and their gradient is 0; those in between keep theirs."""
    logits = torch.tensor([[200.0, -200.0, 2.0, 0.0], [-200.0, 200.0, 200.0, -200.0]], dtype=dtype)
    targets, weights = torch.tensor([1, 1]), torch.tensor([1.0, -2.0])
    wanted = oracle(logits, targets, weights.double(), 3.0)
    lse, target = kernels.row_statistics(logits, targets, 3.0)
    assert target.tolist() == [-3.0, 3.0]
    torch.testing.assert_close(lse, torch.logsumexp(capped(logits, 3.0), 1).float())
    kernels.write_gradient_(logits, targets, lse, weights, 3.0)
    assert not logits[0, :2].any() and not logits[1].any() and logits[0, 2:].all()
    torch.testing.assert_close(logits.double(), wanted, rtol=one_rounding(kernels), atol=1e-30)


def test_a_confident_row_keeps_its_small_gradient(kernels: Any) -> None:
    """The gradient p - 1 where p is nearly 1: rounding p to bf16 before the subtraction would lose it."""
    logits = torch.tensor([[8.0, 0.0, 1.0, -3.0]]).bfloat16()
    targets, weights = torch.tensor([0]), torch.tensor([2.0])
    wanted = oracle(logits, targets, weights.double())
    lse, _ = kernels.row_statistics(logits, targets)
    kernels.write_gradient_(logits, targets, lse, weights)
    torch.testing.assert_close(logits.double(), wanted, rtol=one_rounding(kernels), atol=0)


def test_a_target_of_another_rank(kernels: Any) -> None:
    """The log-sum-exp covers more columns, and the target is not among these: no 1 is added."""
    logits, _, weights = problem(4, 100)
    targets = torch.full((4,), -1)
    part, lse = logits[:, :60].float().contiguous(), torch.logsumexp(logits, 1).float()
    assert not kernels.row_statistics(part, targets)[1].any()
    kernels.write_gradient_(part, targets, lse, weights.float())
    torch.testing.assert_close(part.double(), -weights[:, None] * logits.softmax(1)[:, :60], rtol=1e-5, atol=1e-7)


def test_rows_of_a_larger_matrix(kernels: Any) -> None:
    """Rows at a stride: the numbers between them do not change."""
    logits, targets, weights = problem(5, 300)
    held = torch.full((5, 512), 7.0)
    view = held[:, 100:400]
    view.copy_(logits)
    lse, _ = kernels.row_statistics(view, targets)
    kernels.write_gradient_(view, targets, lse, weights.float())
    torch.testing.assert_close(view.double(), oracle(logits.float(), targets, weights), rtol=2e-5, atol=1e-7)
    assert (held[:, :100] == 7).all() and (held[:, 400:] == 7).all()


def test_offsets_beyond_32_bits(kernels: Any) -> None:
    """Two rows 2**31 + 64 elements apart; the memory between them is never touched."""
    columns, stride = 50, 2**31 + 64
    rows = torch.empty(stride + columns, dtype=torch.bfloat16).as_strided((2, columns), (stride, 1))
    logits, targets, weights = problem(2, columns)
    rows.copy_(logits)
    wanted = oracle(rows, targets, weights)
    lse, _ = kernels.row_statistics(rows, targets)
    kernels.write_gradient_(rows, targets, lse, weights.float())
    torch.testing.assert_close(rows.double(), wanted, rtol=one_rounding(kernels), atol=1e-7)


@pytest.mark.parametrize("rows, columns", [(0, 10), (3, 0)])
def test_nothing_to_do(kernels: Any, rows: int, columns: int) -> None:
    """No rows; and a shard of padding only, which has no probability."""
    logits, targets = torch.empty(rows, columns), torch.full((rows,), -1)
    lse, target = kernels.row_statistics(logits, targets)
    assert lse.shape == target.shape == (rows,) and (lse == -torch.inf).all() and not target.any()
    kernels.write_gradient_(logits, targets, lse, torch.ones(rows))


def test_not_a_number_is_not_hidden(kernels: Any) -> None:
    logits = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 0.0, 2.0]])
    lse, _ = kernels.row_statistics(logits, torch.tensor([0, 0]))
    assert lse.isnan().tolist() == [True, False]


def test_triton_takes_what_it_computes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels compute in fp32: fp64 logits on a GPU are torch's."""
    monkeypatch.setattr(torch_kernels, "have_triton", lambda: True)
    for dtype, taken in ((torch.bfloat16, True), (torch.float32, True), (torch.float64, False)):
        on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=dtype)
        assert torch_kernels._triton_takes(on_gpu) == taken
    assert not torch_kernels._triton_takes(torch.zeros(1))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get(INTERPRET) == "1", reason="needs the compiler, not the interpreter")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_compiler_takes_the_kernels(architecture: int) -> None:
    """For GPUs that are not here: 16 bytes a load for any number of columns, and no registers spilled to memory."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simpo_megatron.head import triton_kernels

    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}  # the matrices, and the stride that slabs.py chooses
    for kernel in (triton_kernels.statistics_kernel, triton_kernels.gradient_kernel):
        tensors = dict(zip(kernel.arg_names[:4], ("*bf16", "*i64", "*fp32", "*fp32"), strict=True))
        signature = {**tensors, "stride": "i32", "columns": "i32", "SOFTCAP": "constexpr"}
        for softcap in (0.0, 30.0):
            source = ASTSource(kernel, signature, constexprs={"SOFTCAP": softcap}, attrs=aligned)
            target = GPUTarget("cuda", architecture, 32)
            ptx = compile_kernel(source, target=target, options={"num_warps": 8}).asm["ptx"]
            assert "ld.global.v4.b32" in ptx and ".local" not in ptx
