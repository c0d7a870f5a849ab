"""Scorers that the tests name as module:function."""

from __future__ import annotations

import signal
from typing import Any


def short(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """Shorter is better."""
    return [-float(len(response)) for response in responses]


def broken(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """Raises."""
    raise RuntimeError("no reward")


def leaving(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """Ends the program, as a script does."""
    raise SystemExit(3)


def terminated(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """SIGTERM arrives meanwhile."""
    signal.raise_signal(signal.SIGTERM)
    return []


def too_few(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """Returns one score."""
    return [1.0]


def not_finite(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> list[float]:
    """Returns NaN."""
    return [float("nan")] * len(responses)


def text(prompt: list[dict[str, Any]], responses: list[str], **columns: Any) -> str:
    """Returns a text as long as there are responses."""
    return "1" * len(responses)


NUMBER = 1
