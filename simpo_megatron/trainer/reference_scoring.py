"""Scores pairs with a reference model: forward passes alone, in the batches of training, resumable after a kill.

engine = ScoringEngine.build(config, hf, transformer)       # or the engine of the run
sums = complete(file, lambda: engine, pairs, training_batches(pairs, config), "Scoring")

Every rank calls these functions. `reference.py` decides when.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs
from simpo_megatron.data.reference_file import ReferenceFile
from simpo_megatron.errors import UserError
from simpo_megatron.models.build import build_model
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.program import with_time_left
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.reference_source import broadcast_sums
from simpo_megatron.trainer.scoring import evaluation_order, score_batch
from simpo_megatron.trainer.setup import prepare_models

_WRITES = 100  # times that the file is written while the training pairs are scored


class ScoringEngine(Engine):
    """An engine that only scores: no DDP, no optimizer, no gradients."""

    def __init__(
        self, config: Config, hf: HFCheckpoint, models: list[GPTModel], transformer: TransformerConfig
    ) -> None:
        self.config, self.hf, self.models, self.transformer = config, hf, models, transformer
        self.chunks = list(models)
        self.packer = self._build_packer()
        self.run_schedule = get_forward_backward_func()

    @classmethod
    def build(cls, config: Config, hf: HFCheckpoint, transformer: TransformerConfig) -> ScoringEngine:
        """Builds the models and loads the weights.

        Collectives: those of `build_model` and of `prepare_models`.

        Args:
            config: of the run, with this model as its --hf-checkpoint.
            hf: the Hugging Face checkpoint.
            transformer: from `build_transformer_config`.
        """
        models = build_model(
            hf,
            transformer,
            transformer_impl=config.model.transformer_impl,
            make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        )
        prepare_models(models, config, hf)
        return cls(config, hf, models, transformer)


def training_batches(pairs: Pairs, config: Config) -> list[np.ndarray]:
    """The batches of the first epoch. The last one may reach into the second epoch, as it does in training."""
    size = config.train.global_batch_size
    return [pairs.order(start, size, config.train.seed) for start in range(0, len(pairs), size)]


def evaluation_batches(pairs: Pairs) -> list[np.ndarray]:
    """The one batch of an evaluation."""
    return [evaluation_order(pairs)]


def complete(
    file: ReferenceFile | None, engine: Callable[[], Engine], pairs: Pairs, batches: list[np.ndarray], title: str
) -> np.ndarray:
    """Scores the pairs that are missing in a file; every rank calls it.

    Collectives: a broadcast of what the file has, those of the engine and of `score_batch`.

    Args:
        file: on rank 0, written from time to time; None for no file, and on the other ranks.
        engine: makes the engine with the reference model. It is called where a pair is missing.
        pairs: the data set.
        batches: indices of pairs, in the order of scoring. Pairs in none of them come last, in batches of the same
            size.
        title: of the progress bar.

    Returns:
        The sums of all pairs, float32 [P, 2], the same on every rank.

    Raises:
        UserError: a log-prob is not finite, or the file cannot be written; the same on every rank.
    """
    sums = broadcast_sums(None if file is None else file.sums)
    if sums is None:
        sums = np.full((len(pairs), 2), np.nan, np.float32)
    if file is not None:
        file.sums = sums
    if np.isnan(sums).any():
        _score_missing(engine(), pairs, batches, file, sums, title)
    return sums


def _score_missing(
    engine: Engine,
    pairs: Pairs,
    batches: list[np.ndarray],
    file: ReferenceFile | None,
    sums: np.ndarray,
    title: str,
) -> None:
    """Fills what is missing in `sums`; the arguments are those of `complete`."""
    reached = np.zeros(len(pairs), bool)
    for indices in batches:
        reached[indices] = True
    rest = np.flatnonzero(~reached)  # a blend with weights leaves some pairs to later epochs
    size = len(batches[0])
    batches = [*batches, *(rest[start : start + size] for start in range(0, len(rest), size))]
    batches = [indices for indices in batches if np.isnan(sums[indices]).any()]
    interval = -(-len(batches) // _WRITES)
    for number, indices in enumerate(with_time_left(batches, title, shown=dist.get_rank() == 0), start=1):
        found, _ = score_batch(engine, pairs, indices)
        new = np.isnan(sums[indices]).any(axis=1)
        sums[indices[new]] = found[new]
        with raise_on_all_ranks():
            if not np.isfinite(found).all():
                pair = int(indices[~np.isfinite(found).all(axis=1)][0])
                raise UserError(f"the reference log-prob of pair {pair} is not finite; the reference model is broken")
            if file is not None and (number % interval == 0 or number == len(batches)):
                file.write()
