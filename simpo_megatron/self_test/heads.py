"""Rows that compare the head, and its kernels, with log-softmax in fp64.

Shapes: R scored positions, H hidden, V vocabulary, P pairs, M = 2 responses of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from simpo_megatron.compat import have_triton
from simpo_megatron.head.kernels import row_statistics, write_gradient_
from simpo_megatron.head.layer import LogProbHead, split_output
from simpo_megatron.head.task import HeadTask, ScoredPositions
from simpo_megatron.self_test.ranks import leave_layout
from simpo_megatron.self_test.rows import Bench, Outcome, Row, judge

PAIRS, LENGTH, HIDDEN, VOCAB = 4, 128, 64, 1024  # LENGTH: tokens of a response
SLAB_BYTES = 2 * LENGTH * VOCAB * 4  # one pair
# The largest relative error: of the sums, and of both gradients as vectors. In bf16 the logits are rounded; a sum in
# bf16 or fp16 would be off by more.
ALLOWED = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-4, 2e-2)}
CAP = 5.0  # of logits, most of which are below it
ADVICE = "train with --head plain, and report it with --json"


def head_rows(bench: Bench) -> Iterator[Row]:
    """The rows of this file."""
    for tensor in (1, 2):
        for dtype in ALLOWED:
            words = str(dtype).removeprefix("torch.") + (", TP 2" if tensor > 1 else "")
            yield Row(f"head: sums and gradients, {words}", partial(_head, tensor, dtype, None), tensor, advice=ADVICE)
    yield Row("head: capped logits", partial(_head, 1, torch.float32, CAP), advice=ADVICE)
    yield Row("head: kernels", partial(_kernels, None), advice=ADVICE)
    yield Row("head: kernels, capped logits", partial(_kernels, CAP), advice=ADVICE)


def make_head(weight_VH: Tensor, tensor: int, slab_bytes: int, softcap: float | None = None) -> LogProbHead:
    """A head with this rank's shard of a weight, and perhaps a cap of its logits; Megatron's groups exist."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=weight_VH.shape[1],
        num_attention_heads=tensor,
        tensor_model_parallel_size=tensor,
        params_dtype=weight_VH.dtype,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
    )
    layer = ColumnParallelLinear(
        weight_VH.shape[1],
        weight_VH.shape[0],
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=True,
    )
    shard = weight_VH.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()]
    layer.weight = torch.nn.Parameter(shard.clone())
    layer.softcap = softcap  # type: ignore[assignment]
    model: Any = SimpleNamespace(output_layer=layer)
    return LogProbHead.install(model, slab_bytes)


def make_task(targets_R: Tensor, pairs: int, vocab_size: int) -> HeadTask:
    """A task that scores every position: pairs of two responses of the same length."""
    count = len(targets_R)
    length = count // pairs
    positions_R = torch.arange(count, device=targets_R.device)
    scored = ScoredPositions(
        positions_R=positions_R,
        targets_R=targets_R,
        segments_R=positions_R // (length // 2),
        per_pair=(length,) * pairs,
        per_pair_max=(length,) * pairs,
    )
    return HeadTask(scored=scored, responses=2, vocab_size=vocab_size, loss=partial(pair_loss, length // 2))


def pair_loss(length: int, sums_PM: Tensor) -> Tensor:
    """The SimPO loss with beta 2 and gamma 1."""
    means_PM = 2.0 * sums_PM / length
    return -F.logsigmoid(means_PM[:, 0] - means_PM[:, 1] - 1.0).sum() / 8


def _problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [R, H], a weight [V, H] and targets [R], the same on every rank and device."""
    generator = torch.Generator().manual_seed(0)
    positions = 2 * PAIRS * LENGTH
    hidden_RH = torch.randn(positions, HIDDEN, generator=generator)
    weight_VH = 0.3 * torch.randn(VOCAB, HIDDEN, generator=generator)
    targets_R = torch.randint(VOCAB, (positions,), generator=generator)
    device = torch.cuda.current_device()
    return hidden_RH.to(device, dtype), weight_VH.to(device, dtype), targets_R.to(device)


def _head(tensor: int, dtype: torch.dtype, softcap: float | None, bench: Bench) -> Outcome:
    try:
        parallel_state.initialize_model_parallel(tensor)
        return _compare_head(tensor, dtype, softcap)
    finally:
        leave_layout()


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _compare_head(tensor: int, dtype: torch.dtype, softcap: float | None) -> Outcome:
    hidden_RH, weight_VH, targets_R = _problem(dtype)
    exact_RH, exact_VH = hidden_RH.double().requires_grad_(), weight_VH.double().requires_grad_()
    logps_R = _capped(F.linear(exact_RH, exact_VH), softcap).log_softmax(-1).gather(1, targets_R[:, None])[:, 0]
    expected_PM = logps_R.view(PAIRS, 2, LENGTH).sum(2)
    pair_loss(LENGTH, expected_PM).backward()

    head = make_head(weight_VH, tensor, SLAB_BYTES, softcap)
    given = hidden_RH[:, None].clone().requires_grad_()
    with head.scoring(make_task(targets_R, PAIRS, VOCAB)):
        output, _ = head(given)
    loss, sums_PM = split_output(output, 2)
    loss.backward()
    shard = exact_VH.grad.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()]  # type: ignore[union-attr]
    of_sums = ((sums_PM - expected_PM).abs() / expected_PM.abs()).max().item()
    of_gradients = max(_off(given.grad[:, 0], exact_RH.grad), _off(head.weight.grad, shard))  # type: ignore[index]
    for_sums, for_gradients = ALLOWED[dtype]
    sums = judge(of_sums, for_sums, "sums", ADVICE)
    return sums if sums.result == "FAILED" else judge(of_gradients, for_gradients, "gradients", ADVICE)


def _off(found: Any, exact: Any) -> float:
    """The relative error of a tensor as one vector."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def _kernels(softcap: float | None, bench: Bench) -> Outcome:
    """Statistics and gradient of a slab of bf16 logits, by the code that the head uses on this device."""
    hidden_RH, weight_VH, targets_R = _problem(torch.bfloat16)
    logits_RV = F.linear(hidden_RH, weight_VH)
    given_RV = logits_RV.double().requires_grad_()
    exact_RV = _capped(given_RV, softcap)
    coefficients_R = torch.linspace(-1, 1, len(targets_R), device=logits_RV.device)
    logps_R = exact_RV.log_softmax(-1).gather(1, targets_R[:, None])[:, 0]
    (expected_RV,) = torch.autograd.grad((coefficients_R * logps_R).sum(), given_RV)
    lse_R, picked_R = row_statistics(logits_RV, targets_R, softcap)
    right_R = exact_RV.detach().gather(1, targets_R[:, None])[:, 0]
    of_statistics = max(_off(lse_R, exact_RV.detach().logsumexp(-1)), _off(picked_R, right_R))
    write_gradient_(logits_RV, targets_R, lse_R, coefficients_R, softcap)
    used = "Triton" if bench.on_gpu and have_triton() else "torch"
    statistics = judge(of_statistics, 1e-6, f"statistics by {used}", ADVICE)
    if statistics.result == "FAILED":
        return statistics
    return judge(_off(logits_RV, expected_RV), 4e-3, f"gradient by {used}", ADVICE)
