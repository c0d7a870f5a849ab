"""What is wrong with a checkpoint is reported in one sentence, before anything is built."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import DEQUANTIZE_MXFP4
from simpo_megatron.models.hf_checkpoint import check_tensors, read_hf_checkpoint
from tests.support import families as tiny


def change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def change_tensors(path: Path, **tensors: torch.Tensor | None) -> None:
    held = {**load_file(path / "model.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path / "model.safetensors")


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    tiny.make("llama_tied", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    hf = read_hf_checkpoint(tmp_path)
    check_tensors(hf)
    found = hf.architecture
    assert (found.vocab_size, found.tied, found.family.name) == (tiny.VOCAB, True, "Llama")
    assert hf.eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").unlink()
    assert read_hf_checkpoint(tmp_path).eos_token_ids == (2,)


def test_reading_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import simpo_megatron.models.hf_checkpoint, sys; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_old_and_new_rope_settings_read_alike(tmp_path: Path) -> None:
    tiny.make("llama3", tmp_path)
    new = read_hf_checkpoint(tmp_path).architecture.rope
    change_config(tmp_path, rope_parameters=None, rope_theta=500000.0, rope_scaling=tiny.LLAMA3)
    assert read_hf_checkpoint(tmp_path).architecture.rope == new
    change_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 777.0})  # beside the older keys
    assert read_hf_checkpoint(tmp_path).architecture.rope == new
    assert (new.theta, new.kind, new.original_max_position_embeddings) == (500000.0, "llama3", 32)


# One model of every family: none trains with dropout.
DROPPING = (
    "llama",
    "mistral",
    "ministral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "olmo2",
    "olmo3",
)
DROPPING += ("phi3", "glm", "glm4", "glm4_moe", "deepseek_v2", "deepseek_v3")


CONTEXT = "original_max_position_embeddings"
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0], "long_factor": [2.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("llama", {"model_type": "gpt2"}, ["'gpt2'", "supported are ", " llama, ministral, mistral, mixtral, "]),
        ("llama", {"layer_types": 3}, ["config.json holds a value of the wrong kind"]),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, ["rope_theta", "'big'"]),
        ("llama", {"rope_parameters": [1]}, ["config.json holds a value of the wrong kind"]),
        ("llama", {"rms_norm_eps": []}, ["config.json holds a value of the wrong kind"]),
        ("llama", {"head_dim": "wide"}, ["head_dim", "'wide'"]),
        ("llama", {"num_key_value_heads": -4}, ["num_key_value_heads", "-4"]),
        *((name, {"attention_dropout": 0.1}, ["attention_dropout to 0.1", "without dropout"]) for name in DROPPING),
        ("phi3", {"resid_pdrop": 0.1}, ["resid_pdrop to 0.1", "without dropout"]),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["'linear'", "'longrope' or none"]),
        ("deepseek_v3", {"norm_topk_prob": False}, ["norm_topk_prob to False"]),
        ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method to 'greedy'"]),
        *(("deepseek_v3", {"rope_interleave": off}, [f"rope_interleave to {off}"]) for off in (False, None)),
        *(
            (name, {"routed_scaling_factor": 0.0}, ["routed_scaling_factor to 0.0", "not a positive number"])
            for name in ("deepseek_v2", "deepseek_v3", "glm4_moe")
        ),
        *(
            (name, {"mlp_bias": True}, ["mlp_bias to True", "transformers ignores it"])
            for name in ("qwen3", "qwen3_moe", "olmo2", "olmo3")
        ),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step to 0"]),
        ("olmo3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor to 0.5", "whole heads"]),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, ["rms_norm_eps to 1e-05", "1e-6"]),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "dequantize"]),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config", "dequantize=True"]),
        ("gpt_oss", {"attention_bias": False}, ["attention_bias to False", "only models with biases"]),
        ("gpt_oss", {"swiglu_alpha": 1.0}, ["swiglu_alpha to 1.0", "1.702"]),
        ("gpt_oss", {"swiglu_limit": 0}, ["swiglu_limit to 0", "positive"]),
        ("deepseek_v3", {"n_group": 3}, ["n_group to 3", "8 experts"]),
        ("deepseek_v3", {"topk_group": 5}, ["topk_group to 5", "n_group to 4"]),
        ("glm4_moe", {"topk_group": 0}, ["topk_group to 0", "not a positive integer"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob to True"]),
        ("deepseek_v2", {"attention_bias": True}, ["attention_bias to True"]),
        ("deepseek_v2", {"head_dim": 64}, ["head_dim to 64", "qk_rope_head_dim"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise to 0.1", "set it to 0"]),
        ("mixtral", {"num_experts_per_tok": 9}, ["num_experts_per_tok to 9", "4 experts"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ("llama", {"attention_bias": "qkv"}, ["attention_bias", "'qkv'"]),
        ("llama", {"layer_types": ["sliding_attention"]}, ["sliding_attention"]),
        ("llama", {"num_hidden_layers": None}, ["num_hidden_layers"]),
        ("llama", {"rope_parameters": {"rope_type": "su", "factor": 2.0}}, ["'su'", "llama3"]),
        ("llama", {"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, ["'yarn'", "lacks factor"]),
        ("llama", {"rope_parameters": {"full_attention": {}}}, ["rope_parameters for full_attention"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (
            "mistral",
            {"layer_types": tiny.MIXED},
            ["full_attention and sliding_attention", "is it a 'ministral' model?"],
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, ["1 layer_types for 4 layers"]),
        ("qwen2", {"layer_types": []}, ["0 layer_types for 4 layers"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 0, "layer_types": tiny.MIXED},
            ["sliding_window to 0"],
        ),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters for rope_type", "full_attention"]),
        ("olmo3", {"rope_parameters": None, "rope_theta": 10000.0}, ["rope_theta to 10000.0", "give rope_parameters"]),
        ("olmo3", {"rope_parameters": {"sliding_attention": tiny.YARN}}, ["'yarn' in the layers with a window"]),
        *(
            (name, {"rope_parameters": {"full_attention": {**tiny.YARN, "truncate": False}}}, ["truncate to False"])
            for name in ("olmo3", "gemma3")
        ),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": tiny.YARN}, "rope_theta": 777.0},
            ["rope_theta to 777.0", "give rope_parameters"],
        ),
        ("olmo2", {"rope_parameters": {"full_attention": {}}}, ["rope_parameters for full_attention"]),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        ("qwen3", {"layer_types": tiny.MIXED}, ["sliding_attention", "off"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation", "'gelu'"]),
        ("gemma2", {"attention_bias": True}, ["attention_bias"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "causal"]),
        ("gemma2", {"sliding_window": None}, ["has no sliding_window, or turns it off"]),
        ("gemma2", {"final_logit_softcapping": True}, ["final_logit_softcapping to True", "positive number"]),
        ("gpt_oss", {"swiglu_limit": 0}, ["swiglu_limit to 0", "positive number"]),
        ("gpt_oss", {"swiglu_alpha": 1.0}, ["swiglu_alpha to 1.0"]),
        ("gpt_oss", {"attention_bias": False}, ["attention_bias to False"]),
        ("gpt_oss", {"num_experts": 4}, ["num_experts to 4 and num_local_experts to 8"]),
        ("mistral", {"sliding_window": -8}, ["sliding_window to -8", "positive integer"]),
        ("mistral", {"sliding_window": 8.5}, ["sliding_window to 8.5"]),
        ("llama", {"is_causal": False}, ["is_causal to False"]),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 1.5}}, ["partial_rotary_factor", "1.5"]),
        ("llama", {"rope_parameters": {**tiny.YARN, "beta_fast": -4.0}}, ["beta_fast", "-4.0"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "short_factor": [1.0, "x", 1.0]}}, ["short_factor", "'x'"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": 2.0}}, ["long_factor", "2.0"]),
        (
            "phi3_tied",
            {"rope_parameters": {**LONGROPE, "long_factor": [2.0] * 2}},
            ["3 numbers as short_factor", "2 pairs"],
        ),
        ("llama", {"rope_parameters": {**LONGROPE, "long_factor": [2.0]}}, ["1 numbers as long_factor", "3 pairs"]),
        ("llama", {"rope_scaling": {**LONGROPE, CONTEXT: 1}}, [CONTEXT, "1"]),
        ("llama_biases", {"rope_parameters": {**tiny.YARN, "rope_theta": 1.0}}, ["rope_theta", "1.0"]),
        ("llama", {"rope_parameters": {**tiny.YARN, "factor": "8"}}, ["factor", "'8'"]),
        ("llama", {"rope_parameters": {**tiny.LLAMA3, "low_freq_factor": 0}}, ["low_freq_factor"]),
        (
            "llama",
            {"rope_parameters": {**tiny.LLAMA3, "original_max_position_embeddings": 0}},
            ["original_max_position"],
        ),
        ("gemma2", {"final_logit_softcapping": 0}, ["final_logit_softcapping to 0", "positive"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar to 0"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping to 50.0", "transformers ignores it"]),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, ["rope_type in rope_parameters"]),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            ["'linear' in the layers with a window"],
        ),
        *(
            (name, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["type to 'linear'", "name it rope_type"])
            for name in ("gemma3", "olmo3")
        ),
        ("gemma3", {"model_type": "gemma3", "text_config": {}}, ["'gemma3'", "text model alone"]),
    ],
)
def test_a_model_that_would_be_computed_differently_is_refused(
    name: str, values: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    tiny.make(name, tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(UserError) as raised:
        read_hf_checkpoint(tmp_path)
    assert all(word in str(raised.value) for word in words)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_hf_checkpoint(tmp_path / "nowhere")
    tiny.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
            read_hf_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"names model-00001-of-00002\.safetensors, which does not exist"):
        read_hf_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    file.unlink()
    with pytest.raises(UserError, match="has neither"):
        read_hf_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"convert them with tools/hf_to_megatron\.py"):
        read_hf_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        read_hf_checkpoint(tmp_path)


NORM, EXPERTS = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("llama", {NORM: None}, ["has no tensor", NORM]),
        ("llama", {NORM: torch.ones(47)}, [NORM, "model.safetensors", "[47]", "[48]"]),
        ("llama", {"model.layers.4.input_layernorm.weight": torch.ones(48)}, ["does not use", "model.layers.4"]),
        ("gpt_oss", {EXPERTS: torch.ones(7, 96, 48)}, [EXPERTS, "[7, 96, 48]", "8 experts"]),
        ("gpt_oss", {EXPERTS: torch.ones(8, 48, 96)}, [f"{EXPERTS}[0]", "[48, 96]", "[96, 48]"]),
        (
            "gpt_oss",
            {EXPERTS: None, f"{EXPERTS}_blocks": torch.ones(8, 48, 3, 16, dtype=torch.uint8)},
            [f"has {EXPERTS}_blocks", f"in place of {EXPERTS}", "MXFP4", "dequantize=True"],
        ),
    ],
)
def test_tensors_are_checked(name: str, tensors: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    tiny.make(name, tmp_path)
    change_tensors(tmp_path, **tensors)
    with pytest.raises(UserError) as raised:
        check_tensors(read_hf_checkpoint(tmp_path))
    assert all(word in str(raised.value) for word in words)


def test_mxfp4_is_dequantized_as_the_refusal_says(tmp_path: Path) -> None:
    """A model in MXFP4 that transformers dequantizes and saves: what is read is what transformers computes with."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    tiny.make("gpt_oss", tmp_path, torch.bfloat16, hidden_size=64, num_hidden_layers=2, layer_types=tiny.MIXED[:2])
    quantized: dict[str, torch.Tensor | None] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            blocks = torch.randint(256, (*scales.shape, 16), dtype=torch.uint8)
            quantized |= {name: None, f"{name}_blocks": blocks, f"{name}_scales": scales}
    change_tensors(tmp_path, **quantized)
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    assert "save_pretrained(FOLDER, save_original_format=False)" in DEQUANTIZE_MXFP4
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    check_tensors(read_hf_checkpoint(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved[EXPERTS], model.state_dict()[EXPERTS])


@pytest.mark.parametrize("more, words", [(1, None), (0, "does not use: model.layers.4.input_layernorm")])
def test_layers_that_predict_more_tokens_are_not_read(more: int, words: str | None, tmp_path: Path) -> None:
    tiny.make("deepseek_v3", tmp_path)
    change_config(tmp_path, num_nextn_predict_layers=more, num_mtp_layers=None)
    change_tensors(tmp_path, **{"model.layers.4.input_layernorm.weight": torch.ones(48)})
    with contextlib.nullcontext() if words is None else pytest.raises(UserError, match=words):
        check_tensors(read_hf_checkpoint(tmp_path))


def test_tensors_without_information_are_ignored(tmp_path: Path) -> None:
    tiny.make("llama_tied", tmp_path)
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, **{frequencies: torch.ones(3), "lm_head.weight": embedding})
    check_tensors(read_hf_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["llama_tied", "gemma2"])
def test_an_output_layer_that_is_not_the_embedding_it_is_tied_to_is_refused(name: str, tmp_path: Path) -> None:
    """In transformers 5 both are used, whatever config.json says."""
    tiny.make(name, tmp_path)
    other = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    other[-1, -1] += 1
    change_tensors(tmp_path, **{"lm_head.weight": other})
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings.*lm_head\.weight.* is not the embedding"):
        check_tensors(read_hf_checkpoint(tmp_path))
