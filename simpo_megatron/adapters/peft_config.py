"""adapter_config.json of PEFT: what it says about an adapter, what is refused, and what is written. No torch.

PEFT joins the experts of a layer when it loads them into transformers 5. It then cannot have dropout on them, and takes
alpha and rank of the joined gate and up twice, which changes the scale of rank-stabilised LoRA. So an adapter on
experts is written without dropout, and with the alpha that gives its scale without rank stabilisation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.adapters.lora import Lora, projections
from simpo_megatron.errors import UserError
from simpo_megatron.files import read_json
from simpo_megatron.models.architecture import Architecture

CONFIG = "adapter_config.json"
# What is read here, or changes nothing in what an adapter with these tensors computes. Any other key must be off.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
}
_OFF = (None, False, [], {}, "none")
# PEFT takes the first factors of other kinds (pissa, olora and so on) out of the base, also when it loads an adapter.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """The content of adapter_config.json.

    Attributes:
        file: its path.
        content: by key.
    """

    file: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> PeftConfig:
        """Reads the file.

        Raises:
            UserError: it cannot be read, or the adapter is no plain LoRA.
        """
        config = read_json(file)
        if config.get("peft_type") != "LORA":
            raise UserError(f"{file} has peft_type {config.get('peft_type')!r}; only LORA is supported")
        for name, value in config.items():
            allowed = _INITS if name == "init_lora_weights" else _OFF
            if value not in allowed and (name == "init_lora_weights" or name not in _KNOWN):
                raise UserError(f"{file} sets {name} to {value!r}, which is not supported; train a plain LoRA")
        for name, patterns, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", int | float)):
            _positive(file, name, config.get(name), kind)
            if not isinstance(config.get(patterns) or {}, dict):
                raise UserError(f"{file} sets {patterns} to {config[patterns]!r}, which is no table; save it again")
            for pattern, value in (config.get(patterns) or {}).items():
                _positive(file, f"{patterns} of {pattern}", value, kind)
        dropout = config.get("lora_dropout") or 0.0
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(f"{file} sets lora_dropout to {dropout!r}; it must be at least 0 and less than 1")
        if not isinstance(config.get("use_rslora") or False, bool):
            raise UserError(f"{file} sets use_rslora to {config['use_rslora']!r}, which is not true or false")
        return cls(file, config)

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return bool(self.content.get("use_rslora", False))

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module, by PEFT's rule: the first pattern that matches the end of its name.

        Raises:
            UserError: a pattern is no regular expression.
        """
        return self._value("r", "rank_pattern", module), float(self._value("lora_alpha", "alpha_pattern", module))

    def _value(self, name: str, patterns: str, module: str) -> Any:
        for pattern, value in (self.content.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(
                    f"{self.file} has {pattern!r} in {patterns}, which is no regular expression ({error}); save it "
                    "again"
                ) from None
        return self.content[name]

    def lora(self, module: str, targets: tuple[str, ...]) -> Lora:
        """The adapter with rank and alpha of this module, on these projections."""
        rank, alpha = self.of(module)
        return Lora(rank, alpha, targets, self.rslora, float(self.content.get("lora_dropout") or 0.0))

    def check_same(self, module: str, lora: Lora, joined: int = 1) -> None:
        """Makes sure that a module has rank and scale of the adapter.

        Args:
            module: its name.
            lora: the adapter.
            joined: how many projections the module joins, each with its own part of the rank.

        Raises:
            UserError: it has another rank or scale.
        """
        rank, alpha = self.of(module)
        scale = Lora(rank, alpha, rslora=self.rslora).scale
        if rank != joined * lora.rank or not math.isclose(scale, lora.scale, rel_tol=1e-6):
            raise UserError(
                f"{self.file} gives {module} rank {rank} and alpha {alpha:g} (r, lora_alpha, rank_pattern, "
                f"alpha_pattern), but other projections rank {lora.rank} and alpha {lora.alpha:g}: every projection "
                "must have the same rank and scale"
            )


def _positive(file: Path, name: str, value: Any, kind: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        number = "whole number" if kind is int else "number"
        raise UserError(f"{file} sets {name} to {value!r}, which is no positive {number}; save it again")


def peft_config(lora: Lora, architecture: Architecture, base: str) -> dict[str, Any]:
    """The content of adapter_config.json: few keys, because an older PEFT refuses those that it does not know.

    Args:
        lora: the adapter.
        architecture: of the model that the adapter is for.
        base: the path or hub id of that model.
    """
    on_experts = any(
        entry.experts and target in lora.targets for entry in architecture.weights for target in projections(entry)
    )
    alpha = lora.alpha * math.sqrt(lora.rank) if lora.rslora and on_experts else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if on_experts else lora.dropout,
        "use_rslora": lora.rslora and not on_experts,
        "target_modules": sorted(hf_targets(architecture, lora)),
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
