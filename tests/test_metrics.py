"""What every metric means, in plain numbers; and the reduction over ranks with unequal numbers of pairs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.metrics import DIVISORS, metric_sums, reduce_metrics
from simpo_megatron.objectives import OBJECTIVES, SFT, Measured, PairScores, SimPO
from tests.support.distributed import WorkerPool

BETA = 2.0
# chosen, rejected; wins by much, by less than its gamma, by exactly gamma, ties, loses.
LOGPS = torch.tensor([[-1.0, -3.0], [-1.0, -1.25], [-1.0, -1.5], [-2.0, -2.0], [-2.0, -1.5]])
GAMMA = torch.tensor([3.5, 1.0, 1.0, -0.5, -2.0])
LENGTHS = torch.tensor([[5, 2], [1, 9], [3, 3], [40, 7], [2, 6]])
TRUNCATED = torch.tensor([[True, False], [False, False], [True, True], [False, True], [True, False]])
EXPECTED = {
    "rewards/chosen": BETA * (-1 - 1 - 1 - 2 - 2) / 5,
    "rewards/rejected": BETA * (-3 - 1.25 - 1.5 - 2 - 1.5) / 5,
    "rewards/margins": BETA * (2 + 0.25 + 0.5 + 0 - 0.5) / 5,
    "rewards/accuracies": 3 / 5,  # strict: the tie is not a win
    "rewards/above_gamma": 3 / 5,  # strict, and each pair has its own gamma: pairs 0, 3 and 4
    "rewards/ties": 1 / 5,
    "likelihood_accuracy": 3 / 5,
    "logps/chosen": -7 / 5,
    "logps/rejected": -9.25 / 5,
    "response_length/chosen": 51 / 5,
    "response_length/rejected": 27 / 5,
    "truncated/chosen": 3 / 5,
    "truncated/rejected": 2 / 5,
}


# The share of a pair in the loss; and the sum of -LOGPS * LENGTHS over the chosen responses, by their tokens.
SHARE, NLL_A_TOKEN = 0.25, 93 / 51


def sums_of(pairs: list[int], objective: Any = None) -> dict[str, torch.Tensor]:
    """The sums that a step computes for a microbatch of these pairs."""
    objective = objective or SimPO(simpo_beta=BETA)
    logps, lengths = LOGPS[pairs, : objective.responses], LENGTHS[pairs, : objective.responses]
    scores = PairScores(logps * lengths, lengths, GAMMA[pairs], torch.ones(len(pairs)))
    rewards, targets = objective.rewards(scores), objective.target_margins(scores)
    truncated, share = TRUNCATED[pairs, : objective.responses], torch.tensor(SHARE * len(pairs))
    return metric_sums(objective.metrics, Measured(scores, truncated, rewards, targets, share))


ALL = [0, 1, 2, 3, 4]


def test_what_every_name_means() -> None:
    sums = sums_of(ALL)
    assert all(value.dtype == torch.float64 for value in sums.values())
    assert (sums.pop("pairs"), sums.pop("chosen_tokens")) == (5, 51)
    assert sums.pop("loss") == 5 * SHARE and sums.pop("nll_loss").item() == pytest.approx(93, rel=1e-12)
    assert {name: value.item() / 5 for name, value in sums.items()} == pytest.approx(EXPECTED, rel=1e-12)


def test_margin_is_the_difference_of_the_rewards() -> None:
    """On random numbers."""
    logps = -3 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    lengths, truncated = torch.ones(64, 2, dtype=torch.int64), torch.zeros(64, 2, dtype=torch.bool)
    objective, none = SimPO(simpo_beta=BETA), torch.zeros(64)
    scores = PairScores(logps, lengths, none, none)
    found = Measured(scores, truncated, objective.rewards(scores), objective.target_margins(scores), torch.zeros(()))
    sums, rewards = metric_sums(objective.metrics, found), BETA * logps.double()
    assert sums["rewards/margins"].item() == pytest.approx((rewards[:, 0] - rewards[:, 1]).sum().item(), rel=1e-6)
    assert sums["rewards/accuracies"] == sums["rewards/above_gamma"] == (logps[:, 0] > logps[:, 1]).sum()


def test_chosen_alone() -> None:
    found = {name: value.item() / 5 for name, value in sums_of(ALL, SFT()).items() if "/" in name}
    assert found == pytest.approx({name: value for name, value in EXPECTED.items() if name in found}, rel=1e-12)
    assert found.keys() == {"logps/chosen", "response_length/chosen", "truncated/chosen"}


def test_no_pairs_sum_to_nothing() -> None:
    empty = sums_of([])
    assert len(empty) == len(EXPECTED) + 4 and all(value.item() == 0 for value in empty.values())


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_reports_its_loss_once(objective: Any) -> None:
    names = [metric.name for metric in objective.metrics]
    assert names[:2] == ["loss", "nll_loss"] and len(set(names)) == len(names)
    assert all(metric.divisor in (*DIVISORS, "none") for metric in objective.metrics)
    assert all(name.endswith("/chosen") for name in names[2:]) == (objective.responses == 1)


# The microbatches of each data-parallel rank: lists of pairs. Unequal numbers, empty rows, and a rank without pairs.
SHARES = {1: [[ALL]], 2: [[[0], [1, 2, 3], []], [[4], [], []]], 4: [[[3]], [[0, 1]], [[]], [[2, 4]]]}


def reduced(layout: tuple[int, int]) -> tuple[dict[str, float], dict[str, int]]:
    """On a rank: the reduced metrics, and the collectives it took."""
    from megatron.core import parallel_state

    tensor, pipeline = layout
    parallel_state.initialize_model_parallel(tensor, pipeline)
    microbatches = SHARES[parallel_state.get_data_parallel_world_size()][parallel_state.get_data_parallel_rank()]
    sums = [sums_of(pairs) for pairs in microbatches]
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather_into_tensor")}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        last = parallel_state.is_pipeline_last_stage()
        return reduce_metrics(sums if last else [], SimPO.metrics), dict(counts)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@pytest.mark.parametrize(
    "world, layout, collectives",
    [
        (1, (1, 1), {"all_reduce": 1}),
        (2, (1, 1), {"all_reduce": 1}),
        (4, (1, 1), {"all_reduce": 1}),
        (4, (2, 1), {"all_reduce": 1}),
        (4, (1, 2), {"all_reduce": 1, "broadcast": 1}),
        (4, (2, 2), {"all_reduce": 1, "broadcast": 1}),
    ],
)
def test_reduced_once_over_unequal_ranks(
    pool: WorkerPool, world: int, layout: tuple[int, int], collectives: dict[str, int]
) -> None:
    for metrics, counts in pool.run(world, reduced, layout):
        assert metrics == pytest.approx({**EXPECTED, "loss": 5 * SHARE, "nll_loss": NLL_A_TOKEN}, rel=1e-12)
        assert counts == collectives
