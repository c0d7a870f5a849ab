"""Writes checkpoints in Megatron-LM's directory layout, by Megatron's dist_checkpointing (`torch_dist`).

    SAVE/latest_checkpointed_iteration.txt      the tracker: "100"; replaced last
    SAVE/iter_0000100/                          .metadata, common.pt, metadata.json, __RANK_THREAD.distcp
    SAVE/.unfinished-iter_0000200-NAME/         a checkpoint that is being written

with CheckpointWriter(engine) as writer:
    writer.save(root, progress)                 # each time one is due
    writer.poll()                               # after each step

A checkpoint is written under a name of its own, by processes that are forked from the ranks. When the last byte of all
ranks is on the disk, rank 0 renames the folder, then replaces the tracker, then deletes checkpoints that need not stay
(`retention.py`). So a save that failed or was killed leaves the previous checkpoint the latest one, and no folder
`iter_*` is ever incomplete. Processes that outlive a killed run cannot write into a checkpoint of the next run.

The data-parallel ranks share the writing (`FullyParallelSaveStrategyWrapper`). The `args` in common.pt are primitives
under Megatron-LM's names, which its `--load` reads; `checkpoint/saved_args.py` makes them.
"""

from __future__ import annotations

import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from simpo_megatron.checkpoint.folder import TRACKER, iteration_folder, latest_step, write_tracker
from simpo_megatron.checkpoint.saved_args import megatron_args, namespace
from simpo_megatron.config.arguments import flat
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import sync
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer.console import print_line
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.full_precision import in_fp32
from simpo_megatron.trainer.optimizer_format import BUCKETS, bucket_checksums, content_metadata
from simpo_megatron.trainer.progress import Progress
from simpo_megatron.trainer.retention import UNFINISHED, delete, delete_old, remove_leftovers
from simpo_megatron.trainer.writing import start_server, undisturbed

FAILURES = (Exception, CheckpointException)  # torch derives CheckpointException from BaseException


def model_names(models: Sequence[Any]) -> list[str]:
    """Megatron-LM's names of the models of a rank in the state of a checkpoint."""
    return ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]


