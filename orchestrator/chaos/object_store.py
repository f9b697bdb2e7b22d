"""A real S3 server (moto) on loopback, behind a proxy that fails the requests that a scene or a test names."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class ObjectStore:
    """Fails requests, each entry one: (method, part of the path and query)."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.unavailable: list[tuple[str, str]] = []  # answered with 503
        self.cut: list[tuple[str, str]] = []  # the connection is lost in the middle of the body
        self.struck: list[str] = []
        self.endpoint = ""
        self.bucket = f"runs-{os.urandom(4).hex()}"

    @property
    def env(self) -> dict[str, str]:
        """What a client of this server needs. One attempt: the retries are ours, not the client's."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        trouble = self._trouble(method, path)
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if trouble == "503":
            environ["wsgi.input"].read(size)
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if trouble == "cut":
            environ["wsgi.input"].read(size // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                environ["wsgi.input"].read()  # what has arrived meanwhile is no next request
            raise ConnectionResetError  # the server says no more of it
        return self._application(environ, start_response)

    def _trouble(self, method: str, path: str) -> str:
        with self._lock:
            for kind, entries in (("503", self.unavailable), ("cut", self.cut)):
                for entry in entries:
                    if entry[0] == method and entry[1] in path:
                        entries.remove(entry)
                        self.struck.append(f"{kind} {method} {path}")
                        return kind
        return ""


@contextlib.contextmanager
def serving() -> Iterator[ObjectStore]:
    """A server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    http = make_server("127.0.0.1", 0, store, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{http.server_port}"
    client = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=store.endpoint, skip_instance_cache=True)
    client.mkdir(store.bucket)
    try:
        yield store
    finally:
        http.shutdown()
