"""Tiny random models of every registered family, and an engine with one of them in a layout.

    path = tiny_checkpoint(folder, "llama")
    with engine_in(bench, path, {"tensor_model_parallel_size": 2}) as made:
        made.engine.compute_gradients(...)

One table of sizes serves all families: a family reads the keys that it knows. A family that needs other keys adds them
to `OWN`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from simpo_megatron.config.arguments import build_config
from simpo_megatron.config.run import Config
from simpo_megatron.data import InMemoryPairs
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, expected_tensors, read_hf_checkpoint, read_hf_config
from simpo_megatron.models.weight_table import tensor_and_slice
from simpo_megatron.self_test.ranks import leave_layout
from simpo_megatron.self_test.rows import Bench
from simpo_megatron.trainer.distributed import initialize
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.setup import build_engine, build_transformer_config
from simpo_megatron.verify.random_weights import RANDOM_PAIRS, random_pairs

SEED = 1234
EXPERTS = 4
SIZES = {
    "vocab_size": 251,  # prime: every tensor-parallel size pads it
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "sliding_window": None,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
}
_ROUTED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
OWN: dict[str, dict[str, Any]] = {  # by model_type
    "deepseek_v2": {**_LATENT, **_ROUTED, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False},
    "glm4_moe": {**_ROUTED, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "deepseek_v3": {**_LATENT, **_ROUTED, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "olmo3": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gpt_oss": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
        },
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 50000.0,
    },
}
DEEP = {"num_hidden_layers": 4}  # for four stages, virtual ones included
# With all experts chosen there are no near-ties between experts, which bf16 would decide by rounding.
ALL_EXPERTS = {"num_experts_per_tok": EXPERTS}
LONGEST, SEQ_LENGTH, PAIRS = 48, 128, 8  # tokens of a sequence and of a packed row; pairs of a step


def tiny_config(model_type: str, **settings: Any) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return {"model_type": model_type, "dtype": "float32", **SIZES, **OWN.get(model_type, {}), **settings}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Writes a config.json into a new folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tiny_checkpoint(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Writes a tiny model, the same on every rank. Norms and biases are random, so that a swapped one is seen.

    Args:
        folder: for all models of this rank; a model that is there is not written again.
        model_type: of its config.json.
        dtype: of the weights.
        **settings: of its config.json.

    Returns:
        The folder of the model.
    """
    name = "-".join((model_type, str(dtype).removeprefix("torch."), *(f"{key}{settings[key]}" for key in settings)))
    path = folder / name
    if (path / "model.safetensors").exists():
        return path
    write_config(path, {**tiny_config(model_type, **settings), "dtype": str(dtype).removeprefix("torch.")})
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(read_hf_config(path)):
        noise = torch.randn(shape, generator=generator)
        tensor = (1 + 0.2 * noise if "norm" in name else 0.1 * noise).to(dtype)
        whole, index = tensor_and_slice(name)
        if index is not None:
            tensor = torch.cat([*([tensors[whole]] if index else []), tensor[None]])
        tensors[whole] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@dataclass(frozen=True)
class Made:
    """An engine, and what it was made of."""

    engine: Engine
    hf: HFCheckpoint
    config: Config
    pairs: InMemoryPairs


def layout_config(bench: Bench, path: Path, settings: dict[str, Any]) -> Config:
    """The configuration of a run on a tiny model.

    Args:
        bench: where it runs.
        path: of the model.
        settings: by the names of the flags; they win.
    """
    given = {
        "hf_checkpoint": path,
        "train_data": (RANDOM_PAIRS,),
        "train_iters": 4,
        "global_batch_size": PAIRS,
        "seq_length": SEQ_LENGTH,
        "max_length": LONGEST,
        "seed": SEED,
        "device": bench.device,
        "transformer_impl": "local",
        "lr": 1e-3,
        "lr_warmup_fraction": 0.0,
        "distributed_timeout_minutes": 1 if bench.device == "cpu" else 6,
        **settings,
    }
    if not given.pop("bf16", False):
        given["fp32"] = True
    return build_config(given)


@contextlib.contextmanager
def engine_in(bench: Bench, path: Path, settings: dict[str, Any]) -> Iterator[Made]:
    """An engine with the model at `path` in a layout. When the block ends, the groups of the layout are gone.

    Collectives: those of `trainer.distributed.initialize` and `build_engine`.

    Args:
        bench: where it runs.
        path: of the model.
        settings: as for `layout_config`.
    """
    config = layout_config(bench, path, settings)
    hf = read_hf_checkpoint(path)
    transformer = build_transformer_config(config, hf)
    engine = None
    try:
        initialize(transformer, config.parallel.distributed_timeout_minutes, bench.device, SEED)
        engine = build_engine(config, hf, transformer, config.train.train_iters or 1)
        pairs = random_pairs(hf.architecture.vocab_size, LONGEST, 4 * PAIRS, SEED)
        yield Made(engine, hf, config, pairs)
    finally:
        if engine is not None:
            free(engine)
        leave_layout()


def free(engine: Engine) -> None:
    """Lets go of what DDP holds: it refers to itself through nodes of autograd, which are not collected as garbage."""
    for chunk in engine.chunks:
        vars(chunk).clear()