def sharded_models(models: Sequence[Any], content: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of the models of this rank.

    Args:
        models: one for each virtual pipeline stage.
        content: Megatron's `content_metadata` of the checkpoint.
    """
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in zip(model_names(models), models, strict=True)
    }


def sharded_state(engine: Engine, content: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """The sharded state of models and optimizer; see `sharded_models`. Saving may gather (`optimizer_format.py`)."""
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = sharded_models(engine.models, content)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _rng_state() -> ShardedObject:
    """The random state that Megatron-LM's loader asks for.

    Training here goes on without it: the data order and the masks of --lora-dropout are functions of seed and position.
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


def _whole_state(engine: Engine, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that a checkpoint holds, and its `content_metadata`."""
    content = content_metadata(engine.config, engine.optimizer)
    common = {
        "args": _args(engine, progress),
        "checkpoint_version": 3.0,
        "iteration": progress.step,
        "progress": asdict(progress),
        "opt_param_scheduler": engine.scheduler.state_dict(),
        "num_floating_point_operations_so_far": 0,
    }
    if not engine.config.checkpoint.save_optim:
        return {**sharded_models(engine.models, content), **common}, content
    common |= {"rng_state": _rng_state(), BUCKETS: bucket_checksums(engine.optimizer)}
    with in_fp32(engine.optimizer):
        return {**sharded_state(engine, content, is_loading=False), **common}, content


class CheckpointWriter:
    """Writes the checkpoints of a run. As a context, it waits at the end for the one that is being written.

    Every rank calls every method. On an error that is not of all ranks (no UserError), and at a signal that ends the
    program, the context does not wait: the checkpoint that is being written never becomes one.

    Args:
        engine: with the model, the optimizer and the schedule. Its settings say what is saved, whether the run waits
            for the disk (--async-save), and which checkpoints stay.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue = AsyncCallsQueue()
        self._writing: tuple[Path, Path] | None = None  # the unfinished folder and the root

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, UserError):
            self.drain()
        else:
            for call in self._queue.async_calls:
                call.async_caller.close(abort=True)

    def save(self, root: Path, progress: Progress) -> None:
        """Starts to write a checkpoint, after the one before is complete. Without --async-save it waits for the disk.

        With --async-save it returns when the state has been copied to the host. On a CPU nothing is copied: the writing
        processes keep the memory pages as they were at the fork.

        Args:
            root: the folder of --save.
            progress: where the run stands.

        Raises:
            UserError: a file cannot be written (full disk, no permission); the latest complete checkpoint stays the
                latest.
        """
        self.drain()
        self._engine.sync_parameters()
        state, content = _whole_state(self._engine, progress)
        name = iteration_folder(root, progress.step).name
        folder = root / f"{UNFINISHED}{name}-{progress.checkpoint[:8]}"
        self._writing = (folder, root)
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                try:
                    remove_leftovers(root)
                    folder.mkdir(parents=True)
                except OSError as error:
                    raise UserError(f"{folder} cannot be created: {error.strerror}") from error
        start_server()
        group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
        try:
            request = dist_checkpointing.save(
                state,
                str(folder),
                strategy,
                async_sharded_save=True,
                # The ranks that gather nothing have no `param_state`; Megatron would log that as a difference.
                preprocess_common_before_consistancy_check=lambda common: {**common, "optimizer": None},
                content_metadata=content,
            )
            assert request is not None  # as always with `async_sharded_save`
            request.add_finalize_fn(partial(self._complete, folder, root, progress.step))
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(undisturbed, request.async_fn))
            self._queue.schedule_async_request(request)
        except FAILURES as error:
            raise self._error(error) from error
        if not self._engine.config.checkpoint.async_save:
            self.drain()

    def poll(self) -> None:
        """Completes the checkpoint that is being written, if all ranks have written theirs.

        Collectives: one all-reduce while a checkpoint is being written, none else.

        Raises:
            UserError: as for `save`.
        """
        self._finalize(wait=False)

    def drain(self) -> None:
        """Waits for the checkpoint that is being written, and completes it.

        Raises:
            UserError: as for `save`.
        """
        self._finalize(wait=True)

    def _finalize(self, wait: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except UserError:
            raise
        except FAILURES as error:
            raise self._error(error) from error

    def _complete(self, folder: Path, root: Path, step: int) -> None:
        """Makes a checkpoint of the folder. Megatron calls it on all ranks when all have written their files."""
        with raise_on_all_ranks():
            if dist.get_rank() != 0:
                return
            final = iteration_folder(root, step)
            try:
                for path in (folder / "common.pt", folder / "metadata.json", folder):
                    sync(path)  # the writers have done so with the tensors
                if final.exists():  # of a run that went on from an earlier checkpoint
                    delete(final)
                folder.rename(final)
                write_tracker(root, step)
            except OSError as error:
                raise cannot_write(
                    f"--save: {error.filename or root / TRACKER}", error, "choose another --save"
                ) from error
            try:
                delete_old(root, step, self._engine.config.checkpoint)
            except OSError as error:
                print_line(f"warning: {error.filename} cannot be deleted: {error.strerror}; delete it")

    def _error(self, error: BaseException) -> UserError:
        """The error of a failed save; rank 0, which knows the failures of all ranks, removes the unfinished folder."""
        assert self._writing is not None
        folder, root = self._writing
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        latest = latest_step(root)
        kept = (
            "no checkpoint was complete yet"
            if latest is None
            else f"{iteration_folder(root, latest)} is still complete"
        )
        return UserError(f"{cannot_write(f'--save: {folder}', first_failure(error), 'choose another --save')}; {kept}")


def first_failure(error: BaseException) -> BaseException:
    """The failure of the first rank that failed. Ranks other than 0 may have no details."""
    return next((failure for failure, _ in getattr(error, "failures", {}).values()), error)
