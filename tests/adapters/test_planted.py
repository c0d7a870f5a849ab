"""Faults of other trainers with adapters, planted: the comparisons of `test_layouts.py` must see each of them.

`FAULTS` names each with the thread that reports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.test_layouts import EP2, FULL, SP
from tests.support.adapters import Oracle, factors_of, merge_weights, run_layout
from tests.support.checkpoints import tensors
from tests.support.distributed import LOCAL, NEWEST, WorkerPool
from tests.support.steps import relative_error

Patch = pytest.MonkeyPatch
SHARED = {"expert_tensor_parallel_size": 2}


def whole_factors_are_not_summed(patch: Patch) -> None:
    """mcore-bridge pull request 173."""
    from simpo_megatron.adapters import install

    patch.setattr(install, "_mark", lambda place, sequence_parallel: None)


def nothing_requires_a_gradient(patch: Patch) -> None:
    """In verl issue 4514 full recomputation hides every factor from autograd."""
    from simpo_megatron.adapters import install

    patch.setattr(install, "_require_grad", lambda module, inputs, output: output)


def factors_of_experts_are_not_summed(patch: Patch) -> None:
    """Megatron-Bridge issue 5634: the output of an adapter is in another parallel state than that of its layer."""
    from simpo_megatron.adapters import layer

    patch.setattr(layer, "copy_to_tensor_model_parallel_region", lambda tensor, group: tensor)


def layers_get_two_adapters(patch: Patch) -> None:
    """Megatron-Bridge pull request 5900: two patterns of targets match one layer."""
    from simpo_megatron.adapters.layer import LinearAdapter

    attach = LinearAdapter.attach
    patch.setattr(LinearAdapter, "attach", lambda adapter, linear: [attach(adapter, linear) for _ in range(2)])


def one_layer_is_left_out(patch: Patch) -> None:
    """SkyRL issue 2041: a kind of layer that the search for targets does not know."""
    from simpo_megatron.adapters import install

    targeted = install._targeted
    patch.setattr(install, "_targeted", lambda *args: targeted(*args)[1:])


def q_k_v_follow_each_other(patch: Patch) -> None:
    """OpenPipe/ART pull request 619: Megatron keeps the rows of q, k and v by query groups."""
    from simpo_megatron.adapters.layer import LinearAdapter
    from simpo_megatron.models.part_layout import Copy

    class Joined(Copy):
        def join(self, parts: Any, ranks: int = 1, dim: int = 0) -> Tensor:
            return torch.cat(tuple(parts), dim)

    init = LinearAdapter.__init__

    def planted(adapter: Any, *args: Any, **kwargs: Any) -> None:
        init(adapter, *args, **kwargs)
        adapter.entry = replace(adapter.entry, part_layout=Joined())

    patch.setattr(LinearAdapter, "__init__", planted)


def _after_marks(patch: Patch, change: Callable[[Any], None]) -> None:
    from simpo_megatron.adapters import install

    mark = install.mark_parameters

    def planted(model: Any, table: Any, *, tied: bool) -> None:
        mark(model, table, tied=tied)
        for place in install.factors(model):
            change(place.parameter)

    patch.setattr(install, "mark_parameters", planted)


def experts_count_as_dense(patch: Patch) -> None:
    """OpenPipe/ART pull request 619: gradients of different experts are averaged over the ranks that hold them."""
    _after_marks(patch, lambda parameter: setattr(parameter, "allreduce", True))


def shards_count_once(patch: Patch) -> None:
    """The gradient norm leaves out the shards of all ranks but the first."""
    _after_marks(patch, lambda parameter: setattr(parameter, "tensor_model_parallel", False))


def all_experts_are_merged_with_the_first(patch: Patch) -> None:
    """Megatron-Bridge pull request 3341."""
    from simpo_megatron.adapters import merge

    delta = merge.delta
    patch.setattr(merge, "delta", lambda adapter, suffix="": delta(adapter, suffix and "0"))


# The layers, the model, the ranks and the layout in which a fault shows.
FAULTS: list[tuple[Callable[[Patch], None], str, str, int, dict[str, Any]]] = [
    (whole_factors_are_not_summed, LOCAL, "llama", 2, SP),
    (nothing_requires_a_gradient, LOCAL, "llama", 1, FULL),
    (factors_of_experts_are_not_summed, LOCAL, "mixtral", 2, SHARED),
    (layers_get_two_adapters, LOCAL, "llama", 1, {}),
    (one_layer_is_left_out, LOCAL, "llama", 1, {}),
    (q_k_v_follow_each_other, LOCAL, "llama", 1, {}),
    (experts_count_as_dense, LOCAL, "mixtral", 2, EP2),
    (shards_count_once, LOCAL, "llama", 2, SP),
    (all_experts_are_merged_with_the_first, NEWEST, "mixtral", 1, {}),
]


def run_planted(fault: Callable[[Patch], None], *args: Any) -> Any:
    """On a rank: `run_layout` with a fault; the error where the ranks differ, or the model lacks a factor."""
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        try:
            return run_layout(*args)
        except (AssertionError, ValueError) as error:
            return str(error)


@pytest.mark.parametrize(
    "pool, fault, model, world, layout",
    [
        pytest.param(kind, fault, *where, id=fault.__name__, marks=[pytest.mark.te] * (kind == NEWEST))
        for fault, kind, *where in FAULTS
    ],
    indirect=["pool"],
)
def test_a_planted_fault_is_seen(
    pool: WorkerPool, oracles: dict[str, Oracle], fault: Any, model: str, world: int, layout: Any, tmp_path: Path
) -> None:
    oracle = oracles[model]
    ranks = pool.run(world, run_planted, fault, oracle.checkpoint, oracle.folder, layout, tmp_path)
    if isinstance(ranks[0], str):
        assert ".adapter." in ranks[0]
        return
    _, metrics, gradients, _ = ranks[0]
    errors = [relative_error(gradient, oracle.gradients[name]) for name, gradient in gradients.items()]
    errors.append(abs(metrics["grad_norm"] / oracle.metrics["grad_norm"] - 1))
    merge_weights(oracle.checkpoint, factors_of(tmp_path / "adapter"), oracle.lora, tmp_path / "wanted")
    weights, merged = (tensors(tmp_path / folder) for folder in ("wanted", "merged"))
    errors += [relative_error(tensor, weights[name]) for name, tensor in merged.items()]
    assert max(errors) > 1e-2
