"""The Megatron-LM arguments of a model, as names and values, as a YAML file and as a line of flags.

Megatron-LM's `--load --use-checkpoint-args` restores most of them from the checkpoint, but not the norm's epsilon,
qk-layernorm, rope scaling and its factor, the window or the vocabulary's divisor (`checkpointing.py`,
`load_args_from_checkpoint`): a run without them starts from the right weights and computes another model.
"""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint

# Of Megatron-Core's llama3 scaling these are fixed (`rotary_pos_embedding.py`); a flag exists for the factor alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DIVISOR = 128

_NO_FLAG = ("rotary_interleaved", "padded_vocab_size", "add_position_embedding")


def megatron_args(hf: HFCheckpoint, divisor: int = DIVISOR) -> dict[str, Any]:
    """The architecture under Megatron-LM's names: primitives alone, as its loader wants `args`."""
    kwargs = dict(hf.family.transformer_kwargs(hf.config))
    positions = hf.config.get("max_position_embeddings", 0)
    args: dict[str, Any] = {
        "num_layers": kwargs.pop("num_layers"),
        "hidden_size": kwargs.pop("hidden_size"),
        "ffn_hidden_size": kwargs.pop("ffn_hidden_size"),
        "num_attention_heads": kwargs.pop("num_attention_heads"),
        "group_query_attention": kwargs["num_query_groups"] != hf.config["num_attention_heads"],
        "num_query_groups": kwargs.pop("num_query_groups"),
        "kv_channels": kwargs.pop("kv_channels"),
        "normalization": "RMSNorm",
        "norm_epsilon": kwargs.pop("layernorm_epsilon"),
        "add_bias_linear": False,
        "add_qkv_bias": kwargs.pop("add_qkv_bias", False),
        "qk_layernorm": kwargs.pop("qk_layernorm", False),
        "swiglu": True,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "rotary_base": int(hf.rope.theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": hf.rope.kind == "llama3",
        "max_position_embeddings": positions,
        "untie_embeddings_and_output_weights": not hf.tied,
        "make_vocab_size_divisible_by": divisor,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if hf.rope.kind == "llama3":
        args["rope_scaling_factor"] = hf.rope.factor
    if hf.rope.kind == "linear":
        args["rotary_seq_len_interpolation_factor"] = int(hf.rope.factor)
    if "num_moe_experts" in kwargs:
        args |= {"num_experts": kwargs.pop("num_moe_experts"), "moe_layer_freq": 1, "moe_grouped_gemm": False}
        args |= {"moe_token_dispatcher_type": "alltoall", "moe_router_score_function": "softmax"}
    return args | kwargs


def limits(hf: HFCheckpoint) -> list[str]:
    """What Megatron-LM's arguments cannot say of this model; this package's trainer can."""
    found = []
    if hf.rope.kind == "llama3":
        for name, fixed in _LLAMA3.items():
            if getattr(hf.rope, name) != fixed:
                found.append(f"rope scaling {name} {getattr(hf.rope, name):g}: Megatron-LM computes with {fixed:g}")
    if hf.rope.kind == "linear" and hf.rope.factor != int(hf.rope.factor):
        found.append(f"linear rope scaling by {hf.rope.factor:g}: Megatron-LM takes whole numbers")
    if hf.rope.theta != int(hf.rope.theta):
        found.append(f"rope theta {hf.rope.theta!r}: Megatron-LM takes whole numbers")
    return found


def flags(args: dict[str, Any]) -> list[str]:
    """The command line of `args` for Megatron-LM's pretrain scripts."""
    line: list[str] = []
    for name, value in args.items():
        if name == "add_bias_linear":
            line += [] if value else ["--disable-bias-linear"]
        elif name not in _NO_FLAG and value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            if isinstance(value, tuple):
                line += [flag, ",".join(map(str, value))]
            else:
                line += [flag] if value is True else [flag, str(value)]
    return line


def yaml_text(hf: HFCheckpoint, args: dict[str, Any]) -> str:
    """megatron_args.yaml: the arguments by name, the line of flags, and what they cannot say."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}
    content = {
        "megatron_args": plain,
        "flags": shlex.join(flags(args)),
        "not_expressible": limits(hf),
        "vocab_size": hf.vocab_size,
    }
    return (
        "# Arguments of this model for Megatron-LM 0.16; --load alone does not restore all of them.\n"
        + yaml.safe_dump(content, sort_keys=False, width=10**6)
    )


def namespace(args: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The part of a checkpoint that Megatron-LM reads its arguments from; primitives alone, so weights_only loads it."""
    from argparse import Namespace

    values = {**args, "use_rotary_position_embeddings": True, "ckpt_format": "torch_dist", **more}
    if not all(isinstance(value, (int, float, str, tuple, type(None))) for value in values.values()):
        raise UserError("the arguments of this model hold something else than numbers and names")
    return {
        "args": Namespace(**values),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
