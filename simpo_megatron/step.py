"""One microbatch in Megatron's schedules: `forward_step`, its loss function, and every normaliser.

The loss of a global batch is

    sum over pairs of weight * (the objective's loss of the pair) / number of pairs
      + nll_weight * (sum over chosen response tokens of -log p) / number of those tokens, or of the pairs

The divisors count the *global* batch. They are known before the step (`BatchCounts`), so packing, accumulation and
data parallelism cannot change the loss. Megatron divides the loss of a microbatch by num_microbatches
(`pipeline_parallel/schedules.py`, forward_step_calc_loss), and DDP averages gradients over the data-parallel ranks. So
the step multiplies the loss by both numbers.

Under context parallelism the log-probs of a response are first summed over the ranks. Everything else is computed from
these sums, so every rank has the same loss, and its backward pass reaches the tokens that the rank holds. Megatron
multiplies the loss by CP, and DDP divides by DP * CP. So the gradients of the ranks add up, and the step needs no
factor CP.

Shapes: P pairs, M scored responses of a pair, T tokens of this rank, R scored positions of this rank, V columns of the
vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from simpo_megatron.batch.row import PreferenceBatch
from simpo_megatron.compat import check_balancing_loss
from simpo_megatron.head.layer import find_head, split_output
from simpo_megatron.head.logprobs import vocab_parallel_logprobs
from simpo_megatron.head.task import HeadTask
from simpo_megatron.metrics import metric_sums
from simpo_megatron.models.placement import unwrap
from simpo_megatron.objectives import Measured, Objective

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class PreferenceStep:
    """The `forward_step_func` of Megatron's `get_forward_backward_func`.

    Attributes:
        objective: what is trained for.
        vocab_size: the true vocabulary, without Megatron's padding.
        num_microbatches: of this step on each data-parallel rank.
        moe_aux_loss_coeff: weight of Megatron's balancing loss of the experts; 0 for none.
        on_sums: called on the last pipeline stage with every microbatch and the summed log-probs [P, M] of its
            responses.
    """

    objective: Objective
    vocab_size: int
    num_microbatches: int
    moe_aux_loss_coeff: float = 0.0
    on_sums: Callable[[PreferenceBatch, Tensor], None] | None = None

    def __post_init__(self) -> None:
        if self.moe_aux_loss_coeff:
            check_balancing_loss()

    def __call__(self, data_iterator: Iterator[PreferenceBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Runs the model on the next microbatch.

        Args:
            data_iterator: the microbatches of this rank.
            model: the model chunk that the schedule runs.

        Returns:
            The output of the stage, and the function that computes the loss from it. On the last stage the output is
            the loss with the sums if the model has a `LogProbHead`, else logits [1, T, V].
        """
        batch = next(data_iterator)
        head = find_head(model)
        with head.scoring(self.head_task(batch)) if head else contextlib.nullcontext():
            output = model(
                batch.tokens,
                batch.position_ids,
                None,
                packed_seq_params=batch.packed_seq_params,
                **self._padding_mask(batch, model),
            )
        if self.moe_aux_loss_coeff and output.requires_grad:
            self._weigh_balancing_loss(batch, output)
        return output, partial(self.loss_func, batch, head is not None)

    def _weigh_balancing_loss(self, batch: PreferenceBatch, output: Tensor) -> None:
        """Makes the balancing loss of the experts a mean over the packed rows that hold pairs.

        Megatron takes the mean over all microbatches, so an empty row would count as much as a row of pairs. In its
        backward pass the balancing loss of every microbatch is multiplied by one number,
        `MoEAuxLossAutoScaler.main_loss_backward_scale`. This method changes that number for the backward pass of one
        microbatch: a hook on the output of the stage, where the backward pass starts, multiplies it by the weight of
        this row, and a callback of autograd restores it when the backward pass ends.
        """
        weight = self._loss_scale() / batch.counts.packed_rows if batch.pairs else 0.0

        def multiply_scale(_: Tensor) -> None:
            scale: Any = MoEAuxLossAutoScaler.main_loss_backward_scale
            restore = partial(MoEAuxLossAutoScaler.set_loss_scale, scale.clone())
            scale.mul_(weight)
            torch.autograd.Variable._execution_engine.queue_callback(restore)  # type: ignore[attr-defined]

        output.register_hook(multiply_scale)

    def _padding_mask(self, batch: PreferenceBatch, model: Any) -> dict[str, Tensor]:
        """The `padding_mask` of GPTModel.forward, which keeps padding out of the balancing loss.

        It is passed only with a balancing loss, because the forward of Megatron-Core 0.15 has no such argument.
        Under sequence parallelism the first stage cuts the mask itself; later stages expect it already cut.
        """
        if not self.moe_aux_loss_coeff:
            return {}
        gpt, mask = unwrap(model), batch.padding_mask
        if not gpt.pre_process and gpt.config.sequence_parallel:
            group: Any = parallel_state.get_tensor_model_parallel_group()
            mask = mask.chunk(group.size(), dim=1)[group.rank()]
        return {"padding_mask": mask}

    def _loss_scale(self) -> float:
        """The factor that cancels Megatron's division by microbatches and DDP's average over data-parallel ranks."""
        return float(self.num_microbatches * parallel_state.get_data_parallel_world_size())

    def head_task(self, batch: PreferenceBatch) -> HeadTask:
        """The scoring task of one microbatch: positions, targets and the loss."""
        # `loss_func` multiplies the loss by the scale. Megatron divides it by num_microbatches and multiplies it by CP.
        gradient = self._loss_scale() / self.num_microbatches * parallel_state.get_context_parallel_world_size()
        return HeadTask(
            scored=batch.scored,
            responses=batch.responses,
            vocab_size=self.vocab_size,
            loss=partial(batch_loss, self.objective, batch),
            loss_gradient=gradient,
            slopes=partial(batch_slopes, self.objective, batch),
        )

    def loss_func(self, batch: PreferenceBatch, fused: bool, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss function of one microbatch.

        Collectives: none with the fused head. Without it one all-gather over the tensor-parallel ranks
        (`vocab_parallel_logprobs`) and one all-reduce of one number a response over the context-parallel ranks; none in
        the backward pass.

        Args:
            batch: the microbatch.
            fused: the output is that of a `LogProbHead`.
            output: of the last stage.

        Returns:
            The share of the microbatch in the loss, multiplied as the module's docstring says, and its `metric_sums`.
        """
        if fused:
            loss, sums_PM = split_output(output, batch.responses)
        else:
            group: Any = parallel_state.get_tensor_model_parallel_group()
            logits_RV = output[0].index_select(0, batch.scored.positions_R)
            logps_R = vocab_parallel_logprobs(logits_RV, batch.scored.targets_R, self.vocab_size, group)
            sums_PM = sum_over_context(batch.segment_sums(logps_R))
            loss = batch_loss(self.objective, batch, sums_PM)
        if self.on_sums is not None:
            self.on_sums(batch, sums_PM.detach())
        measured = measure(self.objective, batch, sums_PM.detach(), loss.detach())
        return loss * self._loss_scale(), metric_sums(self.objective.metrics, measured)


def sum_over_context(sums_PM: Tensor) -> Tensor:
    """Sums over the context-parallel ranks. The gradient is passed on unchanged: every rank computes the whole loss."""
    group: Any = parallel_state.get_context_parallel_group()
    return reduce_from_tensor_model_parallel_region(sums_PM, group)


def batch_loss(objective: Objective, batch: PreferenceBatch, sums_PM: Tensor) -> Tensor:
    """The share of one microbatch in the loss of the global batch. The shares of all microbatches add up to that loss.

    The share is a sum over pairs. The fused head relies on it: the derivative with respect to one pair's sums does not
    depend on the other pairs.

    Args:
        objective: what is trained for.
        batch: the microbatch.
        sums_PM: summed log-probs of the responses, chosen first; fp32.
    """
    loss = sums_PM.new_zeros(())
    if factor := objective.nll_factor(batch.counts.pairs, batch.counts.chosen_tokens):
        loss = loss - factor * sums_PM[:, 0].sum()
    losses_P = objective.pair_losses(batch.scores(sums_PM))
    if losses_P is not None:
        loss = loss + (batch.weight * losses_P).sum() / batch.counts.pairs
    return loss


def batch_slopes(objective: Objective, batch: PreferenceBatch, sums_PM: Tensor) -> Tensor | None:
    """The derivative of `batch_loss` with respect to each sum, [P, M]; None if the objective has no closed form.

    Args:
        objective: what is trained for.
        batch: the microbatch.
        sums_PM: as for `batch_loss`.
    """
    slopes_PM = objective.pair_slopes(batch.scores(sums_PM))
    if slopes_PM is None:
        return None
    slopes_PM = slopes_PM * (batch.weight / batch.counts.pairs)[:, None]
    slopes_PM[:, 0] -= objective.nll_factor(batch.counts.pairs, batch.counts.chosen_tokens)
    return slopes_PM


def measure(objective: Objective, batch: PreferenceBatch, sums_PM: Tensor, loss: Tensor) -> Measured:
    """Collects what the metrics of one microbatch are computed from.

    Args:
        objective: what is trained for.
        batch: the microbatch.
        sums_PM: summed log-probs of the responses, without gradient.
        loss: the share of the microbatch in the loss, without gradient.
    """
    scores = batch.scores(sums_PM)
    return Measured(
        scores=scores,
        truncated_PM=batch.truncated.view(-1, batch.responses),
        rewards_PM=objective.rewards(scores),
        target_margins_P=objective.target_margins(scores),
        loss=loss,
    )
