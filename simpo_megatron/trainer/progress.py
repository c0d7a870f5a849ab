"""Where a run stands, and how far it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs


@dataclass(frozen=True)
class Progress:
    """Where a run stands. The data order is a function of the seed and the position, so no more state is needed.

    Attributes:
        step: optimizer steps taken.
        consumed_pairs: pairs trained on, repeats counted.
        num_pairs: pairs of the training data.
        tokens_crc32: fingerprint of the training data (`Pairs.fingerprint`).
        seed: of the data order.
        checkpoint: a random name that each checkpoint gets when it is saved, by which an export knows the checkpoint
            that it was made of; empty before the first one.
        base: fingerprint of the weights under an adapter, which the checkpoints do not hold; empty without an adapter.
        base_folder: the converted checkpoint that holds them; empty where --hf-checkpoint does.
        adapter: the fields of `Lora`; None without an adapter.
        baseline: what the loss of the next step compares with (`Objective.next_baseline`).
    """

    step: int = 0
    consumed_pairs: int = 0
    num_pairs: int = 0
    tokens_crc32: int = 0
    seed: int = 0
    checkpoint: str = ""
    base: str = ""
    base_folder: str = ""
    adapter: dict[str, Any] | None = None
    baseline: float = 0.0


def new_progress(config: Config, pairs: Pairs, **adapter: Any) -> Progress:
    """Where a new run stands, on these pairs and with what `adapter_progress` gives."""
    return Progress(num_pairs=len(pairs), tokens_crc32=pairs.fingerprint, seed=config.train.seed, **adapter)


@dataclass(frozen=True)
class Length:
    """How far a run goes.

    Attributes:
        pairs: that the whole run sees, repeats counted.
        steps: optimizer steps of the whole run.
    """

    pairs: int
    steps: int

    def is_reached(self, progress: Progress) -> bool:
        """Whether no step and no pair is left."""
        return progress.step >= self.steps or progress.consumed_pairs >= self.pairs


def run_length(config: Config, num_pairs: int) -> Length:
    """The length of a run on so many training pairs, from --train-iters or --train-epochs."""
    train = config.train
    if train.train_epochs is not None:
        pairs = max(1, round(train.train_epochs * num_pairs))
    else:
        pairs = (train.train_iters or 0) * train.global_batch_size  # `TrainConfig` requires one of the two
    return Length(pairs, math.ceil(pairs / train.global_batch_size))
