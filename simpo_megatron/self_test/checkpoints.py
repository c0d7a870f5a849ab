"""Rows on files: resume at another layout, export, conversion, and the file system of --save."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simpo_megatron.checkpoint.folder import iteration_folder
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.source import read_source
from simpo_megatron.checkpoint.to_hf import plan_to_hf
from simpo_megatron.checkpoint.to_megatron import plan_to_megatron
from simpo_megatron.checkpoint.transfer import publish
from simpo_megatron.disk import free_bytes, human
from simpo_megatron.files import atomic_write
from simpo_megatron.models.export import export_hf
from simpo_megatron.models.families.registry import FAMILIES
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.self_test.gradients import CP2, DENSE, EP2, ETP1, PP2, SP2, SPARSE, family_layout
from simpo_megatron.self_test.models import PAIRS, Made, engine_in, tiny_checkpoint
from simpo_megatron.self_test.rows import Bench, Outcome, Row, judge
from simpo_megatron.trainer import loading
from simpo_megatron.trainer.checkpointing import CheckpointWriter
from simpo_megatron.trainer.progress import new_progress

STEPS_BEFORE, STEPS_AFTER = (
    2,
    2,
)  # there is a checkpoint after each of the first, to see whether the right one is loaded
ALLOWED = {False: 1e-4, True: 2e-2}  # relative, of the losses after a resume: in fp32 and in bf16
ADVICE = "do not resume runs here; report it with --json"
# A loss moves by more than what is allowed between two steps, so that weights of another step are seen.
LR = 2e-3


def checkpoint_rows(bench: Bench) -> Iterator[Row]:
    """The rows of this file."""
    yield Row("file system: --save", _file_system)
    for implementation in bench.implementations:
        title = " (Transformer Engine)" if implementation == "transformer_engine" else ""
        bf16 = bench.on_gpu and implementation == "transformer_engine"
        base = {"transformer_impl": implementation, "bf16": bf16, "lr": LR, "dist_ckpt_optim_fully_reshardable": True}
        before, after, words = _two_layouts(bench.processes)
        yield Row(
            f"checkpoint: resume{words}{title}",
            partial(_resume, DENSE, {**base, **before}, {**base, **after}),
            advice=ADVICE,
        )
        if not bf16:
            yield Row(
                f"checkpoint: resume with experts{title}",
                partial(_resume, SPARSE, {**base, **SP2, **ETP1}, {**base, **EP2}),
                processes=2,
                advice=ADVICE,
            )
    if len(bench.implementations) > 1:
        common = {"bf16": bench.on_gpu, "lr": LR, "dist_ckpt_optim_fully_reshardable": True}
        both = [{**common, "transformer_impl": name} for name in bench.implementations]
        yield Row("checkpoint: resume with other layers", partial(_resume, DENSE, *both), advice=ADVICE)
    split = SP2 if bench.processes % 2 == 0 else {}
    yield Row("weights: export" + (" from TP 2 + SP" if split else ""), partial(_export, split))
    yield Row("conversion: to Megatron and back", _convert)


def _two_layouts(processes: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The layouts of the run before and after the resume, and both in words."""
    if processes % 4 == 0:
        return {**SP2, **PP2}, {**CP2}, ": TP 2 + SP + PP 2, then CP 2"
    if processes % 2 == 0:
        return SP2, PP2, ": TP 2 + SP, then PP 2"
    return {}, {"recompute_granularity": "selective"}, ""


def _train(made: Made, first: int, steps: int) -> list[float]:
    """Losses of some steps; step i takes the pairs of position i."""
    losses = []
    for step in range(first, first + steps):
        indices = made.pairs.order(step * PAIRS, PAIRS, made.config.train.seed)
        losses.append(made.engine.train_step(made.engine.packer.pack(made.pairs, indices))["loss"])
    return losses


