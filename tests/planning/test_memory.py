"""The counts of planning/ against models that are built, and against the tensors that autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simpo_megatron.adapters.lora import Lora, adapted_table
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.models.part_layout import Copy
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.planning.memory import Workload, estimate, in_flight, saved_bytes
from simpo_megatron.planning.parameters import Parameters, layers_of_stages, stage_parameters
from tests.support import families as tiny

TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE = {"expert_tensor_parallel_size": 1}
# So many tokens that what does not grow with them is small. The tolerance is 2 %.
TOKENS = 256
NAMES = (
    *("llama", "llama_tied", "llama_biases", "qwen2", "qwen3", "qwen3_tied", "mixtral", "qwen3_moe"),
    *("deepseek_v3", "gemma2", "olmo2", "glm4", "glm4_moe"),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plan")
    for name in NAMES:
        tiny.make(name, folder / name)
    return {name: folder / name for name in NAMES}


def arguments(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return layout_arguments(ParallelConfig(**settings), read_hf_config(path).architecture.num_layers)


def count(path: Path, layout: dict[str, Any]) -> tuple[int, int, int, int]:
    """On a rank: its pipeline stage, its parameters outside experts, those of experts, and numbers not trained."""
    from megatron.core import parallel_state

    _, _, models = tiny.build(path, **layout)
    sizes, buffers = {True: 0, False: 0}, 0
    for model in models:
        for name, parameter in model.named_parameters():
            sizes[".experts." in name] += parameter.numel()
        buffers += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    return parallel_state.get_pipeline_model_parallel_rank(), sizes[False], sizes[True], buffers


@pytest.mark.parametrize(
    "name, world, settings",
    [
        ("llama", 1, {}),
        ("llama", 4, {**TP2, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
        ("llama_tied", 1, {}),
        ("llama_tied", 4, {**TP2, **PP2, "decoder_first_pipeline_num_layers": 1}),
        ("qwen2", 2, TP2),
        ("qwen3", 2, {**PP2, "decoder_last_pipeline_num_layers": 1}),
        ("mixtral", 4, {**SP2, **EP2}),
        ("mixtral", 4, {**SP2, **EP2, **WHOLE, **PP2}),
        ("deepseek_v3", 4, {**SP2, **PP2}),
        ("qwen3_moe", 4, {**PP2, **EP2}),  # the first stage has a dense layer, the second none
    ],
)
def test_parameters_are_those_of_the_built_model(
    pool: Any, checkpoints: dict[str, Path], name: str, world: int, settings: dict[str, Any]
) -> None:
    layout = arguments(checkpoints[name], settings)
    expected = stage_parameters(read_hf_config(checkpoints[name]).architecture, layout)
    for stage, dense, experts, buffers in pool.run(world, count, checkpoints[name], layout):
        assert (expected[stage].dense, expected[stage].experts) == (dense + buffers, experts)
        assert (expected[stage].trained_dense, expected[stage].trained_experts) == (dense, experts)


def kept(path: Path, layout: dict[str, Any], lengths: list[int], lora: Lora | None) -> int:
    """On a rank: bytes autograd keeps of the decoder layers, parameters left out."""
    from simpo_megatron.adapters.install import install, start_dropout

    hf, _, [gpt] = tiny.build(path, **layout)
    if lora is not None:
        install([gpt], hf, lora, 0)
        start_dropout([gpt], 0, 0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    seen: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage
        return tensor

    gpt.decoder.post_process = False  # leaves out the final norm, which belongs to no layer
    gpt.decoder.final_layernorm = None
    ids = torch.randint(0, tiny.VOCAB, (1, sum(lengths)))
    hidden, rotary = gpt.embedding(ids, None), getattr(gpt, "rotary_pos_emb", None)  # latent attention has its own
    hidden = hidden.detach().requires_grad_(True)  # as in all layers but the first, also with a frozen embedding
    rotary = None if rotary is None else rotary(sum(lengths), packed_seq=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = gpt.decoder(hidden, None, rotary_pos_emb=rotary, packed_seq_params=tiny.pack(lengths))
    # Every layer's output is the next layer's input. The last one goes to the next stage and is counted there.
    assert output.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
MODULES = {"recompute_granularity": "selective"}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
ADAPTERS, DROPPING = Lora(8, 16.0), Lora(8, 16.0, dropout=0.1)


@pytest.mark.parametrize(
    "name, world, settings, lora",
    [
        ("llama", 1, {}, ADAPTERS),
        ("llama", 2, SP2, DROPPING),
        ("llama", 2, {**SP2, **MODULES, "recompute_modules": ("mlp",)}, ADAPTERS),
        ("qwen3", 2, TP2, Lora(8, 16.0, ("q_proj", "v_proj"))),
        ("gemma2", 2, SP2, ADAPTERS),
        ("mixtral", 1, {**MODULES, "recompute_modules": ("moe",)}, DROPPING),
        ("mixtral", 2, {**SP2, **EP2, **WHOLE}, ADAPTERS),
        ("mixtral", 4, {**SP2, **EP2}, DROPPING),
        ("glm4_moe", 2, SP2, Lora(8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj"))),
        ("llama", 1, {}, None),
        ("llama", 2, TP2, None),
        ("llama", 2, SP2, None),
        ("llama", 1, MODULES, None),
        ("llama", 2, {**SP2, **MODULES, "recompute_modules": ("core_attn", "layernorm", "mlp")}, None),
        ("mixtral", 1, {**MODULES, "recompute_modules": ("layernorm", "moe")}, None),
        ("llama", 2, {**SP2, **FULL}, None),
        ("llama", 1, BLOCK, None),
        ("qwen3", 2, SP2, None),
        ("qwen3_tied", 2, SP2, None),  # one key head on two ranks
        ("glm4", 2, SP2, None),  # rotated in part
        ("glm4", 4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, None),
        ("gemma2", 2, SP2, None),
        ("olmo2", 1, {}, None),
        ("olmo2", 2, SP2, None),
        ("llama_biases", 2, SP2, None),
        ("gemma2", 1, {**MODULES, "recompute_modules": ("core_attn", "layernorm", "mlp")}, None),
        ("mixtral", 1, {}, None),
        ("qwen3_moe", 2, {**SP2}, None),
        ("deepseek_v3", 2, {**SP2, **MODULES}, None),  # on a CPU torch keeps the scores of heads with two widths
        ("mixtral", 2, {**SP2, **EP2, **WHOLE}, None),
        ("mixtral", 4, {**SP2, **EP2}, None),
    ],
)
def test_activations_are_the_tensors_autograd_keeps(
    pool: Any, checkpoints: dict[str, Path], name: str, world: int, settings: dict[str, Any], lora: Lora | None
) -> None:
    """Summed over all ranks: the router decides how many tokens each expert gets, but not how many all get."""
    path, layout = checkpoints[name], arguments(checkpoints[name], settings)
    hf = read_hf_config(path)
    work = Workload(world_size=world, seq_length=TOKENS, microbatches=1, bf16=False, fused=False, lora=lora)
    expected = saved_bytes(hf.architecture, layout, range(hf.architecture.num_layers), TOKENS, work)
    measured = sum(pool.run(world, kept, path, layout, [TOKENS // 2, TOKENS // 2], lora)) / world
    assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("virtual, microbatches", [(None, 2), (None, 12), (2, 8), (4, 4)])
def test_forward_passes_in_flight_are_those_of_the_schedule(virtual: int | None, microbatches: int) -> None:
    """Those of Megatron's warm-up, and the forward pass after it."""
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    stages = 4
    for rank in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda rank=rank: rank)
        talk: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        total, _, warmup, remaining = get_pp_rank_microbatches(
            microbatches, virtual or 1, stages, p2p_communicator=talk
        )
        layout = {"pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": virtual}
        assert in_flight(rank, layout, microbatches) == min(total, warmup + (remaining > 0))


