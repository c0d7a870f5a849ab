"""The length report of a file of responses: tokens, characters, share that was cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class LengthReport:
    """Sums over responses.

    Attributes:
        responses: counted.
        tokens: of them.
        characters: of them.
        cut: of them ended with finish_reason "length".
    """

    responses: int = 0
    tokens: int = 0
    characters: int = 0
    cut: int = 0

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> LengthReport:
        """Counts the responses of rows."""
        report = cls()
        for row in rows:
            for response in row["responses"]:
                report.responses += 1
                tokens = response.get("tokens")  # files made by hand may have none
                report.tokens += tokens if isinstance(tokens, int) else 0
                report.characters += len(response["content"])
                report.cut += response.get("finish_reason") == "length"
        return report

    def means(self) -> dict[str, float]:
        """Tokens and characters of a response, and the share that was cut."""
        count = max(self.responses, 1)
        return {"tokens": self.tokens / count, "characters": self.characters / count, "truncated": self.cut / count}

    def line(self) -> str:
        """The means in one line."""
        means = self.means()
        return (
            f"{self.responses} responses: {means['tokens']:.1f} tokens and {means['characters']:.1f} characters on "
            f"average, {means['truncated']:.1%} cut at --max-new-tokens"
        )