def _resume(model_type: str, before: dict[str, Any], after: dict[str, Any], bench: Bench) -> Outcome:
    """Saves after each step and goes on; then goes on from the last checkpoint in another layout."""
    bf16 = bool(before["bf16"])
    path = tiny_checkpoint(bench.models, model_type, torch.bfloat16 if bf16 else torch.float32)
    root = bench.save / f"resume-{model_type}-{before['transformer_impl']}-{after['transformer_impl']}"
    with engine_in(bench, path, before) as made:
        state = new_progress(made.config, made.pairs)
        for step in range(STEPS_BEFORE):
            _train(made, step, 1)
            state = replace(state, step=step + 1, consumed_pairs=(step + 1) * PAIRS)
            CheckpointWriter(made.engine).save(root, state)
        expected = _train(made, STEPS_BEFORE, STEPS_AFTER)
    with engine_in(bench, path, after) as made:
        loading.load(made.engine, iteration_folder(root, STEPS_BEFORE))
        found = _train(made, STEPS_BEFORE, STEPS_AFTER)
    error = max(abs(now - then) / abs(then) for now, then in zip(found, expected, strict=True))
    return judge(error, ALLOWED[bf16], "loss after the resume", ADVICE)


def _export(settings: dict[str, Any], bench: Bench) -> Outcome | None:
    """Every family through an engine: loaded, gathered and written, the same bytes."""
    different: list[str] = []
    for family in FAMILIES:
        path = tiny_checkpoint(bench.models, family.model_types[0])
        target = bench.save / f"export-{family.model_types[0]}"
        with engine_in(bench, path, family_layout(family.model_types[0], settings)) as made:
            export_hf(made.engine.models, made.hf, target)
        if bench.rank == 0:
            different += differences(path, target)
    return _same_bytes(different) if bench.rank == 0 else None


def _convert(bench: Bench) -> Outcome | None:
    """Every family through the converter and back, on rank 0."""
    if bench.rank:
        return None
    different: list[str] = []
    options = publish.Options()
    for family in FAMILIES:
        name = family.model_types[0]
        path = tiny_checkpoint(bench.models, name)
        there, back = bench.save / f"megatron-{name}", bench.save / f"back-{name}"
        source = read_source(path)
        conversion = plan_to_megatron(source, None, there, options)
        publish.run(conversion, options)
        publish.run(plan_to_hf(source, read_torch_dist(conversion.final, source), back, options), options)
        different += differences(path, back)
    return _same_bytes(different)


def _same_bytes(different: list[str]) -> Outcome:
    if different:
        return Outcome("FAILED", f"other bytes in {different[0]} ({len(different)} tensors)", "report it with --json")
    return Outcome("proved", f"{len(FAMILIES)} families, every byte")


def differences(path: Path, other: Path, numbers: bool = False) -> list[str]:
    """Tensors that are not byte for byte the same in two Hugging Face checkpoints.

    Args:
        path: a checkpoint.
        other: another.
        numbers: compare in fp32, where an engine has exported in another dtype.
    """
    from safetensors import safe_open

    def hashes(folder: Path) -> dict[str, str]:
        found = {}
        for source in sorted({tensor.file for tensor in read_hf_checkpoint(folder).tensors.values()}):
            with safe_open(str(source), framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  (it is not a dict)
                    whole = file.get_tensor(name).contiguous()
                    whole = whole.float() if numbers else whole
                    found[name] = hashlib.sha256(whole.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return found

    first, second = hashes(path), hashes(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _file_system(bench: Bench) -> Outcome:
    """Whether checkpoints can be written safely: all ranks see the folder, rename and fsync work, there is room."""
    advice = "give --save a folder on a file system that all nodes share"
    name = "seen.txt"
    if bench.rank == 0:
        atomic_write(bench.save / name, "first")
        atomic_write(bench.save / name, "seen")  # replaces a file: rename over it, fsync of file and folder
    dist.barrier()
    try:
        seen = (bench.save / name).read_text(encoding="utf-8")
        own = bench.save / f"rank{bench.rank}.txt"
        atomic_write(own, "mine")
        own.unlink()
    except OSError as error:
        return Outcome("FAILED", f"rank {bench.rank}: {os.strerror(error.errno or 0)}", advice)
    if seen != "seen":
        return Outcome("FAILED", f"rank {bench.rank} reads what was replaced before", advice)
    free = free_bytes(bench.save)
    total = shutil.disk_usage(bench.save).total
    measured = {"free_bytes": float(free)}
    return Outcome("proved", f"{human(free)} of {human(total)} are free, seen by all ranks", measured=measured)
