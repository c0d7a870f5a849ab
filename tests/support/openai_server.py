"""A server with OpenAI's interface, for tests: its replies are made by a function, and it can fail on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a reply is made of: path and body -> a JSON value, a status, or raw bytes.
Reply = Callable[[str, dict[str, Any]], dict[str, Any] | int | bytes]


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Serves inside the block; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(reply(self.path.removeprefix("/v1/"), body))

        def _send(self, content: dict[str, Any] | int | bytes) -> None:
            status = content if isinstance(content, int) else 200
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
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