def test_uneven_stages_hold_all_layers() -> None:
    layout = layout_arguments(
        ParallelConfig(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=23), num_layers=92
    )
    assert layers_of_stages(92, layout) == [[range(first, first + 23)] for first in (0, 23, 46, 69)]
    layout["num_layers_in_last_pipeline_stage"] = 21
    uneven = layers_of_stages(94, {**layout, "num_layers_in_first_pipeline_stage": 25})
    assert uneven == [[range(25)], [range(25, 49)], [range(49, 73)], [range(73, 94)]]


def test_states_of_a_run_by_hand(checkpoints: dict[str, Path]) -> None:
    """bf16, 8 processes, TP2 x PP1 x CP2: optimizer state is divided over DP x CP, that of experts over its copies."""
    hf = read_hf_config(checkpoints["mixtral"])
    layout = arguments(checkpoints["mixtral"], {**SP2, "context_parallel_size": 2, **EP2, **WHOLE})
    [held] = stage_parameters(hf.architecture, layout)
    work = Workload(world_size=8, seq_length=TOKENS, microbatches=1)
    memory = estimate(hf.architecture, layout, work)
    assert (memory.weights, memory.gradients) == (2 * held.total, 4 * held.total)
    assert memory.optimizer == 12 * held.dense // 4 + 12 * held.experts // 4
    assert memory.reference == 0
    whole = estimate(hf.architecture, layout, Workload(8, TOKENS, 1, distributed_optimizer=False, reference=True))
    assert (whole.optimizer, whole.reference) == (12 * held.total, 2 * held.total)
    assert whole.total == memory.total + whole.optimizer - memory.optimizer + whole.reference


def test_what_is_not_trained_has_no_gradient_and_no_optimizer_state(checkpoints: dict[str, Path]) -> None:
    """A table as adapters need it: the base weights do not change, and entries are added."""
    architecture = read_hf_config(checkpoints["mixtral"]).architecture
    layout = arguments(checkpoints["mixtral"], EP2)
    [base] = stage_parameters(architecture, layout)
    frozen = tuple(replace(entry, trained=False) for entry in architecture.weights)
    adapter = WeightEntry("decoder.layers.{layer}.adapter.weight", ("adapter",), ((3, 5),), Copy(), None)
    table = (*frozen, adapter, replace(adapter, experts=4))
    added, in_experts = 15 * architecture.num_layers, 15 * architecture.num_layers * 4 // 2
    [held] = stage_parameters(architecture, layout, table=table)
    assert held == Parameters(base.dense + added, base.experts + in_experts, added, in_experts)
    work = Workload(2, TOKENS, 1, distributed_optimizer=False, lora=ADAPTERS)
    [held] = stage_parameters(architecture, layout, table=adapted_table(architecture, ADAPTERS))
    memory = estimate(architecture, layout, work)
    assert (memory.weights, memory.gradients) == (2 * held.total, 4 * held.trained)
    assert memory.optimizer == 12 * held.trained
