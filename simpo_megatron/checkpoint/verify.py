"""Verifies a Megatron checkpoint against its Hugging Face source, bit for bit and in bounded memory.

Every file is read again. Every Hugging Face tensor is put together from its blocks, by the inverse of the conversion,
and hashed. The hash is compared with the source's and, where there is a conversion.json, with the one recorded in it.
Blocks that several ranks hold are compared with each other, and bytes that are no tensor's with their recorded hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.manifest import file_facts
from simpo_megatron.checkpoint.parameters import StoredModel
from simpo_megatron.checkpoint.transfer.cut import piece_bytes, plan_from_blocks, plan_hash
from simpo_megatron.checkpoint.transfer.moves import TensorMove, Unit
from simpo_megatron.checkpoint.transfer.processes import run_units
from simpo_megatron.checkpoint.transfer.publish import Options
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_files import split_files

UNIT_BYTES = 2 * 2**30


def verify(
    saved: StoredModel, hf: HFCheckpoint | None, manifest: dict[str, Any] | None, options: Options
) -> tuple[list[str], int]:
    """Compares a checkpoint with its source, with the hashes in its manifest, or with both.

    Args:
        saved: the checkpoint.
        hf: its source; None to compare with the manifest alone.
        manifest: of the checkpoint; None where it has none.
        options: memory and workers.

    Returns:
        The differences as sentences, and how many tensors were compared.

    Raises:
        UserError: a file cannot be read.
    """
    size = piece_bytes(options.max_memory, options.workers)
    dtypes = {name: stored.parameter.dtype for stored in saved.parameters for name in stored.parameter.hf}
    moves = [
        plan_from_blocks(stored, tensor, size)
        for stored in saved.parameters
        for tensor in stored.parameter.entry.tensors
    ]
    found, differences = _hash(moves, options, "reading the checkpoint")
    if manifest is not None:
        recorded = {name: tensor["sha256"] for name, tensor in manifest["tensors"].items()}
        differences += _compare(found, recorded, saved.folder, "the source when it was converted")
        differences += _compare_files(saved, manifest)
    if hf is not None:
        differences += [
            f"{name} is {dtypes[name]} in {saved.folder}, but {hf.tensors[name].dtype} in {hf.tensors[name].file}"
            for name in found
            if dtypes[name] != hf.tensors[name].dtype
        ]
        source, _ = _hash([plan_hash(name, hf.tensors[name], size) for name in found], options, "reading the source")
        differences += _compare(found, source, saved.folder, str(hf.path))
    return list(dict.fromkeys(differences)), len(found)


def _hash(moves: Sequence[TensorMove], options: Options, label: str) -> tuple[dict[str, str], list[str]]:
    """Runs moves that only read; the hashes by tensor, and the replicas that differ."""
    groups = split_files([move.size for move in moves], UNIT_BYTES)
    units = [Unit(str(index), (), tuple(moves[at] for at in group)) for index, group in enumerate(groups)]
    outcomes = run_units(units, None, options.workers, label)
    hashes = {name: digest for outcome in outcomes for name, digest in outcome.hashes.items()}
    return hashes, [text for outcome in outcomes for text in outcome.differences]


def _compare(found: dict[str, str], expected: dict[str, str], folder: Path, other: str) -> list[str]:
    differences = [
        f"{name} in {folder} differs from {other}"
        for name in found
        if name in expected and found[name] != expected[name]
    ]
    differences += [f"{name} is in {folder}, but not in {other}" for name in found.keys() - expected.keys()]
    return differences + [f"{name} of {other} is not in {folder}" for name in expected.keys() - found.keys()]


def _compare_files(saved: StoredModel, manifest: dict[str, Any]) -> list[str]:
    now, then = file_facts(saved), manifest["files"]
    differences = [f"{saved.folder / name} is missing" for name in then.keys() - now.keys()]
    differences += [f"{saved.folder / name} was added after the conversion" for name in now.keys() - then.keys()]
    for name in now.keys() & then.keys():
        if now[name] != then[name]:
            differences.append(f"{saved.folder / name} was changed after the conversion, outside the tensors")
    return differences
