"""One microbatch through Megatron's schedules: `forward_step`, its loss function, and every normaliser, once.

The loss of a global batch is

    sum over pairs of weight * simpo_loss / number of pairs
      + sft_weight * (sum over chosen response tokens of -log p) / number of those tokens

(`objective="sft"` keeps the second term alone, with weight 1). Both divisors count the *global* batch and are known before
the step (`batch.BatchCounts`), so packing, accumulation and data parallelism cannot change the loss. Megatron divides a
2-tuple loss by num_microbatches (`pipeline_parallel/schedules.py`, forward_step_calc_loss) and DDP averages over the
data-parallel ranks, so the loss is handed over multiplied by both.

Under context parallelism the sums of log-probs are added up over the ranks before anything else is done with them; every rank
then knows the same loss, and its backward pass reaches its own tokens. Megatron multiplies that loss by CP and DDP divides by
DP * CP, so the gradients of the ranks add up, and no factor CP stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from simpo_megatron.batch import PreferenceBatch
from simpo_megatron.config import LossConfig
from simpo_megatron.logprobs import vocab_parallel_logprobs
from simpo_megatron.loss import simpo_loss
from simpo_megatron.metrics import pair_sums

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PreferenceStep:
    """The `forward_step_func` of Megatron's `get_forward_backward_func`.

    Attributes:
        loss: objective, beta, gamma and the rest.
        vocab_size: the true vocabulary, without Megatron's padding.
        num_microbatches: of this step and data-parallel rank; the same on all of them.
        on_sums: called on the last stage with every microbatch and the summed log-probs of its responses, [P, members].
    """

    loss: LossConfig
    vocab_size: int
    num_microbatches: int
    on_sums: Callable[[PreferenceBatch, Tensor], None] | None = None

    def __call__(self, data_iterator: Iterator[PreferenceBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Runs the model on the next batch.

        Returns:
            The stage's output (on the last stage logits [1, T, V / tensor_model_parallel_size]) and the loss function.
        """
        batch = next(data_iterator)
        padding_mask = batch.padding_mask if self.loss.moe_aux_loss_coeff else None
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            packed_seq_params=batch.packed_seq_params,
            padding_mask=padding_mask,
        )
        return output, partial(self.loss_func, batch)

    def loss_func(self, batch: PreferenceBatch, logits_1TV: Tensor) -> tuple[Tensor, Tensor]:
        """The share of this microbatch in the loss, scaled as Megatron expects it, and its vector of metric sums.

        Collectives: one all-gather over the tensor-parallel ranks (`vocab_parallel_logprobs`), one all-reduce of a number a
        sequence over the context-parallel ranks; none in the backward pass.
        """
        group: Any = parallel_state.get_tensor_model_parallel_group()
        logits_RV = logits_1TV[0].index_select(0, batch.rows)
        logps_R = vocab_parallel_logprobs(logits_RV, batch.targets, self.vocab_size, group)
        sums_PM = sum_over_context(batch.segment_sums(logps_R))
        if self.on_sums is not None:
            self.on_sums(batch, sums_PM.detach())
        loss, nll, pair_metrics = batch_loss(self.loss, batch, sums_PM)
        divisors = (sums_PM.new_tensor(sums_PM.shape[0]), batch.lengths[:: batch.members].sum())
        vector = torch.stack([value.detach().double() for value in (*divisors, loss, nll, *pair_metrics)])
        scale = self.num_microbatches * parallel_state.get_data_parallel_world_size()
        return loss * scale, vector


def sum_over_context(sums_PM: Tensor) -> Tensor:
    """The sums of all context-parallel ranks. The gradient is handed on unchanged: every rank computes the whole loss."""
    group: Any = parallel_state.get_context_parallel_group()
    return reduce_from_tensor_model_parallel_region(sums_PM, group)


def batch_loss(config: LossConfig, batch: PreferenceBatch, sums_PM: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of the pairs of one microbatch, already divided by the counts of the global batch.

    Args:
        sums_PM: summed log-probs of the responses, fp32; chosen first.

    Returns:
        loss: scalar; the losses of all microbatches of all data-parallel ranks add up to the loss of the global batch.
        nll: scalar, summed -log p of the chosen responses.
        pair_metrics: scalars, see `metrics.pair_sums`.
    """
    lengths_PM = batch.lengths.view(-1, batch.members)
    logps_PM = sums_PM / lengths_PM
    gamma_P = torch.where(batch.margin.isnan(), config.gamma, batch.margin)
    nll = -sums_PM[:, 0].sum()
    loss = sums_PM.new_zeros(())
    if config.nll_weight:
        loss = loss + config.nll_weight * nll / batch.counts.chosen_tokens
    if config.objective == "simpo":
        losses_P = simpo_loss(
            logps_PM[:, 0],
            logps_PM[:, 1],
            beta=config.simpo_beta,
            gamma_P=gamma_P,
            loss_type=config.simpo_loss_type,
            label_smoothing=config.simpo_label_smoothing,
        )
        loss = loss + (batch.weight * losses_P).sum() / batch.counts.pairs
    metrics = pair_sums(
        logps_PM.detach(), lengths_PM, batch.truncated.view(-1, batch.members), config.simpo_beta, gamma_P
    )
    return loss, nll, metrics
