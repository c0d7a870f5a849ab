"""The adapter that a run's settings ask for, and the weight tables that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from simpo_megatron.adapters.lora import TARGETS, Lora, adapted_table, adapter_entries, check_lora
from simpo_megatron.adapters.peft_folder import PeftFolder
from simpo_megatron.config.adapter import AdapterConfig
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_table import WeightEntry


def lora_of(settings: AdapterConfig, architecture: Architecture) -> Lora | None:
    """The adapter of a run; None where all weights are trained.

    Args:
        settings: of the run.
        architecture: its model.

    Raises:
        UserError: the model cannot have this adapter, or the folder of --load-adapter cannot be read.
    """
    if settings.load_adapter is not None:
        lora = PeftFolder.read(settings.load_adapter, architecture).lora
        return lora if settings.lora_dropout is None else replace(lora, dropout=settings.lora_dropout)
    if settings.lora_rank is None:
        return None
    rank = settings.lora_rank
    alpha = 2.0 * rank if settings.lora_alpha is None else settings.lora_alpha
    asked = settings.lora_targets or TARGETS
    known = tuple(name for name in TARGETS if name in asked)  # in the order of the table
    targets = (*known, *(name for name in asked if name not in TARGETS))
    lora = Lora(rank, alpha, targets, settings.use_rslora, settings.lora_dropout or 0.0)
    check_lora(lora, architecture)
    return lora


def run_table(settings: AdapterConfig, architecture: Architecture) -> Sequence[WeightEntry] | None:
    """The weight table of a run with adapters; None where it is that of the architecture."""
    lora = lora_of(settings, architecture)
    return None if lora is None else adapted_table(architecture, lora)


def saved_table(settings: AdapterConfig, architecture: Architecture) -> Sequence[WeightEntry] | None:
    """The entries that the checkpoints of a run hold: with adapters, theirs alone; None for all of the architecture."""
    lora = lora_of(settings, architecture)
    return None if lora is None else adapter_entries(architecture, lora)


def install_adapter(models: Sequence[Any], settings: AdapterConfig, hf: HFCheckpoint, seed: int) -> None:
    """Puts the adapter of a run on its models, if it has one: fresh, or with the factors of --load-adapter.

    Args:
        models: of this rank, with the weights of the base.
        settings: of the run.
        hf: the checkpoint of the base.
        seed: of a fresh adapter.

    Raises:
        UserError: see `lora_of`; or the base has a dtype that the adapter was not made for.
    """
    from simpo_megatron.adapters.install import fill_factors, install

    lora = lora_of(settings, hf.architecture)
    if lora is None:
        return
    install(models, hf, lora, seed)
    if settings.load_adapter is not None:
        folder = PeftFolder.read(settings.load_adapter, hf.architecture)
        with folder.open() as factor:
            fill_factors(models, partial(_whole, factor))


def _whole(factor: Any, place: Any) -> Any:
    [name] = place.hf
    return factor(name)
