"""Bytes of a training checkpoint, how many of them a run writes, and whether the disk has room for one.

A checkpoint holds every parameter once, in any layout:

    weights           2 bytes a parameter in bf16, 4 in fp32
    optimizer state   Adam's two moments and a copy of the weight, in fp32: 12 bytes a trained parameter. An fp32 run
                      without the distributed optimizer has no copy: 8 bytes

Not counted are 1 to 2 KiB for every tensor that a rank writes. `save_host_bytes` says what a save takes of the host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simpo_megatron.disk import existing_folder, free_bytes, human
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.parallel.stages import VOCAB_DIVISOR
from simpo_megatron.planning.parameters import stage_parameters

if TYPE_CHECKING:
    from simpo_megatron.config.checkpoint import CheckpointConfig
    from simpo_megatron.config.run import Config


_GATHERED = 3  # measured by tests/trainer/test_save_memory.py


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint.

    Attributes:
        weights: of the model, with the padded rows of the vocabulary.
        optimizer: the state of the optimizer.
    """

    weights: int
    optimizer: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.optimizer

    def __str__(self) -> str:
        return f"{human(self.total)} (weights {human(self.weights)}, optimizer state {human(self.optimizer)})"


def checkpoint_size(
    architecture: Architecture,
    *,
    bf16: bool = True,
    distributed_optimizer: bool = True,
    vocabulary_multiple: int = VOCAB_DIVISOR,
    table: Sequence[WeightEntry] | None = None,
) -> CheckpointSize:
    """The bytes of a checkpoint of a run.

    Args:
        architecture: the model.
        bf16: else fp32.
        distributed_optimizer: `--use-distributed-optimizer`.
        vocabulary_multiple: the rows of the vocabulary are padded to a multiple of this:
            `--make-vocab-size-divisible-by` times the tensor-parallel size.
        table: the weight table; None for that of the architecture.
    """
    whole = layout_arguments(ParallelConfig(), architecture.num_layers)
    [held] = stage_parameters(architecture, whole, vocabulary_multiple, table)
    state = 12 if bf16 or distributed_optimizer else 8
    return CheckpointSize((2 if bf16 else 4) * held.total, state * held.trained)


def checkpoints_of(steps: int, interval: int | None, done: int = 0) -> int:
    """How many checkpoints a run writes: every `interval` steps (None: never) and at its end.

    Args:
        steps: of the whole run.
        interval: `--save-interval`.
        done: steps that were taken before the run was resumed.

    >>> checkpoints_of(10, 4), checkpoints_of(8, 4), checkpoints_of(10, None), checkpoints_of(10, 4, done=4)
    (3, 2, 1, 2)
    """
    if done >= steps:
        return 0
    whole = 0 if interval is None else steps // interval - done // interval
    return whole + (interval is None or steps % interval > 0)


def checkpoints_held(settings: CheckpointConfig, steps: int, count: int) -> int:
    """How many of its checkpoints a run has on the disk at most: an old one is deleted after a newer one is complete.

    Args:
        settings: with --keep-last, --keep-best and --save-retain-interval.
        steps: of the whole run.
        count: checkpoints that it writes.

    >>> from simpo_megatron.config.checkpoint import CheckpointConfig
    >>> checkpoints_held(CheckpointConfig(save=Path("run"), keep_last=2), 100, 10)
    3
    """
    if settings.keep_last is None and settings.save_retain_interval is None:
        return count
    retained = 0 if settings.save_retain_interval is None else steps // settings.save_retain_interval
    return min(count, retained + (settings.keep_last or 1) + (settings.keep_best is not None) + 1)


def save_host_bytes(
    size: CheckpointSize,
    gpus: int,
    model_parallel: int,
    node: int = 8,
    fully_reshardable: bool = False,
    offloaded: float = 0.0,
) -> int:
    """Host memory that a save takes on the node that needs most, above what the processes hold anyway.

    By default every rank copies its share of the checkpoint to the host. With --dist-ckpt-optim-fully-reshardable,
    rank 0 of each data-parallel group gathers the state of its tensor and pipeline shard in one buffer, and copies the
    parameters out of it: `_GATHERED` times the state.

    Args:
        size: of a checkpoint.
        gpus: of the run, one rank each.
        model_parallel: tensor- times pipeline-parallel size.
        node: GPUs of a node.
        fully_reshardable: the form of the optimizer state.
        offloaded: share of the optimizer state that is in host memory anyway, which is not copied.
    """
    here = min(node, gpus)
    if not fully_reshardable:
        return (size.weights + int(size.optimizer * (1 - offloaded))) * here // gpus
    gathering = min(here, model_parallel)  # ranks of a node that gather, at most
    return size.weights * here // gpus + _GATHERED * size.optimizer * gathering // model_parallel


