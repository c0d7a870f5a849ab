"""Rotary embeddings as a Hugging Face config states them. Data only, without torch and Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simpo_megatron.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `theta ** (-2i / d)`, then scaled by `kind`.

    Attributes:
        kind: "default"; "linear", every frequency divided by `factor`; "llama3", low frequencies divided by `factor`.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of "llama3": frequencies that turn fewer
            than `low` times over the original context are divided, more than `high` times kept, in between interpolated.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: dict[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Raises:
        UserError: a scaling whose frequencies Megatron would not reproduce, or one that lacks a value.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _NEEDS:
        raise UserError(
            f"config.json asks for rope scaling {kind!r}; supported are {', '.join(_NEEDS)}: "
            "remove the scaling if the model trains within its original context"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(
            f"config.json sets partial_rotary_factor to {partial}; only models that rotate whole heads (1.0) run"
        )
    missing = [key for key in _NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise UserError(
            f"the {kind!r} rope scaling in config.json lacks {', '.join(missing)}; copy it from the original model"
        )
    return Rope(theta, kind, **{key: rope[key] for key in _NEEDS[kind]})
