"""Checkpoints in Megatron-LM's directory layout, written and read by Megatron's dist_checkpointing (`torch_dist`).

    SAVE/latest_checkpointed_iteration.txt      "100", replaced last
    SAVE/iter_0000100/                          .metadata, common.pt, metadata.json, __RANK_THREAD.distcp

The tracker changes only after the new directory is complete on all ranks, so a killed or failed save leaves the previous
checkpoint as the latest one. `args` holds primitives alone, under Megatron-LM's names, for its `--load`.
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

from simpo_megatron.checkpoint.formats.torch_dist_reader import weight_keys
from simpo_megatron.checkpoint.manifest import check_manifest
from simpo_megatron.config.arguments import flat
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer import torch_adam
from simpo_megatron.trainer.engine import Engine

RELEASE = "release"  # what Megatron-LM and tools/hf_to_megatron.py write into the tracker for weights without a run
FAILURES = (Exception, CheckpointException)  # torch derives CheckpointException from BaseException
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: with the seed, all that the data order needs to go on."""

    step: int = 0
    consumed_pairs: int = 0
    num_pairs: int = 0
    tokens_crc32: int = 0
    seed: int = 0


def checkpoint_dir(root: Path, step: int) -> Path:
    """Megatron-LM's name for the checkpoint of a step."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """The step the tracker file names, None without one.

    Raises:
        UserError: the tracker does not hold a number, or its checkpoint is not complete.
    """
    tracker = root / TRACKER
    if not tracker.is_file() or release_dir(root) is not None:
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{tracker} holds {text[:40]!r}, not a step; write the number of an iter_ folder into it")
    directory = checkpoint_dir(root, int(text))
    if not (directory / "metadata.json").is_file():
        raise UserError(
            f"{directory} is not a complete checkpoint (no metadata.json); write another step into {tracker}"
        )
    return int(text)


def release_dir(root: Path) -> Path | None:
    """The folder of weights without a run, where the tracker names one: a converted checkpoint.

    Raises:
        UserError: it is not complete, or not in the torch_dist format.
    """
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text(encoding="utf-8", errors="replace").strip() != RELEASE:
        return None
    if not (root / RELEASE / "metadata.json").is_file():
        raise UserError(f"{root / RELEASE} is no complete torch_dist checkpoint (no metadata.json); convert it again")
    return root / RELEASE


def check_writable(flag: str, folder: Path) -> None:
    """Writes a probe where the folder is, or where it would be created, and removes it again.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = parent / f".write_probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}; choose a folder that can") from error


def check_new_run(save: Path | None, load: Path | None) -> None:
    """Keeps a new run from writing between the checkpoints of another.

    Raises:
        UserError: `save` holds a run and is not resumed.
    """
    if save is None or (load is not None and load.resolve() == save.resolve()):
        return
    if (save / TRACKER).exists():
        raise UserError(f"--save {save} holds another run; resume it with --load {save}, or choose a new folder")


def _metadata() -> dict[str, Any]:
    # The optimizer state must load at another data-parallel size, and the default sharding type does not.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    metadata = {**_metadata(), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {}
    for index, model in enumerate(engine.models):
        state["model" if len(engine.models) == 1 else f"model{index}"] = model.sharded_state_dict(metadata=metadata)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _rng_state() -> ShardedObject:
    """Megatron-LM's loader asks for it. Nothing here draws random numbers: no dropout, and a data order by formula."""
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
    transformer, model = engine.transformer, engine.models[0]
    names = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "normalization",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
    ]
    if transformer.num_moe_experts is not None:
        names += ["moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_grouped_gemm"]
    return Namespace(
        **flat(engine.config),
        **{name: getattr(transformer, name) for name in names},
        num_experts=transformer.num_moe_experts,
        group_query_attention=transformer.num_query_groups != transformer.num_attention_heads,
        norm_epsilon=transformer.layernorm_epsilon,
        swiglu=True,
        max_position_embeddings=model.max_sequence_length,
        position_embedding_type="rope",
        add_position_embedding=False,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        padded_vocab_size=model.vocab_size,
        consumed_train_samples=progress.consumed_pairs,
        iteration=progress.step,
        ckpt_format="torch_dist",
    )


def save(engine: Engine, root: Path, progress: Progress) -> None:
    """Writes a checkpoint and then points the tracker at it.

    Raises:
        UserError: the file system refused (full disk, no permission); the latest complete checkpoint stays the latest.
    """
    directory = checkpoint_dir(root, progress.step)
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
        dist_checkpointing.save(state, str(directory), content_metadata=_metadata())
    except FAILURES as error:
        raise _save_error(error, directory, root) from error
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            try:
                _replace_text(root / TRACKER, str(progress.step))
            except OSError as error:
                raise UserError(f"{root / TRACKER} cannot be written: {error.strerror}") from error


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _save_error(error: BaseException, directory: Path, root: Path) -> UserError:
    """Says what stopped a save, on rank 0, which gets the failures of all ranks."""
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    latest = latest_step(root)
    kept = "no checkpoint was complete yet" if latest is None else f"{checkpoint_dir(root, latest)} is still complete"
    return UserError(f"saving {directory} failed: {_reason(error)}; {kept}. Free space there, or choose another --save")


def _reason(error: BaseException) -> str:
    """What went wrong on the first rank that failed; rank 0 knows of all ranks, the others may have no details."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    return " ".join(str(failures[0] if failures else error).split())[:400] or type(error).__name__


def load(engine: Engine, root: Path, step: int) -> Progress:
    """Fills model, optimizer and scheduler from the checkpoint of a step, at any layout.

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of this model, or cannot be read.
    """
    directory = checkpoint_dir(root, step)
    with torch_adam.loadable(engine.optimizer):
        state = _load_state(engine, directory)
        for index, model in enumerate(engine.models):
            model.load_state_dict(state["model" if len(engine.models) == 1 else f"model{index}"])
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["opt_param_scheduler"])
    if "progress" not in state:
        raise UserError(f"{directory} was not saved by this program: it does not say where the data stood")
    return Progress(**state["progress"])


def load_weights(models: Sequence[torch.nn.Module], hf: HFCheckpoint, directory: Path) -> None:
    """Fills the models from a checkpoint without optimizer state, at any layout; padded vocabulary rows become zero.

    Args:
        models: of this rank, one a virtual pipeline stage.
        hf: what they were built from; a converted checkpoint must say that it was made from the same.
        directory: from `release_dir`.

    Raises:
        UserError: the checkpoint does not hold exactly the weights of this model, or cannot be read.
    """
    keys = weight_keys(directory)
    check_manifest(directory, hf, keys)
    metadata = {**_metadata(), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    state: Any = {
        name: model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, model in zip(names, models, strict=True)
    }
    loaded = _load_strictly(state, directory)
    for name, model in zip(names, models, strict=True):
        model.load_state_dict(loaded[name])


def _is_spare(key: str) -> bool:
    """What a converted checkpoint holds for the other spec: empty objects, and the second name of a norm."""
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
