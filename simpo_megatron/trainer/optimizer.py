"""Megatron's optimizer for the settings of a run: Adam's constants, and the dtypes and places of its state."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from simpo_megatron.compat import have_transformer_engine
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.config.run import Config
from simpo_megatron.models.fusions import on_gpu
from simpo_megatron.settings import require
from simpo_megatron.trainer.pass_through import DTYPES, fields_of, refusals


def build_optimizer(config: Config, chunks: list[Any], params_dtype: torch.dtype) -> Any:
    """Megatron's ChainedOptimizer over model chunks.

    Args:
        config: of the run.
        chunks: of this rank, wrapped by DDP.
        params_dtype: of the weights.

    Raises:
        UserError: what is asked for is not installed, or Megatron refuses a field that was passed through.
    """
    settings = config.optimizer
    with refusals(config, "optimizer_config"):
        return get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                bf16=config.train.bf16,
                params_dtype=params_dtype,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
                overlap_param_gather=config.parallel.overlap_param_gather,
                **_state_fields(config.memory),
                **fields_of(config, "optimizer_config"),
            ),
            chunks,
        )


def _state_fields(settings: MemoryConfig) -> dict[str, Any]:
    """The fields of OptimizerConfig for the dtypes and the place of the optimizer state; none by default."""
    if not settings.use_precision_aware_optimizer:
        return {}
    require(
        have_transformer_engine(),
        "--use-precision-aware-optimizer needs Transformer Engine's Adam, which is not installed here; install it, or "
        "drop the flag",
    )
    dtypes = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    fields: dict[str, Any] = {name: DTYPES[getattr(settings, name)] for name in dtypes}
    fields["use_precision_aware_optimizer"] = True
    if settings.optimizer_cpu_offload:
        require(on_gpu(), "--optimizer-cpu-offload needs a GPU: here all is in host memory already; drop the flag")
        places = ("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")
        fields |= {name: getattr(settings, name) for name in places}
    return fields
