"""One batch through the layout of a run and through the reference: sums, lengths, rewards, loss, every gradient.

Tolerances are relative. In fp32: sums, rewards and loss 1e-5, the gradient of a tensor 1e-4. In bf16 the reference stays in
fp32 on the rounded weights, and transformers runs once more in bf16 to show what rounding alone costs: the gradient of a
tensor may be off by twice as much as there or by 2e-2, sums, rewards and loss by twice as much or by 5e-3. All gradients as one
vector, and the gradient norm the optimizer clips by, may be off by 1e-5 in fp32, in bf16 by 1.5 times as much as there or by
1e-2. Nothing may be off by more than 0.3.

The pairs are cut into at least two microbatches a data-parallel rank, and two for every pipeline stage, where there are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from simpo_megatron.batch import PreferenceBatch
from simpo_megatron.config import Config, LossConfig
from simpo_megatron.context_parallel import sequence_multiple
from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.loss import simpo_loss
from simpo_megatron.models.hf import HFModel, expected_tensors
from simpo_megatron.models.layout import from_megatron, rank_slice
from simpo_megatron.models.place import Placed, place_parameters
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.verify.reference import Reference

# What is allowed in fp32; at least in bf16; and in bf16 times the error of transformers in bf16.
TOLERANCE = {"sums": (1e-5, 5e-3, 2.0), "gradient": (1e-4, 2e-2, 2.0), "all gradients": (1e-5, 1e-2, 1.5)}
CAP = 0.3


@dataclass
class Difference:
    """One compared number or tensor: how far off, relative to the reference, and how far it may be."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN does not pass


@dataclass
class Report:
    """What a comparison found; `gradients` worst first."""

    values: list[Difference]
    gradients: list[Difference]
    wrong_lengths: list[int]
    uncompared: list[str]  # tensors of the checkpoint that the layout or the reference has no gradient for
    microbatches: int
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (
            not self.wrong_lengths
            and not self.uncompared
            and all(found.passed for found in (*self.values, *self.gradients))
        )


def compare(engine: Engine, hf: HFModel, store: Pairs, config: Config) -> Report | None:
    """Runs both and compares; the report on rank 0, None on the others. Every rank calls it.

    Collectives: those of a training step; a gather of the sums; for every tensor of the checkpoint a broadcast of its
    reference gradient in fp32.

    Raises:
        UserError: the checkpoint holds no finite answer for this batch.
    """
    members = config.loss.members
    pairs = store.order(0, min(config.train.global_batch_size, len(store)), config.train.seed)
    seen: list[tuple[Tensor, Tensor]] = []

    def on_sums(batch: PreferenceBatch, sums_PM: Tensor) -> None:
        seen.append((sums_PM.double().cpu(), batch.lengths.view(-1, members).cpu()))

    plan = engine.plan(store, pairs, _row_capacity(engine, store, pairs))
    metrics = engine.compute_gradients(plan, on_sums)
    engine.optimizer.prepare_grads()
    norm = float(engine.optimizer.get_grad_norm())
    complete_gradients(engine)
    found = _gather_pairs(plan.rows, seen)

    errors = _Errors(engine, hf)
    expected = _Expected(hf, store, pairs.tolist(), config) if dist.get_rank() == 0 else None
    for name, gradient in _broadcast_gradients(expected):
        errors.add(name, gradient)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors.of_rank)
    return None if expected is None else expected.report(found, metrics["loss"], norm, everyone, len(plan.rows))


