"""`LogProbHead` against log_softmax in fp64 on one process: values, both gradients, collectives, FLOPs and memory.

The context-parallel ranks hold random tokens here: the head must not depend on how a row is cut. bf16 is in
`test_bf16.py`. `test_layouts.py` and `test_step.py` train with the head in every layout, under DDP and with the
distributed optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from simpo_megatron.head import kernels, projection, slabs
from simpo_megatron.head.slabs import cut_slabs
from tests.support.distributed import Collectives, WorkerPool
from tests.support.head_problems import (
    HIDDEN,
    PADDED,
    PAIR_LOSSES,
    POSITION_BYTES,
    SCALE,
    VOCAB,
    Problem,
    bf16_arithmetic,
    build_head,
    chosen_nll,
    products,
    random_problems,
    score,
    sigmoid,
    weighted_nll,
)
from tests.support.memory import peak_allocated


def check_problems(
    problems: list[Problem],
    losses: list[Any],
    tp: int,
    sp: bool,
    cp: int,
    slab_positions: list[int],
    tied: bool = False,
) -> None:
    """On a rank: every problem against the oracle, with slabs of so many positions."""
    from megatron.core import parallel_state

    for problem in problems:
        for loss in losses if problem.responses == 2 else [chosen_nll]:
            value, sums, grad_hidden, grad_weight = problem.oracle(loss)
            for size in slab_positions:
                head, weight = build_head(problem, tp, sp, cp, size * POSITION_BYTES // tp, tied)
                got, got_sums, tokens, got_hidden = score(problem, head, weight, loss, tied)
                if sp:
                    parts = [torch.empty_like(got_hidden) for _ in range(tp)]
                    dist.all_gather(parts, got_hidden, group=head.tp_group)
                    got_hidden = torch.cat(parts)
                # Context-parallel ranks bring the gradient of their own tokens; Megatron adds them up.
                dist.all_reduce(weight.grad, group=parallel_state.get_context_parallel_group())
                mine = grad_weight.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
                close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
                close(got, value)
                close(got_sums, sums)
                close(got_hidden[: len(tokens), 0], grad_hidden[tokens])
                close(weight.grad, mine)


LAYOUTS = [(1, False, 1), (2, False, 1), (2, True, 1), (4, False, 1), (4, True, 1), (8, False, 1), (8, True, 1)]
CONTEXT = [(1, False, 2), (2, False, 2), (2, True, 2), (4, True, 2)]


@pytest.mark.parametrize("layout", LAYOUTS + CONTEXT, ids=lambda x: "tp{} sp{:d} cp{}".format(*x))
def test_values_and_gradients(pool: WorkerPool, layout: tuple[int, bool, int]) -> None:
    """Slabs smaller than most pairs, than some, and larger than all. Many ranks share few cores, so they try fewer."""
    tp, _, cp = layout
    if tp * cp <= 2:
        problems, losses, slab_positions = random_problems(), PAIR_LOSSES, [1, 9, 1000]
    else:
        problems, losses, slab_positions = random_problems()[1:], [weighted_nll], [6, 1000]
    pool.run(tp * cp, check_problems, problems, losses, *layout, slab_positions)


@pytest.mark.parametrize("layout", [(1, False, 1), (2, True, 1)], ids=str)
def test_a_tied_weight(pool: WorkerPool, layout: tuple[int, bool, int]) -> None:
    pool.run(layout[0], check_problems, random_problems()[:2], [sigmoid], *layout, [9], True)


def test_a_vocabulary_without_padding(pool: WorkerPool) -> None:
    problem = Problem(((3, 4, 5), (0, 6, 2)), vocab=PADDED)
    pool.run(4, check_problems, [problem], [sigmoid], 4, False, 1, [9])


def check_gradients_go_into_main_grad() -> None:
    problem = Problem(((3, 4, 5), (0, 6, 2)), dtype=torch.float32)
    *_, grad_weight = problem.oracle(sigmoid)
    head, weight = build_head(problem, 1, False, 1, 9 * PADDED * 4)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    for passes in (1, 2):
        score(problem, head, weight, sigmoid, loss_gradient=SCALE)
        assert weight.grad_added_to_main_grad and weight.grad is not None, "DDP's hook wants both"
        torch.testing.assert_close(weight.main_grad, passes * grad_weight.float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"HeadTask\.loss_gradient"):
        score(problem, head, weight, sigmoid, loss_gradient=2 * SCALE)

    weight.zero_out_wgrad, weight.grad = True, None  # a tied embedding adds its own gradient to what is returned
    score(problem, head, weight, sigmoid, loss_gradient=SCALE)
    assert not weight.grad.any()


def check_the_placeholder_gradient_is_made_once() -> None:
    """One tensor of the size of the weight for all backward passes, and zeros whenever a tied embedding adds to it."""
    problem = Problem(((3, 4, 5), (0, 6, 2)), dtype=torch.float32)
    head, weight = build_head(problem, 1, False, 1, 9 * PADDED * 4)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    addresses = set()
    for zeros in (False, True):
        weight.zero_out_wgrad = zeros
        for _ in range(2):
            weight.grad = None  # as DDP's hook does
            score(problem, head, weight, sigmoid, loss_gradient=SCALE)
            addresses.add(weight.grad.data_ptr())
            assert not zeros or not weight.grad.any()
            weight.grad += 1  # what a tied embedding may do
    assert len(addresses) == 2


def check_slopes_replace_autograd() -> None:
    """The head asks for slopes once a slab and never differentiates the loss."""
    problem = Problem(((3, 4, 5), (0, 6, 2), (1, 2, 3)))
    calls, lengths = [], problem.lengths_PM

    def slopes(sums: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.func.grad(lambda x: weighted_nll(x, lengths))(sums)

    def opaque(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return weighted_nll(sums.detach(), lengths)  # autograd.grad would raise

    _, _, grad_hidden, grad_weight = problem.oracle(weighted_nll)
    head, weight = build_head(problem, 1, False, 1, 9 * POSITION_BYTES)
    *_, tokens, got = score(problem, head, weight, opaque, slopes=slopes)
    torch.testing.assert_close(got[: len(tokens), 0], grad_hidden[tokens])
    torch.testing.assert_close(weight.grad, grad_weight)
    assert len(calls) == 3, "once a slab"


def check_frozen_parts_get_no_gradient() -> None:
    problem = Problem(((3, 4, 5), (0, 6, 2)))
    _, _, grad_hidden, _ = problem.oracle(sigmoid)
    head, weight = build_head(problem, 1, False, 1, 9 * POSITION_BYTES)
    weight.requires_grad_(False)
    *_, tokens, got = score(problem, head, weight, sigmoid)
    torch.testing.assert_close(got[: len(tokens), 0], grad_hidden[tokens])
    assert weight.grad is None


def check_a_cap_forgotten_in_the_gradient_is_seen() -> None:
    """The value is right and the gradient is not: the derivative of the cap is left out."""
    problem, write = Problem(((3, 4, 5), (0, 6, 2)), softcap=2.5), slabs.write_gradient_
    value, _, grad_hidden, _ = problem.oracle(sigmoid)
    head, weight = build_head(problem, 1, False, 1, 9 * POSITION_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        forgotten = lambda logits, *rest: write(logits.copy_(kernels.soft_cap(logits, 2.5)), *rest[:-1])  # noqa: E731
        patch.setattr(slabs, "write_gradient_", forgotten)
        got, _, tokens, got_hidden = score(problem, head, weight, sigmoid)
    torch.testing.assert_close(got, value)
    assert not torch.allclose(got_hidden[: len(tokens), 0], grad_hidden[tokens], rtol=0.1)


def check_without_a_task_it_is_the_old_layer() -> None:
    from megatron.core import parallel_state

    problem = Problem(((3, 4, 5),), softcap=2.5)
    head, weight = build_head(problem, 1, False, 1, 9 * POSITION_BYTES)
    hidden = problem.hidden[:, None].clone()
    torch.testing.assert_close(head(hidden)[0][:, 0], 2.5 * torch.tanh(problem.hidden @ problem.weight.T / 2.5))
    score(problem, head, weight, sigmoid)
    assert head(hidden)[0].shape == (len(hidden), 1, PADDED), "a task lasts for one pass"
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = set(head.sharded_state_dict("output_layer.", metadata=metadata))
    assert keys == {"output_layer.weight", "output_layer._extra_state"}


def flops(problem: Problem, slab_positions: int, grad: bool = True) -> float:
    """FLOPs of one pass, in units of one GEMM over the response tokens."""
    head, weight = build_head(problem, 1, False, 1, slab_positions * POSITION_BYTES)
    with FlopCounterMode(display=False) as counter, contextlib.nullcontext() if grad else torch.no_grad():
        score(problem, head, weight, sigmoid)
    return counter.get_total_flops() / (2 * len(problem.positions) * HIDDEN * VOCAB)


def check_work() -> None:
    """Three GEMMs over response tokens; one without gradients. A pair of k slabs projects k - 1 of them again."""
    short, long = Problem(((1, 8, 8), (1, 8, 8))), Problem(((64, 8, 8), (64, 8, 8)))
    assert flops(short, 16) == flops(long, 16) == flops(short, 1000) == 3
    assert flops(short, 16, grad=False) == 1
    assert flops(short, 4) == 3 + 3 / 4


def memory_of_the_pairs(native: bool) -> None:
    """The bound: slab, gradients in fp32 and bf16, selected hidden states, blocks of the statistics, and a tile."""
    slab, vocab, hidden = 8 * 2**20, 8000, 32
    small = {"dtype": torch.bfloat16, "hidden_size": hidden, "vocab": vocab, "padded": vocab}
    for lengths in [((8, 100, 100),), ((8, 100, 100),) * 16, ((8, 2048, 2048),)]:
        problem = Problem(lengths, **small)
        head, weight = build_head(problem, 1, False, 1, slab)
        score(Problem(((1, 1, 1),), **small), head, weight, sigmoid)  # leaves a gradient to add to
        weight.grad = None
        positions, tokens = len(problem.positions), len(problem.hidden)
        gradients = hidden * (vocab * 6 + positions * 4 + tokens * 6)
        statistics = 2 * kernels._BLOCK_BYTES
        cast = vocab * hidden * 4
        with bf16_arithmetic(native):
            peak = peak_allocated(lambda: score(problem, head, weight, sigmoid))  # noqa: B023
        selected = 4 * tokens * hidden * 4 + 16 * tokens * 8
        assert peak < slab + gradients + statistics + cast + selected, lengths
        if positions > 1000:
            assert peak < positions * vocab * 4 / 3, "the bound says something"


ON_ONE_RANK = [
    check_gradients_go_into_main_grad,
    check_the_placeholder_gradient_is_made_once,
    check_slopes_replace_autograd,
    check_frozen_parts_get_no_gradient,
    check_a_cap_forgotten_in_the_gradient_is_seen,
    check_without_a_task_it_is_the_old_layer,
    check_work,
]


@pytest.mark.parametrize("check", ON_ONE_RANK, ids=lambda check: check.__name__.removeprefix("check_"))
def test_on_one_rank(pool: WorkerPool, check: Callable[[], None]) -> None:
    pool.run(1, check)


@pytest.mark.parametrize("native", [True, False], ids=["native bf16", "emulated bf16"])
def test_memory_does_not_grow_with_the_pairs(pool: WorkerPool, native: bool) -> None:
    pool.run(1, memory_of_the_pairs, native)


def memory_of_a_tile(way: str) -> None:
    """No product and no copy of the size of the weight is held.

    With a third of the vocabulary in a tile, the peak falls by the bf16 products, or by the fp32 copy of the weight.
    """
    problem = Problem(((1, 6, 6),), dtype=torch.bfloat16, hidden_size=256, vocab=9000, padded=9000)
    peaks = []
    for tile in (9000, 3000):
        head, weight = build_head(problem, 1, False, 1, 2**20)
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        before, projection._TILE_BYTES = projection._TILE_BYTES, tile * 256 * 4
        with products(way):
            peaks.append(peak_allocated(lambda: score(problem, head, weight, sigmoid, loss_gradient=SCALE)))  # noqa: B023
        projection._TILE_BYTES = before
    assert peaks[0] - peaks[1] > 0.9 * 6000 * 256 * {"round": 2, "mm": 4, "cast": 4}[way]


@pytest.mark.parametrize("way", ["round", "mm", "cast"])
def test_the_weight_gradient_is_made_a_tile_at_a_time(pool: WorkerPool, way: str) -> None:
    pool.run(1, memory_of_a_tile, way)


def count_collectives(problem: Problem, tp: int, sp: bool, cp: int, slab_positions: int) -> dict[str, int]:
    head, weight = build_head(problem, tp, sp, cp, slab_positions * POSITION_BYTES // tp)
    with Collectives() as collectives:
        score(problem, head, weight, sigmoid)
    return collectives.counts


@pytest.mark.parametrize(
    "tp, sp, cp, pairs, expected",
    [
        (1, False, 1, 4, {}),
        (2, False, 1, 4, {"allgather_base": 2, "allreduce": 1}),
        (2, True, 1, 4, {"allgather_base": 1 + 2, "reduce_scatter_base": 1}),
        (1, False, 2, 4, {"allreduce": 2}),
        (2, False, 1, 0, {"allreduce": 1}),
        (2, True, 1, 0, {"allgather_base": 1, "reduce_scatter_base": 1}),
    ],
)
def test_collectives_are_those_of_the_docstring(
    pool: WorkerPool, tp: int, sp: bool, cp: int, pairs: int, expected: dict
) -> None:
    """Two slabs of two pairs, and an empty row."""
    problem = Problem(((2, 4, 4),) * pairs)
    slab_positions = 16
    if cp == 2:  # the cut follows the context-parallel rank that has most
        problem.parts[:] = torch.arange(len(problem.parts)) % 2
        slab_positions = 8
    assert pool.run(tp * cp, count_collectives, problem, tp, sp, cp, slab_positions) == [expected] * (tp * cp)


def test_slabs_hold_whole_pairs_and_cover_every_row() -> None:
    for pair_rows in ([], [5], [3, 3, 3, 3], [1, 20, 1], [20, 20], [0, 4, 0], [7, 0, 0, 9]):
        for slab_positions in (1, 4, 7, 100):
            slabs = cut_slabs(pair_rows, pair_rows, slab_positions)
            parts = [part for slab in slabs for part in slab.parts]
            covered = [row for part in parts for row in range(part.start, part.stop)]
            assert covered == list(range(sum(pair_rows)))
            assert all(part.stop - part.start <= slab_positions for part in parts)
            assert [p for slab in slabs for p in range(slab.pairs.start, slab.pairs.stop)] == list(
                range(len(pair_rows))
            )
            for slab in slabs:
                assert len(slab.parts) == 1 or slab.pairs.stop - slab.pairs.start == 1


def test_context_parallel_ranks_cut_alike() -> None:
    """What one rank holds of a pair may be far less than another."""
    largest = [6, 4, 9]
    for mine in ([6, 0, 1], [0, 4, 9], [0, 0, 0]):
        assert [slab.pairs for slab in cut_slabs(mine, largest, 10)] == [slice(0, 2), slice(2, 3)]
