"""Which layouts are listed, and in what order. The memory of a layout is tested in `test_memory.py`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.disk import human
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_hf_config
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_layout, check_processes, layout_arguments
from simpo_megatron.planning import layouts
from simpo_megatron.planning.layouts import FULL, Request, cost, fewest, fitting, legal

EXAMPLES = Path(__file__).parents[2] / "examples"
REQUEST = Request(72 * 2**30, seq_length=4096, packed_rows=64, slab_bytes=2**28)
DPO = replace(REQUEST, reference=True)


@pytest.fixture(scope="module")
def llama_70b() -> HFCheckpoint:
    return read_hf_config(EXAMPLES / "llama3_70b" / "model.json")


@pytest.mark.parametrize("name, gpus", [("llama3_70b", 24), ("mixtral_8x7b", 16), ("qwen3_moe", 8)])
def test_listed_layouts_pass_the_limits_and_fit(name: str, gpus: int) -> None:
    hf = read_hf_config(EXAMPLES / name / "model.json")
    model = hf.architecture.transformer
    found = fitting(hf.architecture, gpus, REQUEST)
    assert found
    for one in found:
        layout = layout_arguments(one.parallel, hf.architecture.num_layers)
        check_layout(model, layout)
        check_processes(gpus, hf.architecture.num_experts is not None, layout)
        assert one.memory.total <= REQUEST.gpu_bytes
    assert [one.order for one in found] == sorted(one.order for one in found)


def test_layouts_that_the_limits_refuse_are_left_out(llama_70b: HFCheckpoint) -> None:
    """8 key heads allow TP 8 at most, 3 stages do not divide 80 layers, and CP cannot cut rows of 4098 tokens."""
    found = list(legal(llama_70b.architecture, 48, 4098))
    assert {p.context_parallel_size for p in found} == {1}
    assert all(p.expert_model_parallel_size == 1 for p in found)
    uneven = [p for p in found if p.pipeline_model_parallel_size == 3]
    assert {(p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers) for p in uneven} == {(27, 26)}


def test_the_bubble_by_hand(llama_70b: HFCheckpoint) -> None:
    """4 stages, 8 rows a rank: filling and emptying takes as long as 3 rows; half of it with 2 virtual stages."""
    sizes = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "pipeline_model_parallel_size": 4}
    plain = cost(llama_70b.architecture, ParallelConfig(**sizes), 256, REQUEST)
    assert (plain.data_parallel_size, plain.microbatches) == (8, 8)
    assert math.isclose(plain.bubble, 3 / 11) and math.isclose(plain.slowdown, 11 / 8)
    virtual = ParallelConfig(**sizes, num_layers_per_virtual_pipeline_stage=10)
    assert math.isclose(cost(llama_70b.architecture, virtual, 256, REQUEST).bubble, 1.5 / 9.5)
    full = cost(llama_70b.architecture, ParallelConfig(**sizes, **FULL), 256, REQUEST)
    assert math.isclose(full.slowdown, 11 / 8 * 4 / 3) and full.memory.activations < plain.memory.activations


AWARE = {"use_precision_aware_optimizer": True}
HOST = {**AWARE, "optimizer_cpu_offload": True}
# The rows of the table of the README, and what they set.
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "`--use-precision-aware-optimizer`": AWARE,
    "and `--optimizer-cpu-offload --optimizer-offload-fraction 0.5`": {**HOST, "optimizer_offload_fraction": 0.5},
    "or `--optimizer-cpu-offload`": HOST,
    "and `--main-grads-dtype bf16`": {**HOST, "main_grads_dtype": "bf16"},
}


def test_the_table_of_the_readme_is_that_of_the_planner(llama_70b: HFCheckpoint) -> None:
    text = (Path(layouts.__file__).parent / "README.md").read_text(encoding="utf-8")
    for name, settings in ROWS.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        asked = replace(REQUEST, memory=MemoryConfig(**settings))
        found = [fewest(llama_70b.architecture, replace(asked, reference=reference)) for reference in (False, True)]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[4:6] == [str(one[0]) for one in found if one is not None], name
        assert found[0] is not None
        host = found[0][1].memory.host * min(8, found[0][0])
        assert cells[6].removesuffix(" a node") == (human(host) if host else ""), name


def test_recomputing_a_part_of_a_layer(llama_70b: HFCheckpoint) -> None:
    """Of a layer of Llama-3-70B the MLP is 3 x 28672 of 3 x 28672 + 2 x 8192 + 2 x 1024 columns of width 8192."""
    part = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
    sizes = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    whole, mlp, none = (
        cost(llama_70b.architecture, ParallelConfig(**sizes, **more), 16, REQUEST) for more in (FULL, part, {})
    )
    assert math.isclose(mlp.slowdown / none.slowdown, 1 + 86016 / (86016 + 18432) / 3)
    assert whole.memory.activations < mlp.memory.activations < none.memory.activations


def test_70b_needs_its_bytes(llama_70b: HFCheckpoint) -> None:
    """At least 18 bytes a parameter for SimPO, and 20 with a reference, over all GPUs, which are whole nodes."""
    parameters = 70_553_706_496  # of Llama-3-70B
    for request, state in ((REQUEST, 18), (DPO, 20)):
        found = fewest(llama_70b.architecture, request)
        assert found is not None
        gpus, one = found
        floor = state * parameters / request.gpu_bytes
        assert floor <= gpus < floor + 8
        assert one.memory.total * gpus >= state * parameters
        assert not fitting(llama_70b.architecture, gpus - 8, request)
    saving = (
        cost(llama_70b.architecture, one.parallel, gpus, DPO).memory.total
        - cost(llama_70b.architecture, one.parallel, gpus, REQUEST).memory.total
    )
    assert saving >= 2 * parameters / gpus
