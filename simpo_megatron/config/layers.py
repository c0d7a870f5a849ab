"""Layers of settings -> one set: defaults, preset, YAML file, flags. Each layer wins over those before it."""

from __future__ import annotations

from typing import Any

from simpo_megatron.objectives import OBJECTIVES
from simpo_megatron.settings import require


def drops() -> dict[str, str]:
    """Settings that drop another one: a higher layer that sets the key drops the lower layers' value of the other.

    The two are two ways to set one thing, or the default of the other follows from the key.
    """
    return {
        "train_iters": "train_epochs",
        "train_epochs": "train_iters",
        "max_length": "max_prompt_length",
        "fp32": "bf16",
        "bf16": "fp32",
        **{name: other for cls in OBJECTIVES.values() for name, other in cls.drops.items()},
    }


def layered(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merges layers of settings; later layers win.

    Raises:
        UserError: a layer turns on both --fp32 and --bf16.

    >>> layered({"train_epochs": 1.0, "lr": 1e-6}, {"train_iters": 5})
    {'lr': 1e-06, 'train_iters': 5}
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        require(
            not (layer.get("fp32") and layer.get("bf16")),
            "--fp32 and --bf16 are both on; give one of them, by a flag or in the file",
        )
        for name, other in drops().items():
            if is_set(layer.get(name)):
                settings.pop(other, None)
        settings |= layer
    return settings


def is_set(value: Any) -> bool:
    """Whether a setting of this value drops another one."""
    return value is not None and value is not False


def in_place_of(name: str, settings: dict[str, Any]) -> str | None:
    """The setting that sets in another way what `name` sets; None where `name` is set, or nothing stands in for it.

    >>> in_place_of("train_epochs", {"train_epochs": None, "train_iters": 9})
    'train_iters'
    """
    if is_set(settings.get(name)):
        return None
    return next((key for key, other in drops().items() if other == name and is_set(settings.get(key))), None)
