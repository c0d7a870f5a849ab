"""How responses are drawn: the settings, and a seed for every response.

The seed of a response comes from the run's seed, the prompt's id and the response's index. So a run that was stopped,
re-ordered or divided among processes draws the same responses as one that was not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from simpo_megatron.settings import Group, require, setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Group):
    """Sampling. The defaults are those of the SimPO repository's on_policy_data_gen."""

    num_responses: int = setting(5, "responses to each prompt")
    temperature: float = setting(0.8, "0 takes the most likely token")
    top_p: float = setting(0.95, "least probability of the tokens that are drawn from, the most likely first")
    top_k: int = setting(0, "most tokens that are drawn from; 0: no limit")
    max_new_tokens: int = setting(4096, "most tokens of a response; a longer one is cut")
    seed: int = setting(42, "of the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_responses", "max_new_tokens")
        self.not_negative("temperature", "top_k", "seed")
        require(0 < self.top_p <= 1, f"--top-p {self.top_p} must be above 0 and at most 1")
        require(
            self.temperature > 0 or self.num_responses == 1,
            f"--temperature 0 makes --num-responses {self.num_responses} equal responses; use 1, or a temperature",
        )


def response_seed(seed: int, prompt_id: str, index: int) -> int:
    """A seed of 31 bits, which every backend accepts.

    Args:
        seed: of the run.
        prompt_id: of the prompt.
        index: of the response among those to the prompt, from 0.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{prompt_id}".encode()).digest()[:4], "big") >> 1
