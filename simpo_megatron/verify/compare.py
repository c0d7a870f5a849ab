"""Runs one batch through the layout of a run and through the reference, and compares them.

Compared are: summed log-probs, response lengths, rewards, loss, gradient norm, and the gradient of every tensor.

The largest errors that pass are the table `report.TOLERANCE`. The reference is always in fp32. If the layout runs in
bf16, transformers also runs once in bf16: the error of that run shows what rounding alone costs. Lengths must be equal,
and every tensor of the checkpoint must be compared.

Each data-parallel rank gets at least two microbatches for each pipeline stage, if there are enough pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, expected_tensors
from simpo_megatron.objectives import Objective, PairScores
from simpo_megatron.parallel.context import sequence_multiple
from simpo_megatron.parallel.together import host_group
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.scoring import SeenSums
from simpo_megatron.verify.reference import Reference
from simpo_megatron.verify.report import Difference, Report, allowed_error, largest_error, ratio
from simpo_megatron.verify.shards import ShardErrors, complete_gradients


def compare(
    engine: Engine,
    hf: HFCheckpoint,
    pairs: Pairs,
    config: Config,
    reference_device: torch.device | str | None = None,
) -> Report | None:
    """Runs layout and reference, and compares them. Every rank calls it.

    Collectives: those of a training step; a gather of the sums; for each tensor of the checkpoint a broadcast of its
    reference gradient in fp32; a gather of the errors.

    Args:
        engine: of the layout.
        hf: the checkpoint.
        pairs: of the data; the first global batch of their order is used.
        config: of the run.
        reference_device: where the reference runs on rank 0; None for the device of the layout.

    Returns:
        The report on rank 0, None on the others.

    Raises:
        UserError: the reference's loss of this batch is not finite.
    """
    indices = pairs.order(0, min(config.train.global_batch_size, len(pairs)), config.train.seed)
    packer, seen = replace(engine.packer, seq_length=_row_capacity(engine, pairs, indices)), SeenSums()
    batch = packer.pack(pairs, indices)
    metrics = engine.compute_gradients(batch, seen)
    engine.optimizer.prepare_grads()
    norm = float(engine.optimizer.get_grad_norm())
    complete_gradients(engine)
    found = _gather(seen)

    errors = ShardErrors(engine, hf)
    device = torch.device(reference_device or torch.cuda.current_device())
    expected = _Expected(hf, pairs, indices.tolist(), config, device) if dist.get_rank() == 0 else None
    for name, gradient in _broadcast_gradients(expected):
        errors.add(name, gradient)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors.of_rank)
    return (
        None if expected is None else expected.report(found, metrics["loss"], norm, everyone, len(batch.microbatches))
    )


def _row_capacity(engine: Engine, pairs: Pairs, indices: np.ndarray) -> int:
    """Tokens of a packed row, so few that every data-parallel rank gets several microbatches."""
    parallel = engine.config.parallel
    rows = 2 * parallel.pipeline_model_parallel_size * parallel_state.get_data_parallel_world_size()
    responses = pairs.chosen_length[indices].astype(np.int64) + pairs.rejected_length[indices]
    lengths = 2 * pairs.prompt_length[indices] + responses + 2 * sequence_multiple(parallel.context_parallel_size)
    return int(min(max(lengths.max(), -(-lengths.sum() // rows)), engine.config.data.seq_length))


def _gather(seen: SeenSums) -> dict[int, list[tuple[list[float], list[int]]]]:
    """By index of the pair: sums and lengths from every rank that scored it. Collectives: one gather of objects."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(seen.by_pair()))
    found: dict[int, list[tuple[list[float], list[int]]]] = {}
    for index, sums, lengths in (entry for entries in everyone for entry in entries):
        found.setdefault(index, []).append((sums, lengths))
    return found


