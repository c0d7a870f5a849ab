"""Tiny random Hugging Face models of every family, and what the ranks of a worker pool do with them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint

VOCAB = 203  # prime: every tensor-parallel size pads it
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
PHI4_ROPE = {
    "partial_rotary_factor": 0.75,  # 4 of 6
    "original_max_position_embeddings": 64,  # the longest sequence of the tests is shorter
    "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.4], "long_factor": [2.0, 5.0]},
}
SCALED = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}  # both the scores and the angles get a factor
# Heads of 20 for queries and keys, of 10 for values.
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
QWEN3_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16}
GEMMA3 = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
# name: class prefix in transformers, and what its config sets besides the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 16}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN}),
    "llama_attention_bias": ("Llama", {"attention_bias": True}),
    "llama_mlp_bias": ("Llama", {"mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 16}),
    "ministral": (
        "Ministral",
        {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED, "tie_word_embeddings": True},
    ),
    "mistral_whole": ("Mistral", {"sliding_window": None}),
    "olmo2": ("Olmo2", {"head_dim": 16, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", {"sliding_window": 8, "rope_scaling": YARN, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_windows": ("Qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "phi3": ("Phi3", {"head_dim": 16, "sliding_window": 8, "num_key_value_heads": 2}),
    "phi3_tied": ("Phi3", {"tie_word_embeddings": True, "num_key_value_heads": 1, **PHI4_ROPE}),
    "glm": ("Glm", {"head_dim": 12, "num_key_value_heads": 2, "attention_bias": False, "tie_word_embeddings": True}),
    "glm4": ("Glm4", {"head_dim": 16, "num_key_value_heads": 2, "attention_bias": True}),
    "qwen3_windows": ("Qwen3", {**WINDOWS, "head_dim": 16, "attention_bias": True, "layer_types": MIXED}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN3_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe_plain": ("Qwen3Moe", {**QWEN3_EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            **ROUTED,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "rope_scaling": SCALED,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **ROUTED,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **ROUTED, "q_lora_rank": 14}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "swiglu_limit": 1.5,  # gate and up reach it
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    # The bounds are low enough to matter, the heads are wider together than the hidden states, the window is short.
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3", {**GEMMA, **GEMMA3, "tie_word_embeddings": False}),
}

CAPPED = ("gemma2",)  # with a bound for attention scores, which Transformer Engine does not have
WITH_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_moe_plain", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")


def make(name: str, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Saves a random model to `path` and returns it. Norms and biases are random too, so that a swapped one is seen."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prefix, own = MODELS[name]
    config = getattr(transformers, f"{prefix}ForCausalLM").config_class(**{**SIZES, **own, **settings})
    generator = torch.Generator().manual_seed(1)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.2 * noise)
            parameter.data = parameter.to(dtype)
        for key, buffer in model.named_buffers():
            if key in model.state_dict():  # of a router; in fp32, as in the checkpoints
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.config.dtype = dtype
    model.save_pretrained(path)
    for extra in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / extra).write_text(f"the {extra} of {name}\n")
    return type(model).from_pretrained(path).eval()  # not `model`: `to` has rounded its rotary frequencies


def on_disk(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, one for each expert as in a checkpoint: transformers fuses them when loading."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        whole = re.search(r"\.experts\.[a-z_]+$", name) is not None
        found |= {f"{name}[{i}]": of_expert for i, of_expert in enumerate(tensor)} if whole else {name: tensor}
    return found


def build(path: Path, *, bf16: bool = False, **layout: Any) -> tuple[Any, Any, list[Any]]:
    """On a rank: makes the model-parallel groups, then builds and loads the checkpoint at `path` for `layout`.

    Returns:
        The checkpoint, the TransformerConfig and the models.
    """
    from megatron.core import parallel_state, tensor_parallel

    from simpo_megatron.models.build import build_model, transformer_config
    from simpo_megatron.models.load import load_hf_weights
    from simpo_megatron.models.placement import place_parameters

    parallel_state.initialize_model_parallel(
        layout.get("tensor_model_parallel_size", 1),
        layout.get("pipeline_model_parallel_size", 1),
        layout.get("virtual_pipeline_model_parallel_size"),
        expert_model_parallel_size=layout.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=layout.get("expert_tensor_parallel_size"),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    hf = read_hf_checkpoint(path)
    config = transformer_config(hf, bf16=bf16, **layout)
    models = build_model(hf, config)
    for model in models:
        for place in place_parameters(model, hf.architecture.weights, tied=hf.architecture.tied):
            place.parameter.data.fill_(float("nan"))  # so that a weight that is not loaded is seen
    load_hf_weights(models, hf)
    return hf, config, models


def pack(lengths: list[int]) -> Any:
    """PackedSeqParams of sequences of these lengths."""
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def run_schedule(config: Any, models: list[Any], ids: Tensor, lengths: list[int] | None, weights: Tensor | None) -> Any:
    """Runs Megatron's schedule on identical microbatches.

    Args:
        config: of the models.
        models: of this rank.
        ids: [1, T].
        lengths: of the packed sequences; None for one sequence that is not packed.
        weights: [T, V], for a backward pass of `sum(weights * logits)` in every microbatch; None for forward passes
            only.

    Returns:
        The logits [T, V] on the last stage, gathered over the tensor-parallel ranks; None on the other stages.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rank = parallel_state.get_tensor_model_parallel_rank()
    seen: list[Tensor] = []

    def loss_func(logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
        shards = [torch.empty_like(logits) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        dist.all_gather(shards, logits.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        seen.append(torch.cat(shards, dim=-1)[0, :, :VOCAB].float())
        if weights is None:
            return logits.sum(), {}
        width = logits.shape[-1]
        mine = torch.nn.functional.pad(weights, (0, width * len(shards) - VOCAB))[:, rank * width : (rank + 1) * width]
        return (logits[0] * mine).sum(), {}

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        next(batches)
        positions = torch.arange(ids.shape[1])[None]
        packed = pack(lengths) if lengths else None
        return model(ids, positions, None, packed_seq_params=packed), loss_func

    microbatches = max(2, config.pipeline_model_parallel_size)  # interleaved stages need a multiple
    get_forward_backward_func()(
        forward_step_func=partial(forward_step),
        data_iterator=[iter(range(microbatches)) for _ in models],
        model=models if len(models) > 1 else models[0],
        num_microbatches=microbatches,
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=weights is None,
    )
    return seen[0] if seen else None


def logits(path: Path, ids: Tensor, lengths: list[int] | None, layout: dict[str, Any], bf16: bool = False) -> Any:
    """On a rank: the logits [T, V] of the checkpoint at `path` on the last stage; None on the others."""
    _, config, models = build(path, bf16=bf16, **layout)
    return run_schedule(config, models, ids, lengths, None)


def gradients(
    path: Path, ids: Tensor, lengths: list[int], weights: Tensor, layout: dict[str, Any]
) -> dict[str, Tensor]:
    """On a rank: the whole gradients of `sum(weights * logits)` for its pipeline stage, by Hugging Face name.

    Parameters that see other tokens or heads on every rank are summed over the ranks, by the rule of Megatron's
    `finalize_model_grads`: those with the attribute `sequence_parallel`, and the query and key norms by name.
    """
    from simpo_megatron.models.part_layout import join_ranks
    from simpo_megatron.models.placement import place_parameters

    hf, config, models = build(path, **layout)
    run_schedule(config, models, ids, lengths, weights)
    found = {}
    for place in (
        place
        for model in models
        for place in place_parameters(model, hf.architecture.weights, tied=hf.architecture.tied)
    ):
        if not place.entry.trained:
            continue
        gradient, group, ranks = place.parameter.grad, place.group, place.group.size()
        assert gradient is not None, place.name
        shards = [torch.empty_like(gradient) for _ in range(ranks)]
        dist.all_gather(shards, gradient, group=group)
        if place.entry.tp_dim is not None:
            assert place.parameter.tensor_model_parallel, place.name
            whole = join_ranks(place.entry.part_layout, place.entry.rows, shards, place.entry.tp_dim)
        else:
            by_name = config.qk_layernorm and ("q_layernorm" in place.name or "k_layernorm" in place.name)
            summed = by_name or getattr(place.parameter, "sequence_parallel", False)
            whole = sum(shards, torch.zeros_like(gradient)) if summed else gradient
        parts = place.entry.part_layout.split(whole[: sum(place.entry.rows)], place.entry.rows)
        for held in place.entry.tensors:
            name = place.hf[held[0]]
            whole = torch.cat([parts[part] for part in held])
            found[name] = found.get(name, 0) + place.entry.as_stored(whole, held)
    return found
