"""PEFT reads what is written here and computes the same with it, and what PEFT writes is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo_megatron.adapters.lora import Lora
from simpo_megatron.adapters.peft_folder import PeftFolder, factor_shapes
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from tests.support import families as tiny
from tests.support.adapters import ATTENTION, LORA, merge, oracle, random_adapter
from tests.support.steps import CASES, one_thread, oracle_metrics, relative_error
from tests.support.tiny import make_checkpoint

IDS = torch.arange(3, 40)[None]
# "rank_pattern did not match": PEFT joins the experts, and then looks for the names that they had before.
HARMLESS = ("rank_pattern", "alpha_pattern")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama_tied", LORA),
        ("qwen2", Lora(3, 5.0, rslora=True)),
        ("qwen3", ATTENTION),
        ("mistral", LORA),
        ("mixtral", LORA),
        ("qwen3_moe", LORA),
    ],
)
def test_peft_computes_the_same(name: str, lora: Lora, tmp_path: Path) -> None:
    model = tiny.make(name, tmp_path / "base", num_hidden_layers=2)
    factors = random_adapter(tmp_path / "base", tmp_path / "adapter", lora)
    merged = merge(tmp_path / "base", factors, lora, tmp_path / "merged")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    texts = [str(one.message) for one in seen if issubclass(one.category, UserWarning)]
    assert not [text for text in texts if not any(word in text for word in HARMLESS)]
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=2e-5)
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 0.1

    adapted.save_pretrained(str(tmp_path / "again"))
    if name not in tiny.WITH_EXPERTS:
        folder = PeftFolder.read(tmp_path / "again", read_hf_checkpoint(tmp_path / "base").architecture)
        assert folder.lora == lora
        with folder.open() as factor:
            assert all(torch.equal(factor(key), tensor) for key, tensor in factors.items())


def test_the_oracle_has_pefts_gradients(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    factors = random_adapter(checkpoint, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    case = CASES["columns"]
    with one_thread():
        wanted, gradients = oracle(merge(checkpoint, factors, LORA, tmp_path / "merged"), factors, LORA, case)
        loss, metrics = oracle_metrics(adapted, case)
        loss.backward()
    assert metrics == pytest.approx({name: wanted[name] for name in metrics}, rel=1e-5, abs=1e-5)
    found: dict[str, Any] = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == gradients.keys()
    assert all(relative_error(found[name], gradients[name]) < 1e-5 for name in gradients)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_peft_has_joined_are_read(name: str, tmp_path: Path) -> None:
    """`target_parameters` is transformers 5's own form: one tensor for the factors of all experts of a layer."""
    model = tiny.make(name, tmp_path / "base", num_hidden_layers=2)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted: Any = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    folder = PeftFolder.read(tmp_path / "adapter", read_hf_checkpoint(tmp_path / "base").architecture)
    assert folder.lora.targets == ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    architecture = read_hf_checkpoint(tmp_path / "base").architecture
    with folder.open() as factor:
        factors = {name: factor(name) for name in factor_shapes(architecture, folder.lora)}
    merged = merge(tmp_path / "base", factors, folder.lora, tmp_path / "merged")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "sets use_dora to True, which is not supported; train a plain LoRA"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern 2 for q_proj, but r 4"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; only LORA is supported"),
        ({"r": 0}, "sets r to 0, which is no positive number"),
        ({"r": 8}, "has shape [4, 48], but rank 8 and this Llama model give [8, 48]"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "base", num_hidden_layers=2)
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError) as raised:
        PeftFolder.read(tmp_path / "adapter", read_hf_checkpoint(tmp_path / "base").architecture)
    assert sentence in str(raised.value)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "base", num_hidden_layers=2)
    tiny.make("llama", tmp_path / "deeper", num_hidden_layers=3)
    tiny.make("mixtral", tmp_path / "experts", num_hidden_layers=2)
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    for other, sentence in (
        ("deeper", "lacks model.layers.2.mlp.down_proj.lora_A.weight: the adapter must have every layer"),
        ("experts", "has model.layers.0.mlp.down_proj.lora_A.weight, which is no factor of this Mixtral model"),
    ):
        with pytest.raises(UserError) as raised:
            PeftFolder.read(tmp_path / "adapter", read_hf_checkpoint(tmp_path / other).architecture)
        assert sentence in str(raised.value)
