"""Layouts that a model cannot have are refused with the nearest values that it can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.errors import UserError
from simpo_megatron.models.build import transformer_config
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.parallel.limits import check_layout
from simpo_megatron.parallel.stages import stage_layers, virtual_stages
from tests.support import families as tiny

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        (
            "llama",
            {"tensor_model_parallel_size": 3},
            "--tensor-model-parallel-size 3 does not divide num_attention_heads 8; use 1, 2, 4 or 8",
        ),
        ("llama", {"sequence_parallel": True}, "--sequence-parallel needs --tensor-model-parallel-size above 1"),
        (
            "llama",
            {"pipeline_model_parallel_size": 3},
            "the model's 4 layers do not divide into 3 pipeline stages; use --pipeline-model-parallel-size 1, 2 or 4",
        ),
        ("llama", {"pipeline_model_parallel_size": 8}, "do not divide into 8 pipeline stages; use .* 1, 2 or 4"),
        (
            "llama",
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
            "--decoder-first-pipeline-num-layers 1 leaves 3 of the model's 4 layers for the other 2 .*; use 2$",
        ),
        (
            "llama",
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 4},
            "--decoder-first-pipeline-num-layers 4 leaves 0 of the model's 4 layers for the other 2 .*; use 2$",
        ),
        (
            "llama",
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            "do not divide into 2 pipeline stages of 3 virtual stages each",
        ),
        ("llama", {"virtual_pipeline_model_parallel_size": 2}, "need --pipeline-model-parallel-size above 1"),
        (
            "llama",
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "overlap_p2p_comm": False,
            },
            "need overlap_p2p_comm",
        ),
        (
            "deepseek_v3",
            {"pipeline_model_parallel_size": 4},
            "pipeline stage 0 would hold the layers 0, which have no experts: .* smaller --pipeline-model-parallel",
        ),
        ("deepseek_v3", {"recompute_modules": ["moe_act"]}, "moe_act needs Transformer Engine's layers"),
        (
            "glm4_moe",
            {"recompute_modules": ["mla_up_proj"]},
            "mla_up_proj needs multi-latent attention, which",
        ),
        ("llama", {"moe_aux_loss_coeff": 0.5}, "--moe-aux-loss-coeff 0.5 needs a model with experts"),
        ("llama", {"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2 needs a model with experts"),
        ("llama", {"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size 2 needs a model with experts"),
        (
            "mixtral",
            {"expert_model_parallel_size": 3},
            "--expert-model-parallel-size 3 does not divide the 4 experts of a layer; use 1, 2 or 4",
        ),
        (
            "qwen3_moe",
            {**SP, "expert_tensor_parallel_size": 3},
            "--expert-tensor-parallel-size 3 does not divide moe_ffn_hidden_size 32; give .* 1 or 2",
        ),
        ("mixtral", {"tensor_model_parallel_size": 2}, "a model with experts needs --sequence-parallel"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit_are_refused(name: str, layout: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path)
    with pytest.raises(UserError, match=message):
        transformer_config(read_hf_checkpoint(tmp_path), bf16=True, **layout)


def test_query_groups_are_whole_or_cut_evenly() -> None:
    model = {"num_layers": 4, "num_attention_heads": 12, "num_query_groups": 6, "kv_channels": 4, "ffn_hidden_size": 24}
    for ranks in (1, 2, 3, 6, 12):
        check_layout(model, {"tensor_model_parallel_size": ranks})
    with pytest.raises(
        UserError, match=r"size 4 neither divides num_query_groups 6 nor cuts .*; use 1, 2, 3, 6 or 12$"
    ):
        check_layout(model, {"tensor_model_parallel_size": 4})
    with pytest.raises(UserError, match=r"size 12 neither divides num_query_groups 1 .*; use 1, 2, 3 or 6$"):
        check_layout({**model, "num_query_groups": 1, "kv_channels": 3}, {"tensor_model_parallel_size": 12})


def test_the_nearest_values_are_accepted(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path)
    hf = read_hf_checkpoint(tmp_path)
    for layout in (
        {**SP, "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1},
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1, "context_parallel_size": 2},
    ):
        check_layout(hf.architecture.transformer, layout)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            (10, 4, 1, 3, None),
            "--decoder-first-pipeline-num-layers 3 leaves 7 .* the other 3 pipeline stages; use 1 or 4$",
        ),
        (
            (10, 4, 1, None, 2),
            "--decoder-last-pipeline-num-layers 2 leaves 8 .* the other 3 pipeline stages; use 1 or 4$",
        ),
        (
            (10, 4, 1, 2, 3),
            "first.* 2 and .*last.* 3 leave 5 .* 2 pipeline stages; choose two numbers with the sum 4 or 6$",
        ),
        ((10, 2, 1, 2, 3), "leave 5 of the model's 10 layers for the other 0 .* choose two numbers with the sum 10$"),
        ((12, 4, 2, 1, 3), "2 virtual stages each; choose two numbers with the sum 4 or 8, each a multiple of 2$"),
        ((2, 4, 1, 1, None), "leaves 1 .* the other 3 .*; use another --pipeline-model-parallel-size$"),
    ],
)
def test_layers_that_do_not_divide_are_refused_with_the_nearest_that_do(cut: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_layers(*cut)


@pytest.mark.parametrize(
    ("cut", "fix"),
    [
        ((8, 2, 3), "use --num-layers-per-virtual-pipeline-stage 1, 2 or 4$"),
        ((8, 3, 1), "use --pipeline-model-parallel-size 1, 2, 4 or 8$"),
    ],
)
def test_virtual_stages_that_do_not_divide_are_refused(cut: tuple[int, int, int], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        virtual_stages(*cut)
