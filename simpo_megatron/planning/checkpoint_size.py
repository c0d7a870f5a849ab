"""Bytes of a training checkpoint, how many of them a run writes, and whether the disk has room for one.

A checkpoint holds every parameter once, in any layout:

    weights           2 bytes a parameter in bf16, 4 in fp32
    optimizer state   Adam's two moments and a copy of the weight, in fp32: 12 bytes a trained parameter. An fp32 run
                      without the distributed optimizer has no copy: 8 bytes

Not counted are 1 to 2 KiB for every tensor that a rank writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpo_megatron.disk import free_bytes, human
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.parallel.stages import VOCAB_DIVISOR
from simpo_megatron.planning.parameters import stage_parameters

if TYPE_CHECKING:
    from simpo_megatron.config.run import Config


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


def check_disk(config: Config, architecture: Architecture, steps: int | None, done: int = 0) -> list[str]:
    """Compares what a run writes with the space that is free, before its first step.

    Args:
        config: of the run.
        architecture: its model.
        steps: of the whole run; None where they are not known yet.
        done: steps that were taken before the run was resumed.

    Returns:
        A line on the checkpoints; none where the run writes none.

    Raises:
        UserError: the disk of --save has no room for one checkpoint, or that of --export-hf for the model.
    """
    if config.model.export_hf is not None:
        model = architecture.num_parameters * (2 if config.train.bf16 else 4)
        _require_space("--export-hf", config.model.export_hf, "the exported model", model)
    save, interval = config.checkpoint.save, config.checkpoint.save_interval
    count = None if steps is None else checkpoints_of(steps, interval, done)
    if save is None or count == 0:
        return []
    size = checkpoint_size(
        architecture,
        bf16=config.train.bf16,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        vocabulary_multiple=config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size,
    )
    free = _require_space("--save", save, "a checkpoint", size.total)
    if count is None:
        written = "one at the end" + ("" if interval is None else f" and one every {interval} steps")
    else:
        written = f"this run writes {count}, {human(count * size.total)} in all"
    line = f"a checkpoint takes {size}; {written}; {human(free)} are free in {save}"
    if count is not None and count * size.total > free:
        line += f", room for {math.floor(free / size.total)}: free space in time, or raise --save-interval"
    return [line]


def _require_space(flag: str, folder: Path, what: str, size: int) -> int:
    """The bytes that are free in a folder.

    Raises:
        UserError: they are fewer than `size`.
    """
    free = free_bytes(folder)
    if size > free:
        raise UserError(
            f"{flag} {folder}: {what} takes {human(size)}, but only {human(free)} are free; free space there, or "
            f"choose another {flag}"
        )
    return free
