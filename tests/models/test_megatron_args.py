"""Every tiny model under Megatron-LM's arguments, and back: the same, or another family that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from simpo_megatron.checkpoint.saved_args import checkpoint_of_args, flags, megatron_args, namespace, not_expressible
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.families.registry import family_of
from tests.support.families import MODELS, SIZES


def architecture_of(name: str) -> Architecture:
    prefix, own = MODELS[name]
    config = getattr(transformers, f"{prefix}ForCausalLM").config_class(**{**SIZES, **own}).to_dict()
    return family_of(config).architecture(config)


@pytest.mark.parametrize("name", MODELS)
def test_both_ways(name: str) -> None:
    there = architecture_of(name)
    back = checkpoint_of_args(Path(name), vars(namespace(megatron_args(there))), there.vocab_size).architecture
    # Megatron-LM's arguments do not name a family: a Mistral without a window is a Llama.
    assert (back.family is there.family) == (name != "mistral_whole")
    assert vars(back) == {**vars(there), "family": back.family}


def test_the_flags_of_windows_scalings_and_biases() -> None:
    line = " ".join(flags(megatron_args(architecture_of("qwen3_windows"))))
    assert "--window-size 7,0 --window-attn-skip-freq [1,0,1,1]" in line
    biased = architecture_of("llama_biases")
    line = " ".join(flags(megatron_args(biased)))
    assert "--disable-bias-linear" not in line
    assert "rope-" not in line
    assert not_expressible(biased) == ["rope scaling 'yarn': Megatron-LM has no argument for it"]
    assert not_expressible(architecture_of("llama_mlp_bias")) == ["mlp_bias True: Megatron-LM has no argument for it"]
