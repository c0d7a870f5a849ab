"""`--dry-run`: everything about a run that can be known on one CPU process, whatever its layout, in seconds.

    python -m simpo_megatron.train --config run.yaml ... --dry-run
    WORLD_SIZE=64 python -m simpo_megatron.train --config run.yaml ... --dry-run     # also whether 64 processes fit

Checks flags, layout and number of processes, names and shapes of the checkpoint, the tokenizer on the first rows of the data,
and the folders; builds no model and no process group, writes nothing. Prints what a run would be, memory included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from simpo_megatron import compat, cpu
from simpo_megatron.checkpoint.folder import iteration_folder, release_folder
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.config.arguments import flat
from simpo_megatron.config.presets import describe
from simpo_megatron.config.run import Config
from simpo_megatron.data.blend import parse_blend
from simpo_megatron.data.clean import encode_rows
from simpo_megatron.data.counts import nothing_left
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.tokenizer import load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, check_tensors
from simpo_megatron.parallel.config import describe_layout
from simpo_megatron.parallel.limits import check_processes, layout_arguments, processes_needed
from simpo_megatron.planning.memory import Memory, Workload, estimate
from simpo_megatron.settings import flag, require

ROWS = 64  # of each file


def dry_run(config: Config, hf: HFCheckpoint) -> None:
    """Checks the run and prints what it would be.

    Args:
        config: of the run; folders have been checked.
        hf: its checkpoint.

    Raises:
        UserError: the run would end in one, as far as that shows here.
    """
    cpu.enable()
    from simpo_megatron.models.export import check_target
    from simpo_megatron.trainer.setup import build_transformer_config

    remarks = config.objective.warnings(config.optimizer.lr, hf.num_parameters)
    impl = config.model.transformer_impl
    if impl == "transformer_engine" and not compat.have_transformer_engine():
        remarks.append(
            "--transformer-impl transformer_engine: it is not installed here, and has to be where the run is"
        )
        config = replace(config, model=replace(config.model, transformer_impl="auto"))
    if config.model.gradient_accumulation_fusion:
        remarks.append("--gradient-accumulation-fusion: a GPU and Apex's extension have to be where the run is")
        config = replace(config, model=replace(config.model, gradient_accumulation_fusion=None))
    if config.model.head == "plain":
        remarks.append("--head plain: it holds all logits of a row, which the memory above leaves out")
    build_transformer_config(config, hf)
    parallel = config.parallel
    layout = layout_arguments(parallel, hf.architecture.num_layers)
    experts = hf.architecture.num_experts is not None
    needed = processes_needed(experts, layout)
    world = os.environ.get("WORLD_SIZE", str(needed))
    require(
        world.isdecimal() and int(world) > 0, f"WORLD_SIZE is {world!r}, no number of processes; give one, or unset it"
    )
    world_size = int(world)
    check_processes(world_size, experts, layout)
    if config.model.export_hf is not None:
        check_target(config.model.export_hf)
    start = _checkpoint(config, hf)
    tokenizer = load_tokenizer(hf.path)
    tokens = _pair_tokens(config.data.training_sources, "--train-data", config, hf, tokenizer)
    if config.data.valid_data is not None:
        _pair_tokens(config.data.valid_data, "--valid-data", config, hf, tokenizer)

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
        "model": f"{hf.architecture.family.name}, {hf.num_parameters:,} parameters, "
        f"{'bf16' if config.train.bf16 else 'fp32'}; names and shapes of all tensors are right",
        "layout": f"{describe_layout(parallel, data_parallel)}, recompute {parallel.recompute_granularity or 'none'}",
        "processes": f"{world_size}; a multiple of {needed} is needed",
        "data": f"first {ROWS} rows at most: {tokens:.0f} tokens a pair; about {rows} rows a step, "
        f"{work.microbatches} a data-parallel rank",
        "starts from": start,
        "memory of a GPU": describe_memory(estimate(hf.architecture, layout, work)),
    }
    if config.train.preset is not None:
        lines["settings"] = describe(config.train.preset, flat(config))
    _show(lines, remarks)


def _pair_tokens(values: Sequence[str], flag: str, config: Config, hf: HFCheckpoint, tokenizer: Any) -> float:
    """Checks the sources of a blend, raw files by their first rows; mean tokens of their pairs, prompts twice.

    Raises:
        UserError: as training, for what these rows show.
    """
    from simpo_megatron.trainer.data import check_ids, open_prepared

    found = []
    for source in parse_blend(values, flag).sources:
        if is_prepared(source):
            pairs = open_prepared(source, config.data, hf, tokenizer)
        else:
            encoder = PairEncoder(tokenizer, config.data.options, hf.eos_token_ids)
            encoded = encode_rows(islice(read_rows(source), ROWS), encoder)
            if not len(encoded.pairs):
                raise nothing_left(source, encoded.report)
            pairs = encoded.pairs
        check_ids(pairs, hf, source)
        found.append(pairs.pair_tokens[:ROWS])
    return float(np.concatenate(found).mean())


def _checkpoint(config: Config, hf: HFCheckpoint) -> str:
    """Where the run starts from, its names and shapes checked.

    Raises:
        UserError: a checkpoint is not complete, or not of this model.
    """
    from simpo_megatron.trainer.setup import step_to_resume

    check_tensors(hf)
    load = config.checkpoint.load
    step, folder = step_to_resume(config.checkpoint), None if load is None else release_folder(load)
    if load is not None and step is not None:
        folder = iteration_folder(load, step)
    if folder is None:
        return str(hf.path)
    try:
        saved = read_torch_dist(folder, hf).args
    except UserError as error:
        raise UserError(f"--load {config.checkpoint.load} does not fit {hf.path}: {error}") from error
    now = flat(config)
    for name in ("seed", "use_distributed_optimizer") if step is not None else ():
        require(
            saved.get(name, now[name]) == now[name],
            f"{folder} was saved with {flag(name)} {saved.get(name)}, not {now[name]}; resume it with the same",
        )
    return str(folder)


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
