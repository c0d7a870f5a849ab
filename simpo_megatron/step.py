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

from simpo_megatron.batch import PreferenceBatch
from simpo_megatron.compat import check_balancing_loss
from simpo_megatron.config import LossConfig
from simpo_megatron.head import HeadTask, find_head, split_output
from simpo_megatron.logprobs import vocab_parallel_logprobs
from simpo_megatron.loss import simpo_loss
from simpo_megatron.metrics import pair_sums
from simpo_megatron.models.place import unwrap

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

    def __post_init__(self) -> None:
        if self.loss.moe_aux_loss_coeff:
            check_balancing_loss()

    def __call__(self, data_iterator: Iterator[PreferenceBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Runs the model on the next batch.

        Returns:
            The stage's output (on the last stage the loss with the sums where there is a `LogProbHead`, else logits
            [1, T, V / tensor_model_parallel_size]) and the loss function.
        """
        batch = next(data_iterator)
        head = find_head(model)
        with head.armed(self.head_task(batch)) if head else contextlib.nullcontext():
            output = model(
                batch.tokens,
                batch.position_ids,
                None,
                packed_seq_params=batch.packed_seq_params,
                **self._padding_mask(batch, model),
            )
        if self.loss.moe_aux_loss_coeff and output.requires_grad:
            self._weigh_balancing_loss(batch, output)
        return output, partial(self.loss_func, batch, head is not None)

    def _weigh_balancing_loss(self, batch: PreferenceBatch, output: Tensor) -> None:
        """Makes the balancing loss of the experts a mean over the rows that hold pairs.

        Megatron's is a mean over all microbatches, and knows one weight for all of them, which the backward pass reads. An
        empty pack would count like a row, with the one token of padding it has. So each backward pass begins with a weight of
        its own, and puts back the common one at its end.
        """
        microbatches = self.num_microbatches * parallel_state.get_data_parallel_world_size()
        weight = microbatches / batch.counts.rows if batch.pair_rows else 0.0

        def begin(_: Tensor) -> None:
            common: Any = MoEAuxLossAutoScaler.main_loss_backward_scale
            before = common.clone()
            common.mul_(weight)
            end = partial(MoEAuxLossAutoScaler.set_loss_scale, before)
            torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]

        output.register_hook(begin)

    def _padding_mask(self, batch: PreferenceBatch, model: Any) -> dict[str, Tensor]:
        """What Megatron's balancing loss must not count; Megatron 0.15 knows neither mask nor argument.

        Only the first stage cuts it for sequence parallelism by itself.
        """
        if not self.loss.moe_aux_loss_coeff:
            return {}
        gpt, mask = unwrap(model), batch.padding_mask
        if not gpt.pre_process and gpt.config.sequence_parallel:
            group: Any = parallel_state.get_tensor_model_parallel_group()
            mask = mask.chunk(group.size(), dim=1)[group.rank()]
        return {"padding_mask": mask}

    def head_task(self, batch: PreferenceBatch) -> HeadTask:
        """What the head is to do with a batch."""
        return HeadTask(
            rows_R=batch.rows,
            targets_R=batch.targets,
            segments_R=batch.segments,
            pair_rows=batch.pair_rows,
            largest_rows=batch.largest_rows,
            members=batch.members,
            vocab_size=self.vocab_size,
            loss=partial(batch_loss, self.loss, batch),
            # `scale` below; Megatron divides by num_microbatches and multiplies by the context-parallel size.
            loss_gradient=float(parallel_state.get_data_parallel_world_size(with_context_parallel=True)),
        )

    def loss_func(self, batch: PreferenceBatch, fused: bool, output: Tensor) -> tuple[Tensor, Tensor]:
        """The share of this microbatch in the loss, scaled as Megatron expects it, and its vector of metric sums.

        Collectives: none with the fused head. Else one all-gather over the tensor-parallel ranks (`vocab_parallel_logprobs`)
        and one all-reduce of a number a sequence over the context-parallel ranks; none in the backward pass.
        """
        if fused:
            loss, sums_PM = split_output(output, batch.members)
        else:
            group: Any = parallel_state.get_tensor_model_parallel_group()
            logits_RV = output[0].index_select(0, batch.rows)
            logps_R = vocab_parallel_logprobs(logits_RV, batch.targets, self.vocab_size, group)
            sums_PM = sum_over_context(batch.segment_sums(logps_R))
            loss = batch_loss(self.loss, batch, sums_PM)
        sums_PM = sums_PM.detach()
        if self.on_sums is not None:
            self.on_sums(batch, sums_PM)
        divisors = (sums_PM.new_tensor(sums_PM.shape[0]), batch.lengths[:: batch.members].sum())
        metrics = (*divisors, loss.detach(), -sums_PM[:, 0].sum(), *batch_metrics(self.loss, batch, sums_PM))
        scale = self.num_microbatches * parallel_state.get_data_parallel_world_size()
        return loss * scale, torch.stack([value.double() for value in metrics])


def sum_over_context(sums_PM: Tensor) -> Tensor:
    """The sums of all context-parallel ranks. The gradient is handed on unchanged: every rank computes the whole loss."""
    group: Any = parallel_state.get_context_parallel_group()
    return reduce_from_tensor_model_parallel_region(sums_PM, group)


def batch_loss(config: LossConfig, batch: PreferenceBatch, sums_PM: Tensor) -> Tensor:
    """The loss of the pairs of one microbatch, already divided by the counts of the global batch.

    The losses of all microbatches of all data-parallel ranks add up to the loss of the global batch. A sum over pairs, which
    the fused head relies on: the derivative by one pair's sums does not look at the others.

    Args:
        sums_PM: summed log-probs of the responses, fp32; chosen first.
    """
    logps_PM = sums_PM / batch.lengths.view(-1, batch.members)
    loss = sums_PM.new_zeros(())
    if config.nll_weight:
        loss = loss - config.nll_weight * sums_PM[:, 0].sum() / batch.counts.chosen_tokens
    if config.objective == "simpo":
        losses_P = simpo_loss(
            logps_PM[:, 0],
            logps_PM[:, 1],
            beta=config.simpo_beta,
            gamma_P=gammas(config, batch),
            loss_type=config.simpo_loss_type,
            label_smoothing=config.simpo_label_smoothing,
        )
        loss = loss + (batch.weight * losses_P).sum() / batch.counts.pairs
    return loss


def batch_metrics(config: LossConfig, batch: PreferenceBatch, sums_PM: Tensor) -> list[Tensor]:
    """The sums over pairs of one microbatch that are logged, see `metrics.pair_sums`."""
    lengths_PM, truncated_PM = (values.view(-1, batch.members) for values in (batch.lengths, batch.truncated))
    return pair_sums(sums_PM / lengths_PM, lengths_PM, truncated_PM, config.simpo_beta, gammas(config, batch))


def gammas(config: LossConfig, batch: PreferenceBatch) -> Tensor:
    """The target margin of each pair: its own where the data brings one."""
    return torch.where(batch.margin.isnan(), config.gamma, batch.margin)