@dataclass(frozen=True)
class DiskUse:
    """What a run writes, compared with the space that is free.

    Attributes:
        lines: about the checkpoints; none where the run writes none.
        missing: a sentence for every disk without room for one checkpoint and the exported model.
        warnings: a sentence where the disk has room for one checkpoint, but not for all of the run.
    """

    lines: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Write:
    """Something that a run writes `count` times; at least one must fit."""

    flag: str
    folder: Path
    what: str
    size: int
    count: int = 1


def check_disk(config: Config, architecture: Architecture, steps: int | None, done: int = 0) -> list[str]:
    """Makes sure, before the first step of a run, that the disk holds a checkpoint and the exported model.

    Args:
        config: of the run.
        architecture: its model.
        steps: of the whole run; None where they are not known yet.
        done: steps that were taken before the run was resumed.

    Returns:
        Lines about the checkpoints; none where the run writes none.

    Raises:
        UserError: the disk has no room.
    """
    use = disk_use(config, architecture, steps, done)
    for sentence in use.missing:
        raise UserError(sentence)
    return [*use.lines, *(f"warning: {text}" for text in use.warnings)]


def disk_use(config: Config, architecture: Architecture, steps: int | None, done: int = 0) -> DiskUse:
    """Compares what a run writes with the space that is free; arguments as for `check_disk`."""
    save, export, writes, lines = config.checkpoint.save, config.model.export_hf, [], []
    count = None if steps is None else checkpoints_of(steps, config.checkpoint.save_interval, done)
    if save is not None and count != 0:
        size = checkpoint_size(
            architecture,
            bf16=config.train.bf16,
            distributed_optimizer=config.parallel.use_distributed_optimizer,
            vocabulary_multiple=config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size,
        )
        if not config.checkpoint.save_optim:
            size = replace(size, optimizer=0)
        held = 1 if count is None or steps is None else checkpoints_held(config.checkpoint, steps, count)
        writes.append(_Write("--save", save, "a checkpoint", size.total, held))
        lines.append(_describe(size, count, config.checkpoint.save_interval, save))
    if export is not None:
        model = architecture.num_parameters * (2 if config.train.bf16 else 4)
        writes.append(_Write("--export-hf", export, "the exported model", model))
    disks: dict[int, list[_Write]] = {}
    for write in writes:
        disks.setdefault(os.stat(existing_folder(write.folder)).st_dev, []).append(write)
    missing = [sentence for disk in disks.values() if (sentence := _missing(disk))]
    warnings = [] if missing else [sentence for disk in disks.values() if (sentence := _too_many(disk))]
    return DiskUse(tuple(lines), tuple(missing), tuple(warnings))


def _describe(size: CheckpointSize, count: int | None, interval: int | None, save: Path) -> str:
    if count is None:
        written = "one at the end" + ("" if interval is None else f" and one every {interval} steps")
    else:
        written = f"this run writes {count}, {human(count * size.total)} in all"
    return f"a checkpoint takes {size}; {written}; {human(free_bytes(save))} are free in {save}"


def _missing(disk: list[_Write]) -> str | None:
    """The sentence for a disk that does not hold one of everything."""
    needed, free = sum(write.size for write in disk), free_bytes(disk[0].folder)
    if needed <= free:
        return None
    if len(disk) == 1:
        [only] = disk
        return (
            f"{only.flag} {only.folder}: {only.what} takes {human(needed)}, but only {human(free)} are free; free "
            f"space there, or choose another {only.flag}"
        )
    folders = " and ".join(f"{write.flag} {write.folder}" for write in disk)
    return (
        f"{folders} are on one disk: {' and '.join(write.what for write in disk)} take {human(needed)}, but only "
        f"{human(free)} are free; free space there, or choose another disk for one of them"
    )


def _too_many(disk: list[_Write]) -> str | None:
    """The sentence for a disk that does not hold all checkpoints; the first of its writes are they, if it has any."""
    first, *others = disk
    needed, free = sum(write.size * write.count for write in disk), free_bytes(first.folder)
    if needed <= free:
        return None
    room = (free - sum(write.size for write in others)) // first.size
    beside = "".join(f" beside {write.what}" for write in others)
    return (
        f"the disk of {first.flag} {first.folder} has room for {room} of the {first.count} checkpoints of this run"
        f"{beside}: {human(needed)} are needed, {human(free)} are free; free space in time, raise --save-interval, or "
        "delete old ones with --keep-last"
    )
