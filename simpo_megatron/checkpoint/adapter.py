"""The checkpoint of a run with adapters -> a PEFT folder, planned byte by byte. `publish.run` runs it. No Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpo_megatron.adapters.lora import Lora, adapter_entries
from simpo_megatron.adapters.peft_config import CONFIG, peft_config
from simpo_megatron.adapters.peft_folder import PREFIX, WEIGHTS
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_common, read_torch_dist
from simpo_megatron.checkpoint.parameters import StoredModel
from simpo_megatron.checkpoint.source import tensor_bytes
from simpo_megatron.checkpoint.to_hf import safetensors_header
from simpo_megatron.checkpoint.transfer.cut import piece_bytes, plan_from_blocks
from simpo_megatron.checkpoint.transfer.moves import OutFile, Unit
from simpo_megatron.checkpoint.transfer.publish import Conversion, Options, PlanLine, file_stamps, fingerprint
from simpo_megatron.errors import UserError
from simpo_megatron.files import WRITTEN, atomic_write, record_files, wrote_all
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_files import HFTensor


def saved_progress(folder: Path) -> dict[str, Any]:
    """The fields of `Progress` in the checkpoint of a run; empty if it is of no run, or of none by this package.

    Args:
        folder: of one iteration.
    """
    progress = read_common(folder).get("progress")
    return progress if isinstance(progress, dict) else {}


def lora_in(progress: Mapping[str, Any]) -> Lora | None:
    """The adapter that the checkpoint of a run holds; None if it holds none.

    Args:
        progress: from `saved_progress`.
    """
    fields = progress.get("adapter")
    return Lora(**fields) if isinstance(fields, dict) else None


def read_adapter(folder: Path, hf: HFCheckpoint) -> tuple[Lora, StoredModel]:
    """Finds the factors in the checkpoint of a run.

    Args:
        folder: of one iteration.
        hf: the base.

    Raises:
        UserError: the run trained no adapters, or they are of another model; or a file cannot be read.
    """
    lora = lora_in(saved_progress(folder))
    if lora is None:
        raise UserError(f"{folder} is of a run without adapters; convert it with tools/megatron_to_hf.py")
    return lora, read_factors(folder, hf, lora)


def read_factors(folder: Path, hf: HFCheckpoint, lora: Lora) -> StoredModel:
    """Finds the factors of an adapter in a torch_dist checkpoint.

    Args:
        folder: of one iteration.
        hf: the base.
        lora: the adapter.

    Raises:
        UserError: the checkpoint is broken, or holds something else than the factors.
    """
    entries = adapter_entries(hf.architecture, lora)
    return read_torch_dist(folder, replace(hf, architecture=replace(hf.architecture, weights=entries)))


def plan_to_peft(hf: HFCheckpoint, lora: Lora, saved: StoredModel, save: Path, options: Options) -> Conversion:
    """Plans every byte of a PEFT folder.

    Args:
        hf: the base.
        lora: the adapter.
        saved: from `read_adapter`.
        save: the folder to make.
        options: its memory and workers give the size of the pieces.
    """
    tensors = {
        PREFIX + stored.parameter.hf[0]: HFTensor(save, stored.parameter.shape, stored.parameter.dtype)
        for stored in saved.parameters
    }
    header, starts = safetensors_header(tensors)
    size, moves, lines = piece_bytes(options.max_memory, options.workers), [], []
    for stored, (name, tensor), start in zip(saved.parameters, tensors.items(), starts, strict=True):
        moves.append(plan_from_blocks(stored, (0,), size, (WEIGHTS, start, tensor.dtype)))
        lines.append(PlanLine(stored.parameter.name, f"{name} in {WEIGHTS}", tensor_bytes(tensor), tensor.dtype))
    end = len(header) + sum(map(tensor_bytes, tensors.values()))
    unit = Unit(WEIGHTS, (OutFile(WEIGHTS, end, ((0, header),)),), tuple(moves))
    config = peft_config(lora, hf.architecture, str(hf.path))

    def identity() -> str:
        sources = sorted(path for path in saved.folder.rglob("*") if path.is_file())
        return fingerprint("to peft", 1, config, file_stamps(sources))

    def finish(folder: Path, hashes: dict[str, str], plan: str) -> None:
        atomic_write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        record_files(folder, plan)

    return Conversion(
        units=(unit,),
        lines=tuple(lines),
        root=save,
        final=save,
        record=WRITTEN,
        identity=identity,
        finish=finish,
        publish=lambda: None,
        replaceable=lambda: wrote_all(save),
    )
