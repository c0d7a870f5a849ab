"""Warnings about settings that are allowed but probably not meant, a sentence each. The dry run prints them too."""

from __future__ import annotations

from itertools import islice
from typing import Any

from simpo_megatron.config.run import Config
from simpo_megatron.data.blend import parse_blend
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reading import read_rows
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.settings import flag
from simpo_megatron.trainer.progress import run_length


def remarks(config: Config, hf: HFCheckpoint, num_pairs: int | None, data_parallel_size: int) -> list[str]:
    """All warnings about a run.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.
        num_pairs: of the training data; None if it is not known.
        data_parallel_size: of its layout.
    """
    return [
        *config.objective.warnings(config.optimizer.lr, hf.num_parameters),
        *_positions(config, hf),
        *_nothing_kept(config),
        *_without_effect(config),
        *([] if num_pairs is None else _batch(config, num_pairs)),
        *_idle_ranks(config, data_parallel_size),
        *_bf16_gradients(config),
    ]


def _positions(config: Config, hf: HFCheckpoint) -> list[str]:
    longest, tokens = hf.config.get("max_position_embeddings"), config.data.options.max_length
    if not longest or tokens <= longest:
        return []
    return [
        f"--max-length {tokens} (half of --seq-length unless set) exceeds the {longest} positions the model was made "
        "for"
    ]


def _nothing_kept(config: Config) -> list[str]:
    if config.checkpoint.save is not None or config.model.export_hf is not None:
        return []
    return ["neither --save nor --export-hf is set: the trained model is lost when the run ends"]


def _without_effect(config: Config) -> list[str]:
    """Settings that are not at their default, and that nothing reads because another one is off."""
    profile, checkpoint = config.profile, config.checkpoint
    writes = profile.profile or profile.record_memory_history
    saves_adam = checkpoint.save is not None and checkpoint.save_optim
    rows: tuple[tuple[Any, bool, str, tuple[str, ...]], ...] = (
        (profile, profile.profile, "--profile", ("profile_step_start", "profile_step_end")),
        (profile, writes, "--profile or --record-memory-history", ("profile_ranks", "profile_dir")),
        (profile, profile.manual_gc, "--manual-gc", ("manual_gc_interval",)),
        (checkpoint, checkpoint.save is not None, "--save", ("save_optim",)),
        (checkpoint, saves_adam, "--save and an optimizer state in it", ("dist_ckpt_optim_fully_reshardable",)),
        (config.log, config.data.valid_data is not None, "--valid-data", ("eval_interval",)),
    )
    return [
        f"{flag(name if getattr(group, name) is not False else f'no_{name}')} has no effect without {needed}"
        for group, there, needed, names in rows
        for name in names
        if not there and getattr(group, name) != getattr(type(group)(), name)
    ]


def _batch(config: Config, num_pairs: int) -> list[str]:
    batch = config.train.global_batch_size
    size = min(batch, run_length(config, num_pairs).pairs)
    if batch <= num_pairs:
        return []
    if size > num_pairs:
        means = f"a step of {size} pairs is {size / num_pairs:.3g} epochs and sees pairs several times"
    else:
        means = f"the whole run is one step of {size} pairs"
    return [f"--global-batch-size {batch} exceeds the {num_pairs} training pairs: {means}; lower it, or give more data"]


def _idle_ranks(config: Config, data_parallel_size: int) -> list[str]:
    batch = config.train.global_batch_size
    if data_parallel_size <= batch:
        return []
    return [
        f"the data-parallel size {data_parallel_size} exceeds the {batch} pairs of a step (--global-batch-size): at "
        f"least {data_parallel_size - batch} of its ranks have nothing to do"
    ]


def _bf16_gradients(config: Config) -> list[str]:
    if config.memory.main_grads_dtype == "fp32" or config.model.head != "fused":
        return []
    return [
        "--main-grads-dtype bf16: the head adds in fp32, so every microbatch needs an fp32 copy of the output layer's "
        "gradient"
    ]


def count_pairs(config: Config) -> int | None:
    """At most so many pairs --train-data has; None where a step needs fewer, or where weights repeat some of them.

    Args:
        config: of the run. Of raw files no more rows are read than a step has pairs.
    """
    batch = config.train.global_batch_size
    blend = parse_blend(config.data.training_sources, "--train-data")
    if blend.weights is not None:
        return None
    found = 0
    for source in blend.sources:
        if is_prepared(source):
            found += len(PreparedPairs(source, verify=False))
        else:
            found += sum(1 for _ in islice(read_rows(source), batch))
    return found if found < batch else None
