"""The optimizer state of a checkpoint is fp32, whatever it is in memory.

with in_fp32(optimizer):
    state = optimizer.sharded_state_dict(...)       # and optimizer.load_state_dict(...)

Inside the block, Megatron reads and writes the main weights and the moments of its precision-aware optimizer as fp32
tensors on the host. So a checkpoint does not depend on --main-params-dtype, --exp-avg-dtype, --exp-avg-sq-dtype and
--optimizer-cpu-offload, and a resumed run may change them. Without the block, Megatron-Core 0.16

* writes the lower half of each main weight, which only the same dtypes read back and the fully reshardable form does
  not read back at all (`distrib_optimizer.py`, `get_parameter_state_dp_zero`);
* copies all moments to fp32 on the GPU to write the settings of the parameter groups (`FusedAdam.state_dict`);
* takes a mark of the `dp_reshardable` form for a tensor when it loads one (`padding`);
* does not hand a loaded `dp_reshardable` state to the optimizers that work on the host
  (`load_parameter_state_from_dp_reshardable`);
* writes the classes of these optimizers into the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

_READ, _WRITE, _FILL = (
    "_get_main_param_and_optimizer_states",
    "_set_main_param_and_optimizer_states",
    "load_parameter_state_from_dp_reshardable",
)
_STATE = ("param", "exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def in_fp32(optimizer: Any) -> Iterator[None]:
    """Inside the block, a precision-aware optimizer shows its state to Megatron's checkpoints in fp32.

    Other optimizers do not change.

    Args:
        optimizer: Megatron's ChainedOptimizer.
    """
    parts = [
        part
        for part in optimizer.chained_optimizers
        if part.config.use_precision_aware_optimizer and part.optimizer is not None
    ]
    for part in parts:
        # Looked up before they are replaced, so that the methods of the class run.
        setattr(part, _READ, partial(_read, part, getattr(part, _READ)))
        setattr(part, _WRITE, partial(_write, part, getattr(part, _WRITE)))
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            setattr(part, _FILL, partial(_fill, part, getattr(part, _FILL)))
            part.state_dict = partial(_without_classes, part, part.state_dict)
        else:
            part.optimizer.state_dict = partial(torch.optim.Optimizer.state_dict, part.optimizer)
    try:
        yield
    finally:
        for part in parts:
            for name in (_READ, _WRITE, _FILL, "state_dict"):
                vars(part).pop(name, None)
            vars(part.optimizer).pop("state_dict", None)


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers that Transformer Engine keeps as rounded bf16 numbers and what is missing of them.

    It cuts the 32 bits in two halves of 16. Where the lower half is negative as a number, the upper one is 1 larger
    (`multi_tensor/adam.cu`).

    Args:
        upper: bf16.
        lower: int16, of the same shape.

    >>> value = torch.tensor([1.2345678, -3.1415927])
    >>> bool((join_halves(*split_halves(value)) == value).all())
    True
    """
    high = upper.view(torch.int16).int() - (lower < 0).int()
    return ((high << 16) | (lower.int() & 0xFFFF)).view(torch.float32)


def split_halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_halves`: bf16 and int16 of the shape of `value`."""
    bits = value.contiguous().view(torch.int32)
    lower = (bits & 0xFFFF).short()
    return ((bits >> 16) + (lower < 0).int()).short().view(torch.bfloat16), lower


def _weight(part: Any, model_param: torch.nn.Parameter) -> Tensor:
    """What the optimizer updates: this rank's share of the parameter of the model, in the dtype of the model."""
    group, order = part.model_param_group_index_map[model_param]
    return part.optimizer.param_groups[group]["params"][order]


def _keeps_halves(part: Any, weight: Tensor) -> bool:
    state = part.optimizer.state.get(weight, {})
    return "master_param" in state and state["master_param"].dtype == torch.int16


def _read(part: Any, read: Any, model_param: torch.nn.Parameter) -> dict[str, Tensor]:
    tensors, weight = read(model_param), _weight(part, model_param)
    if _keeps_halves(part, weight):
        tensors["param"] = join_halves(weight.detach(), tensors["param"])
    return {name: tensors[name].detach().to("cpu", torch.float32) for name in _STATE}


def _write(part: Any, write: Any, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    weight = _weight(part, model_param)
    values = {name: tensors[name].float() for name in _STATE}
    if isinstance(part.optimizer, HybridDeviceOptimizer):  # it keeps these tensors, and places them itself
        values = {name: value.clone() for name, value in values.items()}  # they may be parts of larger ones
    else:
        values = {name: value.to(weight.device) for name, value in values.items()}
    if _keeps_halves(part, weight):
        upper, values["param"] = split_halves(values["param"])
        weight.data.copy_(upper)
    write(model_param, values)


def _fill(part: Any, fill: Any, state_dict: dict[str, Any]) -> None:
    fill(state_dict)
    part.optimizer._sync_hdo_state_to_sub_optimizers()


def _without_classes(part: Any, state_dict: Any) -> dict[str, Any]:
    """Megatron's state_dict, without what its parameter groups say about the place of the state."""
    found = state_dict()
    for group in found["optimizer"]["param_groups"]:
        for name in part.optimizer.defaults.keys() - {"lr", "weight_decay", "betas", "eps", "bias_correction"}:
            group.pop(name, None)
    return found
