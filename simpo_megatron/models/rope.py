"""Rotary embeddings: what a config.json asks for, and its frequencies. Reading a config.json needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `theta ** (-2i / D)` for a head of width D, then scaled as `kind` says.

    "llama3" divides the frequencies that turn fewer than `low_freq_factor` times over the original context, keeps those
    that turn more than `high_freq_factor` times, and interpolates in between.

    Attributes:
        theta: the base.
        kind: "default", no scaling; "linear", every frequency divided by `factor`; "llama3", low ones divided by it.
        factor: the divisor of "linear" and "llama3".
        low_freq_factor: turns below which "llama3" divides.
        high_freq_factor: turns above which "llama3" keeps.
        original_max_position_embeddings: tokens of the original context, for "llama3".
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


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """The rotary frequencies in radians a token.

    They are computed on the CPU in float32, as transformers does (`modeling_rope_utils.py`): at long contexts another
    rounding of the frequencies changes the angles measurably.

    Args:
        rope: what the model asks for.
        dim: width of a head.

    Returns:
        [dim / 2] float32, on the CPU.
    """
    import torch

    frequency = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        turns = rope.original_max_position_embeddings / wavelength
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - keep) * frequency / rope.factor + keep * frequency
        scaled = torch.where(turns < rope.low_freq_factor, frequency / rope.factor, between)
        frequency = torch.where(turns > rope.high_freq_factor, frequency, scaled)
    return frequency
