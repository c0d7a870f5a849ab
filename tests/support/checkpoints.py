"""Tiny checkpoints, converted, and what the ranks of a worker pool do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import families as tiny
from tools import hf_to_megatron, megatron_to_hf

PROGRAMS = {"to_megatron": hf_to_megatron.main, "to_hf": megatron_to_hf.main}
IDS = torch.randint(3, tiny.VOCAB, (1, 24), generator=torch.Generator().manual_seed(2))


def argv(**flags: Any) -> list[str]:
    """A command line; True is a switch."""
    line: list[str] = []
    for name, value in flags.items():
        line += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return line


def to_megatron(hf: Path, save: Path, **flags: Any) -> Path:
    """Converts; the folder that --load takes."""
    assert hf_to_megatron.main(argv(hf_checkpoint=hf, save=save, **flags)) == 0
    return save


def to_hf(load: Path, save: Path, **flags: Any) -> Path:
    """Converts back."""
    assert megatron_to_hf.main(argv(load=load, save=save, **flags)) == 0
    return save


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, read by safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether names, dtypes and bytes are equal."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )


def build_empty(path: Path, layout: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """On a rank: the model of a checkpoint for a layout, every parameter NaN."""
    hf, config, models = tiny.build(path, **layout)
    for model in models:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    return hf, config, models


def load_dist(models: list[Any], folder: Path) -> None:
    """On a rank: fills models by Megatron's dist_checkpointing, which must find every key the models ask for."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA

    metadata = {**CONTENT_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    state = {name: model.sharded_state_dict(metadata=metadata) for name, model in zip(names, models, strict=True)}
    loaded: Any = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for name, model in zip(names, models, strict=True):
        model.load_state_dict(loaded[name])


def dist_logits(path: Path, folder: Path, layout: dict[str, Any]) -> Any:
    """On a rank: the logits of a torch_dist checkpoint at a layout; None but on the last stage."""
    _, config, models = build_empty(path, layout)
    load_dist(models, folder)
    return tiny.run_schedule(config, models, IDS, None, None)


def rank_file_logits(path: Path, folder: Path, layout: dict[str, Any]) -> Any:
    """On a rank: the logits of a torch checkpoint; its file is loaded as Megatron-LM does, and strictly."""
    from megatron.core import parallel_state as mpu

    _, config, models = build_empty(path, layout)
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if mpu.get_expert_model_parallel_world_size() > 1:
        name += f"_{mpu.get_expert_model_parallel_rank():03d}"
    state = torch.load(folder / name / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    for index, model in enumerate(models):
        model.load_state_dict(state["model" if len(models) == 1 else f"model{index}"], strict=True)
    return tiny.run_schedule(config, models, IDS, None, None)


def save_dist(path: Path, folder: Path, layout: dict[str, Any], per_layer: bool) -> None:
    """On a rank: Megatron's own torch_dist checkpoint of a Hugging Face model; `per_layer`: one key a layer."""
    from megatron.core import dist_checkpointing, parallel_state

    from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA

    _, _, models = tiny.build(path, **layout)
    content = {**CONTENT_METADATA, "singleton_local_shards": per_layer}
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    state = {name: model.sharded_state_dict(metadata=metadata) for name, model in zip(names, models, strict=True)}
    dist_checkpointing.save(state, str(folder), content_metadata=content)
