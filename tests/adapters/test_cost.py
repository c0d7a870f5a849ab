"""What adapters cost: matrix products, what the ranks send each other, and the memory of the programs without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from simpo_megatron.adapters.lora import Lora, adapted_table
from simpo_megatron.adapters.merge_files import compare_adapters, merge_files
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.planning.flops import forward_flops
from tests.adapters.test_layouts import SP, TP2
from tests.support.adapters import LORA, random_adapter
from tests.support.distributed import WorkerPool
from tests.support.memory import peak_allocated
from tests.support.steps import CASES, build_engine, command_line
from tests.support.tiny import make_checkpoint

RANK = 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def products(checkpoint: Path, settings: dict[str, Any]) -> tuple[int, int, int]:
    """On a rank: operations of all matrix products of a step, tokens, and scored positions."""
    from torch.utils.flop_counter import FlopCounterMode

    engine, _ = build_engine(command_line(checkpoint, settings))
    case = CASES["columns"]
    batch = engine.packer.pack(case.pairs, np.array(case.indices))
    with FlopCounterMode(display=False) as counter:
        engine.compute_gradients(batch)
    counts = counter.get_flop_counts()["Global"]
    scored = sum(len(part) for i in case.indices for part in case.pairs.pair(i)[1:])
    total = sum(count for name, count in counts.items() if "attention" not in str(name))
    return total, batch.tokens, scored


def test_frozen_weights_cost_no_weight_gradient(pool: WorkerPool, checkpoint: Path) -> None:
    """Two of three products remain of each weight, the output layer's included; the first layer has none below it."""
    architecture = read_hf_checkpoint(checkpoint).architecture
    [(every, tokens, scored)] = pool.run(1, products, checkpoint, {})
    hidden = architecture.transformer["hidden_size"]
    forward = forward_flops(architecture, tokens, 0, scored)
    assert every == 3 * forward
    [(adapted, *_)] = pool.run(1, products, checkpoint, {"lora_rank": RANK})
    table = adapted_table(architecture, Lora(RANK, 1.0))
    factors = architecture.num_layers * sum(rows * columns for e in table if e.trained for rows, columns in e.shapes)
    qkv = sum(e.rows[i] * hidden for e in table if "linear_qkv.weight" in e.megatron for i in range(3))
    first = 2 * tokens * (qkv + 3 * RANK * hidden)
    assert adapted == 2 * forward + 3 * 2 * tokens * factors - first


class Sent(TorchDispatchMode):
    """Counts what collectives send, by the shape of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = Counter[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            found: list[Any] = list(args)
            while found:
                value = found.pop(0)
                if isinstance(value, torch.Tensor):
                    self.shapes[tuple(value.shape)] += 1
                elif isinstance(value, (list, tuple)):
                    found += value
        return func(*args, **(kwargs or {}))


def sent(checkpoint: Path, settings: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """On a rank: the shapes of the tensors that a forward and backward pass send."""
    engine, _ = build_engine(command_line(checkpoint, {"no_use_distributed_optimizer": True, **settings}))
    case = CASES["columns"]
    batch = engine.packer.pack(case.pairs, np.array(case.indices))
    with Sent() as counted:
        engine.compute_gradients(batch)
    return counted.shapes


@pytest.mark.parametrize("layout", [TP2, SP], ids=["tp2", "tp2 sp"])
def test_what_is_sent_is_as_wide_as_the_rank(pool: WorkerPool, checkpoint: Path, layout: dict[str, Any]) -> None:
    """What a run with adapters sends beyond one that trains all weights; tensors of one dimension are gradients."""
    base, adapted = (pool.run(2, sent, checkpoint, {**layout, **one})[0] for one in ({}, {"lora_rank": RANK}))
    more = adapted - base
    assert {shape[-1] for shape in more if len(shape) > 1} == {RANK, 2 * RANK, 3 * RANK}
    gradients = [sum(n * size for (size, *rest), n in found.items() if not rest) for found in (base, adapted)]
    assert gradients[1] < gradients[0] / 3


def test_files_are_merged_one_weight_at_a_time_and_rounded_once(tmp_path: Path) -> None:
    base = make_checkpoint(
        tmp_path / "base", dtype=torch.bfloat16, hidden_size=128, intermediate_size=512, num_hidden_layers=8
    )
    factors = random_adapter(base, tmp_path / "adapter")
    hf = read_hf_checkpoint(base)
    peak = peak_allocated(lambda: merge_files(hf, tmp_path / "adapter", tmp_path / "merged"))
    largest = 4 * 128 * 512  # in fp32
    assert peak < 4 * largest < sum(tensor.length or 0 for tensor in hf.tensors.values()) / 2
    compared = peak_allocated(lambda: compare_adapters(tmp_path / "adapter", tmp_path / "adapter", hf.architecture))
    assert compared < 2 * 4 * largest  # it holds the updates of two adapters

    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    twice = False
    for name, weight in before.items():
        module, update = name.removesuffix(".weight"), torch.zeros(())
        if (a := factors.get(f"{module}.lora_A.weight")) is not None:
            update = LORA.scale * (factors[f"{module}.lora_B.weight"] @ a)
        assert weight.dtype == torch.bfloat16 and torch.equal(after[name], (weight.float() + update).bfloat16()), name
        twice |= not torch.equal(after[name], weight + update.bfloat16())
    assert twice  # rounding the update as well would be seen
