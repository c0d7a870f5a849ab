"""`--dry-run`: everything about a run that can be known on one CPU process, whatever its layout, in seconds.

    python -m simpo_megatron.train --config run.yaml ... --dry-run
    WORLD_SIZE=64 python -m simpo_megatron.train --config run.yaml ... --dry-run     # also whether 64 processes fit

Checks flags, layout and number of processes, names and shapes of the checkpoint, the tokenizer on the first rows of the data,
and the folders; builds no model and no process group, writes nothing. Prints what a run would be, memory included.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from simpo_megatron import compat, cpu
from simpo_megatron.arguments import flat
from simpo_megatron.config import Config
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.data.tokenize import PairEncoder, truncate
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf import HFModel, check_tensors
from simpo_megatron.models.limits import check_processes, layout_arguments, processes_needed
from simpo_megatron.plan.memory import Memory, Workload, estimate
from simpo_megatron.presets import describe

ROWS = 64  # of each file


def dry_run(config: Config, hf: HFModel) -> None:
    """Checks the run and prints what it would be.

    Args:
        config: of the run; folders have been checked.
        hf: its checkpoint.

    Raises:
        UserError: the run would end in one, as far as that shows here.
    """
    cpu.enable()
    from simpo_megatron.models.export import check_target
    from simpo_megatron.trainer.loop import checkpoint_to_load, layout_config, load_tokenizer

    check_tensors(hf)
    remarks = config.warnings(hf.num_parameters)
    impl = config.model.transformer_impl
    if impl == "transformer_engine" and not compat.have_transformer_engine():
        remarks.append(
            "--transformer-impl transformer_engine: it is not installed here, and has to be where the run is"
        )
        config = replace(config, model=replace(config.model, transformer_impl="auto"))
    if config.model.head == "plain":
        remarks.append("--head plain: it holds all logits of a row, which the memory above leaves out")
    layout_config(config, hf)
    layout = layout_arguments(config.parallel, hf.num_layers)
    experts = "num_moe_experts" in hf.family.transformer_kwargs(hf.config)
    needed = processes_needed(experts, layout)
    world_size = int(os.environ.get("WORLD_SIZE", needed))
    check_processes(world_size, experts, layout)
    if config.model.export_hf is not None:
        check_target(config.model.export_hf)
    step = checkpoint_to_load(config)
    tokenizer = load_tokenizer(hf.path)
    encoder = PairEncoder(tokenizer, config.data.options, hf.eos_token_ids)
    assert config.data.train_data is not None
    tokens = _first_rows(config.data.train_data, encoder, config, hf)
    if config.data.valid_data is not None:
        _first_rows(config.data.valid_data, encoder, config, hf)

    data_parallel = world_size // math.prod(
        layout[f"{name}_size"] for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    )
    rows = math.ceil(config.train.global_batch_size * tokens / config.data.seq_length)
    work = Workload(
        world_size=world_size,
        seq_length=config.data.seq_length,
        microbatches=max(1, math.ceil(rows / data_parallel)),
        slab_bytes=config.model.slab_bytes,
        bf16=config.train.bf16,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        fused=impl != "local",
        divisible_by=config.model.make_vocab_size_divisible_by,
    )
    lines = {
        "model": f"{hf.family.name}, {hf.num_parameters:,} parameters, {'bf16' if config.train.bf16 else 'fp32'}; names "
        "and shapes of all tensors are right",
        "layout": _describe_layout(config, data_parallel),
        "processes": f"{world_size}; a multiple of {needed} is needed",
        "data": f"first {ROWS} rows at most: {tokens:.0f} tokens a pair; about {rows} rows a step, "
        f"{work.microbatches} a data-parallel rank",
        "starts from": str(hf.path) if step is None else f"step {step} of {config.checkpoint.load}",
        "memory of a GPU": describe_memory(estimate(hf, layout, work)),
    }
    if config.train.preset is not None:
        lines["settings"] = describe(config.train.preset, flat(config))
    _show(lines, remarks)


def _first_rows(path: Path, encoder: PairEncoder, config: Config, hf: HFModel) -> float:
    """Tokenizes the first rows of a file; mean tokens of a pair, its prompt twice.

    Raises:
        UserError: as `data.load_preferences`, or the tokenizer is of another model.
    """
    from simpo_megatron.trainer.loop import check_ids

    pairs = encoder.encode([parse_preference(row, where) for where, row in islice(read_rows(path), ROWS)])
    pairs = [truncate(pair, config.data.options, encoder.bos) for pair in pairs if pair.chosen and pair.rejected]
    if not pairs:
        raise UserError(f"{path}: all of the first {ROWS} rows have an empty response; mend the data")
    check_ids(max(max(pair.prompt + pair.chosen + pair.rejected) for pair in pairs), hf, path)
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs) / len(pairs)


def _describe_layout(config: Config, data_parallel: int) -> str:
    p = config.parallel
    sizes = {
        "tensor": p.tensor_model_parallel_size,
        "context": p.context_parallel_size,
        "pipeline": p.pipeline_model_parallel_size,
        "data": data_parallel,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if p.expert_model_parallel_size > 1:
        layout += f", experts over {p.expert_model_parallel_size}"
    return f"{layout}, recompute {p.recompute_granularity or 'none'}"


def describe_memory(memory: Memory) -> str:
    """The parts of a memory estimate, in GiB."""
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in vars(memory).items() if size)
    return f"about {memory.total / 2**30:.1f} GiB on the fullest rank ({parts}), CUDA and NCCL not counted"


def _show(lines: dict[str, str], remarks: list[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, text in lines.items():
        console.print(f"{name + ':':<17}{text}", markup=False)
    for remark in remarks:
        console.print(f"warning: {remark}", markup=False)
    console.print("dry run: nothing is wrong with flags, layout, data, checkpoint and folders", markup=False)
