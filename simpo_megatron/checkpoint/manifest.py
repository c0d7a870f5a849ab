"""conversion.json: what a converted checkpoint was made from and holds, so that it can be verified without its source.

    version     1
    made_by     {PACKAGE: version}
    plan        the fingerprint of the conversion: its sources and settings
    format      "torch_dist" or "torch"
    model       what a run must agree with the checkpoint about
    layout      of a "torch" checkpoint alone
    tensors     {NAME: {sha256, dtype, shape}} of the Hugging Face checkpoint
    files       {NAME: {size, sha256}}
    sha256      of all the rest

A file's hash is of its bytes that are no tensor's: the whole of a small file, headers and padding of a data file. The
hashes of tensors and files together cover every byte.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.parameters import StoredModel
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, expected_tensors

MANIFEST = "conversion.json"


def model_facts(hf: HFCheckpoint) -> dict[str, Any]:
    """What a run must agree with the checkpoint about: sizes, norms, rope, vocabulary."""
    return {
        "family": hf.architecture.family.name,
        "transformer": {name: _plain(value) for name, value in hf.architecture.transformer.items()},
        "rope": hf.architecture.rope.as_dict(),
        "vocabulary_rows": hf.architecture.vocab_size,
        "tied": hf.architecture.tied,
        **({"additions": additions} if (additions := hf.architecture.additions.as_dict()) else {}),
    }


def write_manifest(
    folder: Path,
    hf: HFCheckpoint,
    hashes: dict[str, str],
    plan: str,
    saved: StoredModel,
    layout: dict[str, Any] | None,
) -> None:
    """Writes the manifest of a folder that is otherwise complete.

    Args:
        folder: the checkpoint.
        hf: its source.
        hashes: of the Hugging Face tensors, recorded while they were read.
        plan: the `fingerprint` of the conversion.
        saved: what a reader finds in the folder.
        layout: of a "torch" checkpoint; None for torch_dist.
    """
    content = {
        "version": 1,
        "made_by": made_by(),
        "plan": plan,
        "format": "torch_dist" if layout is None else "torch",
        "model": model_facts(hf),
        **({} if layout is None else {"layout": layout}),
        "tensors": {
            name: {"sha256": digest, "dtype": hf.tensors[name].dtype, "shape": list(hf.tensors[name].shape)}
            for name, digest in sorted(hashes.items())
        },
        "files": file_facts(saved),
    }
    content["sha256"] = _digest(content)
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def made_by() -> dict[str, str]:
    """Versions, for a manifest or a measurement."""
    found = {"python": platform.python_version()}
    for package in ("simpo-megatron", "torch", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None where it has none.

    Raises:
        UserError: it is not what was written.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy it again, or convert again") from None
    if content.get("version") != 1 or digest != _digest(content):
        raise UserError(f"{path} was changed after it was written; copy it again, or convert again")
    return content


def file_facts(saved: StoredModel) -> dict[str, dict[str, Any]]:
    """Size, and hash of the bytes that are no tensor's, of every file of a checkpoint but the manifest."""
    blocks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for stored in saved.parameters:
        for block in (*stored.tiles, *stored.replicas):
            # Padding rows belong to no tensor.
            rows = min(block.rows, max(0, stored.parameter.rows - block.row))
            blocks[block.file].append((block.offset, rows * block.columns * stored.parameter.item_size))
    facts = {}
    for path in sorted(path for path in saved.folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        name = path.relative_to(saved.folder).as_posix()
        facts[name] = {"size": path.stat().st_size, "sha256": _gaps_digest(path, blocks[str(path)])}
    return facts


def _gaps_digest(path: Path, extents: Iterable[tuple[int, int]]) -> str:
    digest, position = hashlib.sha256(), 0
    with path.open("rb") as stream:
        for start, size in (*sorted(set(extents)), (path.stat().st_size, 0)):
            stream.seek(position)
            while position < start:
                data = stream.read(min(start - position, 2**20))
                if not data:
                    break
                digest.update(data)
                position += len(data)
            position = max(position, start + size)
    return digest.hexdigest()


def check_manifest(folder: Path, hf: HFCheckpoint) -> None:
    """Compares the manifest of a folder, where it has one, with the model a run is about to train.

    Args:
        folder: the checkpoint.
        hf: the model, from --hf-checkpoint.

    Raises:
        UserError: another architecture, missing or extra tensors.
    """
    content = read_manifest(folder)
    if content is None:
        return
    facts, wanted = content["model"], json.loads(json.dumps(model_facts(hf)))
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise UserError(
                f"{folder / MANIFEST} says {name} {facts.get(name)}, but the config.json of {hf.path} gives {value}; "
                "give the --hf-checkpoint it was converted from"
            )
    expected = {name: list(shape) for name, shape in expected_tensors(hf)}
    found = {name: tensor["shape"] for name, tensor in content["tensors"].items()}
    for fault, names in (("lacks", expected.keys() - found.keys()), ("also holds", found.keys() - expected.keys())):
        if names:
            raise UserError(
                f"{folder / MANIFEST} {fault} {', '.join(sorted(names)[:5])} ({len(names)} in all); convert again"
            )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
