"""An architecture under Megatron-LM's argument names, and back: what most families share. No torch, no Megatron.

Megatron-LM's arguments cannot express everything (`checkpoint/saved_args.py`, `not_expressible`). What they cannot
express is stored under names of this package, so that the way back to a config.json loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.rope import Rope

if TYPE_CHECKING:
    from simpo_megatron.models.architecture import Architecture

# Megatron-Core computes its llama3 scaling with these values (`rotary_pos_embedding.py`). Only the factor has a flag.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# Scalings without arguments in Megatron-LM. Theirs are the fields of `Rope`, with `rope_` before the name.
OWN_ROPES = ("dynamic", "yarn", "longrope")
_ROPE_ELSEWHERE = ("theta", "partial_rotary_factor")


def _number(value: float) -> int | float:
    """The value as an integer where it is whole: Megatron-LM's flags take whole numbers."""
    return int(value) if value == int(value) else value


def default_megatron_args(architecture: Architecture) -> dict[str, Any]:
    """Megatron-LM's arguments by name. Their values are primitives, because Megatron-LM's loader accepts no others."""
    kwargs, rope = dict(architecture.transformer), architecture.rope
    args: dict[str, Any] = {
        "num_layers": kwargs.pop("num_layers"),
        "hidden_size": kwargs.pop("hidden_size"),
        "ffn_hidden_size": kwargs.pop("ffn_hidden_size"),
        "num_attention_heads": kwargs.pop("num_attention_heads"),
        "group_query_attention": kwargs["num_query_groups"] != architecture.transformer["num_attention_heads"],
        "num_query_groups": kwargs.pop("num_query_groups"),
        "kv_channels": kwargs.pop("kv_channels"),
        "normalization": "RMSNorm",
        "norm_epsilon": kwargs.pop("layernorm_epsilon"),
        "add_bias_linear": kwargs.pop("add_bias_linear", False),
        "add_qkv_bias": kwargs.pop("add_qkv_bias", False),
        "qk_layernorm": kwargs.pop("qk_layernorm", False),
        "swiglu": True,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "rotary_base": _number(rope.theta),
        "rotary_percent": rope.partial_rotary_factor or 1.0,
        "rotary_interleaved": kwargs.pop("rotary_interleaved", False),
        "use_rope_scaling": rope.kind == "llama3",
        "max_position_embeddings": architecture.max_position_embeddings,
        "untie_embeddings_and_output_weights": not architecture.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if rope.kind == "llama3":
        args["rope_scaling_factor"] = rope.factor
        args |= {f"rope_scaling_{name}": getattr(rope, name) for name in LLAMA3_ROPE}
    if rope.kind == "linear":
        args["rotary_seq_len_interpolation_factor"] = _number(rope.factor)
    if rope.kind in OWN_ROPES:
        args |= {f"rope_{name}": value for name, value in rope.as_dict().items() if name not in _ROPE_ELSEWHERE}
    if "num_moe_experts" in kwargs:
        args |= {"num_experts": kwargs.pop("num_moe_experts"), "moe_grouped_gemm": False}
        args["moe_layer_freq"] = kwargs.pop("moe_layer_freq", 1)
        args |= {"moe_token_dispatcher_type": "alltoall", "moe_router_score_function": "softmax"}
    return args | kwargs | architecture.additions.as_dict()


def default_config(args: Mapping[str, Any], model_type: str, prefix: str) -> dict[str, Any]:
    """What the config.json of every family contains, without the vocabulary size.

    Args:
        args: Megatron-LM's arguments by name.
        model_type: of config.json.
        prefix: of the family's classes in transformers, such as "Llama".

    Raises:
        UserError: an argument is missing, or has a value that no family here has.
    """
    for name, expected in (
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("add_bias_linear", False),
        ("rotary_interleaved", False),
    ):
        if args.get(name, expected) != expected:
            raise UserError(f"it has {name} {args[name]!r}; only models with {expected!r} convert")
    config: dict[str, Any] = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": need(args, "hidden_size"),
        "intermediate_size": need(args, "ffn_hidden_size"),
        "num_hidden_layers": need(args, "num_layers"),
        "num_attention_heads": need(args, "num_attention_heads"),
        "num_key_value_heads": args.get("num_query_groups") or need(args, "num_attention_heads"),
        "head_dim": need(args, "kv_channels"),
        "hidden_act": "silu",
        "rms_norm_eps": need(args, "norm_epsilon"),
        "rope_theta": float(need(args, "rotary_base")),
        "max_position_embeddings": need(args, "max_position_embeddings"),
        "tie_word_embeddings": not need(args, "untie_embeddings_and_output_weights"),
    }
    if args.get("use_rope_scaling"):
        config["rope_scaling"] = {"rope_type": "llama3", "factor": args.get("rope_scaling_factor") or 8.0}
        config["rope_scaling"] |= {name: args.get(f"rope_scaling_{name}", fixed) for name, fixed in LLAMA3_ROPE.items()}
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    if args.get("rope_kind"):
        given = {name: args.get(f"rope_{name}") for name in Rope.__dataclass_fields__ if name not in _ROPE_ELSEWHERE}
        rope = Rope(config["rope_theta"], **{name: value for name, value in given.items() if value is not None})
        config["rope_scaling"] = {name: value for name, value in rope.parameters.items() if name != "rope_theta"}
    if args.get("rotary_percent", 1.0) != 1.0:
        config["partial_rotary_factor"] = args["rotary_percent"]
    return config


def need(args: Mapping[str, Any], name: str) -> Any:
    """An argument that the config.json needs.

    Raises:
        UserError: it is absent.
    """
    if args.get(name) is None:
        raise UserError(f"it lacks {name}; give --hf-checkpoint")
    return args[name]


def windowed_layers(skipped: int | Sequence[int] | None, num_layers: int) -> list[bool]:
    """Which layers have the window, from Megatron's `window_attn_skip_freq`.

    Args:
        skipped: every n-th layer has none, or those with a 0 in the list (`transformer/utils.py`,
            `is_layer_window_attention`); None where all have it.
        num_layers: transformer layers.
    """
    if isinstance(skipped, Sequence):
        return [bool(value) for value in skipped[:num_layers]]
    return [not skipped or layer % skipped != 0 for layer in range(1, num_layers + 1)]


def sliding_window(args: Mapping[str, Any]) -> dict[str, int]:
    """The sliding window in config.json, empty without one.

    Hugging Face counts the token itself, Megatron only the tokens on its left.
    """
    return {"sliding_window": args["window_size"][0] + 1} if args.get("window_size") else {}


def dense_layers(args: Mapping[str, Any]) -> list[int]:
    """The layers without experts of a model with experts, by Megatron-LM's `moe_layer_freq`."""
    pattern = args.get("moe_layer_freq") or 1
    if isinstance(pattern, int):  # experts in every n-th layer, from the first on
        pattern = [int(layer % pattern == 0) for layer in range(need(args, "num_layers"))]
    return [layer for layer, experts in enumerate(pattern) if not experts]


def expert_config(args: Mapping[str, Any], *, number: str, width: str) -> dict[str, Any]:
    """What the config.json of a model with experts contains besides `default_config`.

    Args:
        args: Megatron-LM's arguments by name.
        number: the name in config.json of the number of experts.
        width: the name of the intermediate size of one expert.

    Raises:
        UserError: an argument is missing.
    """
    return {
        number: args["num_experts"],
        "num_experts_per_tok": need(args, "moe_router_topk"),
        "norm_topk_prob": not args.get("moe_router_pre_softmax", False),
        width: need(args, "moe_ffn_hidden_size"),
    }
