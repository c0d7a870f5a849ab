"""config.json from the arguments a Megatron checkpoint was saved with, for checkpoints without a Hugging Face reference."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.rank_files_writer import FILE
from simpo_megatron.checkpoint.formats.torch_dist_reader import args_of, read_common
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.checkpoint.source import read_config
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint


def model_from_args(folder: Path, vocab_size: int | None) -> HFCheckpoint:
    """The model of a checkpoint, as far as its arguments tell.

    Args:
        folder: of one iteration, in either format.
        vocab_size: without Megatron's padding, which the arguments do not tell from it.

    Raises:
        UserError: the checkpoint has no arguments, or they do not describe a family this package knows.
    """
    if (folder / "common.pt").exists():
        record = read_common(folder)
    else:
        path = next(iter(sorted(folder.glob(f"mp_rank_*/{FILE}"))), None)
        content = read_torch_file(path).content if path else {}
        record = content.get("args") if isinstance(content, dict) else None
    args = args_of(record)
    if not args:
        raise UserError(f"{folder} holds no arguments to make a config.json from; give --hf-reference")
    config = _config(folder, args, vocab_size)
    with tempfile.TemporaryDirectory() as temporary:  # the reader's checks, on a directory that holds nothing else
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        return replace(read_config(Path(temporary)), path=folder)


def _config(folder: Path, args: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    def need(name: str) -> Any:
        if args.get(name) is None:
            raise UserError(f"the arguments in {folder} lack {name}; give --hf-reference")
        return args[name]

    rows = vocab_size or args.get("vocab_size")
    if rows is None:
        raise UserError(
            f"the arguments in {folder} tell only the padded vocabulary ({args.get('padded_vocab_size')} rows); give "
            "--hf-reference, or --vocab-size"
        )
    for name, expected in (("normalization", "RMSNorm"), ("swiglu", True), ("add_bias_linear", False)):
        if args.get(name, expected) != expected:
            raise UserError(
                f"the checkpoint in {folder} has {name} {args[name]!r}; only models with {expected!r} convert"
            )
    experts, qk_norm, bias = args.get("num_experts"), args.get("qk_layernorm"), args.get("add_qkv_bias")
    kind = ("qwen3_moe" if qk_norm else "mixtral") if experts else "qwen3" if qk_norm else "qwen2" if bias else "llama"
    prefix = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[kind]
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": need("hidden_size"),
        "intermediate_size": need("ffn_hidden_size"),
        "num_hidden_layers": need("num_layers"),
        "num_attention_heads": need("num_attention_heads"),
        "num_key_value_heads": args.get("num_query_groups") or need("num_attention_heads"),
        "head_dim": need("kv_channels"),
        "hidden_act": "silu",
        "rms_norm_eps": need("norm_epsilon"),
        "rope_theta": float(need("rotary_base")),
        "max_position_embeddings": need("max_position_embeddings"),
        "tie_word_embeddings": not need("untie_embeddings_and_output_weights"),
    }
    if args.get("use_rope_scaling"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": args.get("rope_scaling_factor") or 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if args.get("rotary_seq_len_interpolation_factor"):
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(args["rotary_seq_len_interpolation_factor"])}
    if args.get("window_size"):
        if kind not in ("llama", "mixtral"):
            raise UserError(f"the checkpoint in {folder} has a window of {args['window_size']}; give --hf-reference")
        config["sliding_window"] = args["window_size"][0] + 1
        if kind == "llama":
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    if experts:
        ffn = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
        config |= {
            "num_local_experts" if kind == "mixtral" else "num_experts": experts,
            "num_experts_per_tok": need("moe_router_topk"),
            "norm_topk_prob": not args.get("moe_router_pre_softmax", False),
            ffn: need("moe_ffn_hidden_size"),
        }
    return config