class _Expected:
    """The side of the reference, on rank 0 alone."""

    def __init__(
        self, hf: HFCheckpoint, pairs: Pairs, indices: list[int], config: Config, device: torch.device
    ) -> None:
        self.pairs, self.indices, self.config = pairs, indices, config
        self.reference = Reference(hf, torch.float32, device)
        self.sums, self.loss, self.slopes = self._loss(self.reference)
        self.rounded = Reference(hf, torch.bfloat16, device) if config.train.bf16 else None
        self.hf, self.reference_names = hf, set[str]()
        self.squared_norm = torch.zeros((), dtype=torch.float64)
        self.rounded_errors: dict[str, float] = {}
        self.rounded_squares = torch.zeros(2, dtype=torch.float64)  # of all gradients: error and reference
        if self.rounded is not None:
            self.rounded_sums, self.rounded_loss, self.rounded_slopes = self._loss(self.rounded)
        if not math.isfinite(self.loss):
            raise UserError(
                f"the loss of {hf.path} on these pairs is {self.loss} in fp32; the checkpoint is broken, use another"
            )

    def _loss(self, reference: Reference) -> tuple[Tensor, float, Tensor]:
        objective = self.config.objective
        sums = reference.forward(self.pairs, self.indices, objective.responses).requires_grad_()
        loss = reference_loss(objective, reference_scores(self.pairs, self.indices, sums))
        return sums.detach(), loss.item(), torch.autograd.grad(loss, sums)[0]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and gradients of the fp32 reference, and notes how far transformers in bf16 is off."""
        rounded_stream = None if self.rounded is None else self.rounded.gradients(self.rounded_slopes)
        for name, exact in self.reference.gradients(self.slopes):
            self.reference_names.add(name)
            self.squared_norm += exact.double().square().sum().cpu()
            if rounded_stream is None:
                yield name, exact
                continue
            _, rounded = next(rounded_stream)
            off, of = (rounded - exact).double().norm().cpu(), exact.double().norm().cpu()
            self.rounded_errors[name] = ratio(off, of)
            self.rounded_squares += torch.stack((off, of)).square()
            yield name, exact

    def report(
        self, found: dict[int, Any], loss: float, norm: float, everyone: list[dict[str, Tensor]], microbatches: int
    ) -> Report:
        """Compares what the ranks found with the reference.

        Args:
            found: sums and lengths, from `_gather`.
            loss: of the layout.
            norm: of the layout's gradient.
            everyone: the `ShardErrors.of_rank` of every rank.
            microbatches: of a data-parallel rank.
        """
        lengths = reference_scores(self.pairs, self.indices, self.sums).lengths_PM.tolist()
        observed = [(i, *seen) for i, index in enumerate(self.indices) for seen in found.get(index, [])]
        wrong = [index for index in self.indices if not found.get(index)]
        wrong += sorted({self.indices[i] for i, _, counted in observed if counted != lengths[i]})
        places = [i for i, _, _ in observed]
        sums_error, reward_error = self._errors(
            [self.indices[i] for i in places],
            self.sums.new_tensor([sums for _, sums, _ in observed]),
            self.sums[places],
        )
        table = [
            {"pair": index, "reference_sums": self.sums[i].tolist(), "found": found.get(index, [])}
            for i, index in enumerate(self.indices)
        ]
        off_loss = abs(loss - self.loss) / max(abs(self.loss), 1e-30)
        values = [
            Difference(name, error, self._allowed("sums", rounded))
            for name, error, rounded in zip(
                ("summed log-probs", "rewards", "loss"),
                (sums_error, reward_error, off_loss),
                self._rounded(),
                strict=True,
            )
        ]
        vectors, gradients = self._judge_gradients(everyone, norm)
        compared = {entry.name for entry in gradients} & self.reference_names
        trained = [entry for entry in self.hf.architecture.weights if entry.trained]
        uncompared = sorted({name for name, _ in expected_tensors(self.hf, trained)} - compared)
        return Report([*values, *vectors], gradients, wrong, uncompared, microbatches, table)

    def _errors(self, indices: list[int], found_PM: Tensor, exact_PM: Tensor) -> tuple[float, float]:
        """The largest relative errors of the sums of some pairs, and of their rewards."""
        found, exact = (reference_scores(self.pairs, indices, sums_PM) for sums_PM in (found_PM, exact_PM))
        rewards = self.config.objective.rewards
        return largest_error(found.sums_PM, exact.sums_PM), largest_error(rewards(found), rewards(exact))

    def _rounded(self) -> tuple[float, float, float]:
        """The errors of transformers in bf16: sums, rewards and loss. Zeros if the layout runs in fp32."""
        if self.rounded is None:
            return 0.0, 0.0, 0.0
        off_loss = abs(self.rounded_loss - self.loss) / max(abs(self.loss), 1e-30)
        return *self._errors(self.indices, self.rounded_sums, self.sums), off_loss

    def _allowed(self, kind: str, rounded: float) -> float:
        return allowed_error(kind, None if self.rounded is None else rounded)

    def _judge_gradients(
        self, everyone: list[dict[str, Tensor]], norm: float
    ) -> tuple[list[Difference], list[Difference]]:
        """Two lists: all gradients as one vector and their norm; then each gradient, the worst first."""
        totals: dict[str, Tensor] = {}
        for name, squares in (entry for errors in everyone for entry in errors.items()):
            totals[name] = totals.get(name, torch.zeros(3, dtype=torch.float64)) + squares
        off, exact, count = torch.stack(list(totals.values())).sum(0)
        rounded = ratio(*self.rounded_squares.sqrt().unbind())
        allowed = self._allowed("all gradients", rounded)
        reference_norm = self.squared_norm.sqrt()
        vectors = [
            Difference("all gradients", ratio(off.sqrt(), exact.sqrt()), allowed),
            Difference("gradient norm", ratio((reference_norm - norm).abs(), reference_norm), allowed),
        ]
        # A tensor with next to no gradient holds only rounding: its error is measured against a floor, which is 1e-6 of
        # the mean square of all gradients.
        floor = 1e-6 * exact / count
        found = [
            Difference(
                name,
                ratio(off.sqrt(), torch.maximum(exact, floor * count).sqrt()),
                self._allowed("gradient", self.rounded_errors.get(name, 0.0)),
            )
            for name, (off, exact, count) in totals.items()
        ]
        return vectors, sorted(
            found, key=lambda entry: -math.inf if math.isnan(entry.error) else -entry.error / entry.allowed
        )


def _broadcast_gradients(expected: _Expected | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the reference's gradients on every rank. Collectives: two broadcasts for each tensor."""
    stream = iter(()) if expected is None else expected.gradients()
    while True:
        name, tensor = next(stream, (None, torch.empty(0)))
        header: list[Any] = [name, tensor.shape]
        dist.broadcast_object_list(header, src=0, group=host_group())  # rank 0 may compute for minutes before it
        if header[0] is None:
            return
        if expected is None:
            tensor = torch.empty(header[1], device=torch.cuda.current_device())
        tensor = tensor.to(torch.cuda.current_device()).contiguous()
        dist.broadcast(tensor, src=0)
        yield header[0], tensor


