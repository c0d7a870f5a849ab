"""The weight files of a Hugging Face checkpoint: their names, their index, and the headers of safetensors files.

Neither torch nor Megatron is imported, and no weight is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from simpo_megatron.errors import UserError
from simpo_megatron.files import read_json
from simpo_megatron.models.weight_table import tensor_and_slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_FILE_BYTES = 5 * 2**30  # of the files this package writes


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        dtype: its dtype as safetensors names it, such as "BF16".
        start: its first byte in the file.
        length: its bytes according to the file's header; None where nothing is on disk.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int = 0
    length: int | None = None


def file_names(count: int) -> list[str]:
    """The names that transformers gives to `count` files of weights."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def split_files(sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Cuts tensors, in order, into files of at most `max_bytes`; a larger tensor gets a file for itself.

    Args:
        sizes: bytes of the tensors.
        max_bytes: of a file.

    Returns:
        For every file the positions of its tensors in `sizes`.

    >>> split_files([3, 3, 9, 1], 6)
    [[0, 1], [2], [3]]
    """
    files: list[list[int]] = [[]]
    filled = 0
    for position, size in enumerate(sizes):
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(position)
        filled += size
    return [file for file in files if file]


def split_tensors(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Cuts tensors into files as `split_files`. The slices of one tensor follow each other and stay together.

    Args:
        sizes: bytes of the tensors, or of their slices, by name.
        max_bytes: of a file.
    """
    wholes = [list(names) for _, names in groupby(sizes, lambda name: tensor_and_slice(name)[0])]
    files = split_files([sum(sizes[name] for name in names) for names in wholes], max_bytes)
    return [[name for position in file for name in wholes[position]] for file in files]


def index_text(files: Mapping[str, str], total_bytes: int) -> str:
    """The content of model.safetensors.index.json.

    Args:
        files: the file of every tensor, by the name of the tensor or of its slices.
        total_bytes: bytes of all tensors.
    """
    by_tensor = {tensor_and_slice(name)[0]: file for name, file in files.items()}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(by_tensor.items()))}
    return json.dumps(index, indent=2) + "\n"


def read_safetensors(path: Path) -> dict[str, HFTensor]:
    """The tensors of model.safetensors, or of the files that the index names.

    Raises:
        UserError: a file is missing or broken, or the index does not match the files.
    """
    if (path / INDEX).exists():
        index = read_json(path / INDEX).get("weight_map") or {}
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{path / INDEX}: weight_map must map tensor names to file names; download it again")
        files = sorted(set(index.values()))
    elif (path / SINGLE).exists():
        index, files = {}, [SINGLE]
    elif any(path.glob("*.bin")):
        raise UserError(
            f"{path} holds its weights as .bin files, which are pickles; convert them with tools/hf_to_megatron.py "
            f"--hf-checkpoint {path} --save OUT, and start with --load OUT"
        )
    else:
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; is the checkpoint complete?")

    tensors: dict[str, HFTensor] = {}
    for name in files:
        if Path(name).name != name:
            raise UserError(
                f"{path / INDEX} names {name}, which is not a file of that folder; download the index again"
            )
        if not (path / name).exists():
            raise UserError(f"{path / INDEX} names {name}, which does not exist; download that shard")
        tensors.update(read_safetensors_header(path / name))
    for tensor, name in index.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise UserError(f"{path / INDEX} places {tensor} in {name}, which does not hold it; download both again")
    return tensors


def read_safetensors_header(file: Path) -> dict[str, HFTensor]:
    """The tensors of one safetensors file, which is eight bytes of header length, a JSON header and the data.

    Raises:
        UserError: the file has no header, or is shorter than the header says.
    """
    try:
        return _read_header(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a safetensors file ({error!r}); download it again") from None


def _read_header(file: Path) -> dict[str, HFTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"{file} is truncated ({size} bytes, shorter than its header); download it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    if any(not 0 <= first <= last for first, last in (entry["data_offsets"] for entry in header.values())):
        raise ValueError("data_offsets outside the data")
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise UserError(f"{file} is truncated ({size} of {end} bytes); download it again")
    return {
        name: HFTensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + first, last - first)
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    }
