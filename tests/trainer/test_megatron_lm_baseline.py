"""KTO's baseline in Megatron-LM's `pretrain()`, with those parts of it that are used: arguments, checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.errors import UserError
from simpo_megatron.metrics import metric_sums
from simpo_megatron.objectives import OBJECTIVES, Measured, Objective, PairScores
from simpo_megatron.trainer.megatron_lm_baseline import carried, note
from tests.support.distributed import WorkerPool


def kto() -> Objective:
    return OBJECTIVES["kto"]()


def sums_of(objective: Objective, ratios: list[float]) -> dict[str, torch.Tensor]:
    """The sums of a microbatch of pairs with these log-ratios, both responses alike."""
    ratios_P2 = torch.tensor(ratios)[:, None].expand(-1, 2)
    nothing = torch.zeros(len(ratios))
    scores = PairScores(ratios_P2, torch.ones(len(ratios), 2), nothing, nothing, torch.zeros(len(ratios), 2))
    found = Measured(scores, torch.zeros(len(ratios), 2), objective.rewards(scores), nothing, torch.zeros(()))
    return metric_sums(objective.metrics, found)


def two_steps() -> tuple[list[float], int]:
    """On a rank: the baselines that two steps hand on, and how often Megatron's own function was called."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    calls: list[object] = []
    model, args = torch.nn.Linear(1, 1), Namespace(iteration=0)
    model.config = Namespace(finalize_model_grads_func=lambda *given: calls.append(given))  # type: ignore[assignment]
    baselines: list[float] = []
    of_ranks = [[[2.0, 6.0], []], [[-3.0], [5.0, -12.0]]][dist.get_rank()]  # of each step
    for ratios in of_ranks:
        objective = carried(args, kto(), model)
        note(objective, sums_of(objective, ratios))
        with torch.no_grad():
            note(objective, sums_of(objective, [1000.0]))  # of an evaluation
        model.config.finalize_model_grads_func([model])  # type: ignore[union-attr]
        baselines.append(args.simpo_baseline)
    return baselines, len(calls)


def test_the_baseline_is_that_of_all_ranks(pool: WorkerPool) -> None:
    for baselines, calls in pool.run(2, two_steps):
        assert baselines == pytest.approx([0.1 * 5 / 3, 0.0]) and calls == 2


def test_a_resumed_run_finds_it_in_the_arguments_of_its_checkpoint(tmp_path: Path) -> None:
    for step, saved in ((3, Namespace(simpo_baseline=0.7)), (4, Namespace())):
        folder = tmp_path / f"iter_{step:07}"
        folder.mkdir()
        torch.save({"args": saved}, folder / "common.pt")
    model = torch.nn.Linear(1, 1)
    model.config = Namespace(finalize_model_grads_func=None)  # type: ignore[assignment]
    assert carried(Namespace(iteration=3, load=str(tmp_path)), kto(), model) == kto().with_baseline(0.7)
    with pytest.raises(UserError, match="iter_0000004 has no baseline: it was saved with another --objective"):
        carried(Namespace(iteration=4, load=str(tmp_path)), kto(), model)
    dpo = OBJECTIVES["dpo"]()
    assert carried(Namespace(), dpo, model) is dpo
