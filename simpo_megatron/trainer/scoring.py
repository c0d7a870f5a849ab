"""The summed log-probs of the responses of a data set, under the model of an engine; and its evaluation.

    sums_PM = score_pairs(engine, pairs)         # every rank calls it, and every rank gets the sums of all pairs
    metrics = evaluate_pairs(engine, pairs)

Shapes: P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.batch.row import PreferenceBatch
from simpo_megatron.data import Pairs
from simpo_megatron.diagnose.lengths import by_length_difference, spearman
from simpo_megatron.objectives import Objective, PairScores
from simpo_megatron.trainer.engine import Engine


@dataclass
class SeenSums:
    """An `on_sums` callback of the engine that keeps what this rank sees. Only the last pipeline stage sees sums.

    Attributes:
        seen: the microbatches of this rank, each with its sums [P, M].
    """

    seen: list[tuple[PreferenceBatch, Tensor]] = field(default_factory=list)

    def __call__(self, batch: PreferenceBatch, sums_PM: Tensor) -> None:
        """Keeps a microbatch and its sums."""
        self.seen.append((batch, sums_PM))

    def by_pair(self) -> Iterator[tuple[int, list[float], list[int]]]:
        """Yields the index, the sums and the lengths of every pair that this rank has seen."""
        for batch, sums_PM in self.seen:
            lengths_PM = batch.lengths.view(-1, batch.responses)
            yield from zip(batch.pairs, sums_PM.tolist(), lengths_PM.tolist(), strict=True)


def score_batch(engine: Engine, pairs: Pairs, indices: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Scores some pairs as one global batch, packed as a step or an evaluation packs them.

    Collectives: those of an evaluation, and one all-reduce of the sums.

    Args:
        engine: with the model.
        pairs: the data set.
        indices: of the pairs, int64; a pair may be there twice.

    Returns:
        Summed log-probs of the scored responses, fp32 [len(indices), M], chosen first; and the metrics of the batch.
        Both are the same on all ranks.
    """
    found = SeenSums()
    metrics = engine.evaluate(engine.packer.pack(pairs, indices), found)
    known, places = np.unique(indices, return_inverse=True)
    sums_PM = torch.full((len(known), engine.packer.responses), -torch.inf, device=torch.cuda.current_device())
    for batch, of_batch_PM in found.seen:
        sums_PM[torch.from_numpy(np.searchsorted(known, batch.pairs)).to(sums_PM.device)] = of_batch_PM.float()
    # Tensor- and context-parallel ranks have the same sums, and those of other pairs are -inf: the maximum joins them.
    dist.all_reduce(sums_PM, op=dist.ReduceOp.MAX)
    return sums_PM.cpu().numpy()[places], metrics


def score_pairs(engine: Engine, pairs: Pairs) -> np.ndarray:
    """Scores a whole data set, --global-batch-size pairs at a time, in its order.

    Collectives: those of `score_batch` for every batch.

    Args:
        engine: with the model.
        pairs: the data set.

    Returns:
        [P, M] fp32: the summed log-probs of the scored responses, chosen first. The same on all ranks.
    """
    size, indices = engine.config.train.global_batch_size, np.arange(len(pairs))
    return np.concatenate(
        [score_batch(engine, pairs, indices[start : start + size])[0] for start in range(0, len(indices), size)]
    )


def evaluate_pairs(engine: Engine, pairs: Pairs) -> dict[str, float]:
    """Evaluates a whole data set as one batch.

    Collectives: those of `score_batch`.

    Args:
        engine: with the model.
        pairs: the data set.

    Returns:
        The metrics of the objective, and those of `whole_set_metrics`.
    """
    indices = evaluation_order(pairs)
    sums_PM, metrics = score_batch(engine, pairs, indices)
    return {**metrics, **whole_set_metrics(engine.config.objective, pairs, indices, sums_PM)}


def whole_set_metrics(objective: Objective, pairs: Pairs, indices: np.ndarray, sums_PM: np.ndarray) -> dict[str, float]:
    """The metrics that need the scores of all pairs at once.

    Args:
        objective: whose rewards are compared.
        pairs: the data set.
        indices: of the pairs that were scored, [P].
        sums_PM: their summed log-probs, float32.

    Returns:
        By name:

        * `length_spearman`: rank correlation of the average log-prob of a response with its length, over all scored
          responses. It shows whether the model likes long responses.
        * `margin_by_length_difference/1` to `/5`: mean reward margin of the pairs in five bins, from those whose chosen
          response is shortest beside the rejected one. A bin without pairs has no metric.
        * `kl_on_given_text`: mean over the scored responses of the summed log-prob minus that of the reference model,
          where all pairs have one. The text is that of the data and not drawn from the model, so this is not
          KL[pi || pi_ref], and may be negative.
    """
    responses = sums_PM.shape[1]
    lengths = np.stack([pairs.chosen_length[indices], pairs.rejected_length[indices]], axis=1)[:, :responses]
    known_PM = pairs.reference_sums(indices)[:, :responses]
    found = {"length_spearman": spearman((sums_PM / lengths).ravel(), lengths.ravel())}
    if responses == 2:
        sums, counts, known = (torch.from_numpy(array) for array in (sums_PM, lengths, known_PM))
        rewards = objective.rewards(PairScores.of_sums(sums, counts, known)).numpy()
        for one in by_length_difference(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]):
            found[f"margin_by_length_difference/{one.number}"] = one.margin
    if np.isfinite(known_PM).all():
        found["kl_on_given_text"] = float((sums_PM - known_PM).mean(dtype=np.float64))
    return found


def evaluation_order(pairs: Pairs) -> np.ndarray:
    """The indices of all pairs, as an evaluation takes them."""
    return pairs.order(0, len(pairs), seed=0, shuffle=False)
