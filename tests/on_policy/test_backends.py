"""vLLM and servers: what they are asked, servers that stumble, and requests on several threads."""

from __future__ import annotations

import io
import json
import sys
import threading
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.options import DataOptions
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.http_client import Client, on_threads
from tests.on_policy.generating import SAMPLING, TOKENS, rows_of, run
from tests.support.openai_server import serving
from tests.support.tiny import make_tokenizer


class FakeVLLM:
    """Answers with what it was asked."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def generate(self, prompts: list[dict[str, Any]], params: list[dict[str, Any]]) -> list[Any]:
        return [
            types.SimpleNamespace(
                outputs=[
                    types.SimpleNamespace(
                        text=json.dumps([prompt["prompt_token_ids"], asked]), finish_reason="stop", token_ids=[1, 2]
                    )
                ]
            )
            for prompt, asked in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeVLLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    yield


@pytest.mark.usefixtures("vllm")
def test_vllm_gets_ids_and_a_seed_for_each(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    assert run(prompts=prompts, hf_checkpoint=model, output=output, backend="vllm", top_k=4, **SAMPLING) == 0
    encoder = PairEncoder(make_tokenizer(), DataOptions(), ())
    for row in rows_of(output).values():
        for response in row["responses"]:
            ids, asked = json.loads(response["content"])
            assert ids == encoder.encode_prompts([("", row["prompt"])])[0]
            assert asked["seed"] == response["seed"] and asked["stop_token_ids"] == [1]
            assert (asked["temperature"], asked["top_k"], asked["max_tokens"], asked["n"]) == (1.0, 4, TOKENS, 1)


def test_a_server_that_stumbles(model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request meets two failures of its own kind before it is answered."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failures: dict[int, list[int | bytes]] = {}

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any] | int | bytes:
        assert (body["repetition_penalty"], body["min_p"], body["top_k"]) == (1.0, 0.0, -1)
        todo = failures.setdefault(body["seed"], [429, b"not json"] if body["seed"] % 2 else [503, b'{"choices": []}'])
        if todo:
            return todo.pop()
        text = json.dumps(body["prompt"] if path == "completions" else body["messages"])
        choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"completion_tokens": 9}}

    with serving(reply) as url:
        for api in ("completions", "chat"):
            failures.clear()
            flags = {"backend": "server", "server_url": url, "server_api": api, "retries": 2}
            output = tmp_path / f"{api}.jsonl"
            assert run(prompts=prompts, hf_checkpoint=model, output=output, **flags, **SAMPLING) == 0
            assert len(failures) == 21
            row = rows_of(output)["p0"]
            sent = json.loads(row["responses"][0]["content"])
            ids = PairEncoder(make_tokenizer(), DataOptions(), ()).encode_prompts([("", row["prompt"])])[0]
            assert sent == (ids if api == "completions" else row["prompt"])


def test_a_server_that_gives_nothing(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent until the client gives up; silent after a status; refusing, which another attempt would not change."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    release, asked = threading.Event(), list[str]()

    def silent(path: str, body: dict[str, Any]) -> int:
        release.wait()
        return 500

    def hanging(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str]]:
        return 503, {"Content-Length": "99", "Connection": "keep-alive"}

    def refusing(path: str, body: dict[str, Any]) -> int:
        asked.append(path)
        return 400

    for reply, words in (
        (silent, "after 2 attempts (timed out); is it running?"),
        (hanging, "after 2 attempts (503 Service Unavailable: its text did not arrive (timed out)); is it running?"),
        (refusing, "refuses /completions (400 Bad Request"),
    ):
        with serving(reply) as url:
            flags = {"backend": "server", "server_url": url, "retries": 1, "concurrency": 1}
            flags |= {} if reply is refusing else {"timeout": 0.2}
            assert run(prompts=prompts, hf_checkpoint=model, output=tmp_path / "r.jsonl", **flags, **SAMPLING) == 2
            release.set()
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert asked == ["completions"]


def test_the_pause_that_a_server_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are kept up to a minute; what is no number of seconds leaves the growing pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    asked = iter([(429, "7"), (503, "600"), (429, "Fri, 31 Dec 1999 23:59:59 GMT"), (429, "nan"), (429, "0.1")])

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str]] | dict[str, Any]:
        status, pause = next(asked, (200, ""))
        return {} if status == 200 else (status, {"Retry-After": pause})

    with serving(reply) as url:
        assert Client("--server-url", url, timeout=60, retries=5).post("completions", {}, str) == "{}"
    assert pauses[:2] == [7, 60]
    assert all(least <= pause <= 2 * least for least, pause in zip((2, 4, 8), pauses[2:], strict=True))


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsk-other")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Client("--server-url", "http://localhost", 1, 0)
    assert "sk-" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")  # of a file
    keys: list[str] = []

    def answer(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        keys.append(request.headers["Authorization"])
        return io.BytesIO(b"1")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert Client("--server-url", "http://localhost", 1, 0).post("x", {}, str) == "1"
    assert keys == ["Bearer sk-secret"]


def test_an_error_does_not_wait_for_other_requests() -> None:
    begun, release, ended = threading.Event(), threading.Event(), list[int]()

    def ask(number: int) -> None:
        if number == 0:
            begun.wait()
            raise UserError("no")
        begun.set()
        release.wait()
        ended.append(number)

    with pytest.raises(UserError):
        on_threads(ask, range(9), 2)
    assert not ended
    release.set()
    assert on_threads(str, range(5), 3) == list("01234")
