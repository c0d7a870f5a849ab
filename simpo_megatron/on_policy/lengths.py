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
        without_tokens: of them say not how many tokens they have, as in files made by hand.
        tokens: of the others.
        characters: of all.
        cut: of them ended with finish_reason "length".
    """

    responses: int = 0
    without_tokens: int = 0
    tokens: int = 0
    characters: int = 0
    cut: int = 0

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> LengthReport:
        """Counts the responses of rows."""
        report = cls()
        for row in rows:
            for response in row["responses"]:
                tokens = response.get("tokens")
                report.responses += 1
                report.without_tokens += not isinstance(tokens, int)
                report.tokens += tokens if isinstance(tokens, int) else 0
                report.characters += len(response["content"])
                report.cut += response.get("finish_reason") == "length"
        return report

    def means(self) -> dict[str, float | None]:
        """Tokens (None where a response has no count) and characters of a response, and the share that was cut."""
        count = max(self.responses, 1)
        tokens = None if self.without_tokens else self.tokens / count
        return {"tokens": tokens, "characters": self.characters / count, "truncated": self.cut / count}

    def summary(self) -> dict[str, float | None]:
        """The number of responses, and the means."""
        return {"responses": self.responses, **self.means()}

    def line(self) -> str:
        """The means in one line."""
        means = self.means()
        tokens = "" if means["tokens"] is None else f"{means['tokens']:.1f} tokens and "
        return (
            f"{self.responses} responses: {tokens}{means['characters']:.1f} characters on average, "
            f"{means['truncated']:.1%} cut at --max-new-tokens"
        )
