"""PEFT's folder of an adapter, read and written: adapter_config.json and adapter_model.safetensors. No Megatron.

    folder = PeftFolder.read(path, architecture)
    with folder.open() as factor:
        a = factor("model.layers.0.self_attn.q_proj.lora_A.weight")     # whole, on the CPU
    write_peft(path, lora, tensors, base)

The names of the tensors are those of the base weights in the checkpoint, with `lora_A.weight` or `lora_B.weight` for
`weight`. So the experts of a layer have factors one by one. PEFT reads that with transformers 4, and joins them
with transformers 5, which keeps the experts of a layer in one tensor.

Two forms are read for experts: factors one by one, and the joined factors that PEFT writes for `target_parameters`. In
the joined form A is [experts * rank, in], and B is [out, rank * experts], where the expert counts fastest.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.adapters.lora import Lora, adapter_entries, factor_entries, projections
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_path, atomic_write, check_empty, follow_umask, read_json, sync
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFTensor, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the computation and is not supported: the value that is accepted besides null and false.
_REFUSED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
}
_JOINED = re.compile(r"(.*\.mlp\.experts)\.(base_layer\.)?lora_([AB])\.weight$")


@dataclass(frozen=True)
class PeftFolder:
    """An adapter on the disk.

    Attributes:
        path: the folder.
        lora: its shape.
        config: the content of adapter_config.json.
        tensors: the tensors of the file, by their names without `base_model.model.`.
        experts: of a layer of the model; None for a dense one.
        joined: where the factors of all experts of a layer are in one tensor: for the name of each factor of an
            expert, the tensor that holds it, the expert, and which of the parts of its rows.
    """

    path: Path
    lora: Lora
    config: dict[str, Any]
    tensors: dict[str, HFTensor]
    experts: int | None
    joined: dict[str, tuple[str, int, int]]

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
        config = read_json(path / CONFIG)
        _check_config(path, config)
        tensors = {
            name.removeprefix(PREFIX): tensor for name, tensor in read_safetensors_header(path / WEIGHTS).items()
        }
        joined = _joined(architecture, tensors)
        found = {*(tensors.keys() - {holder for holder, _, _ in joined.values()}), *joined}
        lora = Lora(
            config["r"],
            float(config["lora_alpha"]),
            _targets(architecture, found),
            bool(config.get("use_rslora", False)),
        )
        folder = cls(path, lora, config, tensors, architecture.num_experts, joined)
        folder._check_tensors(architecture, found)
        return folder

    def _check_tensors(self, architecture: Architecture, found: set[str]) -> None:
        """Compares names and shapes with the factors that the model would have."""
        expected = {
            entry.hf[0].format(**where): entry.shapes[0]
            for entry in adapter_entries(architecture, self.lora)
            for where in entry.instances(architecture.num_layers)
        }
        name = architecture.family.name
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
            if factor in self.joined:
                continue
            if self.tensors[factor].shape != shape:
                raise UserError(
                    f"{factor} in {self.path / WEIGHTS} has shape {list(self.tensors[factor].shape)}, but rank "
                    f"{self.lora.rank} and this {name} model give {list(shape)}; give an adapter that was made for it"
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

            def factor(name: str) -> Tensor:
                if name not in self.joined:
                    return opened.get_tensor(names[name])
                holder, expert, part = self.joined[name]
                return _expert_factor(opened.get_tensor(names[holder]), self, name, expert, part)

            yield factor


def _expert_factor(tensor: Tensor, folder: PeftFolder, name: str, expert: int, part: int) -> Tensor:
    """The factor of one expert from a joined tensor. gate_up has one A for both; their rows of B follow each other."""
    experts = folder.experts or 1
    if ".lora_A." in name:
        return tensor.unflatten(0, (experts, -1))[expert].contiguous()
    whole = tensor.unflatten(1, (-1, experts))[:, :, expert]
    if "gate_up" not in _kind(name):
        return whole.contiguous()
    return whole.chunk(2)[part].contiguous()


def _kind(name: str) -> str:
    """Whether the factor of an expert is in the joined tensor of gate and up, or in that of down."""
    return "down" if re.search(r"\.(down_proj|w2)\.lora_", name) else "gate_up"


def _joined(architecture: Architecture, tensors: Mapping[str, HFTensor]) -> dict[str, tuple[str, int, int]]:
    """See `PeftFolder.joined`; empty where the adapter has its experts one by one, or none.

    PEFT wraps the parameter that it meets second around the first: `base_layer` is gate_up where both are there. The
    widths tell them apart in any case.
    """
    layers = {}
    for name, tensor in tensors.items():
        if found := _JOINED.match(name):
            layers.setdefault((found[1], found[2] or ""), {})[found[3]] = (name, tensor)
    if not layers:
        return {}
    found: dict[str, tuple[str, int, int]] = {}
    for (block, _), factors in layers.items():
        if set(factors) != {"A", "B"}:
            raise UserError(f"the adapter has one of lora_A and lora_B of {block}; save it again with PEFT")
        layer = int(re.findall(r"\.layers\.(\d+)\.", block)[0])
        for entry in architecture.weights:
            if not entry.experts or not projections(entry):
                continue
            rows, columns = sum(entry.rows), entry.shapes[0][1]
            (a_name, a), (b_name, b) = factors["A"], factors["B"]
            if a.shape[1] != columns or b.shape[0] != rows:
                continue
            probe = Lora(1, 1.0)
            names = [list(factor_entries(entry, probe))[index].hf[0] for index in range(2 * len(entry.hf))]
            for expert in range(entry.experts):
                for index, factor in enumerate(names):
                    holder = a_name if index % 2 == 0 else b_name
                    found[factor.format(layer=layer, expert=expert)] = (holder, expert, index // 2)
    return found


def _targets(architecture: Architecture, names: set[str]) -> tuple[str, ...]:
    """The projections of which the adapter has factors, in the order of the table."""
    found = []
    for entry in architecture.weights:
        for target, hf in zip(projections(entry), entry.hf, strict=False):
            factor = hf.removesuffix(".weight") + ".lora_A.weight"
            if any(factor.format(**where) in names for where in entry.instances(architecture.num_layers)):
                found.append(target)
    return tuple(found)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    file = path / CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file} has peft_type {config.get('peft_type')!r}; only LORA is supported")
    for name, accepted in _REFUSED.items():
        if config.get(name) not in (accepted, None, False, []):
            raise UserError(f"{file} sets {name} to {config[name]!r}, which is not supported; train a plain LoRA")
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise UserError(f"{file} sets {name} to {config.get(name)!r}, which is no positive number; save it again")
    for name, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if other := {key: value for key, value in (config.get(name) or {}).items() if value != config[whole]}:
            key, value = next(iter(other.items()))
            raise UserError(
                f"{file} has {name} {value} for {key}, but {whole} {config[whole]}: every projection must have the same"
            )


def peft_config(lora: Lora, targets: tuple[str, ...], base: str) -> dict[str, Any]:
    """The content of adapter_config.json: few keys, because an older PEFT refuses those that it does not know.

    Args:
        lora: the adapter.
        targets: the names of the projections in the Hugging Face model.
        base: the model that the adapter is for.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def hf_targets(architecture: Architecture, lora: Lora) -> tuple[str, ...]:
    """The names that the Hugging Face model has for the targets: w1 for gate_proj in Mixtral."""
    return tuple(
        hf.removesuffix(".weight").rpartition(".")[2]
        for entry in architecture.weights
        for target, hf in zip(projections(entry), entry.hf, strict=False)
        if target in lora.targets
    )


def write_peft(
    path: Path,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    base: str,
    more_files: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads. The config is written last: with it the folder is whole.

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
        config = peft_config(lora, hf_targets(architecture, lora), base)
        atomic_write(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        sync(path.parent)
    except Exception as failure:  # a full disk raises an OSError or a SafetensorError
        raise cannot_write(f"--export-adapter: {path}", failure, "export elsewhere") from failure
