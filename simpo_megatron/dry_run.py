"""`--dry-run`: all that can be known about a run in one CPU process, in seconds, for any layout.

    python -m simpo_megatron.train --config run.yaml ... --dry-run
    WORLD_SIZE=64 python -m simpo_megatron.train --config run.yaml ... --dry-run     # also: do 64 processes fit?

It checks the flags, the layout and the number of processes, the names and shapes of the checkpoint, the tokenizer on
the first rows of the data, and the folders. It prints what the run would be, with an estimate of the memory of a GPU.
It builds no model and no process group, and writes nothing. The machine of the dry run need not be that of the run. So
a disk that is too small is a warning here, and an error in training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from simpo_megatron import compat, cpu
from simpo_megatron.adapters.settings import lora_of
from simpo_megatron.checkpoint.adapter import read_factors
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.source import has_weights, lacks_tokenizer, model_folder
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
from simpo_megatron.planning.checkpoint_size import disk_use
from simpo_megatron.planning.memory import Memory, Workload, estimate
from simpo_megatron.settings import require

ROWS = 64  # that are read of each data file


@dataclass(frozen=True)
class Cut:
    """How the processes of a run are cut into groups.

    Attributes:
        layout: arguments of TransformerConfig, from `layout_arguments`.
        needed: the number of processes must be a multiple of this.
        world_size: processes: WORLD_SIZE, or `needed` if it is not set.
    """

    layout: dict[str, Any]
    needed: int
    world_size: int

    @property
    def data_parallel(self) -> int:
        """The data-parallel size."""
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return self.world_size // math.prod(self.layout[name] for name in names)


def dry_run(config: Config, hf: HFCheckpoint) -> None:
    """Checks the run and prints what it would be.

    Args:
        config: of the run; its folders have been checked.
        hf: its Hugging Face checkpoint.

    Raises:
        UserError: the run would end in this error, as far as it shows here.
    """
    cpu.enable()
    from simpo_megatron.trainer.adapter import describe_adapter
    from simpo_megatron.trainer.remarks import count_pairs, remarks

    cut = _check_layout(config, hf)
    start, done = _check_start(config, hf)
    disk = disk_use(config, hf.architecture, config.train.train_iters, done)
    tokens = _check_data(config, hf)
    parallel, precision = config.parallel, "bf16" if config.train.bf16 else "fp32"
    rows = math.ceil(config.train.global_batch_size * tokens / config.data.seq_length)
    microbatches = max(1, math.ceil(rows / cut.data_parallel))
    adapter = describe_adapter(config, hf.architecture)
    layout, recompute = describe_layout(parallel, cut.data_parallel), parallel.recompute_granularity or "none"
    lines = {
        "model": f"{hf.architecture.family.name}, {hf.num_parameters:,} parameters, {precision}; "
        + ("names and shapes of all tensors are right" if has_weights(hf.path) else "no weights here to check"),
        **({} if adapter is None else {"adapter": adapter}),
        "layout": f"{layout}, recompute {recompute}",
        "processes": f"{cut.world_size}; a multiple of {cut.needed} is needed",
        "data": f"first {ROWS} rows at most: {tokens:.0f} tokens a pair; about {rows} packed rows a step, "
        f"{microbatches} a data-parallel rank",
        "starts from": start,
        **({"disk": disk.lines[0]} if disk.lines else {}),
        "memory of a GPU": describe_memory(_estimate(config, hf, cut, microbatches)),
    }
    if config.train.preset is not None:
        lines["settings"] = describe(config.train.preset, flat(config))
    too_small = [f"{sentence}; a run on this machine would end here" for sentence in disk.missing]
    of_run = remarks(config, hf, count_pairs(config), cut.data_parallel)
    _show(lines, [*of_run, *_remarks(config, hf), *too_small, *disk.warnings])
    right = "flags, layout, data and checkpoint" if too_small else "flags, layout, data, checkpoint and folders"
    print(f"dry run: nothing is wrong with {right}")


def _remarks(config: Config, hf: HFCheckpoint) -> list[str]:
    """What cannot be checked on this machine, or is left out of the estimate."""
    found = []
    if lacks_tokenizer(hf.path):
        found.append(
            f"{hf.path} has no tokenizer: raw data was not tokenized, and a pair is taken as half of --seq-length"
        )
    if config.model.transformer_impl == "transformer_engine" and not compat.have_transformer_engine():
        found.append(
            "--transformer-impl transformer_engine: Transformer Engine is not installed here; the machines of the run "
            "need it"
        )
    if config.model.gradient_accumulation_fusion:
        found.append(
            "--gradient-accumulation-fusion: the machines of the run need a GPU and Transformer Engine or Apex"
        )
    memory = config.memory
    if memory.use_precision_aware_optimizer and not compat.have_transformer_engine():
        found.append("--use-precision-aware-optimizer: the machines of the run need Transformer Engine")
    if memory.fp8_format:
        found.append(
            f"--fp8-format {memory.fp8_format}: the machines of the run need Transformer Engine and a GPU that "
            "multiplies in FP8; FP8 copies of weights and activations are not in the memory above"
        )
    if config.model.head == "plain":
        found.append("--head plain: it holds all logits of a packed row, which the memory above leaves out")
    return found


def _check_layout(config: Config, hf: HFCheckpoint) -> Cut:
    """Checks that the layout fits the model and the number of processes.

    Raises:
        UserError: it does not.
    """
    from simpo_megatron.trainer.setup import build_transformer_config

    unknown = {"gradient_accumulation_fusion": None, "rope_fusion": None, "moe_permute_fusion": None}
    model = replace(config.model, **unknown, attention_backend="auto")  # kernels are checked where the run is
    if not compat.have_transformer_engine() and model.transformer_impl == "transformer_engine":
        model = replace(model, transformer_impl="auto")
    parallel, memory = config.parallel, replace(config.memory, fp8_format=None)  # FP8 is a matter of the machine too
    if not compat.have_transformer_engine():
        parallel = replace(parallel, cp_comm_type=None)
    build_transformer_config(replace(config, model=model, parallel=parallel, memory=memory), hf)
    layout = layout_arguments(config.parallel, hf.architecture.num_layers)
    experts = hf.architecture.num_experts is not None
    needed = processes_needed(experts, layout)
    world = os.environ.get("WORLD_SIZE", str(needed))
    require(
        world.isdecimal() and int(world) > 0,
        f"WORLD_SIZE is {world!r}, which is not a number of processes; set it to one, or unset it",
    )
    check_processes(int(world), experts, layout)
    return Cut(layout, needed, int(world))


def _estimate(config: Config, hf: HFCheckpoint, cut: Cut, microbatches: int) -> Memory:
    work = Workload(
        world_size=cut.world_size,
        seq_length=config.data.seq_length,
        microbatches=microbatches,
        slab_bytes=config.model.slab_bytes,
        bf16=config.train.bf16,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        fused=config.model.transformer_impl != "local",
        divisible_by=config.model.make_vocab_size_divisible_by,
        memory=config.memory,
        lora=lora_of(config.adapter, hf.architecture),
    )
    return estimate(hf.architecture, cut.layout, work)


def _check_data(config: Config, hf: HFCheckpoint) -> float:
    """Checks training and validation data; the mean tokens of a training pair.

    Where --hf-checkpoint is a config.json alone, raw files are read but not tokenized.

    Raises:
        UserError: as training, as far as the first rows show.
    """
    tokenizer = None if lacks_tokenizer(hf.path) else load_tokenizer(model_folder(hf.path))
    tokens = _pair_tokens(config.data.training_sources, "--train-data", config, hf, tokenizer)
    if config.data.valid_data is not None:
        _pair_tokens(config.data.valid_data, "--valid-data", config, hf, tokenizer)
    return tokens


def _pair_tokens(values: Sequence[str], flag: str, config: Config, hf: HFCheckpoint, tokenizer: Any) -> float:
    """Checks the sources of a blend; of raw files, the first rows.

    Args:
        values: of the flag.
        flag: that names the sources, for errors.
        config: of the run.
        hf: its checkpoint.
        tokenizer: of the checkpoint; None if it has none.

    Returns:
        The mean tokens of the pairs that were read, prompts counted twice; half a packed row where none was tokenized.

    Raises:
        UserError: as training, as far as these rows show.
    """
    from simpo_megatron.trainer.data import check_ids, open_prepared

    found = []
    for source in parse_blend(values, flag).sources:
        if is_prepared(source):
            pairs = open_prepared(source, config.data, hf, tokenizer)
        elif tokenizer is None:
            next(read_rows(source))
            continue
        else:
            encoder = PairEncoder(tokenizer, config.data.options, hf.eos_token_ids)
            encoded = encode_rows(islice(read_rows(source), ROWS), encoder)
            if not len(encoded.pairs):
                raise nothing_left(source, encoded.report)
            pairs = encoded.pairs
        check_ids(pairs, hf, source)
        found.append(pairs.pair_tokens[:ROWS])
    return float(np.concatenate(found).mean()) if found else config.data.seq_length / 2


def _check_start(config: Config, hf: HFCheckpoint) -> tuple[str, int]:
    """Checks the folders of the run, and names and shapes of the checkpoint that it starts from.

    Returns:
        The folder of that checkpoint, with the settings that differ from its run's; and the steps that run has taken.

    Raises:
        UserError: the checkpoint is not complete, or is of another model; or a folder cannot be written to.
    """
    from simpo_megatron.trainer.adapter import base_checkpoint, check_adapters_of, describe_weights
    from simpo_megatron.trainer.folders import check_folders
    from simpo_megatron.trainer.resume import find_saved_run, follow, weights_folder

    check_folders(config)
    check_tensors(hf)
    saved = find_saved_run(config.checkpoint)
    _, changes = follow(config, saved)
    lora = lora_of(config.adapter, hf.architecture)
    folder = weights_folder(config.checkpoint) if saved is None else saved.folder
    if folder is not None and saved is None:
        check_adapters_of(folder, lora)
    if lora is not None:  # such a checkpoint holds no base
        base = base_checkpoint(config.checkpoint)
        if base is not None:
            read_torch_dist(base, hf)
        if folder not in (None, base):
            read_factors(folder, hf, lora)
        start = describe_weights(config, hf, folder)
        return "; ".join((start, *changes)), 0 if saved is None else saved.progress.step
    if folder is None:
        return str(hf.path), 0
    try:
        read_torch_dist(folder, hf)
    except UserError as error:
        raise UserError(f"--load {config.checkpoint.load} does not fit {hf.path}: {error}") from error
    return "; ".join((str(folder), *changes)), 0 if saved is None else saved.progress.step


def describe_memory(memory: Memory) -> str:
    """A memory estimate in words, in GiB."""
    sizes = {name: size for name, size in vars(memory).items() if size and name != "host"}
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
    host = f"; {memory.host / 2**30:.1f} GiB of host memory on a rank" if memory.host else ""
    return f"about {memory.total / 2**30:.1f} GiB on the fullest rank ({parts}), CUDA and NCCL not counted{host}"


def _show(lines: dict[str, str], remarks: list[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, text in lines.items():
        console.print(f"{name + ':':<17}{text}", markup=False)
    for remark in remarks:
        console.print(f"warning: {remark}", markup=False)
