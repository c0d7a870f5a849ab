"""A config.json as it was published is read as transformers reads it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from simpo_megatron.errors import UserError
from simpo_megatron.models.families.registry import family_of
from tests.support import families as tiny

# The keys of the config.json files of Gemma-2 and Gemma-3 as they were published, before transformers 5.
PUBLISHED: list[dict[str, Any]] = [
    {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10000.0,
    },
    {"model_type": "gemma2"},
    {
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 3e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {"model_type": "gemma3_text"},
]


@pytest.mark.parametrize("own", PUBLISHED, ids=lambda own: f"{own['model_type']}, {len(own)} keys")
def test_keys_that_are_absent_have_the_values_of_transformers(own: dict[str, Any]) -> None:
    import transformers

    absent = ("max_position_embeddings", "num_key_value_heads")
    config = {**{key: value for key, value in tiny.SIZES.items() if key not in absent}, **own}
    theirs: Any = transformers.AutoConfig.for_model(**copy.deepcopy(config))  # it changes what it is given
    ours = family_of(config).architecture(config)
    assert [window is not None for window in ours.windows] == [kind != "full_attention" for kind in theirs.layer_types]
    assert {window for window in ours.windows if window} <= {theirs.sliding_window}
    assert ours.transformer["kv_channels"] == theirs.head_dim
    assert ours.transformer["num_query_groups"] == theirs.num_key_value_heads
    assert ours.transformer["softmax_scale"] == theirs.query_pre_attn_scalar**-0.5
    assert (ours.tied, ours.max_position_embeddings) == (theirs.tie_word_embeddings, theirs.max_position_embeddings)
    assert ours.additions.attention_softcap == theirs.attn_logit_softcapping
    assert ours.additions.logit_softcap == theirs.final_logit_softcapping
    ropes = theirs.rope_parameters
    full, sliding = (ropes.get(kind, ropes) for kind in ("full_attention", "sliding_attention"))
    assert (ours.rope.theta, ours.rope.kind) == (full["rope_theta"], full["rope_type"])
    assert ours.rope.factor == full.get("factor", 1.0)
    assert (ours.additions.window_rope_theta or ours.rope.theta) == sliding["rope_theta"]


# A size that is not what transformers takes is seen in the shapes of the weights, or does not enter the computation.
SHAPES = ("num_key_value_heads", "max_position_embeddings")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_one_key_that_is_absent_has_the_value_of_transformers(name: str) -> None:
    """What is read without the key is what is read with all values that transformers' configuration then has."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    prefix, own = tiny.MODELS[name]
    kind = getattr(transformers, f"{prefix}ForCausalLM").config_class
    whole = json.loads(kind(**copy.deepcopy({**tiny.SIZES, **own})).to_json_string(use_diff=False))
    family, compared = family_of(whole), 0
    for key in whole.keys() - {*SHAPES, "model_type"}:
        absent = {other: value for other, value in whole.items() if other != key}
        try:
            found = family.architecture(copy.deepcopy(absent))
            filled = json.loads(kind(**copy.deepcopy(absent)).to_json_string(use_diff=False))
        except (UserError, StrictDataclassError):  # refused by us, or by transformers
            continue
        assert found == family.architecture(filled), f"{key}, by default {filled.get(key)!r}"
        compared += 1
    assert compared > 15


OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 8192,
}
# Windows and rotary embeddings as config.json files have them: the older keys, the newer ones, and none.
WINDOWED: list[dict[str, Any]] = [
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 131072, "max_window_layers": 1},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9, "layer_types": tiny.MIXED},
    {"model_type": "qwen3", "use_sliding_window": True},
    {"model_type": "ministral"},
    {"model_type": "olmo2"},
    {"model_type": "olmo3"},
    {"model_type": "olmo3", "sliding_window": 4096, "rope_theta": 500000, "rope_scaling": OLMO3_YARN},
    {
        "model_type": "olmo3",
        "layer_types": tiny.MIXED,
        "rope_parameters": {
            "full_attention": {"rope_theta": 7e5, **OLMO3_YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    },
]


@pytest.mark.parametrize("own", WINDOWED, ids=lambda own: f"{own['model_type']}, {len(own)} keys")
def test_windows_and_rotary_embeddings_are_those_of_transformers(own: dict[str, Any]) -> None:
    import transformers

    config = {**tiny.SIZES, **own}
    ours, theirs = family_of(config).architecture(config), transformers.AutoConfig.for_model(**config)
    kinds = getattr(theirs, "layer_types", ["full_attention"] * 4)
    assert ours.windows == tuple(None if kind == "full_attention" else theirs.sliding_window for kind in kinds)
    assert ours.transformer["layernorm_epsilon"] == theirs.rms_norm_eps
    full, sliding = (theirs.rope_parameters.get(kind, theirs.rope_parameters) for kind in tiny.MIXED[1::-1])
    assert (ours.rope.theta, ours.rope.kind) == (full["rope_theta"], full["rope_type"])
    assert ours.rope.attention_factor == full.get("attention_factor")
    windowed = (ours.additions.window_rope_theta, "default")
    if windowed[0] is None:  # one embedding for all layers
        windowed = (ours.rope.theta, ours.rope.kind)
    assert windowed == (sliding["rope_theta"], sliding["rope_type"])


def test_the_rope_base_of_mixtral_is_that_of_transformers() -> None:
    import transformers

    config = {**tiny.SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    theirs: Any = transformers.AutoConfig.for_model(**config)
    assert family_of(config).architecture(config).rope.theta == theirs.rope_parameters["rope_theta"] == 1e6
