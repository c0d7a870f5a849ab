"""A Hugging Face checkpoint as a source: its config and the places of its tensors, safetensors or pytorch_model*.bin.

The pickles of .bin files are read without loading or running anything (safe_pickle.py). A directory without weights
serves for --plan, for --dry-run and for runs that start from --load, with the tensors that its config.json implies.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, PickledTensor
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.errors import UserError
from simpo_megatron.files import read_json
from simpo_megatron.models.hf_checkpoint import (
    HFCheckpoint,
    check_tensors,
    expected_tensors,
    read_hf_checkpoint,
    read_hf_config,
)
from simpo_megatron.models.weight_files import INDEX, SINGLE, HFTensor, read_safetensors

BIN_INDEX, BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # a tokenizer has one of them at least
_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def read_source(path: Path) -> HFCheckpoint:
    """A checkpoint to convert, its tensors compared with the weight table.

    Raises:
        UserError: as `read_hf_checkpoint` and `check_tensors`, or a tensor's bytes are not those of its shape.
    """
    hf = read_hf_checkpoint(path, _read_tensors)
    check_tensors(hf)
    for name, tensor in hf.tensors.items():
        _check_extent(name, tensor)
    return hf


def read_model(path: Path, *, loaded: bool, dry_run: bool) -> HFCheckpoint:
    """The model of a run, whose weights may come from elsewhere.

    Args:
        path: --hf-checkpoint.
        loaded: the weights come from --load, so .bin files serve, and so does a folder without weights.
        dry_run: no weights are needed; those that are there are checked as the run would.

    Raises:
        UserError: as `read_hf_checkpoint`, or `path` has no weights and the run needs them.
    """
    if (loaded or dry_run) and path.exists() and not has_weights(path):
        return imagine_weights(read_hf_config(path))
    return read_hf_checkpoint(path, _read_tensors if loaded else None)


def has_weights(path: Path) -> bool:
    """Whether a directory holds weights, or at least an index or a part of them."""
    names = (INDEX, BIN_INDEX, "*.safetensors", "pytorch_model*.bin")
    return any(True for name in names for _ in path.glob(name))


def model_folder(path: Path) -> Path:
    """The folder of --hf-checkpoint, which may be a config.json of any name."""
    return path.parent if path.is_file() else path


def config_alone(path: Path) -> bool:
    """Whether --hf-checkpoint is a config.json, or a folder with a config.json and without weights."""
    if path.is_dir():
        return (path / "config.json").is_file() and not has_weights(path)
    return path.suffix == ".json" and path.is_file()


def lacks_tokenizer(path: Path) -> bool:
    """Whether --hf-checkpoint is a config.json without weights, and no tokenizer lies beside it."""
    return config_alone(path) and not any((model_folder(path) / name).exists() for name in TOKENIZER)


def imagine_weights(hf: HFCheckpoint) -> HFCheckpoint:
    """The model with the tensors that config.json implies, in the dtype it states.

    Raises:
        UserError: the dtype is not a supported one.
    """
    dtype = str(hf.config.get("dtype") or hf.config.get("torch_dtype") or "bfloat16")
    if dtype not in _TORCH_DTYPES:
        raise UserError(f"config.json sets dtype {dtype!r}; supported are {', '.join(_TORCH_DTYPES)}")
    found = {name: HFTensor(hf.path / "absent", shape, _TORCH_DTYPES[dtype]) for name, shape in expected_tensors(hf)}
    return replace(hf, tensors=found)


def tensor_bytes(tensor: HFTensor) -> int:
    """The bytes of a tensor on disk."""
    return math.prod(tensor.shape) * ITEM_SIZE.get(tensor.dtype, 0)


def _check_extent(name: str, tensor: HFTensor) -> None:
    if tensor.dtype not in ITEM_SIZE:
        raise UserError(f"{name} in {tensor.file} has dtype {tensor.dtype}; only F32, F16 and BF16 weights convert")
    if tensor.length is not None and tensor.length != tensor_bytes(tensor):
        raise UserError(
            f"{name} in {tensor.file} has {tensor.length} bytes, but its shape {list(tensor.shape)} in {tensor.dtype} "
            f"needs {tensor_bytes(tensor)}; download the file again"
        )


def _read_tensors(path: Path) -> dict[str, HFTensor]:
    if (path / INDEX).exists() or (path / SINGLE).exists() or not any(path.glob("*.bin")):
        return read_safetensors(path)
    if (path / BIN_INDEX).exists():
        index = read_json(path / BIN_INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{path / BIN_INDEX}: weight_map must map tensor names to file names; download it again")
        files = sorted(set(index.values()))
    else:
        files = [BIN]
    tensors: dict[str, HFTensor] = {}
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{path} has no file {name}, which its index names; download it")
        tensors |= _read_bin(path / name)
    return tensors


def _read_bin(path: Path) -> dict[str, HFTensor]:
    file = read_torch_file(path)
    if not isinstance(file.content, dict):
        raise UserError(f"{path} does not hold a state dict; give the file that from_pretrained reads")
    found = {
        name: HFTensor(path, tensor.shape, tensor.dtype, file.place(tensor))
        for name, tensor in file.content.items()
        if isinstance(tensor, PickledTensor)
    }
    return {name: replace(tensor, length=tensor_bytes(tensor)) for name, tensor in found.items()}
