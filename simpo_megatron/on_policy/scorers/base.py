"""The interface of what scores responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from simpo_megatron.data.schema import Message


@dataclass(frozen=True)
class Answered:
    """A prompt with its responses.

    Attributes:
        prompt: messages.
        responses: their texts.
        columns: the other columns of the row.
        where: place of the row, for errors.
    """

    prompt: list[Message]
    responses: list[str]
    columns: dict[str, Any]
    where: str


class Scorer(Protocol):
    """Gives every response a number; a higher one is better.

    Attributes:
        block: how many prompts it is best asked for at a time.
    """

    block: int

    def __init__(self, settings: Any) -> None:
        """Loads what it needs.

        Raises:
            UserError: it is not there.
        """
        ...

    @classmethod
    def check(cls, settings: Any) -> None:
        """Looks for what it needs, and loads no model.

        Raises:
            UserError: it is not there.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What decides the scores, as JSON values."""
        ...

    def score(self, rows: Sequence[Answered]) -> list[list[float]]:
        """A number for every response of every row.

        Raises:
            UserError: the scorer fails.
        """
        ...
