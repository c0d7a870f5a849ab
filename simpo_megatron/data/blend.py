"""The values of `--train-data`: one source, or several with or without weights (`0.7 a 0.3 b`, as in Megatron-LM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from simpo_megatron.data.pairs import BlendedPairs, Pairs
from simpo_megatron.data.reading import can_be_source, source_exists
from simpo_megatron.errors import UserError


@dataclass(frozen=True)
class Blend:
    """Sources, and their weights where the flag gives them."""

    sources: list[str]
    weights: list[float] | None = None

    def join(self, parts: Sequence[Pairs]) -> Pairs:
        """The pairs of all sources as one.

        Args:
            parts: the pairs of each source.

        Raises:
            UserError: a weight leaves its source no pair.
        """
        if len(parts) == 1:
            return parts[0]
        try:
            return BlendedPairs(parts, self.weights)
        except ValueError as error:
            raise UserError(f"{' '.join(self.sources)}: {error}; give weights closer to each other") from error


def parse_blend(values: Sequence[str], flag: str) -> Blend:
    """Reads the values of a flag.

    A single value may hold a whole blend, as in a YAML file. It is split at spaces unless it is itself a source, and
    only where it begins with a weight or every part can be a source. So a path with spaces stays whole.

    Args:
        values: of the flag.
        flag: its name, for errors.

    Raises:
        UserError: a weight is not a number above 0, or only some of the sources have one.
    """
    if len(values) == 1 and not source_exists(values[0]):
        parts = values[0].split()
        if len(parts) > 1 and (_number(parts[0]) is not None or all(map(can_be_source, parts))):
            values = parts
    if len(values) == 1:
        return Blend(list(values))
    example = "give a weight before every source, as in 0.7 a 0.3 b, or none"
    numbers = [_number(value) for value in values]
    if all(number is None for number in numbers):
        return Blend(list(values))
    if len(values) % 2:
        raise UserError(
            f"{flag} {' '.join(values)}: {len(values)} values are not pairs of weight and source; {example}"
        )
    sources, weights = list(values[1::2]), []
    for value, weight, source in zip(values[::2], numbers[::2], sources, strict=True):
        if weight is None or not math.isfinite(weight) or weight <= 0:
            raise UserError(f"{flag}: the weight {value!r} of {source} is not a number above 0; {example}")
        weights.append(weight)
    for weight, source, number in zip(values[::2], sources, numbers[1::2], strict=True):
        if number is not None:
            raise UserError(
                f"{flag}: expected a source after the weight {weight}, got another number: {source!r}; {example}"
            )
    return Blend(sources, weights)


def _number(text: str) -> float | None:
    try:
        return None if source_exists(text) else float(text)
    except ValueError:
        return None
