"""A real S3 server (moto's) on loopback, with a door before it that can fail; for test_storage.py.

The server is a process of its own: it keeps what it holds when the test's own process forks, and threads do not mix.
"""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

SECRET = "hush-hush-secret-of-nobody"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDNOBODYNOBODY",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
}

SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""

Judge = Callable[[str, str, int], str]
"""(method, path, how often this very request came before) → "", "500", "reset", "lost" (done, but no answer), "cut"."""


@contextmanager
def server() -> Iterator[str]:
    """host:port of an empty S3 server."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


class Door(http.server.ThreadingHTTPServer):
    """Hands requests on to the server at `behind`, or does to them what `judge` says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Hand)
        self.behind = behind
        self.judge: Judge = lambda method, path, before: ""
        self.seen: Counter[tuple[str, str]] = Counter()
        self.done: Counter[str] = Counter()
        """How often which fault was played."""
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


class _Hand(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Door

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed while it sent: nothing comes of that, and no answer is due
            self.close_connection = True
            return None
        with self.server.lock:
            before = self.server.seen[self.command, self.path]
            self.server.seen[self.command, self.path] += 1
            fault = self.server.judge(self.command, self.path, before)
            self.server.done[fault] += 1
        if fault == "reset":
            return self._reset()
        if fault == "500":
            return self._answer(500, {}, b"<Error><Code>InternalError</Code><Message>as asked</Message></Error>")
        with closing(http.client.HTTPConnection(self.server.behind, timeout=120)) as connection:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
        if fault == "lost":
            return self._reset()
        return self._answer(response.status, dict(response.getheaders()), content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Close so that the other side gets a reset, not an end."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        pass
