"""Tensors that hold several parts of a parameter, and query groups that are cut: small pieces, and adapters refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpo_megatron.adapters.lora import Lora, check_lora
from simpo_megatron.checkpoint.transfer import cut
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from tests.support import families as tiny
from tests.support.checkpoints import argv, same_bits, tensors, to_hf, to_megatron
from tests.support.distributed import WorkerPool
from tools import hf_to_megatron


def test_pieces_smaller_than_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v have 128, 32 and 32 rows of 48 columns: pieces of seven rows hold rows of two parts."""
    monkeypatch.setattr(cut, "LARGEST_PIECE", 7 * 48 * 4)
    tiny.make("phi3", tmp_path / "hf")
    for name, flags in {"dist": {}, "ranks": {"format": "torch", "tensor_model_parallel_size": 4}}.items():
        load = to_megatron(tmp_path / "hf", tmp_path / name, **flags)
        back = to_hf(load, tmp_path / f"{name}-back", hf_reference=tmp_path / "hf")
        assert same_bits(tensors(back), tensors(tmp_path / "hf"))


def test_memory_for_a_whole_expert_is_enough_and_less_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Gate and up of an expert are 1.1 MB, read whole into a buffer, of which there are seven."""
    monkeypatch.setattr(cut, "LARGEST_PIECE", 1000)  # bounds other tensors alone
    tiny.make("gpt_oss", tmp_path / "hf", torch.bfloat16, hidden_size=96, intermediate_size=2880, num_hidden_layers=1)
    size = 7 * 2 * 2880 * 96 * 2
    line = argv(hf_checkpoint=tmp_path / "hf", save=tmp_path / "dist", max_memory=f"{size // 2**20}MiB")
    assert hf_to_megatron.main(line) == 2
    assert "gate_up_proj[0] is read whole, with 1.1 MiB, and --max-memory leaves 1.0 MiB" in capsys.readouterr().err
    memory = f"{size // 2**20 + 1}MiB"
    load = to_megatron(tmp_path / "hf", tmp_path / "dist", max_memory=memory)
    back = to_hf(load, tmp_path / "back", hf_reference=tmp_path / "hf", max_memory=memory)
    assert same_bits(tensors(back), tensors(tmp_path / "hf"))


def test_one_adapter_for_several_parts_is_refused(tmp_path: Path) -> None:
    tiny.make("phi3", tmp_path)
    architecture = read_hf_checkpoint(tmp_path).architecture
    with pytest.raises(
        UserError, match=r"q_proj and k_proj and v_proj in one tensor.* --lora-targets o_proj down_proj$"
    ):
        check_lora(Lora(4, 8.0), architecture)
    check_lora(Lora(4, 8.0, ("o_proj", "down_proj")), architecture)


def test_adapters_on_tensors_of_all_experts_are_refused(tmp_path: Path) -> None:
    tiny.make("gpt_oss", tmp_path)
    architecture = read_hf_checkpoint(tmp_path).architecture
    for targets in ((), ("o_proj", "down_proj")):
        with pytest.raises(UserError, match=r"_proj of all experts in one tensor.* q_proj k_proj v_proj o_proj$"):
            check_lora(Lora(4, 8.0, targets) if targets else Lora(4, 8.0), architecture)
    check_lora(Lora(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj")), architecture)


def refusal(path: Path, targets: tuple[str, ...]) -> str:
    """On a rank: what is said of an adapter where two ranks share a query group."""
    from simpo_megatron.adapters.install import install

    hf, _, models = tiny.build(path, tensor_model_parallel_size=2)
    try:
        install(models, hf, Lora(4, 8.0, targets), 0)
    except UserError as error:
        return str(error)
    return ""


def test_an_adapter_of_a_query_group_that_is_cut_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    tiny.make("qwen3_tied", tmp_path)
    for said in pool.run(2, refusal, tmp_path, ("v_proj",)):
        assert "--tensor-model-parallel-size 2 cuts a query group" in said and "use at most 1" in said
    assert pool.run(2, refusal, tmp_path, ("o_proj", "up_proj")) == ["", ""]
