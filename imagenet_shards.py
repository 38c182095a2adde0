"""Packs ImageNet's image files, unmodified, into 147 tar shards plus a JSON index, and reads these shards.

    python3 imagenet_shards.py --imagenet=/data/imagenet --shards=./data
    python3 imagenet_shards.py --verify --shards='pipe:gsutil cat gs://bucket/%s'

In:  DIR/{train,val}/CLASS/*.JPEG: any tree that torchvision.datasets.ImageFolder reads, or Kaggle's with a flat val/
Out: imagenet-train-000000.tar …, imagenet-val-000000.tar …   two members per image: KEY.cls, KEY.jpg
     imagenet-train.json, imagenet-val.json                   the index (wids v1): shards, blocks, checksums, classes
     _info.json                                               the number of samples per shard, for timm's reader

The shards are written by webdataset.ShardWriter. KEY is the file's stem, KEY.cls the class number in ASCII (the rank of
the class folder), KEY.jpg the file's bytes. The images of a split are shuffled once. A block is a run of 64 consecutive
samples in a shard; the index has its offset, length and CRC-32. imagenet_train.py reads block by block.

Guarantee: if the index exists, every shard that it lists is complete. Rerun the same command to resume; finished
shards are kept. The bytes do not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the imports; later end_on_signals() applies

import argparse
import base64
import contextlib
import errno
import fcntl
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import select
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import PIL.features
from PIL import Image as PillowImage
from tqdm import tqdm

# webdataset and torch are imported where they are used: importing PyTorch takes seconds.

# ---------------------------------------------------------------- errors, processes, files


class UserError(Exception):
    """A user-fixable error, in one line: the input, the problem, the remedy."""


class PermanentError(UserError):
    """A failed read that a retry cannot fix."""


class PrefixError(UserError):
    """A failed read that a wrong prefix would explain: not retried for the first file of a run."""


def warn(text: str) -> None:
    """Print a line on stderr, under the script's name."""
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """An error's text in one line; of a long one the end, where tracebacks and commands say what happened."""
    return " ".join(str(error).split())[-300:] or type(error).__name__


def count(number: int, noun: str) -> str:
    """The number and its noun: 1 shard, 2 shards, 3 classes, 4 batches."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it


def format_bytes(size: float) -> str:
    """A size in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name before the text of a UserError."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{what}: {error}") from None


def run_script(work: Callable[[], None], explain: Callable[[Exception], str | None] = lambda error: None) -> int:
    """Call work() and return the exit status: 0, or 1 after an error, which is printed in one line.

    explain: the text for an exception that is neither a UserError nor an OSError; None raises it again
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None if it was closed: ./script >&-
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        work()
        sys.stdout.flush()
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # or Python reports it once more at the exit
        message = "standard output was closed"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else reason(error)
    except Exception as error:
        message = explain(error) or ""
        if not message:
            raise
    warn(message)
    return 1


def end_on_signals(message: Callable[[], str]) -> None:
    """On SIGINT, SIGTERM or Slurm's SIGUSR1 print message() and end this process at once, with status 128 + number.

    A thread does so, which reads the signal's number from the wake-up descriptor: Python runs handlers in the main
    thread only, which may be within an import or wait for another rank. A later call replaces the message.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = [signal.SIGINT, signal.SIGTERM] + [signal.SIGUSR1] * ("SLURM_JOB_ID" in os.environ)

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) not in numbers:
            pass
        try:
            if text := message():
                print(end="\n" * sys.stderr.isatty(), file=sys.stderr)  # the terminal shows ^C, beside a progress bar
                warn(f"{signal.Signals(number).name}: {text}")
        finally:
            os._exit(128 + number)

    def restore() -> None:  # ^C is left to the main process, which ends the others
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    threading.Thread(target=watch, daemon=True).start()
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=restore)


def end_with_parent(_: int = 0) -> None:
    """End this process, and the commands that it started, soon after its parent has ended, whatever ended that."""
    parent, pid = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        while parent.is_alive() if parent else os.getppid() == pid:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def create_locked(path: Path) -> BinaryIO:
    """A new file, with a lock that ends with this process."""
    while True:
        file = open(path, "xb", buffering=1 << 20)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # or another process has removed it before it was locked
            return file
        file.close()


