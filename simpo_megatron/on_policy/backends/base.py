"""The interface of what generates responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from simpo_megatron.data.schema import Message
from simpo_megatron.on_policy.sampling import SamplingSettings


@dataclass(frozen=True)
class Request:
    """One response that is wanted.

    Attributes:
        ids: token ids of the prompt, by the chat template of training.
        messages: the prompt; a server that has its own template takes these.
        temperature: of this response.
        seed: of this response.
    """

    ids: tuple[int, ...]
    messages: list[Message]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        content: its text, without the token that ends it.
        finish_reason: "stop", or "length" where it was cut; a server may give others.
        tokens: generated, with the token that ends it.
    """

    content: str
    finish_reason: str
    tokens: int


class Backend(Protocol):
    """A model that answers.

    Attributes:
        block: how many responses it is best asked for at a time.
        context: the most tokens of a prompt and its response; None where the backend itself refuses longer ones.
        vocabulary: number of token ids that the model knows; None where the backend itself refuses others.
    """

    block: int
    context: int | None
    vocabulary: int | None

    def __init__(self, checkpoint: Path, settings: Any, sampling: SamplingSettings, eos_ids: Sequence[int]) -> None:
        """Loads the model.

        Args:
            checkpoint: folder of the Hugging Face checkpoint.
            settings: the group of `settings.py` that belongs to the backend.
            sampling: of the run; the temperature is that of each request.
            eos_ids: ids that end a response.

        Raises:
            UserError: the model, or what the backend needs, is not there.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What decides the responses and is not in the sampling settings, as JSON values."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """The responses, in the order of the requests.

        Raises:
            UserError: the backend fails.
        """
        ...
