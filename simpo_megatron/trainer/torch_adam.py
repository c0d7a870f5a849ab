"""Loads Megatron's optimizer checkpoints into torch's Adam, which Megatron uses without Apex and Transformer Engine.

torch's Adam keeps a `step` tensor for each parameter; the other two keep one for each group. Megatron-Core 0.16 saves
`step` correctly, but loads it wrongly in three ways. This module works around them:

* The loader looks for `step` before the first optimizer step has created it.
* It asks the saved state of each parameter for a `step` that is not there (`distrib_optimizer.py`,
  `_set_main_param_and_optimizer_states`).
* It hands one tensor to all parameters, which then counts every step once for each parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def loadable(optimizer: Any) -> Iterator[None]:
    """Inside the block, a checkpoint can be loaded into the optimizer. The fused Adams need no change and get none.

    Args:
        optimizer: Megatron's ChainedOptimizer.
    """
    own = [
        part
        for part in optimizer.chained_optimizers
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]
    for part in own:
        _allocate(part.optimizer)
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = _keeping_step(part)
    yield
    for part in own:
        part.__dict__.pop("_set_main_param_and_optimizer_states", None)
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _allocate(adam: torch.optim.Optimizer) -> None:
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        adam.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }


def _keeping_step(part: Any) -> Any:
    fill = part._set_main_param_and_optimizer_states

    def fill_but_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        fill(model_param, {**tensors, "step": state["step"].clone()})

    return fill_but_step