@contextlib.contextmanager
def open_writer(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A stream to write a file, which gets its name when the block ends without an exception: complete and on disk.

    Until then it has a temporary name, and a lock which ends with the process. sync=False: it need not survive a power
    cut, because it is checked when it is read.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")  # no two processes or machines share one
    try:
        with create_locked(temporary) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())  # or a power cut could leave the renamed file without its bytes
            os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some network file systems can't sync a folder
            if sync:
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)  # or a power cut could undo the rename
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "*") -> None:
    """Remove the temporary files that open_writer() left in killed processes. Those of running ones are locked."""
    for path in folder.glob(f"{pattern}.tmp-{'[0-9a-f]' * 12}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


# ---------------------------------------------------------------- prefix → bytes
# A source reads a range of a file. What it returns is not trusted: the caller checks its length and CRC-32.

LIMIT = 64 << 20  # bytes, of an index or a tar member; ImageNet's largest image has a quarter of that
MIN_RATE = 20_000  # bytes a second, on average over a read, below which it fails
URL = re.compile(r"([a-z][a-z0-9+.-]*)://")


def locate(prefix: str, name: str) -> str:
    """The path, URL or pipe:COMMAND of the file `name`: it replaces %s in the prefix, or is appended."""
    quoted = shlex.quote(name) if prefix.startswith("pipe:") else name
    if "%s" in prefix:  # not the % operator: a prefix may hold %20 and other percent signs
        return prefix.replace("%s", quoted)
    return prefix + quoted if prefix.startswith("pipe:") or prefix.endswith(("/", "=")) else f"{prefix}/{quoted}"


def printable(location: str) -> str:
    """A location without its secrets: URLs without user, password and query, of a command only its name and URLs."""
    location = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", location)
    location = re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?...", location)
    if not location.startswith("pipe:"):
        return location
    words = location.removeprefix("pipe:").split()
    program = next((word for word in words if "=" not in word), "")  # TOKEN=… curl …
    return " … ".join([f"pipe:{program}", *re.findall(r"[a-z0-9+]+://[^\s'\"]+", location)])


def printable_file(prefix: str, name: str) -> str:
    """The location of the file `name` without its secrets."""
    return f"{name} from {printable(prefix)}" if prefix.startswith("pipe:") else printable(locate(prefix, name))


def is_local(prefix: str) -> bool:
    """Whether a prefix is a folder."""
    return not (URL.match(prefix) or prefix.startswith("pipe:") or "%s" in prefix)


def check_rate(begun: float, received: int, timeout: float) -> None:
    """UserError if so many bytes since `begun`, a time.monotonic(), are too few."""
    seconds = time.monotonic() - begun
    if seconds > timeout + received / MIN_RATE:
        raise UserError(f"only {received} bytes in {seconds:.0f} s")


class Folder:
    """Reads files of a folder."""

    # Other errors, such as EIO, ESTALE, ETIMEDOUT and EMFILE, may pass: the folder may be on a network file system.
    PERMANENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix = prefix

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        """`length` bytes of a file; fewer only at its end. UserError, a PermanentError if a retry cannot help."""
        try:
            with open(locate(self.prefix, name), "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise (PermanentError if error.errno in self.PERMANENT else UserError)(error.strerror) from None

    def close(self) -> None:
        """Nothing is open between reads."""


# Before a command: a process that ends the command's group when this program's end of the pipe, its input, closes.
GUARD = "exec 3<&0 </dev/null; { read -r _; kill -9 0; } <&3 >/dev/null 2>&1 & exec 3<&-; "


class Command:
    """Reads the output of a command, forwards only: it is started for a file and read on as ranges are wanted.

    The command's exit status and messages only explain missing bytes; they decide nothing about those that came.
    """

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        self.name, self.position, self.closed = "", 0, False
        self.process: subprocess.Popen | None = None

    def kill(self) -> None:
        """End the command and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or runs as another user
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def start(self, name: str) -> None:
        """Start the command for a file."""
        if self.process:
            self.kill()
            self.process.stdout.close()
        self.name, self.position, self.messages = name, 0, bytearray()
        try:
            self.process = subprocess.Popen(
                GUARD + locate(self.prefix, name).removeprefix("pipe:"), shell=True, bufsize=0, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,  # a process group, so that kill() also ends the command's children
            )
        except (OSError, ValueError) as error:  # too many processes, or a null byte in the command
            raise PrefixError(reason(error)) from None

        def keep_last(stream: BinaryIO, messages: bytearray) -> None:
            with stream:
                while data := stream.read(1 << 16):
                    messages[:] = (messages + data)[-4096:]

        self.listener = threading.Thread(target=keep_last, args=(self.process.stderr, self.messages), daemon=True)
        self.listener.start()
        if self.closed:  # close() may have come before this process
            self.kill()

    def take(self, offset: int, length: int) -> bytes:
        """These bytes of the output; fewer only at its end. UserError if they come too slowly."""
        pipe, parts, poll = self.process.stdout, [], select.poll()
        begun, first = time.monotonic(), self.position
        poll.register(pipe)
        while self.position < offset + length:
            if not poll.poll(1000 * self.timeout):
                raise UserError(f"no byte for {self.timeout:g} s")
            if not (data := pipe.read(min(offset + length - self.position, 1 << 20))):
                break
            parts.append(data[max(0, offset - self.position) :])  # what precedes is discarded
            self.position += len(data)
            check_rate(begun, self.position - first, self.timeout)
        return b"".join(parts)

    def finish(self, offset: int, length: int) -> bytes:
        """take(). UserError if there are fewer bytes and the command failed."""
        data = self.take(offset, length)
        if len(data) == length:
            return data
        self.name = ""  # nothing follows: the next read starts the command again
        try:
            status = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise UserError("the command closed its output but does not end") from None
        if status:
            self.listener.join(1)
            said = printable(" ".join(self.messages.decode(errors="replace").split())[-300:]) or "no message"
            text = f"the command failed with exit status {status}: {said}"
            raise PrefixError(f"found {len(data)} bytes, then {text}" if data else text)
        return data

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        """`length` bytes of a file; fewer only at its end."""
        if self.process and name == self.name and self.position <= offset:
            with contextlib.suppress(UserError):  # a server may close a connection that waited: not an error yet
                return self.finish(offset, length)
        self.start(name)
        return self.finish(offset, length)

    def close(self) -> None:
        """From any thread: end the command; a read in progress fails, later ones too."""
        self.closed = True
        if self.process:
            self.kill()
            self.process.stdin.close()


COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gsutil -q cat {}"}  # what reads these URLs
COMMANDS |= dict.fromkeys(["http", "https"], "curl -sSfL --connect-timeout 30 {}")  # from servers that have no ranges


def as_command(prefix: str) -> str:
    """The pipe:COMMAND that reads files under a URL. PermanentError if no command is known for its protocol."""
    protocol = prefix.partition("://")[0]
    if protocol not in COMMANDS:
        raise PermanentError(f"{printable(prefix)}: cannot read {protocol}:// URLs; name a command: pipe:COMMAND %s")
    return "pipe:" + COMMANDS[protocol].format(shlex.quote(locate(prefix, "%s")))


class Web:
    """Reads ranges of files over HTTP, a request each. Obeys http_proxy and https_proxy."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        self.command: Command | None = None  # reads instead once the server has ignored a range

    def request(self, name: str, offset: int, length: int) -> urllib.request.Request:
        """The request for a range. The password is not sent to the target of a redirect."""
        url = urllib.parse.urlsplit(locate(self.prefix, name))
        if not url.hostname or url.port == 0:  # .port is a ValueError if it is not a number up to 65535
            raise ValueError("it names no host")
        user, _, host = url.netloc.rpartition("@")
        path, query = (urllib.parse.quote(part, safe="/%:=&;,+~!$'()*@?") for part in (url.path, url.query))
        host = host.encode("idna").decode() if not host.isascii() else host
        request = urllib.request.Request(url._replace(netloc=host, path=path, query=query).geturl())
        request.add_header("Range", f"bytes={offset}-{offset + length - 1}")
        if user:
            user = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {user}")
        return request

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        begun, parts, received = time.monotonic(), [], 0
        try:
            if self.command:
                return self.command.read(name, offset, length)
            with urllib.request.urlopen(self.request(name, offset, length), timeout=self.timeout) as response:
                if response.status != 206 and length < LIMIT:
                    self.command = Command(as_command(self.prefix), self.timeout)
                    warn(f"{printable(self.prefix)}: the server ignores ranges; files are read from their beginning")
                    return self.command.read(name, offset, length)
                while received < length and (data := response.read1(min(length - received, 1 << 20))):
                    parts.append(data)
                    received += len(data)
                    check_rate(begun, received, self.timeout)
                if response.length and received < length:
                    raise UserError(f"found {received} of {received + response.length} bytes")
                return b"".join(parts)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the range begins at the end of the file
                return b""
            permanent = error.code < 500 and error.code not in (408, 425, 429)
            text = f"HTTP status {error.code} {error.reason}".splitlines()[0]
            raise (PermanentError if permanent else UserError)(text) from None
        except (ValueError, http.client.InvalidURL) as error:
            raise PermanentError(f"not a valid URL ({reason(error)})") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # of URLError, an OSError
            wrong = isinstance(cause, (ssl.SSLCertVerificationError, socket.gaierror))
            raise (PrefixError if wrong else UserError)(reason(cause)) from None

    def close(self) -> None:
        """End the command, if one reads."""
        if self.command:
            self.command.close()


Source = Folder | Command | Web


def open_source(prefix: str, timeout: float) -> Source:
    """What reads files under this prefix. timeout: seconds without a byte after which a read fails."""
    if prefix.startswith(("http://", "https://")):
        return Web(prefix, timeout)
    if URL.match(prefix):
        prefix = as_command(prefix)
    return Command(prefix, timeout) if prefix.startswith("pipe:") else Folder(prefix, timeout)


def retry(
    read: Callable[[], Any], seconds: float, stop: threading.Event | None = None,
    final: tuple[type, ...] = (PermanentError,),
) -> Any:
    """read(); after a UserError again, for `seconds` after the first one, with exponential back-off and jitter.

    The pauses are 1, 2, 4 … s, at most 60, each times 0.5 to 1 at random, so that a thousand readers do not return to a
    server at once. Errors of the types in `final` are not retried; after stop.set() nothing is.
    """
    stop, deadline = stop or threading.Event(), 0.0
    for failures in itertools.count():
        try:
            return read()
        except UserError as error:
            now = time.monotonic()
            deadline = deadline or now + seconds
            if isinstance(error, final) or now >= deadline or stop.is_set():
                raise
            pause = min(min(60, 2**failures) * random.uniform(0.5, 1), deadline - now)
            warn(f"{error}; next try in {pause:.1f} s, for {deadline - now:.0f} s at most")
        stop.wait(pause)


# ---------------------------------------------------------------- index
# The index lists every block before any is read. That makes epochs exact, lengths known, and missing bytes visible.

FINAL_AT_FIRST = PermanentError, PrefixError  # errors that are not retried for the first file of a run
SHARD_NAME, INDEX_NAME = "imagenet-{}-{:06d}.tar", "imagenet-{}.json"
UNFINISHED = "imagenet-conversion-not-finished"  # kind of the file that takes the index's place meanwhile
# Names end up in a shell command and in a path: only those that are safe in both are accepted.
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar")
MAX_BLOCK = 1 << 16  # samples


class Block(NamedTuple):
    """A run of consecutive samples in one shard: the unit that is read, checked and cached."""

    shard: int  # position in Index.shards
    offset: int  # bytes
    length: int  # bytes
    samples: int
    crc32: int

    def holds(self, data: bytes) -> bool:
        """Whether these are the block's bytes."""
        return len(data) == self.length and zlib.crc32(data) == self.crc32


@dataclass(frozen=True)
class Index:
    """The index of a split.

    A sample's number is its position in the order of the blocks, which is that of the shards.
    """

    prefix: str  # of the shards
    classes: list[str]  # wnids; a label is a position in this list
    shards: list[dict[str, Any]]  # as the file lists them: url, nsamples, filesize, sha256, blocks
    blocks: list[Block]
    class_names: list[str] | None = None  # human-readable
    recipe: dict[str, Any] | None = None  # of imagenet_shards.py; None: another program wrote the shards

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [blocks + 1]: number of each block's first sample, and the total."""
        return np.cumsum([0] + [block.samples for block in self.blocks])

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    @property
    def seekable(self) -> bool:
        """Whether any range can be read. A command's output can only be read forwards."""
        return not self.prefix.startswith("pipe:")

    @cached_property
    def digest(self) -> str:
        """Of all that the order of an epoch depends on."""
        content = json.dumps([self.shards, [block.samples for block in self.blocks]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def describe(data: bytes) -> str:
    """What bytes are that should have been something else: the text of an HTML page, or how they begin."""
    if data.lstrip()[:1] == b"<":
        text = re.sub("<[^>]*>", " ", data[:4096].decode(errors="replace"))
        return f"a page that says {' '.join(text.split())[:160]!r}"
    return f"{len(data)} bytes that begin {data[:40]!r}" if data else "nothing"


def parse_index(data: bytes, prefix: str) -> Index:
    """An index from its JSON text. ValueError says what is wrong; no text can do harm."""
    try:
        content = json.loads(data)
        if content["__kind__"] == UNFINISHED:
            raise ValueError("the conversion is not finished; rerun imagenet_shards.py until it writes the index")
        shards, classes, class_names = content["shardlist"], content["classes"], content.get("class_names")
        if any("blocks" not in shard for shard in shards):
            command = f"python3 imagenet_shards.py --index-only --shards={printable(prefix)}"
            raise ValueError(f"the index lists no blocks; add them with: {command}")
        names, sizes, counts, checksums = (
            [shard[key] for shard in shards] for key in ("url", "filesize", "nsamples", "sha256")
        )
        blocks = [Block(number, *block) for number, shard in enumerate(shards) for block in shard["blocks"]]
        invalid: list[Any] = [x for x in names if not SHARD.fullmatch(x)]
        invalid += [x for x in checksums if not re.fullmatch("[0-9a-f]{64}", x)]
        invalid += [x for x in classes + (class_names or classes) if not isinstance(x, str)]
        invalid += [x for x in sizes if type(x) is not int]
        invalid += [x for x in [content.get("recipe")] if not isinstance(x, dict | None)]
        invalid += [b for b in blocks if any(type(x) is not int or not 0 <= x < 1 << 50 for x in b)]
        invalid += [b for b in blocks if not invalid and (not 0 < b.samples <= MAX_BLOCK or b.length > 1 << 30)]
        if not invalid:
            ends = [block.offset + block.length for block in blocks]
            held = [sum(block[2] for block in shard["blocks"]) for shard in shards]
            invalid += [number for number, samples in zip(counts, held) if number != samples]
            invalid += [b for b, end in zip(blocks, ends) if end > sizes[b.shard]]
            invalid += [b for a, b, end in zip(blocks, blocks[1:], ends) if a.shard == b.shard and b.offset != end]
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        cut = data.startswith(b'{\n"__kind__"') and not data.rstrip().endswith(b"}")
        found = f"its first {len(data)} bytes; it is cut" if cut else describe(data)
        raise ValueError(f"expected an index, found {found}") from None
    if invalid:
        raise ValueError(f"the index holds an invalid value, {str(invalid[0])[:80]!a}")
    if not classes or not blocks or len(set(names)) < len(shards) or len(class_names or classes) != len(classes):
        raise ValueError("the index lists no classes, no images, or a shard twice")
    return Index(prefix, classes, shards, blocks, class_names, content.get("recipe"))


def read_file(prefix: str, name: str, timeout: float) -> bytes:
    """A file of at most 64 MiB. UserError names it."""
    source = open_source(prefix, timeout)
    with naming(printable_file(source.prefix, name)), contextlib.closing(source):
        return source.read(name)


def probe(prefix: str, name: str, timeout: float) -> str:
    """Try to read ten bytes of a file: the prefix, as a command if it is a URL without ranges. UserError as read()."""
    source = open_source(prefix, timeout)
    with naming(printable_file(prefix, name)), contextlib.closing(source):
        source.read(name, 0, 10)
        return source.command.prefix if isinstance(source, Web) and source.command else source.prefix


# What a prefix lacks that is not a folder, by what it looks like.
HINTS = {
    r".*[{}*]|.*\.tar$": "give the prefix only: the index lists the shards",
    r"(https?|gs|s3):/[^/]|[\w.-]+:\d+(/|$)": "a URL begins with PROTOCOL://, such as http://",
    r"(curl|wget|gsutil|aws|cat|az|ssh)\b.* |.* %s": "a command begins with pipe:",
}


def find_hint(prefix: str) -> str | None:
    """What is probably meant by a prefix that is not a folder."""
    return next((text for pattern, text in HINTS.items() if re.match(pattern, prefix)), None)


def check_folder(prefix: str, flag: str) -> None:
    """PermanentError, with a hint, unless the prefix is a folder that exists."""
    if not Path(prefix).is_dir():
        raise PermanentError(f"{flag}: no such folder; {find_hint(prefix) or 'imagenet_shards.py makes it'}")


def read_index(shards: str, split: str, retry_for: float = 0, timeout: float = 60, index: str | None = None) -> Index:
    """Read and check imagenet-SPLIT.json under `shards`, or under `index` where it lies elsewhere than the shards.

    UserError if it does not exist or is not an index, with the remedy.
    """
    prefix, name = index or shards, INDEX_NAME.format(split)
    flag = f"{'--index' if index else '--shards'}={printable(prefix)}"
    if is_local(prefix):
        check_folder(prefix, flag)
    if is_local(prefix) and Path(prefix, split).is_dir() and not Path(prefix, name).exists():
        raise PermanentError(f"{flag}: a tree of images, not shards; pack it with imagenet_shards.py --imagenet")
    again = partial(retry, seconds=retry_for, final=FINAL_AT_FIRST)
    try:
        data = again(partial(read_file, prefix, name, timeout))
    except UserError as error:
        hint = None if prefix.startswith("pipe:") else find_hint(prefix)
        remedy = hint or ("make it with imagenet_shards.py" if is_local(prefix) else f"is {flag} right?")
        raise type(error)(f"{error}; {remedy}") from None
    try:
        found = parse_index(data, shards)
    except ValueError as error:
        raise UserError(f"{printable_file(prefix, name)}: {error}; {flag} must name the shards' place") from None
    if shards.startswith("http"):
        shards = again(partial(probe, shards, found.shards[0]["url"], timeout))
    return replace(found, prefix=open_source(shards, timeout).prefix)


# ---------------------------------------------------------------- blocks → streams
# A block is fetched and checked as a whole before any sample of it is used. So a failed read can simply be repeated.


def fetch(source: Source, index: Index, block: Block) -> bytes:
    """A block's bytes from its source, checked. UserError that names shard, block, source and what was found."""
    name = index.shards[block.shard]["url"]
    place = f"{name}, {count(block.samples, 'sample')} at byte {block.offset}"
    with naming(f"{place}, from {printable(locate(source.prefix, name))}"):
        for _ in range(2 if isinstance(source, Folder) else 1):  # a disk may be wrong once, a copy is wrong every time
            data = source.read(name, block.offset, block.length)
            if block.holds(data):
                return data
        problem = f"CRC-32 is {zlib.crc32(data):08x}, the index lists {block.crc32:08x}; found {describe(data)}"
        if len(data) < block.length:
            problem = f"found {len(data)} of {block.length} bytes, {describe(data)}"
        if isinstance(source, Folder):
            raise PermanentError(f"{problem}; copy or convert the shard again")
        raise UserError(problem)


RESERVE = 10_000_000_000  # bytes that a cache leaves free on its disk, but at most a tenth of the disk


def fetch_cached(read: Callable[[], bytes], cache: Path, index: Index, block: Block, cache_full: Event) -> bytes:
    """A block's bytes from the cache, checked; else what read() returns, which then goes into the cache.

    A file's name says which bytes it must hold. Many processes may share the folder. A disk that is nearly full or
    read-only costs only the cache: `cache_full` is set, reported once for all workers, and no more files are written.
    """
    path = cache / f"{index.shards[block.shard]['sha256'][:16]}-{block.offset}-{block.length}"
    with contextlib.suppress(OSError):
        data = path.read_bytes() if path.is_file() else b""
        if block.holds(data):
            return data
    data = read()
    if not cache_full.is_set() and (path.is_file() or not path.exists()):
        try:
            disk = shutil.disk_usage(cache)
            if disk.free - len(data) < min(RESERVE, disk.total // 10):
                raise OSError(errno.ENOSPC, "the disk is nearly full")
            with open_writer(path, sync=False) as file:
                file.write(data)
        except OSError as error:
            if not cache_full.is_set():
                cache_full.set()
                warn(f"--cache={cache}: {error.strerror}; continuing without")
    return data


def read_ahead(fetch: Callable[[Any], bytes], items: Iterable[Any], ahead: int = 4) -> Iterator[tuple[Any, bytes]]:
    """(item, fetch(item)) of each item, in order, from a daemon thread that is at most `ahead` items in advance."""
    results: queue.Queue[tuple[Any, Future] | None] = queue.Queue(ahead - 1)  # and one in hand
    stop = threading.Event()

    def work() -> None:
        for item in items:
            result: Future[bytes] = Future()
            try:
                result.set_result(fetch(item))
            except BaseException as error:
                result.set_exception(error)
            results.put((item, result))
            if stop.is_set():
                return
        results.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        while entry := results.get():
            yield entry[0], entry[1].result()
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):  # lets the thread put what it has in hand
            results.get_nowait()


def check_members(data: bytes) -> None:
    """ValueError unless these bytes are tar members that a tar reader expands to no more than they hold.

    Refused are compressed data, which WebDataset would decompress, sparse files, and members of a negative size or one
    that exceeds the data.
    """
    at = 0
    while at < len(data) and data[at]:  # zeros end an archive
        header = data[at : at + 512]
        if header[257:262] != b"ustar":
            raise ValueError(f"not a tar header at byte {at}: {describe(header)}")
        try:
            size = tarfile.nti(header[124:136])  # type: ignore[attr-defined]
        except tarfile.HeaderError:
            size = -1
        content = data[at + 512 : at + 512 + max(0, size)]
        if len(content) != size:
            raise ValueError(f"a member of {size} bytes is not in its block")
        if header[156:157] == b"S" or (header[156:157] in b"xg" and b"GNU.sparse" in content):
            raise ValueError("a member is a sparse file")
        at += 512 + -(-size // 512) * 512


def open_blocks(
    blocks: Iterable[dict[str, Any]], index: Index, retry_for: float, timeout: float, cache: Path | None = None,
    cache_full: Event | None = None,
) -> Iterator[dict[str, Any]]:
    """A stage in the place of WebDataset's url_opener: {"url", "block"} → {"url", "block", "stream"}.

    "block" is a position in index.blocks, "stream" yields its bytes, a run of tar members. They are complete and have
    the CRC-32 that the index lists. UserError as fetch(), after retries.
    """
    source, stop = open_source(index.prefix, timeout), threading.Event()

    def fetch_block(item: dict[str, Any]) -> bytes:
        block = index.blocks[item["block"]]
        read = partial(retry, partial(fetch, source, index, block), retry_for, stop)
        return fetch_cached(read, cache, index, block, cache_full) if cache else read()

    try:
        for item, data in read_ahead(fetch_block, blocks):
            try:
                check_members(data)
            except ValueError as error:
                place = f"{item['url']}, block at byte {index.blocks[item['block']].offset}"
                raise PermanentError(f"{place}: {error}; make the index again") from None
            yield item | {"stream": io.BytesIO(data)}
    finally:
        stop.set()
        source.close()


# ---------------------------------------------------------------- images

IMAGES = ("jpg", "jpeg", "png")  # extensions of a sample's image
# Pillow's warnings do not say of which image they are. Their causes, such as invalid EXIF data, do no harm.
warnings.filterwarnings("ignore", module=r"PIL\.")


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The undecoded image of a sample."""
    return next(sample[extension] for extension in IMAGES if extension in sample)


def open_image(file: BinaryIO) -> PillowImage.Image:
    """A JPEG or PNG, whatever its name says (n02105855_2933.JPEG is a PNG). Only the header is read.

    ValueError for other files, and for more pixels than Pillow allows without a warning, 89 million.
    """
    limit = PillowImage.MAX_IMAGE_PIXELS
    try:
        image = PillowImage.open(file, formats=["JPEG", "PNG"])
    except PillowImage.UnidentifiedImageError:
        raise ValueError("neither JPEG nor PNG") from None
    except PillowImage.DecompressionBombError:
        raise ValueError(f"more than {2 * limit:,} pixels; {limit:,} are allowed") from None
    if image.width * image.height > limit:
        raise ValueError(f"{image.width} × {image.height} pixels; {limit:,} are allowed")
    return image


def decode_image(data: bytes) -> PillowImage.Image:
    """The decoded image; ValueError says why it can't be decoded."""
    if not data:
        raise ValueError("empty file")
    try:
        image = open_image(io.BytesIO(data))
        image.load()
    except (ValueError, MemoryError):  # the second says nothing about the image
        raise
    except Exception as error:  # Pillow raises many kinds on invalid bytes
        raise ValueError(reason(error)) from None
    return image


def to_8_bits(image: PillowImage.Image) -> PillowImage.Image:
    """A grey image of 16 bits with 8; another one as it is. Pillow's convert() would clip most values to white."""
    if image.mode.startswith("I"):
        return image.point(lambda value: value * (1 / 256)).convert("L")
    return image


def to_rgb(image: PillowImage.Image) -> PillowImage.Image:
    """The image in RGB, whatever it was: CMYK, grey, with a palette."""
    image = to_8_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # an RGB image it would only copy


# ---------------------------------------------------------------- tree → images

# What torchvision.datasets.ImageFolder takes for an image, so that nothing is left out that it would read.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# WebDataset splits a member's name at its first dot; ustar has room for 100 bytes, ".jpg" included.
KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
# SHA-256 of ImageNet's 1,000 sorted wnids, joined by newlines; and its number of images.
IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}


class Image(NamedTuple):
    """A file in the tree."""

    path: str  # relative to the tree's root: train/n01440764/n01440764_10026.JPEG
    label: int  # class number, as torchvision assigns it
    size: int  # bytes
    key: str  # the sample's name in its shard


def find_tree(root: Path) -> Path:
    """The folder that holds train/ and val/: root, or one below it where Kaggle's archive has it."""
    paths = [root / below for below in ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    return next((path for path in paths if (path / "train").is_dir() or (path / "val").is_dir()), root)


def find_classes(root: Path, split: str) -> list[str]:
    """The sorted names of a split's class folders; none for a flat val/ of images."""
    folder = root / split
    if not folder.is_dir():
        advice = "--imagenet must name the folder that holds train/ and val/"
        if (root / ARCHIVES[split]).exists():
            advice = f"unpack {ARCHIVES[split]} with torchvision.datasets.ImageNet({str(root)!r}, {split!r})"
        raise UserError(f"{folder}: no such folder; {advice}")
    names = sorted(os.listdir(folder))
    if archives := [name for name in names if re.fullmatch(r"n\d{8}\.tar", name)]:
        found = f"{count(len(archives), 'class archive')} (first {archives[0]})"
        raise UserError(f"{folder}: {found} among the class folders; unpack each into its folder and remove it")
    classes = [name for name in names if (folder / name).is_dir()]
    if strange := [name for name in classes if not name.isprintable()]:  # for example not UTF-8
        raise UserError(f"{folder}: class folder {strange[0]!a} has an unprintable name; rename it")
    if not classes and not (split == "val" and any(name.lower().endswith(EXTENSIONS) for name in names)):
        raise UserError(f"{folder}: no class folders; expected one folder per class, {folder}/n01440764/*.JPEG")
    return classes


def find_files(folder: Path) -> list[str]:
    """The image files below a folder, sorted as torchvision sorts them; OSError if any part of it can't be read."""
    files: list[str] = []
    folders, seen = [str(folder)], set()
    for parent in folders:  # which grows meanwhile
        if (path := os.path.realpath(parent)) in seen:
            raise UserError(f"{parent}: a link to {path}, which is listed already; remove the link")
        seen.add(path)
        for entry in os.scandir(parent):
            (folders if entry.is_dir() else files).append(entry.path)
    return sorted((file for file in files if file.lower().endswith(EXTENSIONS)), key=os.path.split)


def find_beside(root: Path, *names: str) -> Path | None:
    """A file in the tree's root or up to three levels above it, as Kaggle has it (the root is ILSVRC/Data/CLS-LOC)."""
    paths = [folder / name for name in names for folder in [root, *root.absolute().parents[:3]]]
    return next(filter(Path.is_file, paths), None)


def read_labels(path: Path) -> tuple[dict[str, str], list[str]]:
    """torchvision's meta.bin: the names of each wnid, and the wnids of the validation images in file order.

    Kaggle's files: a line's text by its first word ("n01440764 tench, Tinca tinca"), and nothing.
    """
    if path.suffix != ".bin":
        text = path.read_text(encoding="utf-8", errors="replace")
        return dict(re.findall("^([^ ,\n]+)[ ,](.*)$", text, re.MULTILINE)), []
    import torch  # takes seconds

    try:
        names, wnids = torch.load(path, weights_only=True)
        return {wnid: ", ".join(words) for wnid, words in names.items()}, list(wnids)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: not torchvision's meta.bin ({type(error).__name__}); remove it") from None


def read_val_labels(root: Path, path: Path | None, files: list[str]) -> list[str]:
    """The wnid of each file of a flat val/, from LOC_val_solution.csv or meta.bin: `path`, or found beside the tree."""
    path = path or find_beside(root, "LOC_val_solution.csv", "meta.bin")
    if not path:
        raise UserError(
            f"{root / 'val'}: {count(len(files), 'image')} but no class folders; name Kaggle's LOC_val_solution.csv or "
            "torchvision's meta.bin with --val-labels, move the images into class folders, or use --splits=train"
        )
    labels, wnids = read_labels(path)
    try:  # a line is ILSVRC2012_val_00048981,n03995372 85 1 499 272 …
        wnids = wnids or [labels[Path(file).stem].split()[0] for file in files]
        return [wnid for _, wnid in zip(files, wnids, strict=True)]
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: not a label for each image of {root / 'val'} ({error}); check both") from None


def make_keys(files: list[tuple[str, str]]) -> list[str]:
    """A key per (path, class): the stems if valid and unique, otherwise CLASS-STEM, made valid and unique."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path, _ in files]
    if len(set(stems)) == len(stems) and all(map(KEY.fullmatch, stems)):
        return stems
    keys: dict[str, None] = {}
    for stem, (path, name) in zip(stems, files):
        key = re.sub("[^A-Za-z0-9_-]", "_", f"{name}-{stem}")
        if key in keys or len(key) > 95:
            key = f"{key[:80]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:14]}"
        keys[key] = None
    return list(keys)


def list_split(root: Path, split: str, val_labels: Path | None = None) -> tuple[list[str], list[Image]]:
    """The classes and images of a split, sorted. UserError or OSError for a tree that can't be read completely.

    The classes are those of train/, if it exists, of which val/ may lack some.
    """
    folders = find_classes(root, split)
    train = find_classes(root, "train") if split == "val" and (root / "train").is_dir() else []
    files = [(file, name) for name in folders for file in find_files(root / split / name)]
    if not folders:
        names = find_files(root / split)
        files = list(zip(names, read_val_labels(root, val_labels, names)))
    elif beside := [name for name in {*os.listdir(root / split)} - {*folders} if name.lower().endswith(EXTENSIONS)]:
        warn(f"{root / split}: {count(len(beside), 'image')} beside the class folders left out, {min(beside)!a} …")
    found = {name for _, name in files}
    classes = train or folders or sorted(found)
    if unknown := sorted({*folders, *found} - {*classes}):
        first = f"{', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}"
        first = first.encode("ascii", "backslashreplace").decode()  # names may differ in Unicode normalisation only
        problem = f"train/ and val/ differ in {count(len(unknown), 'class')} ({first})"
        raise UserError(f"{root}: {problem}, so class numbers would; give both the same")
    if (missing := sorted({*classes} - found)) and not train:
        raise UserError(f"{root / split / missing[0]}: no images in this class folder; remove it")
    if missing:
        warn(f"{root / split}: no images of {count(len(missing), 'class')} of train/, {missing[0]!a} …")
    start, labels = len(os.path.join(root / split, "")), {name: label for label, name in enumerate(classes)}
    keys = make_keys([(file[start:], name) for file, name in files])
    return classes, [
        Image(f"{split}/{file[start:]}", labels[name], os.path.getsize(file), key)
        for (file, name), key in zip(files, keys)
    ]


def is_imagenet(classes: list[str]) -> bool:
    """Whether these are the 1,000 classes of ImageNet, in their order."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest() == IMAGENET_CLASSES


def find_class_names(root: Path | None, classes: list[str]) -> list[str] | None:
    """Human-readable names in label order, for example "tench, Tinca tinca"; None if they are not known."""
    path, names = root and find_beside(root, "LOC_synset_mapping.txt", "meta.bin"), {}
    with contextlib.suppress(UserError, OSError):  # an unrelated meta.bin
        names = read_labels(path)[0] if path else {}
    if set(classes) <= set(names):
        return [names[wnid] for wnid in classes]
    if is_imagenet(classes):
        from torchvision.models import ResNet50_Weights  # takes seconds

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return None


# ---------------------------------------------------------------- images → plan
# Everything is decided here, from names and sizes alone. So any process can write any shard, in any order and any
# number of times, and always writes the same bytes.


def plan_shards(images: list[Image], seed: int, maxsize: int, maxcount: int) -> list[list[Image]]:
    """Shuffle the images and divide them into shards.

    A shard is closed as webdataset.ShardWriter does it: once it holds maxsize bytes or maxcount samples.
    """
    images = images.copy()
    random.Random(seed).shuffle(images)
    shards: list[list[Image]] = []
    size = maxsize
    for image in images:
        if size >= maxsize or len(shards[-1]) >= maxcount:
            shards.append([])
            size = 0
        shards[-1].append(image)
        size += image.size + len(str(image.label))
    return shards


class Plan(NamedTuple):
    """The conversion of one split."""

    root: Path
    split: str
    shards: list[list[Image]]
    recipe: dict[str, Any]  # what decides the bytes
    about: dict[str, Any]  # what the index says beside the shards: classes, class_names, recipe


def make_plan(root: Path, split: str, recipe: dict[str, Any], val_labels: Path | None = None) -> Plan:
    """List one split and plan its shards; reads no image. `recipe` has seed, maxsize, maxcount, block_size and resize.

    The plan goes by the sizes of the originals, so --resize makes smaller shards of the same samples.
    """
    classes, images = list_split(root, split, val_labels)
    if is_imagenet(classes) and len(images) != IMAGENET_IMAGES[split]:
        expected = f"ImageNet has {IMAGENET_IMAGES[split]:,}; is the tree complete?"
        warn(f"{root / split}: {count(len(images), 'image')}, {expected}")
    tree = hashlib.sha256()
    for image in images:
        tree.update(b"%s %d %d\n" % (os.fsencode(image.path), image.label, image.size))
    shards = plan_shards(images, recipe["seed"], recipe["maxsize"], recipe["maxcount"])
    recipe = recipe | {"images": len(images), "shards": len(shards), "tree": tree.hexdigest()}
    about = {"classes": classes, "class_names": find_class_names(root, classes), "recipe": recipe}
    return Plan(root, split, shards, recipe, about)


# ---------------------------------------------------------------- images → one shard
# The only part that touches images: their bytes are copied unmodified after a look at both ends.


def validate_image(data: bytes, decode: bool = False) -> None:
    """ValueError if these bytes are not a JPEG or PNG that can be decoded.

    Nearly all complete files pass by their first and last bytes; only others are decoded, or all with `decode`.
    """
    jpeg, png = data.startswith(b"\xff\xd8\xff"), data.startswith(b"\x89PNG\r\n\x1a\n")
    part, end = (b"\xff\xda", b"\xff\xd9") if jpeg else (b"IDAT", b"IEND")  # how the last part begins and ends
    complete = (jpeg or png) and end in data[-1024:]
    if not complete and data.endswith(b"\0") and data.rfind(end) < data.rfind(part):
        raise ValueError("zeros in the place of its end")  # as a power cut leaves them; Pillow decodes them
    if decode or not complete:
        decode_image(data)
    elif png or len(data) * 8 * 64 > PillowImage.MAX_IMAGE_PIXELS:  # a JPEG has a bit or more for each 8 × 8 pixels
        open_image(io.BytesIO(data))


def resize_image(data: bytes, pixels: int, quality: int) -> bytes:
    """A JPEG of the image with a shorter side of `pixels`; the bytes unmodified if it has no more than that.

    ValueError if they can't be decoded. `quality` is libjpeg's, 1 to 95.
    """
    image = decode_image(data)
    scale = pixels / min(image.size)
    if scale >= 1:
        return data
    image = to_8_bits(image)
    image = image if image.mode == "L" else to_rgb(image)
    size = round(image.width * scale), round(image.height * scale)
    stream = io.BytesIO()
    image.resize(size, PillowImage.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def read_files(paths: list[Path], number: int = 16) -> Iterator[bytes]:
    """The files' bytes, in order. The kernel fetches `number` of them ahead, which keeps a disk busy."""
    for path, later in itertools.zip_longest(paths, paths[number:]):
        try:
            if later and hasattr(os, "posix_fadvise"):  # macOS lacks it
                with open(later, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{error.filename or path}: {error.strerror}; fix it and rerun") from None
        yield data


def make_samples(plan: Plan, images: list[Image], invalid: list[list[str]]) -> Iterator[dict[str, Any]]:
    """WebDataset's samples of these images. Those of invalid images are left out; [path, problem] tells of each."""
    resize = plan.recipe["resize"]
    for image, data in zip(images, read_files([plan.root / image.path for image in images])):
        if len(data) != image.size:
            problem = f"{len(data)} bytes, but {image.size} when listed; do not change the tree and rerun"
            raise UserError(f"{plan.root / image.path}: {problem}")
        try:
            if len(data) > LIMIT:  # of a reader
                raise ValueError(f"{format_bytes(len(data))}; {format_bytes(LIMIT)} are allowed")
            validate_image(data)
            jpg = resize_image(data, *resize[:2]) if resize else data
        except ValueError as error:
            invalid.append([image.path, reason(error)])
        else:
            yield {"__key__": image.key, "jpg": jpg, "cls": image.label}


class ShardStream:
    """A shard's file, written or read once, forwards. From the bytes that pass it makes the shard's index entry."""

    def __init__(self, name: str, block_size: int, file: BinaryIO) -> None:
        self.name, self.block_size, self.file = name, block_size, file
        self.rest = bytearray()  # what was read, but belongs to a sample whose end is not known
        self.ends: list[int] = []  # positions where samples end that have not passed completely
        self.size, self.sha256 = 0, hashlib.sha256()  # of all that has passed
        self.start, self.samples, self.crc32 = 0, 0, 0  # of the block that has begun
        self.block: list[int] = []  # it, up to its last sample: [offset, length, samples, CRC-32]
        self.blocks: list[list[int]] = []  # those before

    def write(self, data: bytes) -> None:
        if not self.file.closed:  # tarfile writes once more when a shard is given up
            self.file.write(data)
            self.add(data)

    def read(self, length: int) -> bytes:
        """Bytes that take() adds later. ValueError if there are more than 256 MiB of them."""
        data = self.file.read(length)
        self.rest += data
        if len(self.rest) > 4 * LIMIT:
            raise ValueError(f"{format_bytes(len(self.rest))} without the end of a sample")
        return data

    def take(self, position: int) -> bytes:
        """Add what was read up to this position."""
        data = bytes(self.rest[: position - self.size])
        del self.rest[: len(data)]
        self.add(data)
        return data

    def add(self, data: bytes) -> None:
        self.sha256.update(data)
        while self.ends and self.ends[0] <= self.size + len(data):
            length = self.ends.pop(0) - self.size
            self.crc32, data = zlib.crc32(data[:length], self.crc32), data[length:]
            self.size, self.samples = self.size + length, self.samples + 1
            self.block = [self.start, self.size - self.start, self.samples, self.crc32]
            if self.samples == self.block_size:
                self.end_block()
        self.crc32, self.size = zlib.crc32(data, self.crc32), self.size + len(data)

    def end_block(self) -> None:
        self.blocks += [self.block] if self.samples else []
        self.start, self.samples, self.crc32 = self.size, 0, 0

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index, at its end."""
        self.take(self.size + len(self.rest))
        self.end_block()
        counts = {"nsamples": sum(samples for _, _, samples, _ in self.blocks), "filesize": self.size}
        return {"url": self.name} | counts | {"sha256": self.sha256.hexdigest(), "blocks": self.blocks}


class InvalidImagesError(Exception):
    """A shard with invalid images, which is not kept; args[0] lists their [path, problem]."""


def write_shard(plan: Plan, number: int, images: list[Image], folder: Path, skip_invalid: bool) -> dict[str, Any]:
    """Write one shard and return its entry in the index, in which "skipped" lists [path, problem] of invalid images.

    InvalidImagesError if there are any and they are not to be skipped: all images are read, but no shard is stored.
    """
    import webdataset as wds

    name = SHARD_NAME.format(plan.split, number)
    invalid: list[list[str]] = []
    with open_writer(folder / name) as file:
        stream = ShardStream(name, plan.recipe["block_size"], file)
        writer = wds.ShardWriter(
            f"imagenet-{plan.split}-%06d.tar", start_shard=number, maxcount=len(images), maxsize=math.inf, verbose=0,
            opener=lambda name: stream,
            mtime=0,  # a float time would add a kilobyte of PAX headers to every member, and change with every run
        )
        for sample in make_samples(plan, images, invalid):
            writer.write(sample)
            stream.ends.append(writer.tarstream.tarstream.offset)  # its last bytes have not passed: tarfile keeps some
        if invalid and not skip_invalid:
            raise InvalidImagesError(invalid)
        writer.close()  # without `with`, which would also complete a shard after an exception
        return stream.entry() | ({"skipped": invalid} if invalid else {})


# ---------------------------------------------------------------- plan → all shards and the index

OTHER = {"train": "val", "val": "train"}
RECORDS = ".finished"  # folder in the target, with a file per finished shard


def run_jobs(function: Callable, jobs: dict[Any, tuple], workers: int) -> Generator[tuple[Any, Future]]:
    """Call function(*jobs[key]) for each key in `workers` processes; yield (key, future) of those that end."""
    import webdataset  # noqa: F401  # takes seconds: here, so that the workers, which are forked, have it

    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        try:
            futures = {pool.submit(function, *job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future
        finally:  # nobody waits for other results; and the pool would wait for ever if a worker is killed just now
            for process in set(multiprocessing.active_children()) - set(others):
                process.kill()


def summarize(entries: list[dict[str, Any]]) -> str:
    """What these entries of an index amount to."""
    samples, size = (sum(entry[field] for entry in entries) for field in ("nsamples", "filesize"))
    return f"{count(len(entries), 'shard')}, {count(samples, 'image')}, {format_bytes(size)}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def store(path: Path, text: str) -> None:
    """Write a small file, unless it has this text already: a finished folder may be read-only."""
    if not path.is_file() or path.read_bytes() != text.encode():
        with open_writer(path) as file:
            file.write(text.encode())


def format_index(content: dict[str, Any]) -> str:
    """The index as JSON with one line per shard, so that it is readable and small."""
    shards = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in content["shardlist"])
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "shardlist")
    return "{\n" + ",\n".join(lines) + f',\n"shardlist": [\n{shards}\n]\n}}\n'


def write_index(folder: Path, split: str, about: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write imagenet-SPLIT.json in the format of wids, which ignores the keys that are ours; without entries, a stub.

    Then _info.json for timm's reader (--dataset wds/imagenet --data-dir FOLDER), from the complete indexes.
    """
    path = folder / INDEX_NAME.format(split)
    head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"imagenet-{split}"}
    message = "The conversion is not finished: rerun the same imagenet_shards.py command to resume it."
    text = json.dumps({"__kind__": UNFINISHED, "message": message} | about, indent=1) + "\n"
    if entries:
        text = format_index(head | about | {"shardlist": entries})
        try:
            parse_index(text.encode(), str(folder))  # what a reader would refuse is not written
        except ValueError as error:
            raise UserError(f"{path}: not written, because {error}") from None
    store(path, text)
    splits = {}
    for ours, name in (("train", "train"), ("val", "validation")):
        with contextlib.suppress(KeyError, TypeError):  # no index, or a stub
            shards = read_json(folder / INDEX_NAME.format(ours))["shardlist"]
            lengths, files = [shard["nsamples"] for shard in shards], [shard["url"] for shard in shards]
            splits[name] = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
    store(folder / "_info.json", json.dumps({"splits": splits}, indent=1) + "\n")
    if entries:
        skipped = sum(len(entry.get("skipped", [])) for entry in entries)
        note = f", {count(skipped, 'invalid image')} skipped" if skipped else ""
        print(f"# {path}: {summarize(entries)}, {count(len(about['classes']), 'class')}{note}")


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards that are named as this script names them."""
    return sorted(path for path in folder.glob("*.tar") if re.fullmatch(rf"imagenet-{split}-\d{{6,}}\.tar", path.name))


def check_target(plan: Plan, folder: Path) -> None:
    """UserError if the folder holds shards of another conversion."""
    index, shards, problem = folder / INDEX_NAME.format(plan.split), find_shards(folder, plan.split), ""
    if index.exists():
        then, now = read_json(index).get("recipe"), plan.recipe
        problem = f"{index.name} was not written by this program"
        if isinstance(then, dict):
            differing = [key for key in now if then.get(key) != now[key]]
            changes = "; ".join(f"{key} {then.get(key)} then, {now[key]} now" for key in differing)
            problem = changes and f"its {plan.split} shards have another recipe ({changes})"
    elif shards:
        problem = f"holds {count(len(shards), f'{plan.split} shard')} without an index"
    if problem:
        advice = "use the same tree and arguments, another --shards, --overwrite to start over, or --index-only"
        raise UserError(f"{folder}: {problem}; {advice}")


def clear_target(plan: Plan, folder: Path) -> None:
    """Take the index and the records away from a split's shards, so that all are written anew; remove surplus ones."""
    write_index(folder, plan.split, plan.about, [])  # a stub
    for path in find_shards(folder, plan.split):
        (folder / RECORDS / f"{path.name}.json").unlink(missing_ok=True)
        if path.name >= SHARD_NAME.format(plan.split, len(plan.shards)):  # the others will be replaced
            path.unlink()


def finished_shards(plan: Plan, folder: Path, skip_invalid: bool) -> dict[int, dict[str, Any]]:
    """Index entries, by shard number, of the shards that any run of this conversion has finished.

    A shard that lacks invalid images is not finished for a run that does not skip them: they may be fixed.
    """
    finished = {}
    for number in range(len(plan.shards)):
        name = SHARD_NAME.format(plan.split, number)
        record = read_json(folder / RECORDS / f"{name}.json")
        with contextlib.suppress(OSError, KeyError, TypeError):
            entry = record["entry"]
            kept = (folder / name).stat().st_size == entry["filesize"] and record["recipe"] == plan.recipe
            if kept and (skip_invalid or "skipped" not in entry):
                finished[number] = entry
    return finished


def write_shards(plan: Plan, folder: Path, numbers: list[int], skip_invalid: bool, workers: int) -> None:
    """Write these shards and record each. UserError if there are invalid images that are not to be skipped."""
    starts = list(itertools.accumulate(map(len, plan.shards), initial=0))
    brief = plan._replace(shards=[])  # a worker gets the images of its shard only
    jobs = {number: (brief, number, plan.shards[number], folder, skip_invalid) for number in numbers}
    images, invalid, start = sum(len(plan.shards[n]) for n in numbers), [], time.monotonic()
    with (
        tqdm(total=images, desc=plan.split, unit=" images", disable=None) as bar,
        contextlib.closing(run_jobs(write_shard, jobs, workers)) as results,
    ):
        for number, future in results:
            bar.update(len(plan.shards[number]))
            try:
                entry = future.result()
            except InvalidImagesError as error:
                invalid += error.args[0]
                continue
            name, record = entry["url"], {"recipe": plan.recipe, "entry": entry}
            store(folder / RECORDS / f"{name}.json", json.dumps(record))
            invalid += entry.get("skipped", [])
            size = format_bytes(entry["filesize"])
            tqdm.write(f"# writing {folder / name} {entry['nsamples']} {size} {starts[number]}")
    for path, problem in sorted(invalid):
        warn(f"invalid image {plan.root / path}: {problem}")
    if invalid and not skip_invalid:
        problem = f"{count(len(invalid), 'invalid image')}, listed above; fix them"
        advice = "or give --skip-bad to leave them out, and rerun; finished shards are kept"
        raise UserError(f"{plan.root / plan.split}: {problem}, {advice}")
    print(f"# {plan.split}: {images / (time.monotonic() - start):,.0f} images/s")


def convert(plan: Plan, folder: Path, skip_invalid: bool, workers: int) -> None:
    """Write the shards that are not finished, then the index."""
    numbers, finished = range(len(plan.shards)), finished_shards(plan, folder, skip_invalid)
    if todo := [number for number in numbers if number not in finished]:
        if finished:
            print(f"# {plan.split}: keeping {len(finished)} of {count(len(numbers), 'shard')} that are finished")
        write_index(folder, plan.split, plan.about, [])  # a stub, before any shard is replaced
        write_shards(plan, folder, todo, skip_invalid, workers)
        finished = finished_shards(plan, folder, skip_invalid)
    if lost := [number for number in numbers if number not in finished]:
        name = SHARD_NAME.format(plan.split, lost[0])
        raise UserError(f"{folder}: {name} was removed or changed meanwhile; rerun to write it again")
    write_index(folder, plan.split, plan.about, [finished[number] for number in numbers])


def convert_all(args: argparse.Namespace, splits: list[str]) -> None:
    """Convert the splits. What can be refused is refused before the first shard is written."""
    folder, root = Path(args.shards), find_tree(args.imagenet)
    hint = find_hint(args.shards)
    if not is_local(args.shards) or (hint and not folder.is_dir()):
        advice = hint or "pack into a folder, then copy that with gsutil -m rsync or aws s3 sync"
        raise UserError(f"--shards={printable(args.shards)}: not a folder; {advice}")
    if not root.is_dir():
        raise UserError(f"--imagenet={root}: no such folder; name the one that holds train/ and val/")
    for path in (folder, folder / RECORDS):
        remove_leftovers(path)
    recipe = {name: getattr(args, name) for name in ("seed", "maxsize", "maxcount", "block_size")} | {"resize": None}
    if args.resize:  # encoders differ in bytes
        libjpeg = PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")
        recipe["resize"] = [args.resize, args.quality, f"Pillow {PIL.__version__}, libjpeg {libjpeg}"]
    plans = [make_plan(root, split, recipe, args.val_labels) for split in splits]
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    for plan in plans:
        if not args.overwrite:
            check_target(plan, folder)
    needed, free = 0, shutil.disk_usage(folder).free
    for plan in [] if args.resize else plans:  # it makes images smaller, by how much is not known
        finished = {} if args.overwrite else finished_shards(plan, folder, args.skip_bad)
        for number in {*range(len(plan.shards))} - {*finished}:
            needed += sum(image.size + 2048 for image in plan.shards[number])  # two headers, a label, padding
            with contextlib.suppress(FileNotFoundError):  # what will be replaced
                needed -= (folder / SHARD_NAME.format(plan.split, number)).stat().st_size
    if needed > free:
        raise UserError(f"--shards={folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free")
    for plan in plans:
        if args.overwrite:
            clear_target(plan, folder)
    try:
        for plan in plans:
            convert(plan, folder, args.skip_bad, args.workers)
    finally:
        for path in (folder, folder / RECORDS):
            remove_leftovers(path)  # of workers that were ended


# ---------------------------------------------------------------- shards → index entries
# One function reads a shard and returns its entry: --verify compares that with the index, --index-only stores it.

CHUNK = 8 << 20  # bytes per read, so that a rotational disk that serves several readers is fast
MAX_CLASSES = 1 << 16  # where the number of classes follows from the labels


class SourceFile(io.RawIOBase):
    """A file of a source, which is read once, forwards."""

    def __init__(self, source: Source, name: str, retry_for: float) -> None:
        self.source, self.name, self.retry_for = source, name, retry_for
        self.position, self.ended = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.ended:
            return 0
        data = retry(partial(self.source.read, self.name, self.position, len(buffer)), self.retry_for)
        self.position, self.ended = self.position + len(data), len(data) < len(buffer)
        buffer[: len(data)] = data
        return len(data)


def read_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """(key, {extension: bytes}, offset of its end) of each sample, grouped as webdataset does it."""
    from webdataset.tariterators import base_plus_ext

    for key, members in itertools.groupby(tar, lambda member: base_plus_ext(member.name)[0]):
        sample: dict[str, bytes] = {}
        for member in members:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
            if key is not None and (not member.isreg() or member.issparse()):  # a sparse one may claim any size
                raise ValueError(f"{member.name}: not a regular file")
            if not 0 <= member.size <= LIMIT:
                raise ValueError(f"{member.name}: a member of {member.size} bytes")
            if key is None:  # webdataset ignores other names, such as those of folders
                continue
            extension = base_plus_ext(member.name)[1].lower()
            if extension in sample:
                raise ValueError(f"{member.name}: a second {extension} of this key")
            sample[extension] = tar.extractfile(member).read()
        if key is not None:
            yield key, sample, member.offset_data + -(-member.size // 512) * 512


def read_label(sample: dict[str, bytes], classes: int, decode: bool) -> int:
    """The class number of a sample of one image and one label. ValueError says what is wrong with it."""
    images = [data for extension, data in sample.items() if extension in IMAGES]
    if len(images) != 1 or "cls" not in sample:
        raise ValueError(f"members {', '.join(sample)}; expected cls and one of {', '.join(IMAGES)}")
    validate_image(images[0], decode)
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", sample["cls"]) or int(sample["cls"]) >= classes:
        raise ValueError(f"label {sample['cls'][:20]!r} is not a number below {classes}")
    return int(sample["cls"])


def read_shard(
    prefix: str, name: str, block_size: int, classes: int, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str], int, list[str]]:
    """Read a shard to its end: (its entry in the index, keys, highest label, problems)."""
    keys, highest, problems = [], -1, []
    with contextlib.closing(open_source(prefix, args.timeout)) as source:
        file = io.BufferedReader(SourceFile(source, name, args.retry_for), CHUNK)
        stream = ShardStream(name, block_size, file)
        try:
            if file.peek(2)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):  # gzip, bzip2, xz, zstd
                raise ValueError("compressed; unpack it to a plain tar file")
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for key, sample, end in read_samples(tar):
                    stream.ends.append(end)
                    check_members(stream.take(end))
                    keys.append(key)
                    try:
                        highest = max(highest, read_label(sample, classes, args.decode))
                    except ValueError as error:
                        problems.append(f"{key}: {error}")
            while stream.read(1 << 20):
                pass
            if len(stream.rest) < 1024 or stream.rest.strip(b"\0"):  # tarfile ends at a damaged header
                problem = f"no end of a tar file after {count(len(keys), 'sample')}; is it truncated or damaged?"
                problems = problems or [problem]
        except (UserError, MemoryError):
            raise
        except Exception as error:  # tarfile raises many kinds
            problems.append(reason(error))
    return stream.entry(), keys, highest, problems


def read_shards(
    prefix: str, names: list[str], block_size: int, classes: int, args: argparse.Namespace, index: Index | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Read all shards: (their entries, highest label).

    UserError, after a list of all problems, if there are any. Problems are also differences from the index, if it is
    given, and a key that two samples of a shard have, or of all shards if this script wrote them.
    """
    expected = {entry["url"]: entry for entry in index.shards} if index else {}
    entries, highest, problems = {}, -1, []
    owner: dict[str, str] = {}  # shard of each key
    jobs = {name: (prefix, name, block_size, classes, args) for name in names}
    with contextlib.closing(run_jobs(read_shard, jobs, args.workers)) as results:
        for name, future in tqdm(results, total=len(names), unit=" shards", disable=None):
            try:
                entry, keys, label, found = future.result()
            except UserError as error:
                problems.append(f"{name}: {error}")
                continue
            tqdm.write(f"# reading {name} {len(keys)} {format_bytes(entry['filesize'])}")
            owner = owner if index and index.recipe else {}
            entries[name], highest = entry, max(label, highest)
            for key in keys:
                found += [f"{key}: also in {owner[key]}"] if key in owner else []
                owner[key] = name
            if index and not found:
                pairs = [(key, value, expected[name].get(key)) for key, value in entry.items()]
                found = [f"{key} differs: {now} found, {then} in the index" for key, now, then in pairs if now != then]
            problems += [f"{name}: {problem[:200]}" for problem in found]
    for problem in sorted(problems):
        warn(f"problem: {problem}")
    if problems:
        advice = f"{count(len(problems), 'problem')}, listed above; write or fetch those shards again"
        raise UserError(f"--shards={printable(prefix)}: {advice}")
    return [entries[name] for name in names], highest


def verify(args: argparse.Namespace, splits: list[str]) -> None:
    """Compare every byte of the shards with the index. UserError if anything differs."""
    for split in splits:
        index = read_index(args.shards, split, args.retry_for, args.timeout, args.index and str(args.index))
        url = printable_file(str(args.index or args.shards), INDEX_NAME.format(split))
        planned = (index.recipe or {}).get("shards", len(index.shards))
        if len(index.shards) != planned:
            raise UserError(f"{url}: lists {count(len(index.shards), 'shard')}, but {planned} were made")
        if index.recipe and index.classes != sorted(index.classes):
            raise UserError(f"{url}: the classes are not in the order of the labels, which is sorted")
        names, block_size = [shard["url"] for shard in index.shards], max(block.samples for block in index.blocks)
        read_shards(index.prefix, names, block_size, len(index.classes), args, index)
        print(f"# {url}: {summarize(index.shards)}: all as the index says")


def find_names(args: argparse.Namespace, split: str) -> list[str]:
    """The names of the shards to index: those of --names, or of the shards in the folder."""
    if is_local(args.shards):
        check_folder(args.shards, "--shards")
    elif not (args.names and args.index):
        raise UserError(f"--shards={printable(args.shards)}: not a folder, so --index-only needs --names and --index")
    if args.names:
        from webdataset.shardlists import expand_urls

        try:
            names = expand_urls(args.names)
        except ValueError as error:
            raise UserError(f"--names={args.names}: {reason(error)}") from None
        if strange := [name for name in names if not SHARD.fullmatch(name)]:
            advice = "is not a file name that ends in .tar; folders belong into --shards"
            raise UserError(f"--names: {strange[0]!a} {advice}")
    else:
        names = [SHARD_NAME.format(split, number) for number in range(len(find_shards(Path(args.shards), split)))]
    missing = [name for name in names if is_local(args.shards) and not Path(args.shards, name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {count(len(names), f'{split} shard')} missing (first {[*missing, 'any'][0]})"
        raise UserError(f"{args.shards}: {what}; write them, copy them here, or name others with --names")
    return names


def read_classes(path: Path) -> tuple[list[str], list[str] | None]:
    """The classes, and their names if the file has lines such as "n01440764 tench, Tinca tinca"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = []
    if not lines:
        raise UserError(f"--classes={path}: not a text file in UTF-8 with a class a line")
    if all(re.match(r"n\d{8} ", line) for line in lines):
        return [line[:9] for line in lines], [line[10:] for line in lines]
    return lines, None


def guessed(index: dict[str, Any]) -> bool:
    """Whether the classes of an index are only numbers, as index_only() sets them."""
    return index.get("classes") == [str(number) for number in range(len(index.get("classes") or []))]


def index_only(args: argparse.Namespace, splits: list[str]) -> None:
    """Make indexes of shards that exist, of this script or of another program, and write them into a folder.

    Without --classes, the classes of an index that is there already are kept, or as many numbers as there are labels in
    both splits.
    """
    folder = args.index or Path(args.shards)
    for split in splits:
        names = find_names(args, split)
        ours, other = (read_json(folder / INDEX_NAME.format(name)) for name in (split, OTHER[split]))
        if ours.get("__kind__") == UNFINISHED:
            raise UserError(f"{folder}: the conversion is not finished; rerun its command, or name another --index")
        source = retry(partial(probe, args.shards, names[0], args.timeout), args.retry_for, final=FINAL_AT_FIRST)
        known = next((index for index in (ours, other) if index.get("classes") and not guessed(index)), {})
        classes, class_names = known.get("classes"), known.get("class_names")
        if args.classes:
            classes, class_names = read_classes(args.classes)
        entries, highest = read_shards(source, names, args.block_size, len(classes or range(MAX_CLASSES)), args)
        least = len(other.get("classes") or [])
        classes = classes or [str(label) for label in range(max(highest + 1, least))]
        about = {"classes": classes, "class_names": class_names or find_class_names(None, classes), "recipe": None}
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, split, about, entries)
        if least < len(classes) and guessed(other):
            write_index(folder, OTHER[split], about, other["shardlist"])


# ---------------------------------------------------------------- command line of both scripts


def bounded(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of this kind, int or float, within [low, high]; 1e9 is an int too."""
    noun = "whole number" if kind is int else "number"
    limits = f"of at least {low:,}" if high == math.inf else f"from {low:,} to {high:,}"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):  # int() of a fraction, NaN and infinity
            value = float(text)
            if low <= value <= high and kind(value) == value < math.inf:
                return kind(value)
        raise argparse.ArgumentTypeError(f"{text!a} is not a {noun} {limits}")

    return parse


def prefix_arg(text: str) -> str:
    """An argparse type: a folder, a URL or pipe:COMMAND. A leading ~ is expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; is a variable not set?")
    return os.path.expanduser(text)


def path_arg(text: str) -> Path:
    """An argparse type: the path of a folder or file on this machine. A leading ~ is expanded."""
    if re.match(r"[A-Za-z0-9+.-]{2,}:/|pipe:", text):  # a URL, even with a slash too few
        raise argparse.ArgumentTypeError(f"{printable(text)} is not a path on this machine")
    return Path(prefix_arg(text))


class Once(argparse.Action):
    """Store a flag's value. An error if the flag is repeated, as a shell does for unquoted braces."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.dest in parser.given:
            parser.error(f"argument {option_string}: given twice; quote a value that has braces")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except those that say nothing or that the text itself states."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default is None or action.default is False or "default:" in action.help
        return action.help if stated else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line. Flags are neither abbreviated nor repeated."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False)
        self.register("action", None, Once)
        self.given: set[str] = set()

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The flags' values; exits with status 2 after an error."""
        self.given.clear()
        args, unknown = self.parse_known_args(argv)
        if unknown:
            words = [re.split("[=:]", word)[0] if word.startswith("-") else printable(word) for word in unknown]
            quote = "; give a value as --flag=VALUE, in quotes if it contains spaces"
            hint = "" if all(word.startswith("-") for word in words) else quote
            self.error(f"unrecognized arguments: {words[0]}{' …' if words[1:] else ''}{hint}")
        return args

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, after a line."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    whole = bounded(int, 1)
    parser = Parser(
        "Pack ImageNet's image files into WebDataset shards and an index; verify or index shards.",
        "Each finished shard is a line: # writing NAME SAMPLES SIZE BEFORE, the number of samples before it.",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--imagenet", metavar="DIR", type=path_arg, help="convert the folder that holds train/ and val/")
    add("--verify", action="store_true", help="read finished shards and compare every byte with the index")
    add("--index-only", action="store_true", help="make an index of shards that another program wrote")
    add = parser.add_argument
    add("--shards", metavar="PREFIX", type=prefix_arg, default="./data",
        help="folder of shards and index; to read also http(s)://, gs://, s3://, or pipe:COMMAND that prints a file, "
        "where %%s becomes the file's name")
    add("--splits", metavar="NAMES", default="train,val", choices=["train", "val", "train,val"],
        help="train, val or train,val")
    add("--workers", metavar="N", type=bounded(int, 1, 1024), default=count_cores(),
        help="processes, with a shard each")
    add("--block-size", metavar="N", type=bounded(int, 1, MAX_BLOCK), default=64, help="samples in a block")
    add = parser.add_argument_group("with --imagenet").add_argument
    add("--seed", metavar="N", type=int, default=0, help="of the one shuffle of each split")
    add("--maxsize", metavar="BYTES", type=whole, default="1e9", help="a shard ends when it has as many")
    add("--maxcount", metavar="N", type=whole, default=100000, help="… or this many samples")
    add("--resize", metavar="PX", type=whole, help="shrink images to a shorter side of PX pixels, encoded as JPEG")
    add("--quality", metavar="Q", type=bounded(int, 1, 95), default=90, help="of these JPEGs, 1 to 95")
    add("--val-labels", metavar="FILE", type=path_arg,
        help="LOC_val_solution.csv or meta.bin for a flat val/ (default: the one beside or above the tree)")
    add("--skip-bad", action="store_true", help="leave out, and list, images that are not a valid JPEG or PNG")
    add("--overwrite", action="store_true", help="write all shards anew, also over those of another tree or arguments")
    add = parser.add_argument_group("with --verify and --index-only").add_argument
    add("--decode", action="store_true", help="decode every image")
    add("--index", metavar="DIR", type=path_arg, help="folder of the index, if it is not with the shards")
    add("--names", help="with --index-only: shards of one split, for example 'imagenet1k-train-{0000..1023}.tar'")
    add("--classes", metavar="FILE", type=path_arg, help="with --index-only: the classes in label order, one a line")
    add("--retry-for", metavar="S", type=bounded(float, 0), default=300, help="seconds to repeat a failed read")
    add("--timeout", metavar="S", type=bounded(float, 0.1), default=60,
        help="seconds without a byte after which a read fails")
    args = parser.parse_args(argv)
    if args.imagenet and (args.decode or args.index or args.names or args.classes):
        parser.error("argument --imagenet: not allowed with --decode, --index, --names or --classes")
    if args.names and (args.verify or "," in args.splits):
        parser.error("argument --names: needs --index-only, and --splits=train or --splits=val")
    return args


def explain_memory(error: Exception) -> str | None:
    """The message for a lack of memory, which also is why the system kills a process."""
    if isinstance(error, (BrokenProcessPool, MemoryError)):
        problem = "a worker process was killed" if isinstance(error, BrokenProcessPool) else "too little memory"
        return f"{problem} (out of memory?); rerun with fewer --workers; finished shards are kept"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit status: 0, or 1 after an error."""
    args = parse_args(argv)
    work = convert_all if args.imagenet else verify if args.verify else index_only
    return run_script(partial(work, args, args.splits.split(",")), explain_memory)


if __name__ == "__main__":
    end_on_signals(lambda: "rerun the same command to resume; finished shards are kept")
    sys.exit(main())
