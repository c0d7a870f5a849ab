"""A new family is one object and one line of the registry: everything else reads what the family says.

The toy family is a Llama with another `model_type`, and with another name for the norm before the attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from simpo_megatron import cpu
from simpo_megatron.checkpoint.saved_args import checkpoint_of_args, megatron_args, namespace
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families import registry
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.hf_checkpoint import check_tensors, read_hf_checkpoint
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.planning.parameters import stage_parameters
from tests.support import families as tiny

LLAMA_NORM, TOY_NORM = "input_layernorm", "norm_before_attention"


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return tuple(
        replace(entry, hf=tuple(name.replace(LLAMA_NORM, TOY_NORM) for name in entry.hf))
        for entry in dense_weights(config)
    )


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    return default_config(args, "toy", "Toy") if args.get("hf_model_type") == "toy" else None


TOY = Family("Toy", ("toy",), dense_kwargs, _weights, _config)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (TOY, *registry.FAMILIES))


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Any]:
    """A toy checkpoint, and the model of transformers with the same weights."""
    folder = tmp_path / "toy"
    model = tiny.make("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "toy", "architectures": ["ToyForCausalLM"]})
    )
    file = folder / "model.safetensors"
    save_file({name.replace(LLAMA_NORM, TOY_NORM): tensor for name, tensor in load_file(file).items()}, file)
    return folder, model


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    from megatron.core import parallel_state

    cpu.enable()
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_without_its_line_it_is_unknown(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match=r"model_type 'toy'; supported are .*llama"):
        read_hf_checkpoint(checkpoint[0])


def test_it_is_read(registered: None, checkpoint: tuple[Path, Any]) -> None:
    hf = read_hf_checkpoint(checkpoint[0])
    check_tensors(hf)
    assert hf.architecture.family is TOY
    assert any(TOY_NORM in name for name in hf.tensors)
    [held] = stage_parameters(hf.architecture, layout_arguments(ParallelConfig(), hf.architecture.num_layers), 1)
    assert held.total == hf.architecture.num_parameters == hf.num_parameters
    assert held.trained == held.total


def test_it_is_built_loaded_and_exported(
    registered: None, checkpoint: tuple[Path, Any], one_rank: None, tmp_path: Path
) -> None:
    from simpo_megatron.models.export import export_hf

    folder, model = checkpoint
    hf, config, models = tiny.build(folder)
    ids = torch.randint(0, tiny.VOCAB, (1, 24), generator=torch.Generator().manual_seed(2))
    found = tiny.run_schedule(config, models, ids, None, None)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits[0], rtol=0, atol=1e-4)

    export_hf(models, hf, tmp_path / "exported")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_megatron_arguments_go_both_ways(registered: None, checkpoint: tuple[Path, Any]) -> None:
    hf = read_hf_checkpoint(checkpoint[0])
    args = vars(namespace(megatron_args(hf.architecture)))
    again = checkpoint_of_args(checkpoint[0], args, hf.architecture.vocab_size)
    assert again.config["model_type"] == "toy"
    assert again.architecture == hf.architecture
    llama = checkpoint_of_args(checkpoint[0], {**args, "hf_model_type": None}, hf.architecture.vocab_size)
    assert llama.config["model_type"] == "llama"
