"""The settings of the scorers. They need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpo_megatron.on_policy.backends.settings import LocalSettings
from simpo_megatron.on_policy.http_client import Client
from simpo_megatron.settings import Group, required, setting


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(LocalSettings):
    """A sequence-classification model with one output, such as Skywork-Reward."""

    reward_model: Path | None = setting(None, "its folder", "DIR")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    batch_tokens: int = setting(16384, "most tokens scored at a time, padding included")
    max_length: int | None = setting(None, "refuse longer conversations; by default the model's own limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("batch_tokens", "max_length")


@dataclass(frozen=True, kw_only=True)
class FunctionSettings(Group):
    """A Python function: `def score(prompt, responses, **columns)` returns a number for every response."""

    scorer: str | None = setting(None, "module:function, from the current folder or the environment")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Group):
    """A model behind a server with OpenAI's interface, which compares two responses in both orders."""

    judge_url: str | None = setting(None, "address, such as http://localhost:8000/v1", "URL")
    judge_model: str | None = setting(None, "the model's name there; by default the first that the server lists")
    judge_max_tokens: int = setting(1024, "most tokens of a verdict")
    judge_concurrency: int = setting(16, "requests at a time")
    judge_timeout: float = setting(600.0, "seconds that a request may take", "SECONDS")
    judge_retries: int = setting(5, "times that a request is sent again after a failure, with growing pauses")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("judge_max_tokens", "judge_concurrency", "judge_timeout")
        self.not_negative("judge_retries")

    def client(self) -> Client:
        """A client of the server.

        Raises:
            UserError: there is no address.
        """
        url = required(self.judge_url, "--judge-url is missing; give an address such as http://localhost:8000/v1")
        return Client("--judge-url", url, self.judge_timeout, self.judge_retries)
