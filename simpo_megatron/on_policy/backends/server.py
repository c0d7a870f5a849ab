"""Responses by a server with OpenAI's interface: vLLM, SGLang, TGI and others.

Prompts are sent to /v1/completions as token ids, so that template and BOS are those of training. A server that takes no
ids needs `--server-api chat`: it gets the messages, and writes them with its own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.on_policy.backends.base import Request, Response
from simpo_megatron.on_policy.backends.settings import ServerSettings
from simpo_megatron.on_policy.http_client import on_threads
from simpo_megatron.on_policy.sampling import SamplingSettings

# vLLM and SGLang take what a request leaves open from the model's generation_config.json.
_NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0}


class ServerBackend:
    """See `base.Backend`."""

    def __init__(
        self, checkpoint: Path, settings: ServerSettings, sampling: SamplingSettings, eos_ids: Sequence[int]
    ) -> None:
        self._settings, self._sampling, self._eos_ids = settings, sampling, list(eos_ids)
        self._client = settings.client()
        self._model = self._client.model(settings.server_model)
        self.block, self.context, self.vocabulary = 8 * settings.concurrency, None, None

    def about(self) -> dict[str, Any]:
        """See `base.Backend`."""
        return {"server_model": self._model, "server_api": self._settings.server_api}

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `base.Backend`."""
        return on_threads(self._one, requests, self._settings.concurrency)

    def _one(self, request: Request) -> Response:
        chat = self._settings.server_api == "chat"
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": request.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": self._sampling.max_new_tokens,
            "top_k": self._sampling.top_k or -1,
            "seed": request.seed,
            **_NEUTRAL,
        }
        if chat:
            body["messages"] = request.messages
        else:
            body |= {"prompt": list(request.ids), "stop_token_ids": self._eos_ids}
        return self._client.post("chat/completions" if chat else "completions", body, _read_chat if chat else _read)


def _read(reply: dict[str, Any]) -> Response:
    return _response(reply, reply["choices"][0]["text"])


def _read_chat(reply: dict[str, Any]) -> Response:
    return _response(reply, reply["choices"][0]["message"]["content"])


def _response(reply: dict[str, Any], content: Any) -> Response:
    """The response of a reply. Raises TypeError or ValueError where it is not whole, so that it is asked for again."""
    reason = reply["choices"][0]["finish_reason"]
    if not isinstance(content, str) or not isinstance(reason, str):
        raise TypeError(f"its text is {content!r}, its finish_reason {reason!r}")
    content.encode()  # half a surrogate pair is a ValueError
    return Response(content, reason, int(reply["usage"]["completion_tokens"]))
