"""A web server on this machine that misbehaves as told, for the tests of downloads."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Route = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Passes every request on to the route of its path."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        route = self.server.routes.get(self.path, lambda handler: handler.refuse(404))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            route(self)

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent."""

    def refuse(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def start(self) -> int:
        """Returns where the requested range starts, 0 if none is requested."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def begin(self, length: int, start: int | None = None, whole: int | None = None) -> None:
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{whole}")
        self.send_header("Content-Length", str(length))
        self.end_headers()


@dataclass
class Whole:
    """Serves the content; honours ranges unless told not to."""

    content: bytes
    ranges: bool = True

    def __call__(self, handler: Handler) -> None:
        start = handler.start() if self.ranges else 0
        if start >= len(self.content):
            return handler.refuse(416)
        rest = self.content[start:]
        handler.begin(len(rest), start if start else None, len(self.content))
        handler.wfile.write(rest)


@dataclass
class Cutting:
    """Serves at most `pieces[i]` bytes to request i, then closes the connection; honours ranges."""

    content: bytes
    pieces: list[int]
    requests: int = 0

    def __call__(self, handler: Handler) -> None:
        start = handler.start()
        rest = self.content[start:]
        handler.begin(len(rest), start if start else None, len(self.content))
        piece = self.pieces[min(self.requests, len(self.pieces) - 1)]
        self.requests += 1
        handler.wfile.write(rest[:piece])
        handler.close_connection = True


@dataclass
class Crawling:
    """Serves a few bytes every tenth of a second, or after some bytes none at all."""

    content: bytes
    stall_after: int | None = None

    def __call__(self, handler: Handler) -> None:
        handler.begin(len(self.content))
        for place in range(0, len(self.content), 20):
            if self.stall_after is not None and place >= self.stall_after:
                handler.server.stop.wait(5)
                return
            handler.wfile.write(self.content[place : place + 20])
            handler.wfile.flush()
            if handler.server.stop.is_set():
                return
            if self.stall_after is None:
                time.sleep(0.1)


@dataclass
class InTurn:
    """Answers request i with route i, and with the last route from then on."""

    routes: list[Route]
    requests: int = field(default=0)

    def __call__(self, handler: Handler) -> None:
        route = self.routes[min(self.requests, len(self.routes) - 1)]
        self.requests += 1
        route(handler)


class Server(ThreadingHTTPServer):
    """The server, its routes by path, and the requests that it has seen as (path, headers in lower case)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, Route] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"
