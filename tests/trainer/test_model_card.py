"""The model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from simpo_megatron.config.arguments import parse
from simpo_megatron.trainer.model_card import hub_id_of, model_card

CACHED = "/cache/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/8cde5ca"


@pytest.mark.parametrize(("checkpoint", "base"), [(CACHED, "meta-llama/Meta-Llama-3-8B"), ("run: [1]/model", None)])
def test_the_hub_reads_it(checkpoint: str, base: str | None) -> None:
    """Whatever the paths hold. The hub refuses a card whose base_model is a path."""
    argv = ["--hf-checkpoint", checkpoint, "--train-data", "a #1.jsonl", "--export-hf", "out/mine"]
    config = parse([*argv, "--train-iters", "3", "--simpo-beta", "2.5", "--simpo-gamma-beta-ratio", "0.4"])
    card = ModelCard(model_card(config, 0xABC, {0: {"loss": 0.75}, 3: {"loss": 0.5}}))
    assert card.data.get("base_model") == base
    assert card.data.get("library_name") == "transformers"
    assert card.data.get("tags") == ["preference-optimization", "simpo"]
    assert f"# mine\n\n{base or checkpoint} trained with `simpo`" in card.text
    assert "a #1.jsonl, fingerprint 00000abc" in card.text and "| loss | 0.7500 | 0.5000 |" in card.text
    assert f"* Objective: {config.objective.describe()}" in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert (settings["simpo_beta"], settings["train_iters"], settings["hf_checkpoint"]) == (2.5, 3, checkpoint)


def test_names_on_the_hub() -> None:
    assert hub_id_of(Path("hub/models--gpt2/snapshots/1")) == "gpt2"
    assert hub_id_of(Path("hub/models--a--b-c--d/snapshots/1")) == "a/b-c--d"
    assert hub_id_of(Path("hub/models--a--b/snapshots/1/sub")) is None
