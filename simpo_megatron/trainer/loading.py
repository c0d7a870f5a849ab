"""Reads checkpoints: a run that goes on, or weights alone. `checkpointing.py` writes them.

Each data-parallel rank reads a part of what its group needs, and sends it to the others
(`FullyParallelLoadStrategyWrapper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling

from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA
from simpo_megatron.checkpoint.manifest import check_manifest
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_table import SEPARATE_NORMS
from simpo_megatron.trainer import torch_adam
from simpo_megatron.trainer.checkpointing import FAILURES, first_failure, model_names, sharded_models, sharded_state
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.full_precision import in_fp32
from simpo_megatron.trainer.optimizer_format import check_buckets
from simpo_megatron.trainer.resume import DP_RESHARDABLE

_NO_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state")  # first words of keys of a run


def load(engine: Engine, directory: Path) -> None:
    """Fills model, optimizer and schedule from the checkpoint of a run.

    The layout may differ from that of the save where the form of the optimizer state allows it (`optimizer_format.py`).
    Learning rates, weight decay and Adam's constants are those of the engine, unless its configuration asks for the
    schedule of the checkpoint. A checkpoint without optimizer state fills the model and the schedule alone.

    Args:
        engine: to fill.
        directory: the checkpoint (`SavedRun.folder`).

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of this model, its optimizer state does not fit the
            layout, or it cannot be read.
    """
    # Megatron's parameter groups hold these values too. They come back with the checkpoint and win over the scheduler.
    given = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in engine.optimizer.param_groups
    ]
    common = _read_common(directory)
    content = {**CONTENT_METADATA, **(common.get("content_metadata") or {})}
    content["distrib_optim_fully_reshardable_mem_efficient"] = False  # it says how to gather, and nothing is gathered
    if not holds_optimizer(common):
        state = _load_strictly(sharded_models(engine.models, content), directory)
        _fill_all(engine.models, state)
        engine.optimizer.reload_model_params()
    else:
        with torch_adam.loadable(engine.optimizer), in_fp32(engine.optimizer):
            if content["distrib_optim_sharding_type"] == DP_RESHARDABLE:
                check_buckets(engine.optimizer, common, directory, engine.hf)
            state = _load_strictly(sharded_state(engine, content, is_loading=True), directory)
            _fill_all(engine.models, state)
            with torch.no_grad():  # which Megatron sets itself for the other form alone
                engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["opt_param_scheduler"])
    for group, values in zip(engine.optimizer.param_groups, given, strict=True):
        group.update(values, max_lr=engine.scheduler.max_lr, min_lr=engine.scheduler.min_lr)
    engine.scheduler.step(increment=0)


def holds_optimizer(common: dict[str, Any]) -> bool:
    """Whether the checkpoint with this common.pt holds the optimizer state: no --no-save-optim when it was saved."""
    return getattr(common.get("args"), "save_optim", True)


def _read_common(directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load_common_state_dict(str(directory))
    except FAILURES as error:
        raise UserError(f"{directory} cannot be read: {_reason(error)}") from error


def load_weights(models: Sequence[torch.nn.Module], hf: HFCheckpoint, directory: Path) -> None:
    """Fills the models from the weights of a checkpoint, in any layout. Padded vocabulary rows become zero.

    Args:
        models: of this rank, one for each virtual pipeline stage.
        hf: the checkpoint that they were built from; a converted checkpoint must have been made from the same.
        directory: from `resume.weights_folder`. The optimizer state and the position of a run are left out.

    Raises:
        UserError: the checkpoint does not hold exactly the weights of this model, or cannot be read.
    """
    check_manifest(directory, hf)
    _fill_all(models, _load_strictly(sharded_models(models, CONTENT_METADATA), directory, weights_alone=True))


# The norm before experts: its name in checkpoints, and the one that runs of Megatron's plain layers wrote in 0.1.
_NORM, _OLD_NORM = "layers.pre_mlp_layernorm.weight", "layers.mlp.linear_fc1.layer_norm_weight"


def _ask_for_saved_names(sharded_state: Any, directory: Path) -> None:
    """Asks for the norm before experts by its old name where the checkpoint has that one alone."""
    wanted = [value for value in nested_values(sharded_state) if _NORM in getattr(value, "key", "")]
    saved = dist_checkpointing.load_tensors_metadata(str(directory)) if wanted else {}
    for tensor in wanted:
        old = tensor.key.replace(_NORM, _OLD_NORM)
        if tensor.key not in saved and old in saved:
            tensor.key = old


_NORMS = tuple(f".{name}" for name in (*SEPARATE_NORMS, *SEPARATE_NORMS.values()))


def _is_spare(key: str) -> bool:
    """Keys of a checkpoint that a model may leave unread.

    They are the empty `_extra_state` of Transformer Engine's layers, and the second name of a norm that is a module of
    its own, which a converted checkpoint has.
    """
    return "_extra_state" in key or key.endswith(_NORMS)


def _load_strictly(sharded_state: Any, directory: Path, weights_alone: bool = False) -> dict[str, Any]:
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        _ask_for_saved_names(sharded_state, directory)
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(directory)), group)
        loaded = dist_checkpointing.load(sharded_state, str(directory), strategy, strict=StrictHandling.RETURN_ALL)
    except FAILURES as error:
        raise UserError(f"{directory} does not fit this model or cannot be read: {_reason(error)}") from error
    state: Any
    state, extra, absent = loaded
    ignored = _NO_WEIGHTS if weights_alone else ("rng_state",)
    extra = {key for key in extra if not _is_spare(key) and not key.startswith(ignored)}
    # Without FP8 an extra state is empty. Megatron's plain norms write none.
    absent = {key for key in absent if "_extra_state" not in key}
    for keys, fault in ((absent, "lacks"), (extra, "also holds")):
        if names := sorted(key for key in keys if not key.startswith(ignored)):
            raise UserError(f"{directory} {fault} {', '.join(names[:5])} ({len(names)} in all): it is of another model")
    return state


def _reason(error: BaseException) -> str:
    return " ".join(str(first_failure(error)).split())[:400] or type(error).__name__


def _fill_all(models: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    """Fills the models, which keep the extra states that the checkpoint lacks."""
    for name, model in zip(model_names(models), models, strict=True):
        own = model.state_dict()
        extra = {key: own[key] for key in own if key.endswith("_extra_state")}
        model.load_state_dict({**extra, **state[name]})
