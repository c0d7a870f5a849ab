"""Checkpoints in Megatron-LM's directory layout, written and read by Megatron's dist_checkpointing (`torch_dist`).

    SAVE/latest_checkpointed_iteration.txt      the tracker: "100"; replaced last
    SAVE/iter_0000100/                          .metadata, common.pt, metadata.json, __RANK_THREAD.distcp

The tracker is replaced only after the new folder is complete on all ranks. So after a save that failed or was killed,
the previous checkpoint is still the latest one. The `args` in common.pt are primitives under Megatron-LM's names, which
its `--load` reads; `checkpoint/saved_args.py` makes them.
"""

from __future__ import annotations

import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from simpo_megatron.checkpoint.folder import TRACKER, iteration_folder, latest_step, write_tracker
from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA
from simpo_megatron.checkpoint.manifest import check_manifest
from simpo_megatron.checkpoint.saved_args import megatron_args, namespace
from simpo_megatron.config.arguments import flat
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer import torch_adam
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.progress import Progress

_NO_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state")  # first words of keys of a run
FAILURES = (Exception, CheckpointException)  # torch derives CheckpointException from BaseException


def _sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    metadata = {**CONTENT_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {}
    for index, model in enumerate(engine.models):
        state["model" if len(engine.models) == 1 else f"model{index}"] = model.sharded_state_dict(metadata=metadata)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _rng_state() -> ShardedObject:
    """The random state that Megatron-LM's loader asks for.

    Training here draws no random numbers: there is no dropout, and the data order is a formula.
    """
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tracker.get_states(),
    }
    return ShardedObject(
        "rng_state",
        [state],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _args(engine: Engine, progress: Progress) -> Namespace:
    """The run's settings and the architecture, under the names that Megatron-LM's loader reads."""
    config, transformer = engine.config, engine.transformer
    architecture = megatron_args(engine.hf.architecture, config.model.make_vocab_size_divisible_by)
    if transformer.num_moe_experts is not None:
        architecture["moe_grouped_gemm"] = transformer.moe_grouped_gemm
    return namespace(
        {**flat(config), **architecture},
        padded_vocab_size=engine.models[0].vocab_size,
        consumed_train_samples=progress.consumed_pairs,
        iteration=progress.step,
    )


def save(engine: Engine, root: Path, progress: Progress) -> None:
    """Writes a checkpoint and then points the tracker at it. Every rank calls it.

    Args:
        engine: with the model, the optimizer and the schedule.
        root: the folder of --save.
        progress: where the run stands.

    Raises:
        UserError: a file cannot be written (full disk, no permission); the latest complete checkpoint stays the latest.
    """
    directory = iteration_folder(root, progress.step)
    engine.sync_parameters()
    state = {
        **_sharded_state(engine, is_loading=False),
        "args": _args(engine, progress),
        "checkpoint_version": 3.0,
        "iteration": progress.step,
        "progress": asdict(progress),
        "opt_param_scheduler": engine.scheduler.state_dict(),
        "rng_state": _rng_state(),
        "num_floating_point_operations_so_far": 0,
    }
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed while it saved this step
                directory.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{directory} cannot be created: {error.strerror}") from error
    try:
        dist_checkpointing.save(state, str(directory), content_metadata=CONTENT_METADATA)
    except FAILURES as error:
        raise _save_error(error, directory, root) from error
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            try:
                write_tracker(root, progress.step)
            except OSError as error:
                raise UserError(f"{root / TRACKER} cannot be written: {error.strerror}") from error


def _save_error(error: BaseException, directory: Path, root: Path) -> UserError:
    """The error of a failed save; rank 0, which knows the failures of all ranks, removes the unfinished folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    latest = latest_step(root)
    kept = "no checkpoint was complete yet" if latest is None else f"{iteration_folder(root, latest)} is still complete"
    return UserError(f"{cannot_write(f'--save: {directory}', _first(error), 'choose another --save')}; {kept}")


def _first(error: BaseException) -> BaseException:
    """The failure of the first rank that failed. Ranks other than 0 may have no details."""
    return next((failure for failure, _ in getattr(error, "failures", {}).values()), error)


def _reason(error: BaseException) -> str:
    return " ".join(str(_first(error)).split())[:400] or type(error).__name__


def load(engine: Engine, directory: Path) -> None:
    """Fills model, optimizer and schedule from the checkpoint of a run. The layout may differ from that of the save.

    Learning rates, weight decay and Adam's constants are those of the engine, unless its configuration asks for the
    schedule of the checkpoint.

    Args:
        engine: to fill.
        directory: the checkpoint (`SavedRun.folder`).

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of this model, or cannot be read.
    """
    # Megatron's parameter groups hold these values too. They come back with the checkpoint and win over the scheduler.
    given = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in engine.optimizer.param_groups
    ]
    with torch_adam.loadable(engine.optimizer):
        state = _load_strictly(_sharded_state(engine, is_loading=True), directory)
        for index, model in enumerate(engine.models):
            _fill(model, state["model" if len(engine.models) == 1 else f"model{index}"])
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["opt_param_scheduler"])
    for group, values in zip(engine.optimizer.param_groups, given, strict=True):
        group.update(values, max_lr=engine.scheduler.max_lr, min_lr=engine.scheduler.min_lr)
    engine.scheduler.step(increment=0)


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
    metadata = {**CONTENT_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    state: Any = {
        name: model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, model in zip(names, models, strict=True)
    }
    loaded = _load_strictly(state, directory, weights_alone=True)
    for name, model in zip(names, models, strict=True):
        _fill(model, loaded[name])


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


def _is_spare(key: str) -> bool:
    """Keys of a checkpoint that a model may leave unread.

    They are the empty `_extra_state` of Transformer Engine's layers, and the second name of the norm before experts,
    which a converted checkpoint has.
    """
    return "_extra_state" in key or key.endswith((_NORM, _OLD_NORM))


def _load_strictly(sharded_state: Any, directory: Path, weights_alone: bool = False) -> dict[str, Any]:
    try:
        _ask_for_saved_names(sharded_state, directory)
        loaded = dist_checkpointing.load(sharded_state, str(directory), strict=StrictHandling.RETURN_ALL)
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


def _fill(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Fills a model, which keeps the extra states that the checkpoint lacks."""
    own = model.state_dict()
    model.load_state_dict({**{name: own[name] for name in own if name.endswith("_extra_state")}, **weights})
