"""What Arena-Hard's style control counts in an answer: tokens, headers, lists and bold text."""

from __future__ import annotations

import re
from typing import Any


def style(text: str, tokens_of: str) -> dict[str, Any]:
    """What Arena-Hard's style control counts in an answer, without its blocks of code.

    Args:
        text: the answer.
        tokens_of: the model by which tiktoken counts tokens. Where tiktoken or its data is missing, `token_len` is
            left out, and style control cannot be used.
    """
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    counts: dict[str, Any] = {
        "header_count": {f"h{level}": _count(rf"^#{{{level}}}\s", plain) for level in range(1, 7)},
        "list_count": {"ordered": _count(r"^\s*\d+\.\s", plain), "unordered": _count(r"^\s*[-*+]\s", plain)},
        "bold_count": {"**": _count(r"\*\*[^*\n]+\*\*", plain), "__": _count(r"__[^_\n]+__", plain)},
    }
    try:
        import tiktoken

        tokens = len(tiktoken.encoding_for_model(tokens_of).encode(text, disallowed_special=()))
    except Exception:  # not installed, or its vocabulary cannot be downloaded
        return counts
    return {"token_len": tokens, **counts}


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))