def _row_capacity(engine: Engine, store: Pairs, pairs: np.ndarray) -> int:
    """Tokens of a row such that every data-parallel rank accumulates over several."""
    parallel = engine.config.parallel
    rows = 2 * parallel.pipeline_model_parallel_size * parallel_state.get_data_parallel_world_size()
    responses = store.chosen_length[pairs].astype(np.int64) + store.rejected_length[pairs]
    lengths = 2 * store.prompt_length[pairs] + responses + 2 * sequence_multiple(parallel.context_parallel_size)
    return int(min(max(lengths.max(), -(-lengths.sum() // rows)), engine.config.data.seq_length))


def complete_gradients(engine: Engine) -> None:
    """Gives every rank the whole reduced gradient where the distributed optimizer left each its shard.

    Collectives: one all-gather for every gradient bucket over the ranks that share it.
    """
    if not engine.config.parallel.use_distributed_optimizer:
        return
    for chunk in engine.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def _gather_pairs(
    rows: list[list[int]], seen: list[tuple[Tensor, Tensor]]
) -> dict[int, list[tuple[list[float], list[int]]]]:
    """What every rank that saw them says of every pair: sums and lengths, by pair. Collectives: one gather of objects."""
    mine = [
        (pair, sums.tolist(), lengths.tolist())
        for row, (sums_PM, lengths_PM) in zip(rows, seen, strict=False)  # earlier stages saw nothing
        for pair, sums, lengths in zip(row, sums_PM, lengths_PM, strict=True)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[int, list[tuple[list[float], list[int]]]] = {}
    for pair, sums, lengths in (entry for entries in everyone for entry in entries):
        found.setdefault(pair, []).append((sums, lengths))
    return found


class _Expected:
    """The reference's side, on rank 0."""

    def __init__(self, hf: HFModel, store: Pairs, pairs: list[int], config: Config) -> None:
        self.store, self.pairs, self.config = store, pairs, config
        device = torch.device(torch.cuda.current_device())
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
            raise UserError(f"the loss of {hf.path} on these pairs is {self.loss} in fp32; the checkpoint is broken")

    def _loss(self, reference: Reference) -> tuple[Tensor, float, Tensor]:
        sums = reference.forward(self.store, self.pairs, self.config.loss.members).requires_grad_()
        loss = reference_loss(self.config.loss, self.store, self.pairs, sums)
        return sums.detach(), loss.item(), torch.autograd.grad(loss, sums)[0]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names and gradients of the fp32 reference; beside each, what bf16 makes of it is noted."""
        rounded_stream = None if self.rounded is None else self.rounded.gradients(self.rounded_slopes)
        for name, exact in self.reference.gradients(self.slopes):
            self.reference_names.add(name)
            self.squared_norm += exact.double().square().sum().cpu()
            if rounded_stream is None:
                yield name, exact
                continue
            _, rounded = next(rounded_stream)
            off, of = (rounded - exact).double().norm().cpu(), exact.double().norm().cpu()
            self.rounded_errors[name] = _ratio(off, of)
            self.rounded_squares += torch.stack((off, of)).square()
            yield name, exact

    def report(
        self, found: dict[int, Any], loss: float, norm: float, everyone: list[dict[str, Tensor]], microbatches: int
    ) -> Report:
        """Judges what the ranks found."""
        members, beta = self.config.loss.members, self.config.loss.simpo_beta
        lengths = reference_lengths(self.store, self.pairs, members)
        wrong = [pair for pair, wanted in zip(self.pairs, lengths.tolist(), strict=True) if not found.get(pair)]
        table, sums_error, reward_error = [], 0.0, 0.0
        for pair, wanted_sums, wanted_lengths in zip(self.pairs, self.sums, lengths, strict=True):
            for sums, counted in found.get(pair, []):
                if counted != wanted_lengths.tolist() and pair not in wrong:
                    wrong.append(pair)
                off = torch.tensor(sums, dtype=torch.float64) - wanted_sums
                sums_error = _worst(sums_error, _ratio(off.abs().max(), wanted_sums.abs().max()))
                reward = (beta * wanted_sums / wanted_lengths).abs().max()
                reward_error = _worst(reward_error, _ratio((beta * off / wanted_lengths).abs().max(), reward))
            table.append({"pair": pair, "reference_sums": wanted_sums.tolist(), "found": found.get(pair, [])})
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
        uncompared = sorted({name for name, _ in expected_tensors(self.hf)} - compared)
        return Report([*values, *vectors], gradients, wrong, uncompared, microbatches, table)

    def _rounded(self) -> tuple[float, float, float]:
        """The errors of transformers in bf16 in sums, rewards and loss; zeros where the layout runs in fp32."""
        if self.rounded is None:
            return 0.0, 0.0, 0.0
        lengths = reference_lengths(self.store, self.pairs, self.config.loss.members)
        of_sums, of_rewards = (
            ((self.rounded_sums - self.sums).abs() / by).amax(1) / (self.sums.abs() / by).amax(1) for by in (1, lengths)
        )
        return (
            of_sums.max().item(),
            of_rewards.max().item(),
            abs(self.rounded_loss - self.loss) / max(abs(self.loss), 1e-30),
        )

    def _allowed(self, kind: str, rounded: float) -> float:
        fp32, bf16, times = TOLERANCE[kind]
        return fp32 if self.rounded is None else min(max(bf16, times * rounded), CAP)

    def _judge_gradients(
        self, everyone: list[dict[str, Tensor]], norm: float
    ) -> tuple[list[Difference], list[Difference]]:
        """All gradients as one vector, their norm, and each of them, worst first."""
        totals: dict[str, Tensor] = {}
        for name, squares in (entry for errors in everyone for entry in errors.items()):
            totals[name] = totals.get(name, torch.zeros(3, dtype=torch.float64)) + squares
        off, exact, count = torch.stack(list(totals.values())).sum(0)
        rounded = _ratio(*self.rounded_squares.sqrt().unbind())
        allowed = self._allowed("all gradients", rounded)
        reference_norm = self.squared_norm.sqrt()
        vectors = [
            Difference("all gradients", _ratio(off.sqrt(), exact.sqrt()), allowed),
            Difference("gradient norm", _ratio((reference_norm - norm).abs(), reference_norm), allowed),
        ]
        floor = 1e-6 * exact / count  # of the mean square: a tensor with next to no gradient is rounding alone
        found = [
            Difference(
                name,
                _ratio(off.sqrt(), torch.maximum(exact, floor * count).sqrt()),
                self._allowed("gradient", self.rounded_errors.get(name, 0.0)),
            )
            for name, (off, exact, count) in totals.items()
        ]
        return vectors, sorted(
            found, key=lambda entry: -math.inf if math.isnan(entry.error) else -entry.error / entry.allowed
        )


class _Errors:
    """On every rank: how far its shards of the gradients are from the reference."""

    def __init__(self, engine: Engine, hf: HFModel) -> None:
        self.places: dict[str, list[tuple[Placed, int]]] = {}
        for place in (place for model in engine.models for place in place_parameters(model, hf)):
            for part, name in enumerate(place.hf):
                self.places.setdefault(name, []).append((place, part))
        self.of_rank: dict[str, Tensor] = {}  # summed squares of the error and of the reference, and their number

    def add(self, name: str, gradient: Tensor) -> None:
        """Compares this rank's shards of a tensor with the whole gradient."""
        for place, part in self.places.get(name, []):
            parameter: Any = place.parameter
            weight, rank, ranks = place.weight, place.group.rank(), place.group.size()
            mine = from_megatron(weight, parameter.main_grad, ranks)[part].double()
            exact = gradient.double()
            if weight.tp_dim is not None:
                whole = mine.shape[weight.tp_dim] * ranks
                rows = rank_slice(exact.shape[weight.tp_dim], whole, rank, ranks)
                exact = exact.narrow(weight.tp_dim, rows.start, rows.stop - rows.start)
            exact = torch.nn.functional.pad(exact, (0, 0) * (exact.ndim - 1) + (0, mine.shape[0] - exact.shape[0]))
            squares = torch.stack(
                [(mine - exact).square().sum(), exact.square().sum(), exact.new_tensor(exact.numel())]
            )
            self.of_rank[name] = self.of_rank.get(name, 0) + squares.cpu()


def _broadcast_gradients(expected: _Expected | None) -> Iterator[tuple[str, Tensor]]:
    """The reference's gradients on every rank, one after the other. Collectives: two broadcasts a tensor."""
    stream = iter(()) if expected is None else expected.gradients()
    while True:
        name, tensor = next(stream, (None, torch.empty(0)))
        header: list[Any] = [name, tensor.shape]
        dist.broadcast_object_list(header, src=0)
        if header[0] is None:
            return
        if expected is None:
            tensor = torch.empty(header[1], device=torch.cuda.current_device())
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        yield header[0], tensor


def reference_lengths(store: Pairs, pairs: list[int], members: int) -> Tensor:
    """Scored tokens of the responses, counted in the store: [P, members]."""
    lengths = [[len(response) for response in store.pair(pair)[1 : 1 + members]] for pair in pairs]
    return torch.tensor(lengths, dtype=torch.float64)


def reference_loss(config: LossConfig, store: Pairs, pairs: list[int], sums_PM: Tensor) -> Tensor:
    """The loss of the batch from whole sums, written for one process; float64."""
    lengths = reference_lengths(store, pairs, config.members)
    loss = -config.nll_weight * sums_PM[:, 0].sum() / lengths[:, 0].sum()
    if config.objective == "simpo":
        margin = torch.from_numpy(store.margin[pairs]).double()
        losses = simpo_loss(
            *(sums_PM / lengths).unbind(1),
            beta=config.simpo_beta,
            gamma_P=torch.where(margin.isnan(), config.gamma, margin),
            loss_type=config.simpo_loss_type,
            label_smoothing=config.simpo_label_smoothing,
        )
        loss = loss + (torch.from_numpy(store.weight[pairs]).double() * losses).mean()
    return loss


def _ratio(error: Tensor, of: Tensor) -> float:
    return (error / of.clamp_min(1e-30)).item()


def _worst(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)
