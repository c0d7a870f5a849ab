"""Megatron's DDP, optimizer and learning-rate schedule behind two calls: `train_step` and `evaluate`."""

from __future__ import annotations

import math
from itertools import tee
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from simpo_megatron.adapters.install import start_dropout
from simpo_megatron.batch.packer import GlobalBatch, RowPacker
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.metrics import reduce_metrics
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.step import PreferenceStep
from simpo_megatron.trainer.optimizer import build_optimizer
from simpo_megatron.trainer.pass_through import fields_of, refusals
from simpo_megatron.trainer.timing import Seconds


class Engine:
    """Trains and evaluates.

    Args:
        config: of the run.
        hf: the checkpoint that the models were built from.
        models: one GPTModel for each virtual pipeline stage of this rank, from `setup.prepare_models`.
        transformer: their TransformerConfig. The hooks that Megatron's schedule calls are set in it.
        train_iters: steps of the whole run, for the learning-rate schedule.

    Attributes:
        chunks: the models wrapped by DDP: Megatron's model chunks.
        packer: makes the global batches that the methods take (`packer.pack`).
        baseline: what the loss of the next step compares with (`Objective.next_baseline`).
        seconds: the time of `forward_backward` and `optimizer` in `train_step`.
    """

    baseline: float = 0.0

    def __init__(
        self,
        config: Config,
        hf: HFCheckpoint,
        models: list[GPTModel],
        transformer: TransformerConfig,
        train_iters: int,
    ) -> None:
        self.config, self.hf, self.models, self.transformer = config, hf, models, transformer
        self.chunks: list[Any] = self._wrap()
        self.optimizer = self._build_optimizer()
        self.scheduler = self._build_scheduler(train_iters)
        self.packer = self._build_packer()
        self.seconds = Seconds()
        self.run_schedule = get_forward_backward_func()

    def _wrap(self) -> list[DistributedDataParallel]:
        # DDP wraps the bare GPTModel, which is built in bf16 already. Float16Module would upcast all logits to fp32.
        parallel, hooks = self.config.parallel, self.transformer
        own = {
            "grad_reduce_in_fp32": self.config.memory.main_grads_dtype == "fp32",
            "overlap_grad_reduce": parallel.overlap_grad_reduce,
            "overlap_param_gather": parallel.overlap_param_gather,
            "use_distributed_optimizer": parallel.use_distributed_optimizer,
        }
        with refusals(self.config, "ddp_config"):
            ddp = DistributedDataParallelConfig(**{**own, **fields_of(self.config, "ddp_config")})
            chunks = [
                DistributedDataParallel(hooks, ddp, model, disable_bucketing=index > 0)
                for index, model in enumerate(self.models)
            ]
        single = len(chunks) == 1

        def hook(name: str) -> Any:
            functions = [getattr(chunk, name) for chunk in chunks]
            return functions[0] if single else functions

        if parallel.overlap_grad_reduce:
            hooks.no_sync_func = hook("no_sync")
        if parallel.overlap_param_gather:
            hooks.param_sync_func = hook("start_param_sync")
        hooks.finalize_model_grads_func = finalize_model_grads
        return chunks

    def _build_packer(self) -> RowPacker:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return RowPacker(
            seq_length=self.config.data.seq_length,
            responses=self.config.objective.responses,
            hidden_size=self.transformer.hidden_size,
            share_prompts=self.config.data.share_prompts,
            fixed_length=not self.config.parallel.variable_seq_lengths,
            sequence_parallel=self.config.parallel.sequence_parallel,
            row_multiple=self.config.memory.row_multiple,
            microbatch_multiple=stages if len(self.chunks) > 1 else 1,  # the interleaved schedule needs it
        )

    def _build_optimizer(self) -> Any:
        optimizer = build_optimizer(self.config, self.chunks, self.transformer.params_dtype)
        self.transformer.grad_scale_func = optimizer.scale_loss
        measure = optimizer.get_grad_norm

        def finite_grad_norm() -> float:
            # Megatron asks for the norm before the update. An error here keeps a NaN out of the weights.
            norm = float(measure())
            if not math.isfinite(norm):
                raise UserError(
                    f"the gradient norm is {norm} and no weight was changed; lower --lr, or look at the data"
                )
            return norm

        optimizer.get_grad_norm = finite_grad_norm
        return optimizer

    def _build_scheduler(self, train_iters: int) -> OptimizerParamScheduler:
        # The schedule counts pairs, as Megatron-LM counts samples: one step is --global-batch-size pairs.
        settings, pairs = self.config.optimizer, self.config.train.global_batch_size
        total = train_iters * pairs
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            # Whole steps: a warm-up that is a fraction of a step would only set the first learning rate to 0.
            lr_warmup_steps=int(settings.lr_warmup_fraction * train_iters) * pairs,
            lr_decay_steps=total,
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=total,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
            override_opt_param_scheduler=not settings.use_checkpoint_opt_param_scheduler,
        )

    def _run(self, batch: GlobalBatch, forward_only: bool, on_sums: Any = None) -> dict[str, float]:
        objective = self.config.objective.with_baseline(self.baseline)
        coefficient = self.config.train.moe_aux_loss_coeff
        sums: list[dict[str, Tensor]] = self.run_schedule(
            forward_step_func=PreferenceStep(
                objective, self.hf.architecture.vocab_size, len(batch.microbatches), coefficient, on_sums
            ),
            data_iterator=list(tee(self.packer.microbatches(batch), len(self.chunks))),  # all chunks read every row
            model=self.chunks,
            num_microbatches=len(batch.microbatches),
            seq_length=batch.row_length or self.packer.seq_length,  # read only where there are several stages
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reduce_metrics(sums, objective.metrics)

    def compute_gradients(self, batch: GlobalBatch, on_sums: Any = None) -> dict[str, float]:
        """Fills the gradient buffers with the gradient of this batch.

        Args:
            batch: from `packer.pack`.
            on_sums: see `PreferenceStep`.

        Returns:
            The metrics of the batch.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        start_dropout(self.models, self.config.train.seed, self.scheduler.num_steps)
        return self._run(batch, forward_only=False, on_sums=on_sums)

    def train_step(self, batch: GlobalBatch) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
            batch: from `packer.pack`.

        Returns:
            The metrics of the batch before the step, with `grad_norm` (before clipping) and `learning_rate`.

        Raises:
            UserError: the loss or the gradient norm is not finite; the weights are unchanged.
        """
        with self.seconds.of("forward_backward"):
            metrics = self.compute_gradients(batch)
        if not math.isfinite(metrics["loss"]):
            raise UserError(f"the loss is {metrics['loss']} and no weight was changed; lower --lr, or look at the data")
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        with self.seconds.of("optimizer"):
            _, metrics["grad_norm"], _ = self.optimizer.step()
        self.baseline = self.config.objective.next_baseline(metrics)
        self.scheduler.step(increment=self.config.train.global_batch_size)
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: GlobalBatch, on_sums: Any = None) -> dict[str, float]:
        """Measures a batch of any size, by the formula of training.

        Args:
            batch: from `packer.pack`.
            on_sums: see `PreferenceStep`.

        Returns:
            The metrics of the batch.
        """
        for chunk in self.chunks:
            chunk.eval()
        return self._run(batch, forward_only=True, on_sums=on_sums)

    def sync_parameters(self) -> None:
        """Completes the parameters of this rank: --overlap-param-gather leaves them to the next forward pass."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
