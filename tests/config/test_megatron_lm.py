"""Which of Megatron-LM's arguments the plug refuses, and what it remarks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpo_megatron import megatron_lm
from simpo_megatron.config.megatron_lm import notes
from simpo_megatron.errors import UserError
from tests.support.runs import megatron_lm_args as args
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"micro_batch_size": 2}, "--micro-batch-size 2 cannot be used with SimPO: .* set it to 1"),
        ({"calculate_per_token_loss": True}, "--calculate-per-token-loss True .* drop it"),
        ({"fp16": True}, "--fp16 True .* use --bf16"),
        ({"dataloader_type": "cyclic"}, "--dataloader-type cyclic .* set it to external"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout must be 0"),
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer has no chat template"),
        ({"tokenizer_model": None}, "--tokenizer-model is missing"),
        ({"train_data_path": None}, "--train-data-path is missing"),
        ({"num_layers": 8}, "--num-layers 8, but .* has 4"),
        ({"group_query_attention": False}, "--num-query-groups 4, but .* has 2"),
        (
            {"num_experts": 4, "moe_token_dispatcher_type": "allgather"},
            "--moe-token-dispatcher-type allgather .* use alltoall",
        ),
        (
            {"share_prompts": True, "context_parallel_size": 2},
            "no attention for it under --context-parallel-size 2",
        ),
        ({"objective": "dpo", "simpo_beta": 3.0}, "--simpo-beta belongs to --objective simpo and has no effect"),
        ({"simpo_gamma": 1.0, "simpo_gamma_beta_ratio": 0.5}, "give one of them"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp cannot be used with SimPO: .* --use-distributed-optimizer"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 cannot be used"),
        ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute cannot .* drop it"),
        ({"tp_comm_overlap": True}, "--tp-comm-overlap cannot .* change in length"),
        ({"fp8": "hybrid"}, "--fp8-format hybrid cannot .* multiple of 16 tokens"),
        ({"fp4": "e2m1"}, "--fp4-format e2m1 cannot"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm cannot"),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute cannot"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local cannot .* set it to none"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel cannot"),
        ({"share_prompts": True, "apply_rope_fusion": True}, "--share-prompts: .* give --no-rope-fusion"),
        (
            {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 3, "sequence_parallel": True},
            "--seq-length 256 must be a multiple of 3",
        ),
    ],
    ids=str,
)
def test_what_the_loss_cannot_serve_is_refused(good: tuple[Path, Path], changes: dict[str, Any], words: str) -> None:
    megatron_lm.check_args(args(*good))
    with pytest.raises(UserError, match=words):
        megatron_lm.check_args(args(*good, **changes))


def test_what_is_off_and_what_costs_more_is_not_refused(good: tuple[Path, Path]) -> None:
    """Values that Megatron-LM gives to what is off; then what works, with a line that says what it costs."""
    off = {"use_megatron_fsdp": False, "fp8": None, "cuda_graph_impl": "none", "apply_rope_fusion": True}
    given = args(*good, **off)
    megatron_lm.check_args(given)
    assert notes(given) == []
    given = args(*good, accumulate_allreduce_grads_in_fp32=False, pipeline_model_parallel_size=2)
    megatron_lm.check_args(given)
    bf16, rows = notes(given)
    assert "an fp32 copy of the output layer's gradient" in bf16
    assert "--seq-length 256" in rows and "--variable-seq-lengths" in rows
    assert notes(args(*good, simpo_variable_seq_lengths=True, pipeline_model_parallel_size=2)) == []


def test_experts_need_the_dispatcher_that_takes_rows_of_any_length(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS)
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(3))
    megatron_lm.check_args(args(model, data, num_experts=4, moe_token_dispatcher_type="alltoall"))


def test_a_model_that_megatron_lm_cannot_compute_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Gemma2", head_dim=16)
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(3))
    words = "cannot compute .*post_norms True: Megatron-LM has no argument for it.*simpo_megatron.train"
    with pytest.raises(UserError, match=words):
        megatron_lm.check_args(args(model, data, kv_channels=16))
