"""Rotary frequencies and attention factors are those of the models of transformers, made from the same config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from simpo_megatron.errors import UserError
from simpo_megatron.models.rope import Rope, check_length, inverse_frequencies, read_partial_rope, read_rope, rotary_dim
from tests.support.families import LLAMA3

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 4.0], "long_factor": [3.0] * 6}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, all values": {
        **YARN,
        "original_max_position_embeddings": 512,
        "beta_fast": 4,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, factor given": {**YARN, "attention_factor": 0.9},
    "yarn, context not given": {"rope_type": "yarn", "factor": 8.0},
    "longrope": {**LONG, "original_max_position_embeddings": 32},
    "longrope, factor given": {**LONG, "factor": 3.0, "original_max_position_embeddings": 64},
}


def check(rope: Rope, theirs: Any, head_dim: int) -> None:
    """Compares exactly."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling
    assert rotary_dim(rope, head_dim) == 2 * len(frequencies)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_heads(kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"head_dim": 12, "max_position_embeddings": 128, "rope_theta": 50000.0}
    config = transformers.LlamaConfig.from_dict({**sizes, "rope_scaling": dict(KINDS[kind])})
    old = {**sizes, "rope_scaling": KINDS[kind]}  # as transformers 4 writes it
    for written in (config.to_dict(), old):
        check(read_rope(written), LlamaRotaryEmbedding(config), 12)
    assert kind == "default" or read_rope(old) != read_rope(sizes)


def test_every_value_counts() -> None:
    """So `test_whole_heads` would see one that is lost."""
    given = KINDS["yarn, all values"]
    sizes = {"head_dim": 12, "max_position_embeddings": 128, "rope_theta": 50000.0}
    found, factor = inverse_frequencies(read_rope({**sizes, "rope_scaling": given}), 12)
    for name in given.keys() - {"rope_type", "factor", "original_max_position_embeddings"}:
        others = {key: value for key, value in given.items() if key != name}
        without, other = inverse_frequencies(read_rope({**sizes, "rope_scaling": others}), 12)
        assert not torch.equal(found, without) or factor != other, name


def test_a_part_of_every_head() -> None:
    """Phi-3 keeps the context before the scaling, and the rotated part, outside of `rope_parameters`."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = {
        "model_type": "phi3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONG,
    }
    rope = read_partial_rope(config)
    theirs = Phi3RotaryEmbedding(transformers.Phi3Config(**config))
    check(rope, theirs, 16)
    assert (rotary_dim(rope, 16), rope.factor) == (12, 8.0)
    with pytest.raises(UserError, match=r"partial_rotary_factor to 0\.75; a 'phi3' model rotates whole heads"):
        read_rope(config)
    check_length(rope, 32, "--max-length")
    with pytest.raises(
        UserError, match=r"^--max-length 33: with the 'longrope' .* more than 32 tokens .* set it to 32"
    ):
        check_length(rope, 33, "--max-length")
