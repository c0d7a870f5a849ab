"""How preference rows become token ids, and which of them are kept: what the user can set."""

from dataclasses import dataclass
from typing import Literal, get_args

from simpo_megatron.errors import UserError

PromptTruncation = Literal["keep_end", "keep_start"]
AssistantHeader = Literal["prompt", "response"]
TiePolicy = Literal["drop", "zero-margin"]
DuplicatePolicy = Literal["keep", "drop"]


@dataclass(frozen=True)
class DataOptions:
    """Lengths are in tokens. Raises UserError for values that leave a response no token."""

    max_length: int = 2048
    """Prompt and response together, each member of a pair on its own."""
    max_prompt_length: int = 1800
    """What a prompt is cut to, only when it and the longer response do not fit into max_length."""
    prompt_truncation: PromptTruncation = "keep_end"
    """The end of a long prompt that is kept. keep_end keeps a leading BOS too."""
    assistant_header: AssistantHeader = "prompt"
    """Where the chat template's assistant header goes. "response" scores it and counts it in |y|, as the SimPO
    repository does."""
    tie_policy: TiePolicy = "drop"
    """What happens to a pair with equal scores: dropped, or kept with a target margin of 0."""
    duplicates: DuplicatePolicy = "keep"
    """What happens to a pair whose ids all stood in an earlier row."""
    min_score_gap: float | None = None
    """Drop a pair whose chosen score does not exceed its rejected score by this much; None looks at ties alone."""
    max_length_ratio: float | None = None
    """Drop a pair whose longer response has more than this many times the tokens of the shorter one."""

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise UserError(f"--max-prompt-length is {self.max_prompt_length}; it must be at least 1.")
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"--max-prompt-length ({self.max_prompt_length}) must be less than --max-length ({self.max_length}): a "
                "prompt that long leaves no token for the response. Lower the first or raise the second."
            )
        if self.max_length_ratio is not None and self.max_length_ratio < 1:
            raise UserError(f"--max-length-ratio is {self.max_length_ratio:g}; it must be at least 1.")
        if self.min_score_gap is not None and self.min_score_gap < 0:
            raise UserError(f"--min-score-gap is {self.min_score_gap:g}; it must be at least 0.")
        for flag, value, allowed in (
            ("--prompt-truncation", self.prompt_truncation, get_args(PromptTruncation)),
            ("--assistant-header", self.assistant_header, get_args(AssistantHeader)),
            ("--tie-policy", self.tie_policy, get_args(TiePolicy)),
            ("--duplicates", self.duplicates, get_args(DuplicatePolicy)),
        ):
            if value not in allowed:
                raise UserError(f"{flag} is {value!r}; it must be one of {', '.join(allowed)}.")
