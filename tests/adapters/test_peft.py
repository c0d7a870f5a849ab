"""PEFT reads what is written here and computes the same with it, and what PEFT writes is read."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo_megatron.adapters.joined_experts import JoinedFactor
from simpo_megatron.adapters.lora import Lora
from simpo_megatron.adapters.merge_files import merge_files
from simpo_megatron.adapters.peft_folder import PREFIX, WEIGHTS, PeftFolder, factor_shapes
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
        ("qwen2", Lora(3, 5.0, rslora=True, dropout=0.1)),
        ("qwen3", ATTENTION),
        ("mistral", LORA),
        ("mixtral", Lora(4, 3.0, rslora=True, dropout=0.1)),  # PEFT can have neither after it has joined the experts
        ("qwen3_moe_plain", LORA),
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
    folder = PeftFolder.read(tmp_path / "again", read_hf_checkpoint(tmp_path / "base").architecture)
    with folder.open() as factor:
        assert all(torch.equal(factor(key), tensor) for key, tensor in factors.items())
    plain = name in tiny.WITH_EXPERTS
    same = replace(lora, alpha=lora.scale * lora.rank, rslora=False, dropout=0.0) if plain else lora
    assert folder.lora == same


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


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_plain"])
def test_experts_that_peft_has_joined_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    # Planted: in B the ranks count fastest, as others read it (SkyRL issue 1852).
    monkeypatch.setattr(JoinedFactor, "take", ranks_count_fastest)
    with folder.open() as factor:
        wrong = {name: factor(name) for name in factors}
    planted = merge(tmp_path / "base", wrong, folder.lora, tmp_path / "planted")
    assert (logits(adapted) - logits(planted)).abs().max() > 1e-2


def ranks_count_fastest(joined: JoinedFactor, whole: Tensor) -> Tensor:
    """`JoinedFactor.take` with the other order of ranks and experts in B."""
    if joined.rank_dim == 0:
        return whole.unflatten(0, (joined.experts, -1))[joined.expert].contiguous()
    return whole.unflatten(1, (joined.experts, -1))[:, joined.expert].chunk(joined.parts)[joined.part].contiguous()


def test_peft_drops_gate_and_up_without_down(tmp_path: Path) -> None:
    """That is why `check_lora` refuses such targets. PEFT warns, and computes with the factors of attention alone."""
    model = tiny.make("qwen3_moe_plain", tmp_path / "base", num_hidden_layers=2)
    factors = random_adapter(tmp_path / "base", tmp_path / "adapter")
    kept = {name: tensor for name, tensor in factors.items() if "down_proj" not in name}
    save_file({PREFIX + name: tensor for name, tensor in kept.items()}, tmp_path / "adapter" / WEIGHTS)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"].remove("down_proj")
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    attention = {name: tensor for name, tensor in kept.items() if "experts" not in name}
    loaded = merge(tmp_path / "base", attention, LORA, tmp_path / "attention")
    torch.testing.assert_close(logits(adapted), logits(loaded), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="the model has experts, and PEFT would drop an adapter with a part"):
        PeftFolder.read(tmp_path / "adapter", read_hf_checkpoint(tmp_path / "base").architecture)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "sets use_dora to True, which is not supported; train a plain LoRA"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to"),
        (
            {"alpha_pattern": {"up_proj": 7}},
            "gives model.layers.0.mlp.up_proj rank 4 and alpha 7 (r, lora_alpha, rank_pattern, alpha_pattern), but "
            "other projections rank 4 and alpha 6: every projection must have the same rank and scale",
        ),
        ({"rank_pattern": {"layers.1.*o_proj": 2}}, "gives model.layers.1.self_attn.o_proj rank 2 and alpha 6"),
        ({"rank_pattern": {"(": 2}}, "has '(' in rank_pattern, which is no regular expression"),
        ({"rank_pattern": {"q_proj": "2"}}, "sets rank_pattern of q_proj to '2', which is no positive whole number"),
        ({"lora_dropout": 1}, "sets lora_dropout to 1; it must be at least 0 and less than 1"),
        ({"rank_pattern": ["q_proj"]}, "sets rank_pattern to ['q_proj'], which is no table"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa', which is not supported"),
        ({"kasa_config": {"a": 1}}, "sets kasa_config to {'a': 1}, which is not supported"),
        ({"of_tomorrow": 0.5}, "sets of_tomorrow to 0.5, which is not supported"),
        ({"use_rslora": "yes"}, "sets use_rslora to 'yes', which is not true or false"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; only LORA is supported"),
        ({"r": 0}, "sets r to 0, which is no positive whole number"),
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: {}, "holds no tensors; save the adapter with PEFT's save_pretrained"),
        (lambda tensors: {name: tensor.char() for name, tensor in tensors.items()}, "is I8; factors must be one of"),
        (lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()}, "has numbers that are not finite"),
        (lambda tensors: {name: tensor * 1e30 for name, tensor in tensors.items()}, "is too large for fp32; train it"),
        (
            lambda tensors: {name: tensor * 1e4 for name, tensor in tensors.items()},
            ".weight with the adapter is too large for F16; train the adapter again",
        ),
    ],
)
def test_tensors_that_are_no_factors_are_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "base", num_hidden_layers=2)
    weights = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError) as raised:
        merge_files(read_hf_checkpoint(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert sentence in str(raised.value) and not (tmp_path / "merged").exists()


def test_patterns_that_give_all_projections_the_same_are_read(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "base", num_hidden_layers=2)
    lora = Lora(4, 6.0, ("q_proj", "v_proj"), dropout=0.25)
    random_adapter(tmp_path / "base", tmp_path / "adapter", lora)
    file = tmp_path / "adapter" / "adapter_config.json"
    patterns = {"r": 2, "lora_alpha": 9, "rank_pattern": {"[qv]_proj": 4, "absent": 5}, "alpha_pattern": {".*": 6}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **patterns}))
    assert PeftFolder.read(tmp_path / "adapter", read_hf_checkpoint(tmp_path / "base").architecture).lora == lora


def test_gate_and_up_that_share_factors_of_twice_the_rank_are_refused(tmp_path: Path) -> None:
    """What PEFT trains after it has joined the experts of an adapter."""
    model = tiny.make("mixtral", tmp_path / "base", num_hidden_layers=2)
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    adapted: Any = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    for key, parameter in adapted.named_parameters():
        if "base_layer.lora_B" in key:
            parameter.data += 0.1
    adapted.save_pretrained(str(tmp_path / "again"))
    folder = PeftFolder.read(tmp_path / "again", read_hf_checkpoint(tmp_path / "base").architecture)
    with folder.open() as factor, pytest.raises(UserError) as raised:
        factor("model.layers.0.block_sparse_moe.experts.1.w3.lora_B.weight")
    assert "gate and up share their factors, which are of twice the rank" in str(raised.value)


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
