"""A server with OpenAI's interface, for tests: its replies are made by a function, and it can fail on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a reply is made of: a JSON value, raw bytes, or a status with or without headers.
Content = dict[str, Any] | bytes | int | tuple[int, dict[str, str]]
Reply = Callable[[str, dict[str, Any]], Content]  # path and body -> what the server says


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Serves inside the block; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(reply(self.path.removeprefix("/v1/"), body))

        def _send(self, content: Content) -> None:
            status, headers = content if isinstance(content, tuple) else (content, {})
            data = content if isinstance(content, bytes) else json.dumps(status).encode()
            with suppress(ConnectionError):  # a client that has given up
                self.send_response(status if isinstance(status, int) else 200)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait at a time; the default of 5 resets some of a test's

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
