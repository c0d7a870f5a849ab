"""A Hugging Face checkpoint directory: its config, and the names, shapes and files of its tensors.

    hf = read_hf_checkpoint(path)
    check_tensors(hf)

Only JSON and the headers of safetensors files are read, without torch and Megatron, and no weight but those that
`tied_output.py` compares. So a missing or mis-shaped tensor is known before anything is built or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids, read_json
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.families.registry import family_of
from simpo_megatron.models.tied_output import OUTPUT_LAYER, check_tied_output
from simpo_megatron.models.weight_files import HFTensor, read_safetensors
from simpo_megatron.models.weight_table import WeightEntry, tensor_and_slice

# Files of a checkpoint besides its weights. They are copied unchanged: saving a tokenizer again loses templates and
# flags.
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


def copied_files(path: Path) -> list[Path]:
    """The files of a checkpoint directory that every copy of it gets unchanged."""
    return sorted({file for pattern in COPIED for file in path.glob(pattern) if file.is_file()})


@dataclass(frozen=True)
class HFCheckpoint:
    """What is known of a checkpoint directory, from `read_hf_checkpoint`.

    Attributes:
        path: the directory.
        config: the content of config.json.
        architecture: the model that it describes.
        eos_token_ids: every token that ends a turn, see `files.end_of_turn_ids`.
        tensors: the tensors in the weight files, by name. A tensor that holds all experts of a layer is replaced by its
            slices, `NAME[0]`, `NAME[1]` and so on.
    """

    path: Path
    config: dict[str, Any]
    architecture: Architecture
    eos_token_ids: tuple[int, ...]
    tensors: dict[str, HFTensor]

    @property
    def num_parameters(self) -> int:
        """Numbers in the tensors on disk."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_hf_checkpoint(path: Path, read_tensors: Callable[[Path], dict[str, HFTensor]] | None = None) -> HFCheckpoint:
    """Reads a local checkpoint directory, headers only.

    Args:
        path: the directory.
        read_tensors: finds its tensors; None for those of the safetensors files.

    Raises:
        UserError: a file is missing, truncated or not JSON, the weights are not safetensors, or the model is not
            supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a local Hugging Face checkpoint (download it first)")
    hf = read_hf_config(path)
    return replace(hf, tensors=_cut_slices((read_tensors or read_safetensors)(path), hf.architecture))


def read_hf_config(path: Path) -> HFCheckpoint:
    """Reads a checkpoint without its weights: `tensors` is empty.

    Args:
        path: a checkpoint directory, or a config.json of any name.

    Raises:
        UserError: the config is missing or not JSON, or the model is not supported.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a local folder or config.json (hub ids are not downloaded)")
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    return HFCheckpoint(path, config, read_architecture(path, config), end_of_turn_ids(file.parent, file), {})


def read_architecture(path: Path, config: dict[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        path: names the config in errors.
        config: its content.

    Raises:
        UserError: the model is not supported.
    """
    try:
        return family_of(config).architecture(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: config.json holds a value of the wrong kind ({error}); copy it again") from error


def _cut_slices(tensors: dict[str, HFTensor], architecture: Architecture) -> dict[str, HFTensor]:
    """The tensors, with the slices of those that hold all experts of a layer in their place.

    Raises:
        UserError: such a tensor has a slice for another number of experts.
    """
    experts = {
        tensor_and_slice(entry.hf[parts[0]].format(**where))[0]: entry.experts
        for entry in architecture.weights
        if entry.sliced
        for where in entry.instances(architecture.num_layers)
        for parts in entry.tensors
        if where["expert"] == 0
    }
    found = {}
    for name, tensor in tensors.items():
        if name not in experts:
            found[name] = tensor
            continue
        if not tensor.shape or tensor.shape[0] != experts[name]:
            raise UserError(
                f"{name} in {tensor.file} has shape {list(tensor.shape)}, but config.json implies {experts[name]} "
                "experts; take config.json and weights from the same model"
            )
        size = (tensor.length or 0) // experts[name]
        for index in range(experts[name]):
            start = tensor.start + index * size
            found[f"{name}[{index}]"] = replace(tensor, shape=tensor.shape[1:], start=start, length=size)
    return found


def check_tensors(hf: HFCheckpoint, table: Iterable[WeightEntry] | None = None) -> None:
    """Compares the names and shapes of a checkpoint's tensors with the weight table.

    Args:
        hf: the checkpoint.
        table: the weight table; None for that of its architecture.

    Raises:
        UserError: a tensor is missing, has another shape than config.json implies, or would not be used, or an output
            layer is not the embedding that it is tied to.
    """
    expected = dict(expected_tensors(hf, table))
    for name, shape in expected.items():
        if name not in hf.tensors:
            family, whole = hf.architecture.family.name, tensor_and_slice(name)[0]
            if f"{whole}_blocks" in hf.tensors:
                raise UserError(
                    f"{hf.path} has {whole}_blocks in place of {whole}: it is quantized (MXFP4); dequantize it in "
                    "transformers, and save it again"
                )
            raise UserError(f"{hf.path} has no tensor {name}, which {family} needs; is the checkpoint complete?")
        found = hf.tensors[name]
        if found.shape != shape:
            raise UserError(
                f"{name} in {found.file} has shape {list(found.shape)}, but config.json implies {list(shape)}; "
                "take config.json and weights from the same model"
            )
    if unused := sorted(name for name in hf.tensors.keys() - expected.keys() if not _ignored(name, hf)):
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"{hf.path} has tensors that {hf.architecture.family.name} does not use: {', '.join(unused[:5])}{more}; "
            "loading without them would train another model"
        )
    check_tied_output(hf)


def expected_tensors(
    hf: HFCheckpoint, table: Iterable[WeightEntry] | None = None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of every tensor in the weight table; arguments as for `check_tensors`."""
    for entry in hf.architecture.weights if table is None else table:
        for where in entry.instances(hf.architecture.num_layers):
            for parts in entry.tensors:
                yield entry.hf[parts[0]].format(**where), entry.shape_of(parts)


def _ignored(name: str, hf: HFCheckpoint) -> bool:
    """Whether a tensor repeats what is known (rotary frequencies, a copy of the tied embedding), or is not read."""
    repeats = name.endswith("rotary_emb.inv_freq") or (hf.architecture.tied and name == OUTPUT_LAYER)
    return repeats or name.startswith(hf.architecture.family.unread(hf.config))
