"""`logprobs.py` against torch's log_softmax in fp64: values and gradients, on 1 to 8 vocabulary shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.head import logprobs
from simpo_megatron.head.logprobs import vocab_parallel_logprobs
from tests.support.distributed import Collectives, WorkerPool

VOCAB, PADDED, TOKENS = 50, 64, 40


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with the padding columns largest, targets that touch both ends of every shard of 8, weights."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(TOKENS, PADDED, dtype=torch.float64, generator=generator)
    logits[:, VOCAB:] = 50.0
    edges = [i for start in range(0, PADDED, 8) for i in (start, start + 7) if i < VOCAB] + [VOCAB - 1]
    targets = torch.cat((torch.tensor(edges), torch.randint(VOCAB, (TOKENS - len(edges),), generator=generator)))
    return logits.to(dtype), targets, torch.randn(TOKENS, dtype=torch.float64, generator=generator)


def oracle(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and gradient of the logits in fp64, without shards."""
    logits, targets, weights = problem(dtype)
    logits = logits.double().requires_grad_()
    logps = torch.log_softmax(logits[:, :VOCAB], dim=-1).gather(1, targets[:, None])[:, 0]
    return logps.detach(), torch.autograd.grad((weights * logps).sum(), logits)[0]


def run_shard(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """On a rank: log-probs, and the gradient of this rank's columns."""
    rank, world = dist.get_rank(), dist.get_world_size()
    logits, targets, weights = problem(dtype)
    shard = logits.chunk(world, dim=1)[rank].clone().requires_grad_()
    logps = vocab_parallel_logprobs(shard, targets, VOCAB, dist.group.WORLD)
    (weights * logps).sum().backward()
    return logps.detach(), shard.grad


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_on_every_shard(pool: WorkerPool, world: int, dtype: torch.dtype) -> None:
    logps, gradient = oracle(dtype)
    results = pool.run(world, run_shard, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for values, _ in results:
        torch.testing.assert_close(values.double(), logps, rtol=min(tolerance, 2e-6), atol=min(tolerance, 2e-6))
        assert (values <= 0).all()
    got = torch.cat([shard for _, shard in results], dim=1).double()
    torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance)
    assert (got[:, VOCAB:] == 0).all(), "padding columns must have no gradient"


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logps, gradient = oracle(torch.float64)
    monkeypatch.setattr(logprobs, "_BLOCK_BYTES", 7 * 4 * PADDED)
    logits, targets, weights = problem(torch.float64)
    logits.requires_grad_()
    got = vocab_parallel_logprobs(logits, targets, VOCAB)
    (weights * got).sum().backward()
    torch.testing.assert_close(got, logps)
    torch.testing.assert_close(logits.grad, gradient)


def count_collectives() -> dict[str, int]:
    with Collectives() as collectives:
        run_shard(torch.float32)
    return collectives.counts


@pytest.mark.parametrize("world, expected", [(1, {}), (2, {"allgather_base": 1})])
def test_collectives_are_those_of_the_docstring(pool: WorkerPool, world: int, expected: dict[str, int]) -> None:
    assert pool.run(world, count_collectives) == [expected] * world


def test_no_tokens_keep_the_graph() -> None:
    logits = torch.randn(0, 8, requires_grad=True)
    logps = vocab_parallel_logprobs(logits, torch.zeros(0, dtype=torch.int64), 8)
    logps.sum().backward()
    assert logps.shape == (0,) and logits.grad is not None
