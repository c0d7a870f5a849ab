"""Rows that compare a layout, or a family, with transformers in fp32 on the CPU: loss, summed log-probs, gradients.

`verify/compare.py` does the work. Every layout runs in fp32, and on GPUs in bf16 too, with each implementation of the
layers that is installed. The data-parallel size is what remains of the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.models.families.registry import FAMILIES, family_of
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.self_test.models import ALL_EXPERTS, DEEP, engine_in, tiny_checkpoint, tiny_config
from simpo_megatron.self_test.rows import Bench, Outcome, Row
from simpo_megatron.verify.compare import compare
from simpo_megatron.verify.report import Difference, Report

TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
FIXED = {"variable_seq_lengths": False}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PLAIN = {"head": "plain"}
DENSE, SPARSE = "llama", "mixtral"


@dataclass(frozen=True)
class Layout:
    """A layout to prove.

    Attributes:
        processes: that it needs a multiple of.
        settings: by the names of the flags.
        model_type: of the tiny model.
    """

    processes: int
    settings: dict[str, Any] = field(default_factory=dict)
    model_type: str = DENSE


LAYOUTS: dict[str, Layout] = {
    "DP": Layout(1),
    "DP, no distributed optimizer": Layout(1, {"use_distributed_optimizer": False}),
    "DP, fixed rows": Layout(1, FIXED),
    "DP, full recompute": Layout(1, FULL),
    "DP, selective recompute": Layout(1, {"recompute_granularity": "selective"}),
    "DP, plain head": Layout(1, PLAIN),
    "TP 2": Layout(2, TP2),
    "TP 2 + SP": Layout(2, SP2),
    "TP 2 + SP, plain head": Layout(2, {**SP2, **PLAIN}),
    "PP 2": Layout(2, PP2),
    "PP 2, fixed rows": Layout(2, {**PP2, **FIXED}),
    "PP 2 + VPP 2": Layout(2, VPP2),
    "CP 2": Layout(2, CP2),
    "CP 2, plain head": Layout(2, {**CP2, **PLAIN}),
    "TP 4 + SP": Layout(4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "PP 4": Layout(4, {"pipeline_model_parallel_size": 4}),
    "CP 4": Layout(4, {"context_parallel_size": 4}),
    "TP 2 + SP + PP 2": Layout(4, {**SP2, **PP2}),
    "TP 2 + SP + CP 2, fixed rows": Layout(4, {**SP2, **CP2, **FIXED}),
    "CP 2 + PP 2 + VPP 2": Layout(4, {**CP2, **VPP2}),
    "TP 2 + SP + CP 2 + PP 2, full recompute": Layout(8, {**SP2, **CP2, **PP2, **FULL}),
    "EP 1": Layout(1, {}, SPARSE),
    "EP 2": Layout(2, EP2, SPARSE),
    "TP 2 + SP + ETP 1": Layout(2, {**SP2, **ETP1}, SPARSE),
    "TP 2 + SP + EP 2 + ETP 1": Layout(2, {**SP2, **EP2, **ETP1}, SPARSE),
    "EP 4": Layout(4, {"expert_model_parallel_size": 4}, SPARSE),
    "TP 2 + SP + EP 2": Layout(4, {**SP2, **EP2}, SPARSE),
    "TP 2 + SP + CP 2 + PP 2 + EP 2 + ETP 1": Layout(8, {**SP2, **CP2, **PP2, **EP2, **ETP1}, SPARSE),
}
ADVICE = "do not train on this layout; report it with --json"


def family_layout(model_type: str, split: dict[str, Any]) -> dict[str, Any]:
    """`split`, a layout with tensor parallelism or {}, as the tiny model takes it: some experts cannot be split."""
    config = tiny_config(model_type)
    whole = family_of(config).architecture(config).has_whole_experts
    return {**split, **ETP1} if split and whole else split


def gradient_rows(bench: Bench) -> Iterator[Row]:
    """The rows of this file; implementation and precision are in the name where they are not local and fp32."""
    for name, layout in LAYOUTS.items():
        for implementation in bench.implementations:
            for bf16 in (False, True):
                if not _is_chosen(bench, name, layout, implementation, bf16):
                    continue
                settings = {**layout.settings, "transformer_impl": implementation, "bf16": bf16}
                function = partial(_compare, layout.model_type, settings)
                title = f"gradients: {name}{_variant(implementation, bf16)}"
                yield Row(title, function, layout.processes, advice=ADVICE)
    split = SP2 if bench.processes % 2 == 0 else {}
    for implementation in bench.implementations:
        for family in FAMILIES:
            model_type = family.model_types[0]
            settings = {**family_layout(model_type, split), "transformer_impl": implementation}
            function = partial(_compare, model_type, settings)
            yield Row(f"family: {family.name}{_variant(implementation, False)}", function, advice=ADVICE)


def _is_chosen(bench: Bench, name: str, layout: Layout, implementation: str, bf16: bool) -> bool:
    """Whether a layout runs in this precision, and on a CPU whether it is worth its time."""
    if bench.on_gpu:
        # Transformer Engine's ring attention has no fp32 on GPUs.
        ring = "context_parallel_size" in layout.settings and implementation == "transformer_engine"
        return bf16 or not ring
    if bf16:
        return name == ("TP 2 + SP" if bench.processes % 2 == 0 else "DP")
    return name == "DP" or bench.processes < 4 or 2 * layout.processes >= bench.processes


def _variant(implementation: str, bf16: bool) -> str:
    words = [*(["Transformer Engine"] if implementation == "transformer_engine" else []), *(["bf16"] if bf16 else [])]
    return f" ({', '.join(words)})" if words else ""


def _compare(model_type: str, settings: dict[str, Any], bench: Bench) -> Outcome | None:
    bf16 = settings.get("bf16", False)
    own = ALL_EXPERTS if bf16 and model_type == SPARSE else {}
    if settings.get("pipeline_model_parallel_size", 1) > 2 or "num_layers_per_virtual_pipeline_stage" in settings:
        own = {**own, **DEEP}
    path = tiny_checkpoint(bench.models, model_type, torch.bfloat16 if bf16 else torch.float32, **own)
    return compare_at(path, settings, bench)


def compare_at(path: Path, settings: dict[str, Any], bench: Bench) -> Outcome | None:
    """Compares the model at `path` with transformers, in the layout of these settings; None on ranks other than 0."""
    what = read_hf_config(path).architecture.additions.beyond_transformer_engine
    if what and settings.get("transformer_impl") == "transformer_engine":
        return Outcome("not here", f"Transformer Engine has no {what}")
    with engine_in(bench, path, settings) as made:
        report = compare(made.engine, made.hf, made.pairs, made.config, reference_device="cpu")
    return None if report is None else describe(report)


def describe(report: Report) -> Outcome:
    """The outcome of a comparison: the entry that is nearest to what is allowed, or farthest beyond it."""
    for fault, names in (("not compared", report.uncompared), ("pairs with wrong lengths", report.wrong_lengths)):
        if names:
            return Outcome("FAILED", f"{fault}: {', '.join(map(str, names[:3]))} ({len(names)} in all)", ADVICE)
    entries = [*report.values, *report.gradients]
    farthest = max(entries, key=_excess)
    figure = f"{farthest.name} {farthest.error:.1e}, allowed {farthest.allowed:.0e}"
    measured = {"largest_error": farthest.error, "allowed_error": farthest.allowed}
    if report.passed:
        return Outcome("proved", figure, measured=measured)
    count = sum(not entry.passed for entry in entries)
    return Outcome("FAILED", f"{figure}; {count} of {len(entries)} are off", ADVICE, measured)


def _excess(entry: Difference) -> float:
    return entry.error / entry.allowed if entry.error == entry.error else float("inf")
