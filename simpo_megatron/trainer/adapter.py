"""What a run with adapters checks and says: its base, and how much is trained."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from simpo_megatron.adapters.lora import adapter_entries, parameters_of
from simpo_megatron.adapters.settings import lora_of
from simpo_megatron.checkpoint.folder import iteration_folder, latest_step, release_folder
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.checkpoint.source import config_alone
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.run import Config
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
    content = read_torch_file(saved / "common.pt").content
    progress = content.get("progress") if isinstance(content, dict) else None
    name = progress.get("base_folder") if isinstance(progress, dict) else None
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


def base_of(config: Config, hf: HFCheckpoint) -> tuple[str, str]:
    """The weights under the adapters of a run: their fingerprint, and their folder if it is a converted checkpoint.

    Both are empty without adapters.

    Collectives: those of `raise_on_all_ranks`, and a broadcast of a string.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.

    Raises:
        UserError: see `base_checkpoint` and `base_files`; on every rank.
    """
    if not config.adapter.trains_adapters:
        return "", ""
    found: list[str | None] = [None]
    with raise_on_all_ranks():
        base = base_checkpoint(config.checkpoint)
        if dist.get_rank() == 0:
            found = [weights_fingerprint(base_files(hf, base))]
    dist.broadcast_object_list(found, src=0, group=host_group())
    return str(found[0]), "" if base is None else str(base.resolve())


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


def describe_adapter(config: Config, architecture: Architecture) -> str | None:
    """One line: the adapters of a run, and the parameters that it trains; None without adapters."""
    lora = lora_of(config.adapter, architecture)
    if lora is None:
        return None
    dropout = f"dropout {lora.dropout:g}, " if lora.dropout else ""
    trained = parameters_of(adapter_entries(architecture, lora), architecture.num_layers)
    return (
        f"LoRA: rank {lora.rank}, scale {lora.scale:g}, {dropout}on {', '.join(lora.targets)}; {trained:,} parameters "
        f"are trained, {architecture.num_parameters:,} are frozen"
    )
