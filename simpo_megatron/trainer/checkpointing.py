"""Checkpoints in Megatron-LM's directory layout, written and read by Megatron's dist_checkpointing (`torch_dist`).

    SAVE/latest_checkpointed_iteration.txt      the tracker: "100"; replaced last
    SAVE/iter_0000100/                          .metadata, common.pt, metadata.json, __RANK_THREAD.distcp

The tracker is replaced only after the new folder is complete on all ranks. So after a save that failed or was killed,
the previous checkpoint is still the latest one. The `args` in common.pt are primitives under Megatron-LM's names, which
its `--load` reads; `checkpoint/megatron_args.py` makes them.
"""

from __future__ import annotations

import os
import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from simpo_megatron.checkpoint.folder import TRACKER, iteration_folder, latest_step, write_tracker
from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA
from simpo_megatron.checkpoint.manifest import check_manifest
from simpo_megatron.checkpoint.saved_args import megatron_args, namespace
from simpo_megatron.config.arguments import flat
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer import torch_adam
from simpo_megatron.trainer.engine import Engine

FAILURES = (Exception, CheckpointException)  # torch derives CheckpointException from BaseException


@dataclass(frozen=True)
class Progress:
    """Where a run stands. The data order is a function of the seed and the position, so no more state is needed.

    Attributes:
        step: optimizer steps taken.
        consumed_pairs: pairs trained on, repeats counted.
        num_pairs: pairs of the training data.
        tokens_crc32: fingerprint of the training data (`Pairs.fingerprint`).
        seed: of the data order.
    """

    step: int = 0
    consumed_pairs: int = 0
    num_pairs: int = 0
    tokens_crc32: int = 0
    seed: int = 0


def check_writable(flag: str, folder: Path) -> None:
    """Checks that a folder can be written to, by a probe file in it or in its nearest existing parent.

    Args:
        flag: that names the folder, for the error.
        folder: perhaps not there yet; it is not created.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = parent / f".write_probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}; choose a folder that can") from error


def check_new_run(save: Path | None, load: Path | None) -> None:
    """Keeps a new run from writing into the folder of another run.

    Args:
        save: the folder of --save.
        load: the folder of --load.

    Raises:
        UserError: `save` holds a run, and this run does not resume it.
    """
    if save is None or (load is not None and load.resolve() == save.resolve()):
        return
    if (save / TRACKER).exists():
        raise UserError(f"--save {save} holds another run; resume it with --load {save}, or choose a new folder")


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
                directory.mkdir(parents=True, exist_ok=True)
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
    return UserError(f"saving {directory} failed: {_reason(error)}; {kept}; free space there, or choose another --save")


def _reason(error: BaseException) -> str:
    """What went wrong on the first rank that failed. Ranks other than 0 may have no details."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    return " ".join(str(failures[0] if failures else error).split())[:400] or type(error).__name__


def load(engine: Engine, root: Path, step: int) -> Progress:
    """Fills model, optimizer and schedule from the checkpoint of a step. The layout may differ from that of the save.

    Args:
        engine: to fill.
        root: the folder of --load.
        step: from `setup.step_to_resume`.

    Returns:
        Where the saved run stood.

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of this model, or cannot be read.
    """
    directory = iteration_folder(root, step)
    with torch_adam.loadable(engine.optimizer):
        state = _load_state(engine, directory)
        for index, model in enumerate(engine.models):
            model.load_state_dict(state["model" if len(engine.models) == 1 else f"model{index}"])
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["opt_param_scheduler"])
    if "progress" not in state:
        raise UserError(
            f"{directory} was not saved by this program: it has no position in the data; start from its weights instead"
        )
    return Progress(**state["progress"])


def load_weights(models: Sequence[torch.nn.Module], hf: HFCheckpoint, directory: Path) -> None:
    """Fills the models from a checkpoint without optimizer state, in any layout. Padded vocabulary rows become zero.

    Args:
        models: of this rank, one for each virtual pipeline stage.
        hf: the checkpoint that they were built from; a converted checkpoint must have been made from the same.
        directory: from `release_folder`.

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
    loaded = _load_strictly(state, directory)
    for name, model in zip(names, models, strict=True):
        model.load_state_dict(loaded[name])


def _is_spare(key: str) -> bool:
    """Keys that only the other layer spec asks for; they are ignored on load.

    They are Transformer Engine's empty `_extra_state` and the second name of the norm before experts.
    """
    return "_extra_state" in key or key.endswith("layers.pre_mlp_layernorm.weight")


def _load_state(engine: Engine, directory: Path) -> dict[str, Any]:
    try:
        saved = dist_checkpointing.load_common_state_dict(str(directory))["args"].use_distributed_optimizer
    except (*FAILURES, AttributeError, KeyError) as error:
        raise UserError(f"{directory}/common.pt cannot be read ({_reason(error)}); resume from another step") from error
    if saved != engine.config.parallel.use_distributed_optimizer:
        raise UserError(
            f"{directory} was saved {'with' if saved else 'without'} the distributed optimizer; resume with "
            f"{'--use-distributed-optimizer' if saved else '--no-use-distributed-optimizer'}"
        )
    return _load_strictly(_sharded_state(engine, is_loading=True), directory)


def _load_strictly(sharded_state: Any, directory: Path) -> dict[str, Any]:
    try:
        loaded = dist_checkpointing.load(sharded_state, str(directory), strict=StrictHandling.RETURN_ALL)
    except FAILURES as error:
        raise UserError(f"{directory} does not fit this model or cannot be read: {_reason(error)}") from error
    state: Any
    state, extra, absent = loaded
    extra = {key for key in extra if not _is_spare(key)}
    for keys, fault in ((absent, "lacks"), (extra, "also holds")):
        if names := sorted(key for key in keys if not key.startswith("rng_state")):
            raise UserError(f"{directory} {fault} {', '.join(names[:5])} ({len(names)} in all): it is of another model")
    return state
