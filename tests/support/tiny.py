"""Tiny models, tokenizers and preferences that the tests make for themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools.toy_tokenizer import train_tokenizer

WORDS = (
    "amber birch cedar delta ember fjord grove heron indigo jasper kelp lotus maple north ochre pine quartz reed"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with Llama-3-like control tokens."""
    return train_tokenizer([" ".join(WORDS)] * 4, 310, ["<|bos|>", "<|eot|>", "<|h|>", "<|/h|>"], chat_template)


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every one of them matters, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name else 0.08 * noise
    return model


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# GLM-4.5 in small: a dense layer, then experts of which one is shared; half of a head is rotated.
GLM = {
    "head_dim": 16,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# DeepSeek-V3 in small: queries and keys of 10, values of 5; a dense layer, then experts of which one is shared.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}


def make_checkpoint(
    folder: Path, architecture: str = "Llama", dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A random model with its tokenizer, saved as a Hugging Face checkpoint."""
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{architecture}ForCausalLM").config_class(**{**settings, **overrides})
    model = randomize(getattr(transformers, f"{architecture}ForCausalLM")(config))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational preferences of very unequal lengths."""
    choose = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(1, longest)))

    return [
        {
            "prompt": [{"role": "user", "content": text(8)}],
            "chosen": [{"role": "assistant", "content": text(20)}],
            "rejected": [{"role": "assistant", "content": "no " + text(6)}],
        }
        for _ in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
