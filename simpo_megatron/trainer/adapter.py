"""What a run with adapters checks and says: its base, and how much is trained."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from simpo_megatron.adapters.lora import adapter_entries, parameters_of
from simpo_megatron.adapters.settings import lora_of
from simpo_megatron.checkpoint.folder import release_folder
from simpo_megatron.config.run import Config
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.settings import require
from simpo_megatron.trainer.reference_source import weights_fingerprint


def base_of(config: Config, hf: HFCheckpoint) -> str:
    """The fingerprint of the weights under the adapters of a run; empty without adapters.

    Collectives: those of `raise_on_all_ranks`, and a broadcast of a string.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.

    Raises:
        UserError: --load gives a converted checkpoint; on every rank.
    """
    if not config.adapter.trains_adapters:
        return ""
    found: list[str | None] = [None]
    with raise_on_all_ranks():
        check_base(config)
        if dist.get_rank() == 0:
            found = [weights_fingerprint({tensor.file for tensor in hf.tensors.values()})]
    dist.broadcast_object_list(found, src=0, group=host_group())
    return str(found[0])


def check_base(config: Config) -> None:
    """Refuses a converted checkpoint as the base of adapters: a resumed run could not name it.

    Raises:
        UserError: --load gives one.
    """
    load = config.checkpoint.load
    require(
        load is None or release_folder(load) is None or not config.adapter.trains_adapters,
        f"--load {load} holds the weights of a converted model, and adapters take theirs from --hf-checkpoint, also "
        "when the run is resumed; give that folder alone",
    )


def describe_weights(config: Config, hf: HFCheckpoint, folder: Path | None) -> str:
    """The weights that a run starts from, which is not resumed.

    Args:
        config: of the run.
        hf: its Hugging Face checkpoint.
        folder: the checkpoint of --load whose weights are taken, or None.
    """
    if not config.adapter.trains_adapters:
        return str(hf.path) if folder is None else f"the weights of {folder}"
    adapters = folder or config.adapter.load_adapter
    return str(hf.path) if adapters is None else f"{hf.path} with the adapters of {adapters}"


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
