"""Rotary embeddings: what a config.json asks for, and its frequencies. Reading a config.json needs no torch.

The frequencies are those of transformers (`modeling_rope_utils.ROPE_INIT_FUNCTIONS`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `theta ** (-2i / D)` for D rotated dimensions of a head, then scaled as `kind` says.

    All but `theta` and `kind` have their names in the `rope_parameters` of transformers, which documents them. None
    stands for what it computes where they are absent.

    Attributes:
        theta: the base.
        kind: "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
        factor: how much longer the context becomes.
        low_freq_factor: of "llama3".
        high_freq_factor: of "llama3".
        original_max_position_embeddings: tokens of the context before the scaling. Longer sequences have other
            frequencies with "dynamic" and "longrope" (`check_length`).
        attention_factor: what cosine and sine are multiplied by, for "yarn" and "longrope".
        beta_fast: of "yarn".
        beta_slow: of "yarn".
        mscale: of "yarn".
        mscale_all_dim: of "yarn".
        truncate: of "yarn".
        short_factor: of "longrope".
        long_factor: of "longrope".
        partial_rotary_factor: the share of a head that is rotated, its first dimensions; None for whole heads.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that are not None, as primitives."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def parameters(self) -> dict[str, Any]:
        """`rope_parameters` of transformers 5, for the rotated dimensions."""
        names = (*_NEEDS[self.kind], *_MAY_HAVE.get(self.kind, ()))
        if self.original_max_position_embeddings:
            names = (*names, "original_max_position_embeddings")
        values = {name: value for name, value in self.as_dict().items() if name in names}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"rope_type": self.kind, "rope_theta": self.theta, **values}


# What each kind needs, and what it may have, in `rope_parameters`.
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_MAY_HAVE = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}

# Numbers that are not merely positive: above the first, up to the second. "yarn" divides by the logarithm of the base.
# "longrope" by that of the context.
_RANGES = {
    "rope_theta": (1, math.inf),
    "original_max_position_embeddings": (1, math.inf),
    "partial_rotary_factor": (0, 1),
}


def read_rope(config: dict[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before), for whole heads.

    As in transformers, `rope_scaling` takes the place of `rope_parameters` where config.json has both.

    Raises:
        UserError: a scaling whose frequencies are not known, or one that lacks a value; heads that are rotated in part,
            or several embeddings for one model.
    """
    rope = read_partial_rope(config)
    if rope.partial_rotary_factor is not None:
        raise UserError(
            f"config.json sets partial_rotary_factor to {rope.partial_rotary_factor}; a {config.get('model_type')!r} "
            "model rotates whole heads (1.0)"
        )
    return rope


