"""The factors of all ranks -> one PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.adapters.install import AdaptedModel, factors
from simpo_megatron.adapters.peft_folder import write_peft
from simpo_megatron.models.export import first_replica, gathered
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.placement import unwrap
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks


def export_adapter(
    models: Sequence[torch.nn.Module],
    hf: HFCheckpoint,
    path: Path,
    more_files: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapter of a run as a PEFT folder, in the dtype of its parameters. Every rank calls it.

    Collectives: those of `gather_adapter`, and of `raise_on_all_ranks`.

    Args:
        models: of this rank, with an adapter, wrapped by DDP or not.
        hf: the checkpoint of the base.
        path: the folder, absent or empty.
        more_files: text files to add, by name.

    Raises:
        UserError: on every rank; the folder is not empty, or a file cannot be written.
    """
    whole, adapted = gather_adapter(models), unwrap(models[0])
    assert isinstance(adapted, AdaptedModel)
    with raise_on_all_ranks():
        if whole is not None:
            write_peft(path, adapted.lora, whole, hf.architecture, str(hf.path), more_files)


def gather_adapter(models: Sequence[torch.nn.Module]) -> dict[str, Tensor] | None:
    """The whole factors of all ranks, on rank 0; None on the others.

    Collectives: for every factor that is split one gather over the ranks of its layer, and one gather of all factors.

    Args:
        models: of this rank, with an adapter.
    """
    places = [place for model in models for place in factors(model) if first_replica(place)]
    places.sort(key=lambda place: bool(place.entry.experts))  # those are gathered over other groups
    mine = dict(gathered(places))
    first = dist.get_rank() == 0
    found: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine, found, dst=0, group=host_group())
    if found is None:
        return None
    whole = {name: tensor for part in found for name, tensor in part.items()}
    return dict(sorted(whole.items()))
