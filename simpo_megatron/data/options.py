"""How preference rows become token ids: what the user can set."""

from dataclasses import dataclass
from typing import Literal, get_args

from simpo_megatron.errors import UserError

PromptTruncation = Literal["keep_end", "keep_start"]
AssistantHeader = Literal["prompt", "response"]
TiePolicy = Literal["drop", "zero-margin"]


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

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise UserError(f"--max-prompt-length is {self.max_prompt_length}; it must be at least 1.")
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"--max-prompt-length ({self.max_prompt_length}) must be less than --max-length ({self.max_length}): a "
                "prompt that long leaves no token for the response. Lower the first or raise the second."
            )
        for flag, value, allowed in (
            ("--prompt-truncation", self.prompt_truncation, get_args(PromptTruncation)),
            ("--assistant-header", self.assistant_header, get_args(AssistantHeader)),
            ("--tie-policy", self.tie_policy, get_args(TiePolicy)),
        ):
            if value not in allowed:
                raise UserError(f"{flag} is {value!r}; it must be one of {', '.join(allowed)}.")
