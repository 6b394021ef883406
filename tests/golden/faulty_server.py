"""A file server, on the loopback unless told otherwise, that fails as told, and remembers what it was asked."""

import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer.

    `status` is answered in place of content. `after` bytes of the body something happens (`then`). `pause` seconds lie
    between blocks of `block` bytes. `extra` bytes are announced that do not come, `shift` moves the announced range,
    `total` is the announced size of the file. `flip` inverts the last byte. Without `ranges` the whole file comes.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    then: Literal["stall", "reset", "close"] = "close"
    pause: float = 0.0
    block: int = 1 << 16
    extra: int = 0
    shift: int = 0
    total: int | None = None
    flip: bool = False
    ranges: bool = True


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by path. `faults` of a path, or of a path and a first byte, are used up one by one.

    `always[path]` is a fault that stays. `requests` are pairs of path and `(start, stop)` or None;
    `num_connections` counts connections.
    """

    daemon_threads = True

    def __init__(self, host="127.0.0.1"):
        super().__init__((host, 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str | tuple[str, int], list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[tuple[str, tuple[int, int] | None]] = []
        self.num_connections = 0
        self.idle_timeout: float | None = None
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that go away are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body go out as two packets, of which the second would wait 40 ms for the first one's receipt.
    disable_nagle_algorithm = True

    def setup(self):
        self.timeout = self.server.idle_timeout
        with self.server.lock:
            self.server.num_connections += 1
        super().setup()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        asked = self._range()
        with server.lock:
            server.requests.append((path, asked))
            faults = (asked and server.faults.get((path, asked[0]))) or server.faults.get(path)
            fault = faults.pop(0) if faults else server.always.get(path, Fault())
        content = server.files.get(path)
        if content is None or fault.status is not None:
            self.send_response(fault.status or 404)
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop = (asked if fault.ranges else None) or (0, len(content))
        body = content[start:stop]
        self.send_response(206 if asked and fault.ranges else 200)
        if asked and fault.ranges:
            first, total = start + fault.shift, fault.total or len(content)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        if fault.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) + fault.extra))
        self.end_headers()
        if self.command == "GET":
            self._send(body[:-1] + bytes([body[-1] ^ 255]) if fault.flip else body, fault)

    def _send(self, body, fault):
        sent = body if fault.after is None else body[: fault.after]
        for first in range(0, len(sent), fault.block):
            self.wfile.write(sent[first : first + fault.block])
            self.wfile.flush()
            if fault.pause:
                time.sleep(fault.pause)
        if fault.after is None and not fault.extra:
            return
        self.close_connection = True
        if fault.then == "stall":
            self.server.closing.wait(30)
        if fault.then == "reset":
            # Without lingering, closing sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _range(self):
        value = self.headers.get("Range")
        if value is None:
            return None
        first, last = value.removeprefix("bytes=").split("-")
        return int(first), int(last) + 1
