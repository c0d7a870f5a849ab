"""The baseline of an objective in Megatron-LM's `pretrain()`: a number that each step hands to the next.

    chosen = carried(args, chosen, model)            # in forward_step: the objective with the baseline of this step
    note(chosen, sums)                               # after the loss of a microbatch

The statistic is reduced where Megatron's schedule finishes the gradients of a step, because all ranks are there. It is
an attribute of Megatron-LM's arguments, which every checkpoint holds. So a resumed run finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from simpo_megatron.checkpoint.folder import iteration_folder
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.errors import UserError
from simpo_megatron.metrics import reduce_metrics
from simpo_megatron.objectives import Objective

NAME = "simpo_baseline"  # in Megatron-LM's arguments
_sums: list[dict[str, Tensor]] = []  # of the microbatches of this step on this rank


def carried(args: Any, objective: Objective, model: torch.nn.Module) -> Objective:
    """The objective with the baseline of this step.

    Args:
        args: Megatron-LM's.
        objective: from the arguments.
        model: the model chunk that the schedule runs.

    Raises:
        UserError: the run is resumed from a checkpoint without a baseline.
    """
    if not objective.needs_baseline:
        return objective
    if not hasattr(args, NAME):
        setattr(args, NAME, _saved(args) if args.iteration else 0.0)
    config = get_model_config(model)
    finish = config.finalize_model_grads_func  # None in the configurations of later virtual stages
    if finish is not None and not hasattr(finish, NAME):

        def finish_and_reduce(*given: Any, **named: Any) -> None:
            finish(*given, **named)
            setattr(args, NAME, objective.next_baseline(reduce_metrics(_sums, objective.metrics)))
            _sums.clear()

        setattr(finish_and_reduce, NAME, True)
        config.finalize_model_grads_func = finish_and_reduce
    return objective.with_baseline(getattr(args, NAME))


def note(objective: Objective, sums: dict[str, Tensor]) -> None:
    """Keeps the sums of a microbatch of training; those of an evaluation have no step to come."""
    if objective.needs_baseline and torch.is_grad_enabled():
        _sums.append(dict(sums))


def _saved(args: Any) -> float:
    """The baseline in the checkpoint that the run is resumed from."""
    folder = iteration_folder(Path(args.load), args.iteration)
    content = read_torch_file(folder / "common.pt").content
    found = vars(content["args"]).get(NAME)
    if found is None:
        raise UserError(
            f"{folder} has no baseline: it was saved with another --objective; start from it with --finetune"
        )
    return float(found)
