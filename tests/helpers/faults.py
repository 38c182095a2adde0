"""A real HTTP server that fails on demand, damaged bytes, and a small disk."""

import ctypes
import http.server
import multiprocessing
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st

Fault = Callable[["Handler", bytes], None]
Place = Callable[[bytes], int]  # a position in the bytes that were asked for


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder, and ranges of its files. server.faults: file name → faults, one for each request."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        path = self.server.folder / name
        data = self.file = path.read_bytes() if path.is_file() else None
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        self.partial = bool(match)
        if match and data is not None:
            first = int(match[1])
            self.range = f"bytes {first}-{match[2]}/{len(data)}"
            data = data[first : int(match[2]) + 1]
        self.server.requests.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else serve
        fault(self, data)

    def begin(self, length: int | None) -> None:
        """Status and headers of a good answer. length: what it says of itself, None: nothing."""
        self.send_response(206 if self.partial else 200)
        if self.partial:
            self.send_header("Content-Range", self.range)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


def serve(handler: Handler, data: bytes | None) -> None:
    if data is None:
        return answer(404, "Not Found")(handler, b"")
    handler.begin(len(data))
    handler.wfile.write(data)


def answer(status: int, text: str) -> Fault:
    """A page, in nginx's words."""
    page = f"<html>\r\n<head><title>{status} {text}</title></head>\r\n<body>\r\n<h1>{status} {text}</h1>\r\n</body>\r\n"

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(page)))
        handler.end_headers()
        handler.wfile.write(page.encode())

    return fault


def redirect(url: str) -> Fault:
    """To the same name under another URL."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", url + handler.path.rpartition("/")[2])
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def whole(handler: Handler, data: bytes | None) -> None:
    """The whole file, whatever range was asked for."""
    handler.partial = False
    serve(handler, handler.file)


def drip(pause: float) -> Fault:
    """A byte after each pause."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data))
        for n in range(len(data)):
            handler.wfile.write(data[n : n + 1])
            if handler.server.ended.wait(pause):
                break

    return fault


def cut(place: Place, tell: bool = True) -> Fault:
    """The first bytes, then the connection is closed. tell: the header says how many there would be."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data) if tell else None)
        handler.wfile.write(data[: place(data)])

    return fault


def reset(place: Place) -> Fault:
    """The first bytes, then a TCP reset."""

    def fault(handler: Handler, data: bytes) -> None:
        cut(place)(handler, data)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return fault


def stall(place: Place, seconds: float = 20) -> Fault:
    """The first bytes, then nothing."""

    def fault(handler: Handler, data: bytes) -> None:
        cut(place)(handler, data)
        handler.wfile.flush()
        handler.server.ended.wait(seconds)

    return fault


def wrong_length(by: int) -> Fault:
    """All bytes, under a Content-Length that says `by` more."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data) + by)
        handler.wfile.write(data)

    return fault


def other_bytes(change: Callable[[bytes], bytes]) -> Fault:
    """A complete answer of other bytes."""
    return lambda handler, data: serve(handler, change(data))


def down(seconds: float) -> Fault:
    """From the first request on, every connection is reset for this long: use it as one fault of many."""
    begun: list[float] = []

    def fault(handler: Handler, data: bytes) -> None:
        begun.append(time.monotonic())
        if time.monotonic() - begun[0] < seconds:
            return reset(lambda data: 0)(handler, data)
        return serve(handler, data)

    return fault


@contextmanager
def fault_server(folder: Path, ranges: bool = True, port: int = 0) -> Iterator[http.server.ThreadingHTTPServer]:
    """The server, with .url, .faults to set, and .requests made. ranges: False for one that ignores them."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.folder, server.faults, server.requests, server.ended = folder, {}, [], threading.Event()
        server.ranges = ranges
        server.handle_error = lambda *args: None  # a reader may hang up
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # shutdown() waits for a poll
        yield server
        server.ended.set()
        server.shutdown()


def small_disk(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    if os.geteuid() or os.system(f"mount -t tmpfs -o {','.join(options)} none '{folder}'"):
        pytest.skip("needs the right to mount a small tmpfs")


def small_shm(size: int) -> int:
    """In a forked process: give it, and those that it starts, a /dev/shm of so many bytes. Not 0 if that fails."""
    new_mounts = ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS
    mount = f"mount --make-rprivate / && mount -t tmpfs -o size={size} none /dev/shm"
    return new_mounts or os.system(f"({mount}) 2>/dev/null")


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and theirs."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    started = [int(child) for thread in threads for child in thread.read_text().split()]
    return started + [pid for child in started for pid in descendants(child)]


def ended(pids: list[int]) -> bool:
    """Whether all these processes end within 10 s. Some may only wait to be reaped."""

    def runs(pid: int) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    give_up = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < give_up:
        time.sleep(0.02)
    return not any(map(runs, pids))


def killed(seconds: float, work: Callable[[], object]) -> list[int]:
    """Let a process do this work, kill it then. Returns its descendants of that moment."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    time.sleep(seconds)
    started = descendants(process.pid)
    process.kill()
    process.join()
    return started


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """These bytes after up to five changes of a kind that disks and networks make."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 5))):
        where = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 2)):
            case 0:
                data[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[where:]
            case 2:
                data[where:where] = draw(st.binary(max_size=600))
    return bytes(data)
