"""A real HTTP server that fails on demand, damaged bytes, and a small disk."""

import ctypes
import http.server
import json
import multiprocessing
import os
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st

Fault = Callable[["Handler", bytes], object]
Place = Callable[[bytes], int]  # a position in the bytes that were asked for


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder, and ranges of its files; also as the data set me/data of a Hugging Face hub.

    server.faults: file name → faults, one for each request.
    """

    name = ""  # of the file that is asked for
    protocol_version = "HTTP/1.0"  # a connection for each request

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = urllib.parse.urlsplit(self.path).path.strip("/")  # of a proxy's requests too
        self.name = name = name.rpartition("/")[2] if "/resolve/" in name else name
        path = self.server.folder / name
        data = self.file = path.read_bytes() if path.is_file() else None
        if name.startswith("api/datasets/me/data"):
            files = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                     for path in self.server.folder.iterdir()]
            kind = f"{name}//".split("/")[4]
            data = json.dumps({"tree": files, "paths-info": []}.get(kind, {"id": "me/data"})).encode()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.range = "" if not match or data is None else f"bytes {match[1]}-{match[2]}/{len(data)}"
        if self.range:
            data = data[int(match[1]) : int(match[2]) + 1]
        self.server.requests.append(name)
        self.server.passwords.append(self.headers.get("Authorization"))
        faults = self.server.faults.get(name)
        (faults.pop(0) if faults else serve)(self, data)

    def do_POST(self) -> None:
        self.do_GET()

    def begin(self, length: int | None) -> None:
        """Status and headers of a good answer. length: what it says of itself, None: nothing."""
        self.send_response(206 if self.range else 200)
        if self.range:
            self.send_header("Content-Range", self.range)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.server.statuses.append((self.name, int(code)))


def serve(handler: Handler, data: bytes | None) -> None:
    if data is None:
        return answer(404, "Not Found")(handler, b"")
    handler.begin(len(data))
    handler.wfile.write(data)


def answer(status: int, text: str, **headers: str) -> Fault:
    """A page, in nginx's words."""
    page = f"<html>\r\n<head><title>{status} {text}</title></head>\r\n<body>\r\n<h1>{status} {text}</h1>\r\n</body>\r\n"

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": len(page)}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(page.encode())

    return fault


def redirect(url: str) -> Fault:
    """To the same name under another URL."""
    return lambda handler, data: answer(302, "Found", Location=url + handler.path.rpartition("/")[2])(handler, data)


def cut(place: Place, tell: bool = True, then: Callable[[Handler], object] = lambda handler: None) -> Fault:
    """The first bytes, then the connection is closed. tell: the header says how many there would be."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data) if tell else None)
        handler.wfile.write(data[: place(data)])
        then(handler)

    return fault


def reset(place: Place) -> Fault:
    """The first bytes, then a TCP reset."""

    def hang_up(handler: Handler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return cut(place, then=hang_up)


def stall(place: Place, seconds: float = 20) -> Fault:
    """The first bytes, then nothing."""
    return cut(place, then=lambda handler: handler.server.ended.wait(seconds))


def drip(pause: float) -> Fault:
    """A byte after each pause."""
    return cut(lambda data: 0, then=lambda handler: [
        handler.wfile.write(b"x") for _ in iter(lambda: handler.server.ended.wait(pause), True)
    ])  # fmt: skip


def other_bytes(change: Callable[[bytes], bytes]) -> Fault:
    """A complete answer of other bytes."""
    return lambda handler, data: serve(handler, change(data))


def whole(handler: Handler, data: bytes) -> None:
    """The whole file, whatever range was asked for."""
    handler.range = ""
    serve(handler, handler.file)


@contextmanager
def fault_server(folder: Path, port: int = 0) -> Iterator[http.server.ThreadingHTTPServer]:
    """The server, with .url, .faults to set, and what was asked and answered."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.folder, server.faults, server.ended = folder, {}, threading.Event()
        server.requests, server.statuses, server.passwords = [], [], []
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
    return new_mounts or os.system(f"(mount --make-rprivate / && mount -t tmpfs -o size={size} x /dev/shm) 2>/dev/null")


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and theirs."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    started = [int(child) for thread in threads for child in thread.read_text().split()]
    return started + [pid for child in started for pid in descendants(child)]


def stat(pid: int) -> list[str]:
    """State, parent, process group and so on; that of a dead process if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return ["Z", "0", "0"]


def group(number: int) -> list[int]:
    """The processes of a process group."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if stat(pid)[2] == str(number)]


def ended(pids: list[int]) -> bool:
    """Whether all these processes end within 10 s. Some may only wait to be reaped."""
    give_up = time.monotonic() + 10
    while (running := any(stat(pid)[0] != "Z" for pid in pids)) and time.monotonic() < give_up:
        time.sleep(0.02)
    return not running


def killed(when: float | Callable[[list[int]], bool], work: Callable[[], object]) -> list[int]:
    """Let a process do this work, kill it after seconds, or when(its descendants). Returns these of that moment."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    give_up = time.monotonic() + (60 if callable(when) else when)
    while time.monotonic() < give_up and not (callable(when) and when(descendants(process.pid))):
        time.sleep(0.02)
    started = descendants(process.pid)
    process.kill()
    process.join()
    return started


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """These bytes after a change of a kind that disks and networks make: some are altered, lost or inserted."""
    lost = st.sampled_from([0, 1, 512, len(data)])
    return st.builds(lambda at, lost, new: data[:at] + new + data[at + lost :], st.integers(0, len(data)), lost,
                     st.sampled_from([0, 1, 512]).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