def read_partial_rope(config: dict[str, Any]) -> Rope:
    """`read_rope` for families that may rotate only the first dimensions of a head."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if nested := sorted(name for name, value in given.items() if isinstance(value, dict)):
        raise UserError(
            f"config.json has rope_parameters for {' and '.join(nested)}; a {config.get('model_type')!r} model has one "
            "rotary embedding for all layers"
        )
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _NEEDS:
        raise UserError(
            f"config.json asks for rope scaling {kind!r}; supported are {', '.join(_NEEDS)}: "
            "remove the scaling if the model trains within its original context"
        )
    if missing := [key for key in _NEEDS[kind] if given.get(key) is None]:
        raise UserError(
            f"the {kind!r} rope scaling in config.json lacks {', '.join(missing)}; copy it from the original model"
        )
    names = (*_NEEDS[kind], *_MAY_HAVE.get(kind, ()))
    values = {name: _value(name, given[name]) for name in names if given.get(name) is not None}
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = _original_context(kind, given, config)
    if kind == "longrope":
        ratio = config.get("max_position_embeddings", 0) / values["original_max_position_embeddings"]
        values = {"factor": ratio, **values}
    partial = _first("partial_rotary_factor", given, config, default=1.0)
    theta = float(_first("rope_theta", given, config, default=10000.0))
    return Rope(theta, kind, partial_rotary_factor=None if partial == 1.0 else float(partial), **values)


def _first(name: str, *places: dict[str, Any], default: Any = None) -> Any:
    """The value of the first place that has one, checked; else the default."""
    return next((_value(name, place[name]) for place in places if place.get(name) is not None), default)


def _value(name: str, value: Any) -> Any:
    """A value of the rotary embedding: a positive number, or what its name asks for.

    Raises:
        UserError: it is another.
    """
    if name == "truncate":
        good = isinstance(value, bool)
    elif name in ("short_factor", "long_factor"):
        good = isinstance(value, list) and all(map(_is_positive, value))
    else:
        zero = name.startswith("mscale") and type(value) in (int, float) and value == 0
        low, high = _RANGES.get(name, (0, math.inf))
        good = zero or (_is_positive(value) and low < value <= high)
    if not good:
        raise UserError(
            f"config.json sets {name} of the rotary embedding to {value!r}; copy it from the original model"
        )
    return tuple(map(float, value)) if isinstance(value, list) else value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _original_context(kind: str, given: dict[str, Any], config: dict[str, Any]) -> int:
    """Tokens of the context before the scaling, by the precedence of transformers (`standardize_rope_params`)."""
    name, whole = "original_max_position_embeddings", config.get("max_position_embeddings")
    found = whole if kind == "dynamic" else _first(name, config, given, default=whole)
    if not isinstance(found, int) or found < 2:
        raise UserError(f"the {kind!r} rope scaling in config.json lacks {name}; copy it from the original model")
    return found


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """How many dimensions of a head are rotated, its first ones."""
    return int(head_dim * (rope.partial_rotary_factor or 1.0))


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """The rotary frequencies in radians a token, and the attention factor, as transformers computes them.

    They are computed on the CPU in float32: at long contexts another rounding of the frequencies changes the angles
    measurably.

    Args:
        rope: what the model asks for.
        head_dim: width of a head.

    Returns:
        [rotary_dim / 2] float32, on the CPU, for sequences up to `check_length`; and what cosine and sine are
        multiplied by.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, context = rotary_dim(rope, head_dim), rope.original_max_position_embeddings
    # Some releases of transformers take the factor of "yarn" and "longrope" for the ratio of the two contexts.
    longer = int(context * rope.factor) if rope.kind in ("yarn", "longrope") else context
    config: Any = SimpleNamespace(
        rope_parameters={**rope.parameters, "factor": rope.factor},
        rope_scaling={**rope.parameters, "factor": rope.factor},
        rope_theta=rope.theta,
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=longer,
        original_max_position_embeddings=context,
        standardize_rope_params=lambda: None,
    )
    # Without scaling it is the linear one by 1, which is exact.
    frequencies, factor = ROPE_INIT_FUNCTIONS["linear" if rope.kind == "default" else rope.kind](config, "cpu")  # type: ignore[arg-type]
    return frequencies, float(factor)


def check_factors(rope: Rope, head_dim: int) -> None:
    """Refuses a "longrope" without one factor for every pair of rotated dimensions.

    Args:
        rope: what the model asks for.
        head_dim: width of a head.

    Raises:
        UserError: a list is shorter or longer.
    """
    pairs = (rotary_dim(rope, head_dim) + 1) // 2
    for name in ("short_factor", "long_factor"):
        if (factors := getattr(rope, name)) is not None and len(factors) != pairs:
            raise UserError(
                f"config.json gives {len(factors)} numbers as {name} of the rotary embedding, but {pairs} pairs of "
                "dimensions of a head are rotated; copy it from the original model"
            )


def check_length(rope: Rope, length: int, flag: str) -> None:
    """Refuses sequences with other frequencies than shorter ones, which a packed row cannot have side by side.

    Args:
        rope: what the model asks for.
        length: tokens of the longest sequence.
        flag: that sets it.

    Raises:
        UserError: the sequence is longer than the context before the scaling.
    """
    if rope.kind in ("dynamic", "longrope") and length > rope.original_max_position_embeddings:
        raise UserError(
            f"{flag} {length}: with the {rope.kind!r} rope scaling of this model, sequences of more than "
            f"{rope.original_max_position_embeddings} tokens have other rotary frequencies, which is not supported; "
            f"set it to {rope.original_max_position_embeddings} or less"
        )
