"""Requests to a server with OpenAI's interface: timeouts, and new attempts after failures that may pass.

client = Client("--server-url", "http://localhost:8000/v1", timeout=600, retries=5)
text = client.post("completions", body, lambda reply: reply["choices"][0]["text"])
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from simpo_megatron.errors import UserError

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
_LONGEST_PAUSE = 60.0  # seconds

S = TypeVar("S")
T = TypeVar("T")


class Client:
    """A server. Safe to use from several threads.

    Args:
        flag: that names the address, for errors.
        url: with /v1 where the server has it.
        timeout: seconds of one attempt.
        retries: attempts after the first.
        pause: seconds before the second attempt; each further pause is twice as long.
    """

    def __init__(self, flag: str, url: str, timeout: float, retries: int, pause: float = 1.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{flag} {url} is not an address; it must begin with http:// or https://")
        try:
            urllib.request.Request(url)
        except ValueError as error:
            raise _no_address(f"{flag} {url}", error) from None
        self._what, self._url = f"{flag} {url}", url.rstrip("/")
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):  # the error of http.client would show the key
                raise UserError("OPENAI_API_KEY has characters that no header of a request can hold; set the key alone")
            self._headers["Authorization"] = f"Bearer {key}"

    def model(self, name: str | None) -> str:
        """The name of the model: `name`, or the first that the server lists.

        Raises:
            UserError: the server does not answer, or does not have the model.
        """
        found = self._request("models", None, lambda reply: [str(model["id"]) for model in reply["data"]])
        if not found or name not in (None, *found):
            raise UserError(f"{self._what} does not have the model {name}; it has {', '.join(found) or 'none'}")
        return name or found[0]

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """Sends a request and reads the reply.

        Args:
            path: below the address.
            body: a JSON object.
            read: takes what is wanted from the reply. Where it raises KeyError, IndexError, TypeError or ValueError,
                the reply is broken, and the request is sent again.

        Raises:
            UserError: every attempt failed, or the server refuses the request.
        """
        return self._request(path, json.dumps(body).encode(), read)

    def _request(self, path: str, body: bytes | None, read: Callable[[Any], T]) -> T:
        request = urllib.request.Request(f"{self._url}/{path}", body, self._headers)
        problem = ""
        for attempt in range(self._retries + 1):
            pause = min(self._pause * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                    return read(json.loads(reply.read()))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {_text(error)}"
                if error.code not in _PASSING:
                    raise UserError(
                        f"{self._what} refuses /{path} ({problem}); check the flags and the server"
                    ) from None
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except http.client.InvalidURL as error:
                raise _no_address(self._what, error) from None
            except (OSError, http.client.HTTPException) as error:  # no server, a connection that broke, a timeout
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problem = f"a broken reply ({type(error).__name__}: {error})"
            if attempt < self._retries:
                time.sleep(pause)
        raise UserError(f"{self._what} fails at /{path} after {self._retries + 1} attempts ({problem}); is it running?")


def _no_address(what: str, error: Exception) -> UserError:
    return UserError(f"{what} is not an address ({error}); correct it")


def _text(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says about a failure, in one line."""
    try:
        with error:
            return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, http.client.HTTPException) as broken:  # the server hangs in the middle
        return f"its text did not arrive ({broken})"


def _seconds(text: str | None) -> float:
    """The pause that a server asks for; 0 where it asks for none."""
    try:
        return min(float(text or 0), _LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0


def on_threads(function: Callable[[S], T], items: Sequence[S], count: int) -> list[T]:
    """`function` of every item, in their order, by several threads.

    A program that is interrupted, or that ends with an error, does not wait for requests that are under way, as it
    would with a pool of `concurrent.futures`.

    Args:
        function: safe to run on several threads.
        items: its arguments.
        count: of threads.

    Raises:
        Exception: the first that `function` raises. No further item is begun then.
    """
    todo, found = iter(range(len(items))), SimpleQueue[tuple[int, T | None, Exception | None]]()
    stopped = threading.Event()

    def work() -> None:
        for i in todo:  # each number goes to one thread
            if stopped.is_set():
                return
            try:
                found.put((i, function(items[i]), None))
            except Exception as error:
                stopped.set()  # here, or this thread might begin another item before the caller knows
                found.put((i, None, error))

    for _ in range(min(count, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: list[Any] = [None] * len(items)
    try:
        for _ in items:
            i, results[i], error = found.get()
            if error is not None:
                raise error
    finally:
        stopped.set()
    return results
