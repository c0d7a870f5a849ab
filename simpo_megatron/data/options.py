"""How rows become token ids and which rows are kept: settings of the user, recorded in every prepared set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.settings import Group, require, setting


@dataclass(frozen=True, kw_only=True)
class PairOptions(Group):
    """The options whose defaults do not depend on other settings."""

    prompt_truncation: Literal["keep_end", "keep_start"] = setting(
        "keep_end", "the part of a prompt that is kept when it is cut; keep_end keeps the BOS at its start too"
    )
    assistant_header: Literal["prompt", "response"] = setting(
        "prompt",
        "what the assistant's header belongs to; response: it is scored, as in the SimPO repository",
    )
    system_message: Literal["template", "first_user"] = setting(
        "template",
        "what writes a system message; first_user, for templates without that role: it is put before the text of the "
        "first user message, with an empty line in between",
    )
    tie_policy: Literal["drop", "zero-margin"] = setting(
        "drop", "pairs with equal scores: drop them, or keep them with a target margin of 0"
    )
    duplicates: Literal["keep", "drop"] = setting("keep", "pairs that repeat an earlier pair: keep or drop them")
    min_score_gap: float | None = setting(None, "drop pairs whose chosen score exceeds the rejected score by less")
    max_length_ratio: float | None = setting(
        None, "drop pairs whose longer response has more than this many times the tokens of the shorter"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_length_ratio is None or self.max_length_ratio >= 1,
            f"--max-length-ratio {self.max_length_ratio} must be at least 1",
        )
        self.not_negative("min_score_gap")


@dataclass(frozen=True)
class DataOptions(PairOptions):
    """All options.

    Attributes:
        max_length: tokens of the prompt and one response.
        max_prompt_length: tokens that a prompt is cut to where it and the longer response do not fit into max_length.
    """

    max_length: int = 2048
    max_prompt_length: int = 1800

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("max_length", "max_prompt_length")
        require(
            self.max_prompt_length < self.max_length,
            f"--max-prompt-length {self.max_prompt_length} must be less than --max-length {self.max_length}: a prompt "
            "that long leaves no token for the response; lower the first or raise the second",
        )
