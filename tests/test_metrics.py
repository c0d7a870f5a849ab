"""`metrics.py`: what each name means, against plain torch, and one reduction over unequal data-parallel ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.metrics import CHOSEN_METRICS, PAIR_METRICS, metric_names, pair_sums, reduce_metrics

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
    "logps/chosen": -7 / 5,
    "logps/rejected": -9.25 / 5,
    "response_length/chosen": 51 / 5,
    "response_length/rejected": 27 / 5,
    "truncated/chosen": 3 / 5,
    "truncated/rejected": 2 / 5,
}


def test_what_every_name_means() -> None:
    sums = dict(zip(PAIR_METRICS, pair_sums(LOGPS, LENGTHS, TRUNCATED, BETA, GAMMA), strict=True))
    assert {name: value.item() / 5 for name, value in sums.items()} == pytest.approx(EXPECTED, rel=1e-12)
    assert all(value.dtype == torch.float64 for value in sums.values())


def test_margin_is_the_difference_of_the_rewards() -> None:
    """Property, on numbers that are not round."""
    logps = -3 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    lengths, truncated = torch.ones(64, 2, dtype=torch.int64), torch.zeros(64, 2, dtype=torch.bool)
    sums = dict(zip(PAIR_METRICS, pair_sums(logps, lengths, truncated, BETA, torch.zeros(64)), strict=True))
    rewards = BETA * logps.double()
    assert sums["rewards/margins"].item() == pytest.approx((rewards[:, 0] - rewards[:, 1]).sum().item(), rel=1e-6)
    assert sums["rewards/accuracies"] == sums["rewards/above_gamma"] == (logps[:, 0] > logps[:, 1]).sum()


def test_chosen_alone() -> None:
    sums = pair_sums(LOGPS[:, :1], LENGTHS[:, :1], TRUNCATED[:, :1], BETA, GAMMA)
    found = {name: value.item() / 5 for name, value in zip(CHOSEN_METRICS, sums, strict=True)}
    assert found == pytest.approx({name: EXPECTED[name] for name in CHOSEN_METRICS})


def test_no_pairs_sum_to_nothing() -> None:
    empty = pair_sums(LOGPS[:0], LENGTHS[:0], TRUNCATED[:0], BETA, GAMMA[:0])
    assert [value.item() for value in empty] == [0.0] * len(PAIR_METRICS)


@pytest.mark.parametrize("members", [1, 2])
def test_names_are_in_order_and_unique(members: int) -> None:
    names = metric_names(members)
    assert names[:4] == ("pairs", "chosen_tokens", "loss", "nll_loss")
    assert len(set(names)) == len(names)
    assert all(name.endswith("/chosen") for name in names[4:]) == (members == 1)


# Microbatches of the data-parallel ranks: lists of pairs. Unequal counts, an empty pack, and an idle rank.
SHARES = {1: [[[0, 1, 2, 3, 4]]], 2: [[[0], [1, 2, 3], []], [[4], [], []]], 4: [[[3]], [[0, 1]], [[]], [[2, 4]]]}
NLL_A_TOKEN = 0.5


def microbatch_vector(pairs: list[int]) -> torch.Tensor:
    """What `step` hands on: pairs, chosen tokens, the share in the loss, summed NLL, and the sums over pairs."""
    tokens = LENGTHS[pairs, 0].sum().item()
    head = torch.tensor([len(pairs), tokens, 0.25 * len(pairs), NLL_A_TOKEN * tokens], dtype=torch.float64)
    return torch.cat((head, torch.stack(pair_sums(LOGPS[pairs], LENGTHS[pairs], TRUNCATED[pairs], BETA, GAMMA[pairs]))))


def reduced(layout: tuple[int, int]) -> tuple[dict[str, float], dict[str, int]]:
    """On a rank: the reduced metrics, and the collectives it took."""
    from megatron.core import parallel_state

    tensor, pipeline = layout
    parallel_state.initialize_model_parallel(tensor, pipeline)
    microbatches = SHARES[parallel_state.get_data_parallel_world_size()][parallel_state.get_data_parallel_rank()]
    vectors = [microbatch_vector(pairs) for pairs in microbatches]
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
        return reduce_metrics(vectors if last else [], 2), dict(counts)
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
    pool, world: int, layout: tuple[int, int], collectives: dict[str, int]
) -> None:
    for metrics, counts in pool.run(world, reduced, layout):
        assert metrics == pytest.approx({**EXPECTED, "loss": 5 * 0.25, "nll_loss": NLL_A_TOKEN}, rel=1e-12)
        assert counts == collectives
