"""Every family there and back bit for bit; converted weights in Megatron-Core, at several layouts, as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import families as tiny
from tests.support.checkpoints import (
    IDS,
    dist_logits,
    rank_file_logits,
    same_bits,
    save_dist,
    tensors,
    to_hf,
    to_megatron,
)

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP4_VPP2 = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}
RANK_FILES = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "pp2vpp2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "uneven": {
        "pipeline_model_parallel_size": 3,
        "decoder_first_pipeline_num_layers": 1,
        "tensor_model_parallel_size": 4,
        "decoder_last_pipeline_num_layers": 1,
    },
    "local": {"transformer_impl": "local"},
}


def world(layout: dict[str, Any]) -> int:
    ranks = layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1)
    return ranks * layout.get("expert_model_parallel_size", 1)


def assert_logits(found: list[Any], expected: torch.Tensor) -> None:
    found = [logits for logits in found if logits is not None]
    assert found
    for logits in found:
        assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("name", tiny.MODELS)
def test_torch_dist_and_back(name: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path / "hf", torch.bfloat16)
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    back = to_hf(load, tmp_path / "back", hf_reference=tmp_path / "hf")
    assert same_bits(tensors(back), tensors(tmp_path / "hf"))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


@pytest.mark.parametrize("name", ["gemma2", "qwen2_tied", "olmo3", "gpt_oss", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("layout", RANK_FILES)
def test_rank_files_and_back(name: str, layout: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path / "hf", torch.bfloat16)
    flags = RANK_FILES[layout] | (
        {"expert_model_parallel_size": 2} if name in tiny.WITH_EXPERTS and layout != "uneven" else {}
    )
    if name == "gpt_oss":  # experts with biases are not split
        flags.pop("tensor_model_parallel_size", None)
    if name in tiny.WITH_EXPERTS and layout == "tp2":
        flags |= {"moe_grouped_gemm": True}
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron", format="torch", **flags)
    back = to_hf(load, tmp_path / "back", hf_reference=tmp_path / "hf")
    assert same_bits(tensors(back), tensors(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, {**TP2, **PP2}) for name in ("gemma2", "llama3", "qwen3_windows", "qwen2", "olmo3")),
        *(("qwen3_tied", layout) for layout in ({}, TP2, PP4_VPP2)),
        ("mixtral", SP),
        ("mixtral", EP2),
        ("qwen3_moe", {**EP2, **PP2}),
        ("deepseek_v2", {**EP2, **PP2}),
        ("deepseek_v3", {**SP, **EP2}),
        ("gpt_oss", {**EP2, **PP2}),
    ],
    ids=str,
)
def test_megatron_computes_what_transformers_does(name: str, layout: dict[str, Any], pool: Any, tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 8} if layout is PP4_VPP2 else {}
    model = tiny.make(name, tmp_path / "hf", **settings)
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    found = pool.run(world(layout), dist_logits, tmp_path / "hf", load / "release", layout)
    with torch.no_grad():
        assert_logits(found, model(IDS).logits[0])


@pytest.mark.parametrize(
    ("name", "flags", "layout"),
    [
        ("gemma3", {**RANK_FILES["tp2pp2"]}, {**TP2, **PP2}),
        ("qwen2_tied", {**RANK_FILES["pp2vpp2"]}, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
        ("llama3", {**PP2, "decoder_first_pipeline_num_layers": 1}, UNEVEN),
        ("deepseek_v3", {**EP2, **PP2}, {**EP2, **PP2}),
    ],
    ids=str,
)
def test_megatron_loads_rank_files_strictly(
    name: str, flags: dict[str, Any], layout: dict[str, Any], pool: Any, tmp_path: Path
) -> None:
    model = tiny.make(name, tmp_path / "hf")
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron", format="torch", transformer_impl="local", **flags)
    found = pool.run(world(layout), rank_file_logits, tmp_path / "hf", load / "release", layout)
    with torch.no_grad():
        assert_logits(found, model(IDS).logits[0])


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("name", "layout"), [("olmo3", {**TP2, **PP2}), ("deepseek_v2", EP2), ("gpt_oss", EP2)], ids=str
)
def test_megatrons_own_checkpoint_to_hf(name: str, layout: dict, per_layer: bool, pool: Any, tmp_path: Path) -> None:
    tiny.make(name, tmp_path / "hf")
    (tmp_path / "megatron").mkdir()
    pool.run(world(layout), save_dist, tmp_path / "hf", tmp_path / "megatron", layout, per_layer)
    back = to_hf(tmp_path / "megatron", tmp_path / "back", hf_reference=tmp_path / "hf")
    assert same_bits(tensors(back), tensors(tmp_path / "hf"))


def test_bin_files_and_several_shards(tmp_path: Path) -> None:
    model = tiny.make("llama", tmp_path / "hf")
    expected = tensors(tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.unlink()
    names = sorted(expected)
    shards = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, held in shards.items():
        torch.save({name: expected[name].clone() for name in held}, tmp_path / "hf" / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert same_bits(tensors(to_hf(load, tmp_path / "back", hf_reference=tmp_path / "hf")), expected)
    assert model is not None


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "gemma2", "gemma3"])
def test_other_dtype_and_config_from_arguments(name: str, tmp_path: Path) -> None:
    import transformers

    model = tiny.make(name, tmp_path / "hf")
    load = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    back = to_hf(load, tmp_path / "back", dtype="bfloat16")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(tmp_path / "hf").items()}
    assert same_bits(tensors(back), expected)
    again = to_hf(load, tmp_path / "again", vocab_size=tiny.VOCAB)
    assert "low_freq_factor" not in (again / "config.json").read_text(), "a key of another rope scaling"
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()(IDS).logits
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_divisor_of_the_vocabulary_is_in_megatron_args(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "hf")
    for divisor, flags in ((128, {}), (64, {"format": "torch", "make_vocab_size_divisible_by": 64})):
        out = to_megatron(tmp_path / "hf", tmp_path / str(divisor), **flags)
        text = (out / "release" / "megatron_args.yaml").read_text()
        assert f"--make-vocab-size-divisible-by {divisor}" in text
        assert f"make_vocab_size_divisible_by: {divisor}" in text
