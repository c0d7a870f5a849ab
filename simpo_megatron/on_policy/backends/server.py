"""Responses by a server with OpenAI's interface: vLLM, SGLang, TGI and others.

Prompts are sent to /v1/completions as token ids, so that template and BOS are those of training. A server that takes no
ids needs `--server-api chat`: it gets the messages, and writes them with its own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.backends.base import Limits, Request, Response
from simpo_megatron.on_policy.backends.settings import ServerSettings


class ServerBackend:
    """See `base.Backend`."""

    def __init__(self, checkpoint: Path, settings: ServerSettings, limits: Limits, eos_ids: Sequence[int]) -> None:
        self._settings, self._limits, self._eos_ids = settings, limits, list(eos_ids)
        self._client = settings.client()
        self._model = self._client.model(settings.server_model)
        self.block = 8 * settings.concurrency
        self._threads = ThreadPoolExecutor(settings.concurrency)

    def about(self) -> dict[str, Any]:
        """See `base.Backend`."""
        return {"server_model": self._model, "server_api": self._settings.server_api}

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `base.Backend`."""
        return list(self._threads.map(self._one, requests))

    def _one(self, request: Request) -> Response:
        chat = self._settings.server_api == "chat"
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": request.temperature,
            "top_p": self._limits.top_p,
            "max_tokens": self._limits.max_new_tokens,
            "seed": request.seed,
        }
        if self._limits.top_k:
            body["top_k"] = self._limits.top_k
        if chat:
            body["messages"] = request.messages
        else:
            body |= {"prompt": list(request.ids), "stop_token_ids": self._eos_ids}
        answer = self._client.post("chat/completions" if chat else "completions", body, _read_chat if chat else _read)
        if answer.content is None:
            raise UserError(f"--server-url {self._settings.server_url}: a reply without a text; check the server's log")
        return Response(str(answer.content), answer.finish_reason, answer.tokens)


@dataclass(frozen=True)
class _Answer:
    content: str | None
    finish_reason: str
    tokens: int


def _read(reply: dict[str, Any]) -> _Answer:
    choice = reply["choices"][0]
    return _Answer(choice["text"], str(choice["finish_reason"]), int(reply["usage"]["completion_tokens"]))


def _read_chat(reply: dict[str, Any]) -> _Answer:
    choice = reply["choices"][0]
    return _Answer(choice["message"]["content"], str(choice["finish_reason"]), int(reply["usage"]["completion_tokens"]))
