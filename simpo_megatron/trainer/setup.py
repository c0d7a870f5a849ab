"""From a configuration to an engine: the TransformerConfig of a run, and the model before DDP wraps it.

    transformer = build_transformer_config(config, hf)       # needs no process group
    initialize(transformer, ...)                             # `distributed.py`
    engine = build_engine(config, hf, transformer, train_iters)

Between building the models and wrapping them is the place where a model may be changed, by adapters for example.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

from simpo_megatron.checkpoint.folder import TRACKER, latest_step, release_folder
from simpo_megatron.config.run import CheckpointConfig, Config
from simpo_megatron.errors import UserError
from simpo_megatron.models.build import build_model, transformer_config
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.load import load_hf_weights
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.limits import check_shared_prompts, layout_arguments
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer.checkpointing import load_weights
from simpo_megatron.trainer.engine import Engine


def build_transformer_config(config: Config, hf: HFCheckpoint) -> TransformerConfig:
    """Megatron's config of the model in the layout of the run; needs no process group.

    Raises:
        UserError: the layout does not divide the model.
    """
    if config.data.share_prompts:
        fused = use_transformer_engine(config.model.transformer_impl)
        check_shared_prompts(config.objective.responses, config.parallel.context_parallel_size, fused)
    return transformer_config(
        hf,
        bf16=config.train.bf16,
        transformer_impl=config.model.transformer_impl,
        gradient_accumulation_fusion=config.model.gradient_accumulation_fusion,
        moe_aux_loss_coeff=config.train.moe_aux_loss_coeff,
        **layout_arguments(config.parallel, hf.architecture.num_layers),
    )


def build_engine(config: Config, hf: HFCheckpoint, transformer: TransformerConfig, train_iters: int) -> Engine:
    """The engine of a run, with the weights that it starts from; those of a step that it resumes are loaded later.

    Collectives: those of `build_model`, and one gather of errors.

    Args:
        config: of the run.
        hf: the Hugging Face checkpoint.
        transformer: from `build_transformer_config`; Megatron's groups exist for it.
        train_iters: steps of the whole run, for the learning-rate schedule.

    Raises:
        UserError: the weights cannot be read, or are of another model; on every rank.
    """
    models = build_model(
        hf,
        transformer,
        transformer_impl=config.model.transformer_impl,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )
    with raise_on_all_ranks():
        load = config.checkpoint.load
        converted = None if load is None else release_folder(load)
        if converted is not None:
            load_weights(models, hf, converted)
        elif step_to_resume(config.checkpoint) is None:
            load_hf_weights(models, hf, progress=dist.get_rank() == 0)
    return Engine(config, hf, models, transformer, train_iters)


def step_to_resume(settings: CheckpointConfig) -> int | None:
    """The step that --load resumes from; None where the run starts from weights without a run.

    Raises:
        UserError: --load names a folder without a complete checkpoint.
    """
    load = settings.load
    if load is None or release_folder(load) is not None:
        return None
    step = latest_step(load)
    if step is None and load != settings.save:
        raise UserError(f"--load {load} has no {TRACKER}; give a folder some --save wrote to, or drop --load")
    return step
