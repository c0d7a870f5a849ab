"""PEFT's folder of an adapter, read and written: adapter_config.json and adapter_model.safetensors. No Megatron.

    folder = PeftFolder.read(path, architecture)
    with folder.open() as factor:
        a = factor("model.layers.0.self_attn.q_proj.lora_A.weight")     # whole, on the CPU
    write_peft(path, lora, tensors, base)

The names of the tensors are those of the base weights in the checkpoint, with `lora_A.weight` or `lora_B.weight` for
`weight`. So the experts of a layer have factors one by one. PEFT reads that with transformers 4, and joins them
with transformers 5, which keeps the experts of a layer in one tensor.

Two forms are read for experts: factors one by one, and those of `joined_experts.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpo_megatron.adapters.joined_experts import JoinedFactor, joined_factors
from simpo_megatron.adapters.lora import Lora, adapter_entries, projections
from simpo_megatron.adapters.peft_config import CONFIG, PeftConfig, peft_config
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_path, atomic_write, check_empty, follow_umask, sync
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_files import HFTensor, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class PeftFolder:
    """An adapter on the disk.

    Attributes:
        path: the folder.
        lora: its shape.
        tensors: the tensors of the file, by their names without `base_model.model.`.
        joined: the factors of experts that lie in one tensor for all experts of a layer, by their names.
    """

    path: Path
    lora: Lora
    tensors: dict[str, HFTensor]
    joined: dict[str, JoinedFactor]

    @classmethod
    def read(cls, path: Path, architecture: Architecture) -> PeftFolder:
        """Reads a folder, headers only, and compares it with a model.

        Raises:
            UserError: a file is missing or broken, the adapter is of another model, or it is not a plain LoRA.
        """
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has no {CONFIG}; give the folder of a PEFT adapter")
        if not (path / WEIGHTS).is_file():
            raise UserError(f"{path} has no {WEIGHTS}; save the adapter with PEFT's save_pretrained")
        config = PeftConfig.read(path / CONFIG)
        tensors = {
            name.removeprefix(PREFIX): tensor for name, tensor in read_safetensors_header(path / WEIGHTS).items()
        }
        if not tensors:
            raise UserError(f"{path / WEIGHTS} holds no tensors; save the adapter with PEFT's save_pretrained")
        if other := next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), None):
            raise UserError(
                f"{other} in {path / WEIGHTS} is {tensors[other].dtype}; factors must be one of {', '.join(_DTYPES)}"
            )
        joined = joined_factors(architecture, tensors)
        found = {*(tensors.keys() - {factor.tensor for factor in joined.values()}), *joined}
        folder = cls(path, _lora(config, _targets(architecture, found), found, joined), tensors, joined)
        folder._check_tensors(architecture, found)
        return folder

    def _check_tensors(self, architecture: Architecture, found: set[str]) -> None:
        """Compares names and shapes with the factors that the model would have."""
        expected, name = factor_shapes(architecture, self.lora), architecture.family.name
        if other := sorted(found - expected.keys()):
            raise UserError(
                f"{self.path / WEIGHTS} has {other[0]}, which is no factor of this {name} model; give an adapter that "
                "was made for it"
            )
        if missing := sorted(expected.keys() - found):
            raise UserError(
                f"{self.path / WEIGHTS} lacks {missing[0]}: the adapter must have every layer of this {name} model; "
                "give one that was made for it"
            )
        for factor, shape in expected.items():
            joined = self.joined.get(factor)
            tensor = factor if joined is None else joined.tensor
            found_shape, wanted = self.tensors[tensor].shape, shape
            if joined is not None:
                ranks = self.lora.rank * joined.blocks * joined.experts
                wanted = (ranks, found_shape[1]) if joined.rank_dim == 0 else (found_shape[0], ranks)
            if found_shape != wanted:
                raise UserError(
                    f"{tensor} in {self.path / WEIGHTS} has shape {list(found_shape)}, but rank {self.lora.rank} and "
                    f"this {name} model give {list(wanted)}; give an adapter that was made for it"
                )

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """A function from the name of a factor, as in the weight table, to the whole factor on the CPU."""
        from safetensors import safe_open

        try:
            file = safe_open(str(self.path / WEIGHTS), framework="pt", device="cpu")
        except Exception as error:  # safetensors raises its own type, OSError and others
            raise UserError(f"{self.path / WEIGHTS} cannot be read ({error}); copy it again") from error
        with file as opened:
            names = {name.removeprefix(PREFIX): name for name in opened.keys()}  # noqa: SIM118 (it is no mapping)

            @functools.lru_cache(maxsize=4)
            def read(name: str) -> Tensor:
                tensor = opened.get_tensor(names[name])
                if not tensor.isfinite().all():
                    raise UserError(f"{name} in {self.path / WEIGHTS} has numbers that are not finite; train it again")
                return tensor

            def factor(name: str) -> Tensor:
                joined = self.joined.get(name)
                if joined is None:
                    return read(name)
                try:
                    return joined.take(read(joined.tensor))
                except ValueError as error:
                    raise UserError(f"{joined.tensor} in {self.path / WEIGHTS}: {error}") from None

            yield factor


def factor_shapes(architecture: Architecture, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Name and shape of every factor of an adapter."""
    return {
        entry.hf[0].format(**where): entry.shapes[0]
        for entry in adapter_entries(architecture, lora)
        for where in entry.instances(architecture.num_layers)
    }


def _targets(architecture: Architecture, names: set[str]) -> tuple[str, ...]:
    """The projections of which the adapter has factors, in the order of the table."""
    found = []
    for entry in architecture.weights:
        for target, hf in zip(projections(entry), entry.hf, strict=False):
            factor = hf.removesuffix(".weight") + ".lora_A.weight"
            if any(factor.format(**where) in names for where in entry.instances(architecture.num_layers)):
                found.append(target)
    return tuple(found)


def _lora(config: PeftConfig, targets: tuple[str, ...], found: set[str], joined: dict[str, JoinedFactor]) -> Lora:
    """The adapter of a folder, whose projections all must have its rank and scale."""
    modules = {name.rpartition(".lora_")[0]: (name.rpartition(".lora_")[0], 1) for name in found - joined.keys()}
    modules |= {factor.tensor.rpartition(".lora_")[0]: (factor.module, factor.blocks) for factor in joined.values()}
    ordered = sorted(modules.values(), key=lambda module: (module[1], module[0]))
    lora = config.lora(next((module for module, blocks in ordered if blocks == 1), ""), targets)
    for module, blocks in ordered:
        config.check_same(module, lora, blocks)
    return lora


def write_peft(
    path: Path,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    base: str,
    more_files: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads. The config is written last.

    Args:
        path: the folder, absent or empty.
        lora: the adapter.
        tensors: the factors on the CPU, by their names in the weight table.
        architecture: of the base.
        base: its path or hub id.
        more_files: text files to add, by name.

    Raises:
        UserError: the folder is not empty, or a file cannot be written.
    """
    from safetensors.torch import save_file

    check_empty("--export-adapter", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with atomic_path(path / WEIGHTS) as temporary:
            named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(named, str(temporary), metadata={"format": "pt"})
            follow_umask(temporary)
        for file, text in (more_files or {}).items():
            atomic_write(path / file, text)
        config = peft_config(lora, architecture, base)
        atomic_write(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        sync(path.parent)
    except Exception as failure:  # a full disk raises an OSError or a SafetensorError
        raise cannot_write(f"--export-adapter: {path}", failure, "export elsewhere") from failure
