"""The scorer of the example: 1 for a right answer, 0 for a wrong one."""

from __future__ import annotations

from typing import Any


def score(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """A response is right if its last word is the answer.

    Args:
        prompt: messages; not needed here.
        responses: texts.
        columns: of the row; `answer` is the right one.
    """
    return [float(response.rstrip(".").split()[-1:] == [columns["answer"]]) for response in responses]
