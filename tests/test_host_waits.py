"""What one training step waits for on the host: on a GPU each such call stops the process until the device is done.

Counted inside Megatron's schedule, forward and backward, by the module that calls. Ours must not call any. What
Megatron-Core 0.16.1 calls is listed by name.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpo_megatron import compat
from tests.support.distributed import BOTH, LOCAL, WorkerPool
from tests.support.steps import CASES, build_engine, command_line
from tests.support.tiny import EXPERTS, make_checkpoint
from tests.test_layouts import CP2, EP2, PP2, SP, VPP

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
FUNCTIONS = ((torch.cuda, "synchronize"), (torch, "nonzero"), (torch.autograd, "backward"), (torch.autograd, "grad"))

# The backward pass of a microbatch.
BACKWARD = ("megatron.core.pipeline_parallel.schedules", "backward")
# Megatron's rotary embedding on plain torch reads the lengths of the sequences; Transformer Engine's kernel does not.
ROPE = {("megatron.core.models.common.embeddings.rope_utils", name) for name in ("tolist", "__bool__")}
# Non-interleaved stages wait after each transfer (`batch_p2p_sync`).
TRANSFER = {("megatron.core.pipeline_parallel.p2p_communication", "synchronize")}
# Recomputed attention: the kind of the mask, which is a number on the host, and a backward pass of its own.
RECOMPUTE = {
    ("megatron.core.transformer.attention", "item"),
    ("megatron.core.tensor_parallel.random", "item"),
    ("megatron.core.tensor_parallel.random", "backward"),
}
# Experts: the sizes of the all-to-all.
EXPERT = {
    ("megatron.core.transformer.moe.experts", "tolist"),
    ("megatron.core.transformer.moe.moe_utils", "tolist"),
    ("megatron.core.tensor_parallel.mappings", "tolist"),
}
# Transformer Engine's experts read the sizes once more.
TE_EXPERT = ("transformer_engine.pytorch.module.grouped_linear", "tolist")
NO_PERMUTE = {"no_moe_permute_fusion": True}  # a Triton kernel


def caller() -> str:
    """The nearest module of ours, of Megatron's or of Transformer Engine's that a call comes from.

    A worker of the tests does not count, and neither do the functions that stand for kernels.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("tests.te_on_cpu.") and frame.f_code.co_name not in ("with_modes", "__torch_function__"):
            return "kernel"
        if name.startswith(("megatron.", "simpo_megatron.", "transformer_engine.")) and name != "simpo_megatron.cpu":
            return name
        frame = frame.f_back  # type: ignore[assignment]
    return "nobody"


@contextlib.contextmanager
def watched(found: Counter[tuple[str, str]]) -> Iterator[None]:
    """Counts the calls that wait, by module and name."""
    owners = [*((torch.Tensor, name) for name in METHODS), *FUNCTIONS]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name in owners]

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[caller(), name] += 1
            return real(*args, **kwargs)

        return call

    try:
        for owner, name in owners:
            setattr(owner, name, counting(name, getattr(owner, name)))
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)


def waits_of_a_step(checkpoint: Path, layout: dict[str, Any]) -> dict[tuple[str, str], int]:
    """On a rank: what the schedule of a step waits for."""
    from simpo_megatron.models import build, fusions  # `build` takes the name `on_gpu` when it is imported

    case = CASES["sigmoid"]
    on_gpu = fusions.on_gpu
    assert build.on_gpu is on_gpu
    fusions.on_gpu = compat.have_transformer_engine  # its fused kernels, which a GPU turns on
    try:
        engine, _ = build_engine(command_line(checkpoint, {**layout, **case.loss}))
    finally:
        fusions.on_gpu = on_gpu
    batch = engine.packer.pack(case.pairs, np.array(case.indices))
    found: Counter[tuple[str, str]] = Counter()
    real = engine.run_schedule

    def schedule(**settings: Any) -> Any:
        with watched(found):
            return real(**settings)

    engine.run_schedule = schedule  # type: ignore[assignment]
    engine.compute_gradients(batch)
    return {call: times for call, times in found.items() if call[0] != "kernel"}


@pytest.mark.parametrize("pool", BOTH, indirect=True)
@pytest.mark.parametrize(
    ("model", "world", "layout", "megatron"),
    [
        ("Llama", 1, {}, ROPE),
        ("Llama", 2, {**SP, "recompute_granularity": "selective"}, ROPE | RECOMPUTE),
        ("Llama", 2, CP2, ROPE),
        ("Llama", 2, PP2, ROPE | TRANSFER),
        ("Llama", 2, VPP, ROPE),  # no shapes are exchanged, and no transfer is waited for
        ("Mixtral", 2, EP2, ROPE | EXPERT),
    ],
    ids=str,
)
def test_a_step_waits_for_nothing_of_ours(
    pool: WorkerPool,
    tmp_path: Path,
    model: str,
    world: int,
    layout: dict[str, Any],
    megatron: set[tuple[str, str]],
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", model, **(EXPERTS if model == "Mixtral" else {}))
    if pool.kind != LOCAL:
        megatron = megatron - ROPE | ({TE_EXPERT} if model == "Mixtral" else set())
    for found in pool.run(world, waits_of_a_step, checkpoint, {**layout, **NO_PERMUTE}):
        assert not {call for call in found if call[0].startswith("simpo_megatron.")}
        assert found.keys() - {BACKWARD} == megatron
