"""A real HTTP server that fails on demand."""

import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder. server.faults: file name → faults, one a request until they are used up."""

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requests.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else serve
        fault(self, (self.server.folder / name).read_bytes() if (self.server.folder / name).is_file() else None)

    def log_message(self, *args) -> None:
        pass


def serve(handler: Handler, data: bytes | None, length: int | None = None, status: int = 200) -> None:
    if data is None:
        return answer(404, "Not Found")(handler, None)
    handler.send_response(status)
    if length is not None or status == 200:
        handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def answer(status: int, text: str) -> Callable:
    """A page, in nginx's words."""
    page = f"<html>\r\n<head><title>{status} {text}</title></head>\r\n<body>\r\n<h1>{status} {text}</h1>\r\n</body>\r\n"

    def fault(handler: Handler, data: bytes | None) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(page)))
        handler.end_headers()
        handler.wfile.write(page.encode())

    return fault


def cut(at: int, tell: bool = True) -> Callable:
    """The first `at` bytes, then the connection is closed. tell: it had said how many there would be."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        if tell:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:at])

    return fault


def reset(at: int) -> Callable:
    """The first `at` bytes, then a TCP reset."""

    def fault(handler: Handler, data: bytes) -> None:
        cut(at)(handler, data)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return fault


def stall(at: int, seconds: float = 20) -> Callable:
    """The first `at` bytes, then nothing."""

    def fault(handler: Handler, data: bytes) -> None:
        cut(at)(handler, data)
        handler.wfile.flush()
        handler.server.ended.wait(seconds)

    return fault


def wrong_length(by: int) -> Callable:
    """All bytes, under a Content-Length that says `by` more."""
    return lambda handler, data: serve(handler, data, len(data) + by)


def other_bytes(change: Callable[[bytes], bytes]) -> Callable:
    """A whole answer of other bytes."""
    return lambda handler, data: serve(handler, change(data))


def down(seconds: float) -> Callable:
    """From the first request on, every connection is reset for this long: use it as one fault of many."""
    begun: list[float] = []

    def fault(handler: Handler, data: bytes) -> None:
        begun.append(time.monotonic())
        if time.monotonic() - begun[0] < seconds:
            return reset(0)(handler, data)
        return serve(handler, data)

    return fault


@contextmanager
def fault_server(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """The server, with .url, .faults to set, and .requests made."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.folder, server.faults, server.requests, server.ended = folder, {}, [], threading.Event()
        server.handle_error = lambda *args: None  # a reader may hang up
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()
