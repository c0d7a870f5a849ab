"""What tests of generation share: a small sampling, the program in this process, and its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools import generate_responses

TOKENS = 6
SAMPLING = {"num_responses": 3, "max_new_tokens": TOKENS, "temperature": 1.0}


def run(**flags: Any) -> int:
    """Runs tools/generate_responses.py; returns its exit code."""
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return generate_responses.main(words)


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by their id."""
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
