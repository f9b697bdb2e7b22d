"""What tests of several folders share."""

import http.server
import json
import queue
import threading
from collections.abc import Iterator

import pytest

from orchestrator.webhook import URL


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator["queue.Queue[dict[str, object]]"]:
    """A server on loopback that ARRIERO_WEBHOOK_URL points to: what it was told."""
    bodies: queue.Queue[dict[str, object]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(URL, f"http://127.0.0.1:{server.server_port}/secret")
        yield bodies
        server.shutdown()
