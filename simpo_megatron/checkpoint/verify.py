"""Verifies a Megatron checkpoint against its Hugging Face source, bit by bit and in bounded memory.

Every file is read again, every Hugging Face tensor put together from its blocks by the inverse of the map and hashed, and
the hash compared with the source's and, where there is a conversion.json, with the one recorded during the conversion. Rows
that several ranks hold are compared with each other, bytes that are no tensor's with their recorded hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.manifest import file_facts
from simpo_megatron.checkpoint.parameters import StoredModel
from simpo_megatron.checkpoint.transfer.cut import read_step, slab_bytes, tensor_step
from simpo_megatron.checkpoint.transfer.execute import Outcome
from simpo_megatron.checkpoint.transfer.moves import Step, Unit
from simpo_megatron.checkpoint.transfer.processes import run_units
from simpo_megatron.checkpoint.transfer.progress import transfer_bar
from simpo_megatron.checkpoint.transfer.publish import Options
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, HFTensor

UNIT_BYTES = 2 * 2**30


def verify(
    saved: StoredModel, hf: HFCheckpoint | None, manifest: dict[str, Any] | None, options: Options
) -> tuple[list[str], int]:
    """Compares; returns the differences as sentences, and how many tensors were compared.

    Args:
        saved: the checkpoint.
        hf: its source; None where the manifest has to do.
        manifest: of the checkpoint, None without one.
        options: memory and workers.

    Raises:
        UserError: a file cannot be read.
    """
    size = slab_bytes(options.max_memory, options.workers)
    found, differences = _hash(_checkpoint_steps(saved, size), options, "reading the checkpoint")
    if manifest is not None:
        recorded = {name: tensor["sha256"] for name, tensor in manifest["tensors"].items()}
        differences += _compare(found, recorded, saved.folder, "the source when it was converted")
        differences += _compare_files(saved, manifest)
    if hf is not None:
        shapes = {name: tensor.dtype for name, tensor in _stored_dtypes(saved).items()}
        differences += [
            f"{name} is {shapes[name]} in {saved.folder}, but {hf.tensors[name].dtype} in {hf.tensors[name].file}"
            for name in found
            if shapes[name] != hf.tensors[name].dtype
        ]
        steps = [tensor_step(name, hf.tensors[name], size) for name in found]
        source, _ = _hash(steps, options, "reading the source")
        differences += _compare(found, source, saved.folder, str(hf.path))
    return list(dict.fromkeys(differences)), len(found)


def _checkpoint_steps(saved: StoredModel, size: int) -> list[Step]:
    return [
        read_step(stored.item, part, stored.tiles, stored.replicas, size)
        for stored in saved.parameters
        for part in range(len(stored.item.hf))
    ]


def _stored_dtypes(saved: StoredModel) -> dict[str, HFTensor]:
    return {
        name: HFTensor(saved.folder, shape, stored.item.dtype)
        for stored in saved.parameters
        for name, shape in zip(stored.item.hf, stored.item.weight.shapes, strict=True)
    }


def _hash(steps: Sequence[Step], options: Options, label: str) -> tuple[dict[str, str], list[str]]:
    units: list[list[Step]] = [[]]
    for step in steps:
        if units[-1] and sum(other.size for other in units[-1]) + step.size > UNIT_BYTES:
            units.append([])
        units[-1].append(step)
    plan = [Unit(str(index), (), tuple(members)) for index, members in enumerate(units)]
    with transfer_bar(label, sum(unit.size for unit in plan)) as report:
        outcomes: list[Outcome] = run_units(plan, None, options.workers, report)
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
