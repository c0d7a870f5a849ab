"""A Hugging Face checkpoint directory: its config and the names, shapes and files of its tensors.

Reads JSON and safetensors headers, never a weight; no torch, no Megatron. The checks run on names and shapes alone, so
what is missing or mis-shaped is known before anything is built or written.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.families.registry import family_of
from simpo_megatron.models.family import Family, Weight, required
from simpo_megatron.models.rope import Rope, read_rope

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_FILE_BYTES = 5 * 2**30  # of the files this package writes

# What a checkpoint has besides weights; copied as it is, because saving a tokenizer again loses templates and flags.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def file_names(count: int) -> list[str]:
    """The names transformers gives to `count` files."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def copied_files(path: Path) -> list[Path]:
    """The files of a checkpoint directory that go with every copy of it."""
    return sorted({file for pattern in COPIED for file in path.glob(pattern) if file.is_file()})


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint. `dtype` is safetensors' name of it, such as "BF16"; `start` its first byte in the
    file, `length` the bytes that the file's header gives it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint that has been looked at, made by `read_hf_checkpoint`.

    Attributes:
        path: the directory.
        config: config.json.
        family: what `model_type` names.
        vocab_size: rows of the embedding, without Megatron's padding.
        eos_token_ids: every token that ends a generation, from generation_config.json, else config.json.
        tied: the output layer is the embedding.
        tensors: by name, what the safetensors files hold.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tied: bool
    tensors: dict[str, HFTensor]

    @property
    def num_layers(self) -> int:
        return required(self.config, "num_hidden_layers")

    @property
    def num_parameters(self) -> int:
        """Of the tensors on disk."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weight table of this model."""
        return self.family.weights(self.config)

    @property
    def rope(self) -> Rope:
        return read_rope(self.config)


def read_hf_checkpoint(path: Path, read_tensors: Callable[[Path], dict[str, HFTensor]] | None = None) -> HFCheckpoint:
    """Reads a local checkpoint directory, headers only.

    Args:
        path: the directory.
        read_tensors: finds its tensors; by default those of the safetensors files.

    Raises:
        UserError: a file is missing, truncated or not JSON, the weights are not safetensors, or the model is not one
            that runs.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a local Hugging Face checkpoint (download it first)")
    return replace(read_hf_config(path), tensors=(read_tensors or read_safetensors)(path))


def read_hf_config(path: Path) -> HFCheckpoint:
    """A model without its weights: `tensors` is empty.

    Args:
        path: a checkpoint directory, or a config.json by whatever name.

    Raises:
        UserError: the config is missing or not JSON, or the model is not one that runs.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    family = _family(path, config)
    generation = file.parent / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return HFCheckpoint(
        path=path,
        config=config,
        family=family,
        vocab_size=required(config, "vocab_size"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        tied=bool(config.get("tie_word_embeddings", False)),
        tensors={},
    )


def _family(path: Path, config: dict[str, Any]) -> Family:
    """The family of a config.json it can use."""
    try:
        family = family_of(config)
        family.transformer_kwargs(config)
        family.weights(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: config.json holds a value of the wrong kind ({error}); copy it again") from error
    return family


def check_tensors(hf: HFCheckpoint) -> None:
    """Compares the checkpoint with the weight table of its family, by name and shape.

    Raises:
        UserError: a tensor is missing or has another shape than config.json implies, or nothing would use it.
    """
    expected = dict(expected_tensors(hf))
    for name, shape in expected.items():
        if name not in hf.tensors:
            raise UserError(
                f"{hf.path} has no tensor {name}, which {hf.family.name} needs; is the checkpoint complete?"
            )
        found = hf.tensors[name]
        if found.shape != shape:
            raise UserError(
                f"{name} in {found.file} has shape {list(found.shape)}, but config.json implies {list(shape)}; "
                "take config.json and weights from the same model"
            )
    if unused := sorted(name for name in hf.tensors.keys() - expected.keys() if not _ignored(name, hf.tied)):
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"{hf.path} has tensors that {hf.family.name} does not use: {', '.join(unused[:5])}{more}; "
            "loading without them would train another model"
        )


def expected_tensors(hf: HFCheckpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor the weight table asks for, with its shape."""
    for weight in hf.weights:
        for where in weight.instances(hf.num_layers):
            for name, shape in zip(weight.hf, weight.shapes, strict=True):
                yield name.format(**where), shape


def _ignored(name: str, tied: bool) -> bool:
    """Tensors without information: rotary frequencies, which config.json implies, and a copy of the tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a UserError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; is {file.parent} a complete Hugging Face checkpoint?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__} instead of a JSON object; copy it again")
    return value


def read_safetensors(path: Path) -> dict[str, HFTensor]:
    """The tensors of model.safetensors, or of the shards the index names."""
    if (path / INDEX).exists():
        index = read_json(path / INDEX).get("weight_map") or {}
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{path / INDEX}: weight_map must map tensor names to file names; download it again")
        files = sorted(set(index.values()))
    elif (path / SINGLE).exists():
        index, files = {}, [SINGLE]
    elif any(path.glob("*.bin")):
        raise UserError(
            f"{path} holds its weights as .bin files, which are pickles; convert them to safetensors "
            "(load and save_pretrained with transformers)"
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
    """The tensors of one safetensors file: eight bytes of header length, a JSON header, the data.

    Raises:
        UserError: the file is shorter than its header says, or has no header.
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
