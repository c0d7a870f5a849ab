"""Built and loaded models compute what transformers computes: logits and gradients, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import families as tiny
from tests.support.distributed import BOTH, LOCAL, NEWEST, WorkerError

LENGTHS = [17, 30, 5]  # the window of the Mistral model is 8, the original context of the Llama 3 model 32
IDS = torch.randint(0, tiny.VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))

TP2 = {"tensor_model_parallel_size": 2}
TP4_SP = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}


def world(layout: dict[str, Any]) -> int:
    return layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1)


def packed_reference(model: Any) -> Tensor:
    """The logits [T, V] of the sequences of the packed row, each computed alone."""
    return torch.cat([model(ids[None]).logits[0] for ids in IDS[0].split(LENGTHS)])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()  # an expert may get no token


@pytest.mark.parametrize("pool", BOTH, indirect=True)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_family_equals_transformers(name: str, pool: Any, tmp_path: Path) -> None:
    model = tiny.make(name, tmp_path)
    if pool.kind != LOCAL and name in tiny.CAPPED:
        with pytest.raises(WorkerError, match=f"capped attention scores, which Transformer Engine {pool.kind} cannot"):
            pool.run(1, tiny.logits, tmp_path, IDS, LENGTHS, {})
        return
    with torch.no_grad():
        [plain] = pool.run(1, tiny.logits, tmp_path, IDS, None, {})
        assert error(plain, model(IDS).logits[0]) < 1e-5
        [packed] = pool.run(1, tiny.logits, tmp_path, IDS, LENGTHS, {})
        assert error(packed, packed_reference(model)) < 1e-5
        assert error(packed, plain) > 1e-2  # so the test would see it if sequences attended to each other


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama_tied", layout) for layout in (TP2, PP2, {**SP, **PP2}, VPP2, UNEVEN)),
        *(("phi3", layout) for layout in (TP2, SP, VPP2)),  # the others are in `test_gradients_equal_transformers`
        ("llama3", UNEVEN),
    ],
    ids=str,
)
def test_every_layout_equals_transformers(name: str, layout: dict[str, Any], pool: Any, tmp_path: Path) -> None:
    model = tiny.make(name, tmp_path)
    results = pool.run(world(layout), tiny.logits, tmp_path, IDS, LENGTHS, layout)
    found = [result for result in results if result is not None]
    assert len(found) == layout.get("tensor_model_parallel_size", 1)
    with torch.no_grad():
        expected = packed_reference(model)
    for result in found:
        assert error(result, expected) < 1e-5


@pytest.mark.parametrize(
    "pool, name",
    [
        (LOCAL, "llama3"),
        (LOCAL, "gemma2"),
        *(pytest.param(NEWEST, name, marks=pytest.mark.te) for name in ("llama3", "gemma3")),
    ],
    indirect=["pool"],
)
def test_bf16_is_as_close_as_transformers_bf16(name: str, pool: Any, tmp_path: Path) -> None:
    half = tiny.make(name, tmp_path, torch.bfloat16)
    with torch.no_grad():
        bf16 = packed_reference(half).float()
        fp32 = packed_reference(type(half).from_pretrained(tmp_path, dtype=torch.float32))
    [found] = pool.run(1, tiny.logits, tmp_path, IDS, LENGTHS, {}, True)
    assert error(found, fp32) < 1.5 * error(bf16, fp32) + 1e-3


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}


@pytest.mark.parametrize("pool", BOTH, indirect=True)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, {}) for name in ("llama", "llama3", "phi3", "qwen2_tied", "qwen3", "qwen3_moe")),
        *((name, layout) for name in ("mistral", "qwen3") for layout in (FULL, SELECTIVE)),
        *((name, layout) for name in ("glm4", "qwen3") for layout in (TP2, SP, {**SP, **PP2})),
        *(("qwen3_tied", layout) for layout in (TP2, SP)),  # one key head: every rank has it and a half of the queries
        ("phi3", TP4_SP),  # two key heads, each on two ranks
        ("glm", {}),
        *((name, SP) for name in ("llama_attention_bias", "llama_mlp_bias")),
        *((name, {**SP, **PP2}) for name in ("llama_biases", "qwen3_windows", "olmo3")),
        ("olmo2", TP2),
        ("olmo3", FULL),
        ("deepseek_v2", SP),
        ("glm4_moe", {**SP, **PP2}),
        ("deepseek_v3", {**SP, **VPP2}),
        ("gpt_oss", {**SP, **PP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    ],
    ids=str,
)
def test_gradients_equal_transformers(name: str, layout: dict[str, Any], pool: Any, tmp_path: Path) -> None:
    model = tiny.make(name, tmp_path)
    weights = torch.randn(IDS.shape[1], tiny.VOCAB, generator=torch.Generator().manual_seed(3))
    (packed_reference(model) * weights).sum().backward()
    results = pool.run(world(layout), tiny.gradients, tmp_path, IDS, LENGTHS, weights, layout)
    found = {name: gradient for result in results for name, gradient in result.items()}
    expected = tiny.on_disk(model, {name: parameter.grad for name, parameter in model.named_parameters()})
    assert found.keys() == expected.keys()
    for parameter in expected:
        # Megatron's schedule divides the loss by the number of microbatches, which are all the same here.
        assert error(found[parameter], expected[parameter]) < 2e-5, parameter
