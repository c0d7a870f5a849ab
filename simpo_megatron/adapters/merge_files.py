"""A Hugging Face checkpoint with an adapter added, and two adapters compared: file by file, without Megatron and a GPU.

No more than one weight, in fp32, and its factors are in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from simpo_megatron.adapters.lora import Lora, projections
from simpo_megatron.adapters.peft_folder import PeftFolder
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import check_empty, record_files
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, check_tensors, copied_files
from simpo_megatron.models.weight_files import INDEX
from simpo_megatron.program import with_time_left

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**24  # bytes that are copied at a time
Factor = Callable[[str], "Tensor"]


def adapted_names(architecture: Architecture, lora: Lora) -> Iterator[str]:
    """The base tensors to which an adapter adds something, without `.weight`."""
    for entry in architecture.weights:
        for target, hf in zip(projections(entry), entry.hf, strict=False):
            if target in lora.targets:
                for where in entry.instances(architecture.num_layers):
                    yield hf.removesuffix(".weight").format(**where)


def update(factor: Factor, lora: Lora, name: str) -> Tensor:
    """Scale * B A of one projection, in fp32.

    Raises:
        UserError: it is too large for fp32.
    """
    a, b = (factor(f"{name}.lora_{kind}.weight").float() for kind in "AB")
    added = (b @ a).mul_(lora.scale)
    if not _finite(added):
        raise UserError(f"what the adapter adds to {name} is too large for fp32; train it again")
    return added


def _finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN, without a copy."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def merge_files(hf: HFCheckpoint, adapter: Path, save: Path) -> None:
    """Writes the base with an adapter added: in fp32, rounded once to the dtype of each weight.

    Args:
        hf: the base.
        adapter: the PEFT folder.
        save: the folder to make; absent or empty. It has the files of the base.

    Raises:
        UserError: the adapter is of another model, or a file cannot be read or written. Nothing is left at `save`.
    """
    check_empty("--save", save)
    check_tensors(hf)
    save = save.resolve()  # "." has no name
    folder = PeftFolder.read(adapter, hf.architecture)
    partial = save.with_name(f".{save.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with folder.open() as factor:
            names = set(adapted_names(hf.architecture, folder.lora))
            for source in with_time_left(sorted({tensor.file for tensor in hf.tensors.values()}), "Merging files"):
                _merge_file(hf, source, partial / source.name, lambda name: _added(factor, folder.lora, names, name))
        index = [hf.path / INDEX] if (hf.path / INDEX).is_file() else []
        for path in (*copied_files(hf.path), *index):
            shutil.copyfile(path, partial / path.name)
        record_files(partial)
        save.mkdir(exist_ok=True)  # it may be the folder where the user is, so it is filled and not replaced
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(save / path.name)
    except OSError as failure:
        raise cannot_write(f"--save {save}", failure, "choose another --save") from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _added(factor: Factor, lora: Lora, names: set[str], tensor: str) -> Tensor | None:
    """What the adapter adds to a tensor; None where it adds nothing."""
    name = tensor.removesuffix(".weight")
    return update(factor, lora, name) if name in names else None


def _merge_file(hf: HFCheckpoint, source: Path, target: Path, added: Callable[[str], Tensor | None]) -> None:
    """Copies one file of the base; the bytes of tensors that change are computed."""
    import torch

    from simpo_megatron.models.dtypes import TORCH

    tensors = {name: tensor for name, tensor in hf.tensors.items() if tensor.file == source}
    with source.open("rb") as read, target.open("wb") as write:
        _copy(read, write, min(tensor.start for tensor in tensors.values()))
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if read.tell() != tensor.start:
                raise UserError(f"{source} has bytes between its tensors; save it again with safetensors")
            plus = added(name)
            if plus is not None and tensor.dtype not in TORCH:
                raise UserError(f"{name} in {source} is {tensor.dtype}; adapters are added to {', '.join(TORCH)}")
            if plus is None:
                _copy(read, write, tensor.length or 0)
                continue
            data = bytearray(read.read(tensor.length or 0))
            weight = torch.frombuffer(data, dtype=TORCH[tensor.dtype]).view(tensor.shape)
            merged = plus.add_(weight).to(weight.dtype)
            if not _finite(merged):
                raise UserError(f"{name} with the adapter is too large for {tensor.dtype}; train the adapter again")
            write.write(merged.view(torch.uint8).numpy().tobytes())


def _copy(read: BinaryIO, write: BinaryIO, length: int) -> None:
    while length:
        data = read.read(min(BLOCK, length))
        if not data:
            raise UserError("a file of the base ended early; copy it again")
        write.write(data)
        length -= len(data)


def compare_adapters(one: Path, other: Path, architecture: Architecture) -> tuple[float, str, int]:
    """How far two adapters are from each other: by what they add to each weight, because factors are not unique.

    Args:
        one: a PEFT folder.
        other: another.
        architecture: of their base.

    Returns:
        The largest difference of an update, relative to the norm of the larger one; where it is; and how many weights
        were compared.

    Raises:
        UserError: one of them cannot be read, or they are on different projections.
    """
    import torch

    first, second = (PeftFolder.read(path, architecture) for path in (one, other))
    if first.lora.targets != second.lora.targets:
        raise UserError(
            f"{one} is on {', '.join(first.lora.targets)} and {other} on {', '.join(second.lora.targets)}; give two "
            "adapters of the same projections"
        )
    worst, where, count = 0.0, "", 0
    with first.open() as ours, second.open() as theirs:
        for name in adapted_names(architecture, first.lora):
            a, b = update(ours, first.lora, name), update(theirs, second.lora, name)
            largest = max(a.norm(dtype=torch.float64).item(), b.norm(dtype=torch.float64).item())
            difference = (a - b).norm(dtype=torch.float64).item() / largest if largest else 0.0
            count += 1
            if difference > worst or not where:
                worst, where = difference, name
    return worst, where, count
