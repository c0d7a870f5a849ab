"""What a run with adapters checks and says: its base, and how much is trained."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simpo_megatron.adapters.lora import Lora, adapter_entries, parameters_of
from simpo_megatron.adapters.settings import lora_of
from simpo_megatron.checkpoint.adapter import lora_in, saved_progress
from simpo_megatron.checkpoint.folder import iteration_folder, latest_step, release_folder
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.checkpoint.source import config_alone
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.settings import require
from simpo_megatron.trainer.reference_source import weights_fingerprint


def base_checkpoint(settings: CheckpointConfig) -> Path | None:
    """The converted checkpoint with the weights under the adapters of a run; None: they are in --hf-checkpoint.

    A new run has it as --load. Its checkpoints name it, so a run that is resumed has it too.

    Raises:
        UserError: it is not complete, or is no longer where it was.
    """
    if settings.load is None:
        return None
    step = latest_step(settings.load)
    if step is None:
        return release_folder(settings.load)
    saved = iteration_folder(settings.load, step)
    name = saved_progress(saved).get("base_folder")
    if not isinstance(name, str) or not name:
        return None
    complete = (Path(name) / FORMAT_FILE).is_file()
    require(complete, f"{saved} holds adapters for the weights in {name}, where no checkpoint is now; put it back")
    return Path(name)


def base_files(hf: HFCheckpoint, base: Path | None) -> set[Path]:
    """The files with the weights under the adapters of a run.

    Args:
        hf: the Hugging Face checkpoint of the run.
        base: from `base_checkpoint`.

    Raises:
        UserError: the Hugging Face checkpoint is a config alone, and there is no other base.
    """
    if base is not None:
        return set(base.glob("*.distcp"))
    require(
        not config_alone(hf.path),
        f"{hf.path} has no weights, and adapters need those of their model; give a folder with weights",
    )
    return {tensor.file for tensor in hf.tensors.values()}


def adapter_progress(config: Config, hf: HFCheckpoint) -> dict[str, Any]:
    """What `Progress` says of the adapters of a new run; empty without adapters.

    Collectives: those of `raise_on_all_ranks`, and a broadcast of a string.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.

    Raises:
        UserError: see `base_checkpoint` and `base_files`; on every rank.
    """
    found: list[str | None] = [None]
    with raise_on_all_ranks():
        lora = lora_of(config.adapter, hf.architecture)
        if lora is None:
            return {}
        base = base_checkpoint(config.checkpoint)
        if dist.get_rank() == 0:
            found = [weights_fingerprint(base_files(hf, base))]
    dist.broadcast_object_list(found, src=0, group=host_group())
    folder = "" if base is None else str(base.resolve())
    return {"base": str(found[0]), "base_folder": folder, "adapter": asdict(lora)}


def check_adapters_of(folder: Path, lora: Lora | None, base: str | None = None) -> None:
    """Makes sure that --finetune can start a run from a checkpoint: both have the same adapter, or both have none.

    Args:
        folder: of the checkpoint.
        lora: the adapter of the run.
        base: fingerprint of the weights under it; None: do not compare them.

    Raises:
        UserError: the checkpoint has another adapter, or one for other weights, or none.
    """
    progress = saved_progress(folder)
    saved = lora_in(progress)
    if saved is None:
        require(
            lora is None or not progress,
            f"{folder} is of a run without adapters, and adapters need a base: convert it with "
            "tools/megatron_to_hf.py, and give that as --hf-checkpoint",
        )
        return
    if lora is None:
        raise UserError(
            f"{folder} holds adapters alone, of {_describe(saved)}; train them on with --lora-rank {saved.rank}, or "
            "merge them with tools/adapters.py and train the merged model"
        )
    require(
        replace(saved, dropout=lora.dropout) == lora,
        f"{folder} holds adapters of {_describe(saved)}, and this run has {_describe(lora)}; give the same "
        "--lora-rank, --lora-alpha, --lora-targets and --use-rslora",
    )
    same = base in (None, progress.get("base"))
    require(same, f"{folder} holds adapters for other weights than those of this run; give its base")


def describe_weights(config: Config, hf: HFCheckpoint, folder: Path | None) -> str:
    """The weights that a run starts from, which is not resumed.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.
        folder: the checkpoint of --load whose weights are taken, or None.
    """
    if not config.adapter.trains_adapters:
        return str(hf.path) if folder is None else f"the weights of {folder}"
    base = base_checkpoint(config.checkpoint)
    weights = str(hf.path) if base is None else f"the weights of {base}"
    adapters = config.adapter.load_adapter if folder in (None, base) else folder
    return weights if adapters is None else f"{weights} with the adapters of {adapters}"


def _describe(lora: Lora) -> str:
    return f"rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.targets)}"


def describe_adapter(config: Config, architecture: Architecture) -> str | None:
    """One line: the adapters of a run, and the parameters that it trains; None without adapters."""
    lora = lora_of(config.adapter, architecture)
    if lora is None:
        return None
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    trained = parameters_of(adapter_entries(architecture, lora), architecture.num_layers)
    return (
        f"LoRA: {_describe(lora)}{dropout}; {trained:,} parameters are trained, {architecture.num_parameters:,} are "
        "frozen"
    )