def with_any_reference(pairs: Pairs) -> Pairs:
    """The pairs with log-probs of a reference model: their own where they have them, else -2 for every token.

    An objective that compares with a reference model is verified with any numbers: both sides read the same.
    """
    indices = np.arange(len(pairs))
    known = pairs.reference_sums(indices)
    lengths = np.stack([pairs.chosen_length[:], pairs.rejected_length[:]], axis=1).astype(np.float32)
    return pairs.with_reference_sums(np.where(np.isnan(known), -2 * lengths, known))


def reference_scores(pairs: Pairs, indices: list[int], sums_PM: Tensor) -> PairScores:
    """The scores of these pairs in float64, for the objective.

    Args:
        pairs: of the data.
        indices: of the pairs.
        sums_PM: their summed log-probs.

    Returns:
        Scores whose lengths are counted in the data, not in a packed row.
    """
    responses, known_PM = sums_PM.shape[1], pairs.reference_sums(np.asarray(indices, np.int64))
    lengths = [[len(response) for response in pairs.pair(index)[1 : 1 + responses]] for index in indices]
    return PairScores(
        sums_PM=sums_PM,
        lengths_PM=torch.tensor(lengths, dtype=torch.float64),
        margin_P=torch.from_numpy(pairs.columns["margin"][indices]).double(),
        weight_P=torch.from_numpy(pairs.columns["weight"][indices]).double(),
        reference_sums_PM=torch.from_numpy(known_PM[:, :responses]).double(),
    )


def reference_loss(objective: Objective, scores: PairScores) -> Tensor:
    """The loss of a whole batch in float64, in one process."""
    sums_P, tokens = scores.sums_PM[:, 0], scores.lengths_PM[:, 0].sum().item()
    loss = -objective.nll_factor(len(sums_P), tokens) * sums_P.sum()
    losses_P = objective.pair_losses(scores)
    return loss if losses_P is None else loss + (scores.weight_P * losses_P).mean()
