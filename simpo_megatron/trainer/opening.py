"""The first lines of a run: model, layout, kernels, objective, length, and what it starts from."""

from __future__ import annotations

import os

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from simpo_megatron import compat
from simpo_megatron.checkpoint.folder import iteration_folder
from simpo_megatron.config.arguments import flat
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.config.presets import describe
from simpo_megatron.config.run import Config
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.config import describe_layout
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.progress import Length, Progress
from simpo_megatron.trainer.resume import step_to_resume, weights_folder


def describe_start(engine: Engine, length: Length, state: Progress) -> str:
    """One line: the checkpoint that the run starts from."""
    settings = engine.config.checkpoint
    load, step = settings.load, step_to_resume(settings)
    if load is None or step is None:
        folder = weights_folder(settings)
        return f"starting from {engine.hf.path if folder is None else f'the weights of {folder}'}"
    done = "; that is the whole run, nothing is left to train" if length.is_reached(state) else ""
    return f"resumed from {iteration_folder(load, step)}, after {state.consumed_pairs} pairs{done}"


def describe_run(engine: Engine, length: Length, num_pairs: int) -> list[str]:
    """The lines at the start: model, layout, kernels, objective, preset and length."""
    config, transformer = engine.config, engine.transformer
    layout = describe_layout(config.parallel, parallel_state.get_data_parallel_world_size())
    device = torch.device(torch.cuda.current_device()).type
    precision = "bf16" if config.train.bf16 else "fp32"
    lines = [
        f"{engine.hf.architecture.family.name} model, {precision}, {layout} on {device}",
        _describe_kernels(config, transformer),
        config.objective.describe(),
    ]
    if config.train.preset is not None:
        lines.append(describe(config.train.preset, flat(config)))
    if config.train.deterministic_mode:
        lines.append(f"deterministic: torch's algorithms, NCCL_ALGO {os.environ.get('NCCL_ALGO')}")
    if coefficient := config.train.moe_aux_loss_coeff:
        lines.append(f"balancing loss of the experts: coefficient {coefficient:g}")
    epochs = length.pairs / num_pairs
    lines.append(f"{length.steps} steps of {config.train.global_batch_size} pairs: {epochs:.2f} epochs")
    return lines


def _describe_kernels(config: Config, transformer: TransformerConfig) -> str:
    """One line: which package runs the layers, Adam and the accumulation of weight gradients."""
    fused = use_transformer_engine(config.model.transformer_impl)
    layers = "Transformer Engine's" if fused else "Megatron's on plain torch"
    if not compat.have_transformer_engine():
        layers += " (Transformer Engine is not installed)"
    package = "Transformer Engine" if fused else "Apex"
    weight_gradients = f"fused, by {package}" if transformer.gradient_accumulation_fusion else "not fused"
    adam = compat.adam() + _places(config.memory)
    return f"layers: {layers}; Adam: {adam}; accumulation of weight gradients: {weight_gradients}"


def _places(settings: MemoryConfig) -> str:
    """What the precision-aware optimizer keeps in which dtype, or where; empty for the others."""
    if not settings.use_precision_aware_optimizer:
        return ""
    gradients = f"gradients {settings.main_grads_dtype}"
    if settings.optimizer_cpu_offload:
        return f" ({settings.optimizer_offload_fraction:.0%} of its state in host memory, {gradients})"
    moments = f"moments {settings.exp_avg_dtype} and {settings.exp_avg_sq_dtype}"
    return f" (weights {settings.main_params_dtype}, {moments}, {gradients})"
