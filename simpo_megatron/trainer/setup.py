"""From a configuration to an engine: the TransformerConfig of a run, its models, and what is done to them before DDP.

    config = name_layers(config)                             # "auto" is Transformer Engine's or Megatron's
    transformer = build_transformer_config(config, hf)       # needs no process group
    initialize(transformer, ...)                             # `distributed.py`
    engine = build_engine(config, hf, transformer, train_iters)

`prepare_models` is the one place where a model is changed between building it and wrapping it.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from simpo_megatron.adapters.settings import install_adapter
from simpo_megatron.config.run import Config
from simpo_megatron.head.layer import LogProbHead
from simpo_megatron.models.build import build_model, transformer_config
from simpo_megatron.models.fusions import Kernels
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.load import load_hf_weights
from simpo_megatron.models.rope import check_length
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.limits import check_shared_prompts, layout_arguments
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer.adapter import base_checkpoint
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.loading import load_weights
from simpo_megatron.trainer.low_precision import fp8_fields
from simpo_megatron.trainer.pass_through import CLASSES, check_use, fields_of, refusals
from simpo_megatron.trainer.resume import step_to_resume, weights_folder


def name_layers(config: Config) -> Config:
    """The configuration with the layers that `--transformer-impl auto` comes to, which checkpoints then record.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    fused = use_transformer_engine(config.model.transformer_impl)
    return replace(config, model=replace(config.model, transformer_impl="transformer_engine" if fused else "local"))


def build_transformer_config(config: Config, hf: HFCheckpoint) -> TransformerConfig:
    """Megatron's config of the model in the layout of the run. Needs no process group.

    Args:
        config: of the run.
        hf: the Hugging Face checkpoint.

    Raises:
        UserError: the layout does not divide the model, --share-prompts does not work with these settings, or the
            model's rotary embedding does not work with this --max-length.
    """
    check_length(hf.architecture.rope, config.data.options.max_length, "--max-length")
    if config.data.share_prompts:
        fused = use_transformer_engine(config.model.transformer_impl)
        check_shared_prompts(config.objective.responses, config.parallel.context_parallel_size, fused)
    passed = {name: fields_of(config, name) for name in CLASSES}["transformer_config"]  # checks the others too
    check_use(config, has_experts=hf.architecture.num_experts is not None)
    layout = layout_arguments(config.parallel, hf.architecture.num_layers)
    transformer_engine = use_transformer_engine(config.model.transformer_impl)
    fp8 = fp8_fields(config.memory, transformer_engine, hf.architecture.transformer, layout)
    with refusals(config, "transformer_config"):
        return transformer_config(
            hf,
            bf16=config.train.bf16,
            transformer_impl=config.model.transformer_impl,
            kernels=Kernels(**{name: getattr(config.model, name) for name in vars(Kernels())}),
            moe_aux_loss_coeff=config.train.moe_aux_loss_coeff,
            deterministic_mode=config.train.deterministic_mode,
            **{**layout, **fp8, **passed},
        )


def build_engine(config: Config, hf: HFCheckpoint, transformer: TransformerConfig, train_iters: int) -> Engine:
    """The engine of a run, with the weights that the run starts from.

    The weights of a run that is resumed are loaded later, with its optimizer (`checkpointing.load`).

    Collectives: those of `build_model` and of `prepare_models`.

    Args:
        config: of the run.
        hf: the Hugging Face checkpoint.
        transformer: from `build_transformer_config`; Megatron's groups exist for it.
        train_iters: steps of the whole run, for the learning-rate schedule.

    Raises:
        UserError: the weights cannot be read, or are of another model; on every rank.
    """
    with refusals(config, "transformer_config"):
        models = build_model(
            hf,
            transformer,
            transformer_impl=config.model.transformer_impl,
            make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        )
    prepare_models(models, config, hf)
    return Engine(config, hf, models, transformer, train_iters)


def prepare_models(models: list[GPTModel], config: Config, hf: HFCheckpoint) -> None:
    """Loads the weights and installs adapter and head: all that is done to models before DDP wraps them.

    Collectives: one gather of errors; for weights of --load also those of `load_weights`.

    Args:
        models: of this rank, one for each virtual pipeline stage.
        config: of the run.
        hf: the Hugging Face checkpoint they were built from.

    Raises:
        UserError: the weights cannot be read, or are of another model; on every rank.
    """
    with raise_on_all_ranks():
        folder, first = weights_folder(config.checkpoint), dist.get_rank() == 0
        base = None
        if config.adapter.trains_adapters:  # the checkpoints of such a run hold no base
            base = base_checkpoint(config.checkpoint)
            if base is None:
                load_hf_weights(models, hf, progress=first)
            else:
                load_weights(models, hf, base)
            install_adapter(models, config.adapter, hf, config.train.seed)
        if folder is not None and folder != base:
            load_weights(models, hf, folder)
        elif not config.adapter.trains_adapters and step_to_resume(config.checkpoint) is None:
            load_hf_weights(models, hf, progress=first)
    if config.model.head == "fused":
        for model in models:
            if model.post_process:
                LogProbHead.install(model, config.model.slab_bytes)
