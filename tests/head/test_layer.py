"""LogProbHead against log_softmax in fp64 on one process: values, both gradients, collectives, FLOPs and memory.

The context-parallel ranks take tokens at random here: the head must not care how a row was cut. Models, DDP's hooks and the
distributed optimizer around the head are in `test_step.py`, which trains with it in every layout.
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

from simpo_megatron.head import kernels, layer, projection, slabs
from simpo_megatron.head.slabs import cut_slabs
from tests.support.distributed import Collectives
from tests.support.head_problems import (
    HIDDEN,
    PADDED,
    PAIR_LOSSES,
    ROW_BYTES,
    SCALE,
    VOCAB,
    Problem,
    bf16_arithmetic,
    build_head,
    chosen_nll,
    random_packs,
    score,
    sigmoid,
    weighted_nll,
)
from tests.support.memory import peak_allocated


def check_problems(
    problems: list[Problem], losses: list[Any], tp: int, sp: bool, cp: int, slabs: list[int], tied: bool = False
) -> None:
    """On a rank: every problem against the oracle, with slabs of so many rows."""
    from megatron.core import parallel_state

    for problem in problems:
        for loss in losses if problem.responses == 2 else [chosen_nll]:
            value, sums, grad_hidden, grad_weight = problem.oracle(loss)
            for rows in slabs:
                head, weight = build_head(problem, tp, sp, cp, rows * ROW_BYTES // tp, tied)
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
def test_values_and_gradients(pool, layout: tuple[int, bool, int]) -> None:
    """Slabs smaller than most pairs, than some, and larger than all; fewer combinations where many ranks share few cores."""
    tp, _, cp = layout
    if tp * cp <= 2:
        problems, losses, slabs = random_packs(), PAIR_LOSSES, [1, 9, 1000]
    else:
        problems, losses, slabs = random_packs()[1:], [weighted_nll], [6, 1000]
    pool.run(tp * cp, check_problems, problems, losses, *layout, slabs)


@pytest.mark.parametrize("layout", [(1, False, 1), (2, True, 1)], ids=str)
def test_a_tied_weight(pool, layout: tuple[int, bool, int]) -> None:
    pool.run(layout[0], check_problems, random_packs()[:2], [sigmoid], *layout, [9], True)


def test_a_vocabulary_without_padding(pool) -> None:
    problem = Problem(((3, 4, 5), (0, 6, 2)), vocab=PADDED)
    pool.run(4, check_problems, [problem], [sigmoid], 4, False, 1, [9])


def bf16_errors(native: bool, confident: bool) -> list[tuple[float, float, float]]:
    """On a rank: of sums, hidden and weight gradient the error of the head, of the plain path, and the predicted one.

    Args:
        native: compute as on a processor with bf16 arithmetic, or as on one without.
        confident: see `Problem`.
    """
    from simpo_megatron.head.logprobs import vocab_parallel_logprobs

    small = {"dtype": torch.bfloat16, "hidden_size": 64, "vocab": 1000, "padded": 1024}
    problem = Problem(((5, 60, 40), (9, 33, 70)) * 8, **small, confident=confident)
    _, sums, *wanted = problem.oracle(sigmoid)

    with bf16_arithmetic(native):
        head, weight = build_head(problem, 1, False, 1, 70 * 1024 * (2 if native else 4))  # every pair is too large
        _, fused_sums, _, fused_hidden = score(problem, head, weight, sigmoid)
    assert fused_sums.dtype == torch.float32 and fused_hidden.dtype == weight.grad.dtype == torch.bfloat16
    fused = (fused_sums, fused_hidden[: len(problem.hidden), 0], weight.grad)

    hidden, plain_weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    logps = vocab_parallel_logprobs(hidden[problem.rows] @ plain_weight.T, problem.targets[problem.rows], 1000)
    plain_sums = logps.new_zeros(32).index_add(0, problem.segments, logps).view(16, 2)
    (SCALE * sigmoid(plain_sums, problem.lengths_PM)).backward()
    plain = (plain_sums.detach(), hidden.grad, plain_weight.grad)

    def error(got: torch.Tensor, right: torch.Tensor) -> float:
        return float((got.double() - right).norm() / right.norm())

    right = (sums, *wanted)
    return list(
        zip(map(error, fused, right), map(error, plain, right), problem.bf16_errors(sigmoid, native), strict=True)
    )


def too_far(fused: float, plain: float, predicted: float) -> bool:
    """Rounding alone does not explain the error, or the plain path is closer by more than the products of each slab."""
    return fused > 1.5 * predicted + 1e-6 or fused > 1.05 * plain + 1e-6  # 1e-6: fp32


NATIVE = pytest.mark.parametrize("native", [True, False], ids=["native bf16", "emulated bf16"])
CONFIDENT = pytest.mark.parametrize("confident", [False, True], ids=["any target", "confident"])


@CONFIDENT
@NATIVE
def test_bf16_is_as_exact_as_rounding_allows(pool, native: bool, confident: bool) -> None:
    """Both ways of computing, whichever processor this is."""
    [errors] = pool.run(1, bf16_errors, native, confident)
    assert not any(too_far(*found) for found in errors), errors


class Bf16Gradients(projection.Gradients):
    """Accumulates over the slabs in the dtype of the weight."""

    @classmethod
    def of(cls, hidden_RH: Any, weight_VH: Any, main_grad: Any, factor: float) -> projection.Gradients:
        made = projection.Gradients.of(hidden_RH, weight_VH, main_grad, factor)
        assert made.weight_VH is not None
        return cls(made.hidden_RH, made.weight_VH.bfloat16(), made.factor)


def rounded_first(logits_NV: torch.Tensor, targets_N: torch.Tensor, lse_N: torch.Tensor, by_N: torch.Tensor) -> None:
    """The gradient of the logits, with the probability rounded before the target is subtracted."""
    p_NV = (logits_NV.float() - lse_N[:, None]).exp().bfloat16()
    p_NV.scatter_add_(1, targets_N[:, None], torch.full_like(p_NV[:, :1], -1.0))
    logits_NV.copy_(p_NV.float() * -by_N[:, None])


def rounded_statistics(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse_N, target_N = kernels.row_statistics(logits_NV, targets_N)
    return lse_N.bfloat16().float(), target_N


# What is replaced, by what; and where it shows: with native bf16, with confident predictions.
BF16_MISTAKES: dict[str, tuple[Any, str, Any, bool, bool]] = {
    "gradient rounded first": (slabs, "write_gradient_", rounded_first, False, True),
    "statistics in bf16": (slabs, "row_statistics", rounded_statistics, True, False),
    "weight gradient summed in bf16": (layer, "Gradients", Bf16Gradients, False, False),
}


def bf16_errors_with(mistake: str, native: bool, confident: bool) -> list[tuple[float, float, float]]:
    """On a rank: `bf16_errors` of a head that rounds where it must not."""
    owner, name, value, *_ = BF16_MISTAKES[mistake]
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return bf16_errors(native, confident)
    finally:
        setattr(owner, name, before)


@pytest.mark.parametrize("mistake", BF16_MISTAKES)
def test_bf16_mistakes_are_seen(pool, mistake: str) -> None:
    native, confident = BF16_MISTAKES[mistake][3:]
    [errors] = pool.run(1, bf16_errors_with, mistake, native, confident)
    assert any(too_far(*found) for found in errors), errors


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


def check_frozen_parts_get_no_gradient() -> None:
    problem = Problem(((3, 4, 5), (0, 6, 2)))
    _, _, grad_hidden, _ = problem.oracle(sigmoid)
    head, weight = build_head(problem, 1, False, 1, 9 * ROW_BYTES)
    weight.requires_grad_(False)
    *_, tokens, got = score(problem, head, weight, sigmoid)
    torch.testing.assert_close(got[: len(tokens), 0], grad_hidden[tokens])
    assert weight.grad is None


def check_without_a_task_it_is_the_old_layer() -> None:
    from megatron.core import parallel_state

    problem = Problem(((3, 4, 5),))
    head, weight = build_head(problem, 1, False, 1, 9 * ROW_BYTES)
    hidden = problem.hidden[:, None].clone()
    torch.testing.assert_close(head(hidden)[0][:, 0], problem.hidden @ problem.weight.T)
    score(problem, head, weight, sigmoid)
    assert head(hidden)[0].shape == (len(hidden), 1, PADDED), "a task lasts for one pass"
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = set(head.sharded_state_dict("output_layer.", metadata=metadata))
    assert keys == {"output_layer.weight", "output_layer._extra_state"}


def flops(problem: Problem, slab_rows: int, grad: bool = True) -> float:
    """FLOPs of one pass, in units of one GEMM over the response tokens."""
    head, weight = build_head(problem, 1, False, 1, slab_rows * ROW_BYTES)
    with FlopCounterMode(display=False) as counter, contextlib.nullcontext() if grad else torch.no_grad():
        score(problem, head, weight, sigmoid)
    return counter.get_total_flops() / (2 * len(problem.rows) * HIDDEN * VOCAB)


def check_work() -> None:
    """Three GEMMs over response tokens; one without gradients; a pair of k slabs projects k - 1 of them again."""
    short, long = Problem(((1, 8, 8), (1, 8, 8))), Problem(((64, 8, 8), (64, 8, 8)))
    assert flops(short, 16) == flops(long, 16) == flops(short, 1000) == 3
    assert flops(short, 16, grad=False) == 1
    assert flops(short, 4) == 3 + 3 / 4


def memory_of_the_pairs(native: bool) -> None:
    """Bound: the slab, gradients in fp32 and in bf16, the selected rows, the few rows the statistics work on, and a tile."""
    slab, vocab, hidden = 8 * 2**20, 8000, 32
    small = {"dtype": torch.bfloat16, "hidden_size": hidden, "vocab": vocab, "padded": vocab}
    for lengths in [((8, 100, 100),), ((8, 100, 100),) * 16, ((8, 2048, 2048),)]:
        problem = Problem(lengths, **small)
        head, weight = build_head(problem, 1, False, 1, slab)
        score(Problem(((1, 1, 1),), **small), head, weight, sigmoid)  # leaves a gradient to add to
        weight.grad = None
        rows, tokens = len(problem.rows), len(problem.hidden)
        gradients = hidden * (vocab * 6 + rows * 4 + tokens * 6)
        statistics = 2 * kernels._BLOCK_BYTES
        cast = vocab * hidden * 4
        with bf16_arithmetic(native):
            peak = peak_allocated(lambda: score(problem, head, weight, sigmoid))  # noqa: B023
        selected = 4 * tokens * hidden * 4 + 16 * tokens * 8
        assert peak < slab + gradients + statistics + cast + selected, lengths
        if rows > 1000:
            assert peak < rows * vocab * 4 / 3, "the bound says something"


ON_ONE_RANK = [
    check_gradients_go_into_main_grad,
    check_frozen_parts_get_no_gradient,
    check_without_a_task_it_is_the_old_layer,
    check_work,
]


@pytest.mark.parametrize("check", ON_ONE_RANK, ids=lambda check: check.__name__.removeprefix("check_"))
def test_on_one_rank(pool, check: Callable[[], None]) -> None:
    pool.run(1, check)


@NATIVE
def test_memory_does_not_grow_with_the_pairs(pool, native: bool) -> None:
    pool.run(1, memory_of_the_pairs, native)


def memory_of_a_tile() -> None:
    """A product of the size of the weight is never held: with a third of the vocabulary in a tile, the peak falls."""
    problem = Problem(((1, 6, 6),), dtype=torch.bfloat16, hidden_size=256, vocab=9000, padded=9000)
    peaks = []
    for tile in (9000, 3000):
        head, weight = build_head(problem, 1, False, 1, 2**20)
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        before, projection._TILE_BYTES = projection._TILE_BYTES, tile * 256 * 4
        with bf16_arithmetic(True):
            peaks.append(peak_allocated(lambda: score(problem, head, weight, sigmoid, loss_gradient=SCALE)))  # noqa: B023
        projection._TILE_BYTES = before
    assert peaks[0] - peaks[1] > 0.9 * 6000 * 256 * 2


def test_the_weight_gradient_is_made_a_tile_at_a_time(pool) -> None:
    pool.run(1, memory_of_a_tile)


def count_collectives(problem: Problem, tp: int, sp: bool, cp: int, slab_rows: int) -> dict[str, int]:
    head, weight = build_head(problem, tp, sp, cp, slab_rows * ROW_BYTES // tp)
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
def test_collectives_are_those_of_the_docstring(pool, tp: int, sp: bool, cp: int, pairs: int, expected: dict) -> None:
    """Two slabs of two pairs, and an empty pack."""
    problem = Problem(((2, 4, 4),) * pairs)
    slab_rows = 16
    if cp == 2:  # the cut follows the context-parallel rank that has most
        problem.parts[:] = torch.arange(len(problem.parts)) % 2
        slab_rows = 8
    assert pool.run(tp * cp, count_collectives, problem, tp, sp, cp, slab_rows) == [expected] * (tp * cp)


def test_slabs_hold_whole_pairs_and_cover_every_row() -> None:
    for pair_rows in ([], [5], [3, 3, 3, 3], [1, 20, 1], [20, 20], [0, 4, 0], [7, 0, 0, 9]):
        for slab_rows in (1, 4, 7, 100):
            slabs = cut_slabs(pair_rows, pair_rows, slab_rows)
            parts = [part for slab in slabs for part in slab.parts]
            covered = [row for part in parts for row in range(part.start, part.stop)]
            assert covered == list(range(sum(pair_rows)))
            assert all(part.stop - part.start <= slab_rows for part in parts)
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
