"""Packs ImageNet's image files, unmodified, into 147 tar shards plus a JSON index, and reads these shards.

    python3 imagenet_shards.py --imagenet=/data/imagenet --shards=./data
    python3 imagenet_shards.py --verify --shards=gs://bucket

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

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in a background job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C ends the process at once; there is nothing to clean up

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import select
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import fsspec
import numpy as np
import PIL.features
import webdataset as wds
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

# ---------------------------------------------------------------- errors, processes, files


class UserError(Exception):
    """A user-fixable error, in one line: the input, the problem, the remedy."""


class PermanentError(UserError):
    """A failed read that a retry cannot fix."""


def reason(error: BaseException) -> str:
    """An error's text in one line; of a long one the end."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[-300:] or type(error).__name__


def warn(text: object) -> None:
    """Print a line on stderr, under the script's name, with control characters escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))
    write = print if multiprocessing.parent_process() else tqdm.write  # whose lock a killed process would keep
    write(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)


def plural(number: int, noun: str) -> str:
    """The number and its noun: 1 shard, 2 shards, 3 classes, 4 batches."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def format_bytes(size: float) -> str:
    """A size in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it


def run_script(work: Callable[[], None], explain: Callable[[Exception], str | None] = lambda error: None) -> int:
    """Call work() and return the exit status: 0, or 1 after an error, which is printed in one line.

    explain: the text for an exception that is neither a UserError nor an OSError; None raises it again
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it is closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a killed process has printed all its lines
    try:
        work()
        return 0
    except (UserError, OSError) as error:
        file = getattr(error, "filename", None)
        warn(f"{file}: {reason(error)}" if file else reason(error) if isinstance(error, OSError) else error)
    except Exception as error:
        if not (message := explain(error)):
            raise
        warn(message)
    return 1


def end_with_parent() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends, whatever ended that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # it ended before
        os._exit(1)


def run_jobs(function: Callable, jobs: dict[Any, tuple], workers: int) -> Iterator[tuple[Any, Any]]:
    """Call function(*jobs[key]) for each key in `workers` processes; yield (key, result) as they end."""
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), end_with_parent) as pool:
        try:
            futures = {pool.submit(function, *job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (BrokenProcessPool, MemoryError):
            raise UserError("a worker process was killed (out of memory?); rerun with fewer --workers") from None
        finally:  # nobody waits for other results; and the pool would wait for ever if a worker is killed just now
            for process in {*multiprocessing.active_children()} - others:
                process.kill()


def lock_folder(folder: Path) -> BinaryIO:
    """A file whose lock the kernel releases when this process and its children end. UserError if another run has it."""
    lock = open(folder / "lock", "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # other errors: some network file systems have no locks
            raise UserError(f"{folder}: another run is writing there; wait for it, or end it") from None
    return lock


def publish(temporary: Path, path: Path) -> None:
    """Give a file its name, in one step, when its bytes are on the disk."""
    for name in (temporary, path.parent):  # the folder, so that no power cut undoes a rename before this one
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.replace(temporary, path)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file in one step. It has one writer at a time; after a kill, the next one overwrites the temporary."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: not written: {reason(error)}; the previous file, if any, is kept") from None


# ---------------------------------------------------------------- prefix → bytes
# A source reads a range of a file. What it returns is not trusted: the caller checks its length and CRC-32.

LIMIT = 64 << 20  # bytes, of an index or an image; ImageNet's largest image has a quarter of that
PERMANENT = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError


def is_local(prefix: str) -> bool:
    """Whether a prefix is a folder."""
    return not ("://" in prefix or "%s" in prefix or prefix.startswith("pipe:"))


def locate(prefix: str, name: str) -> str:
    """The path, URL or pipe:COMMAND of the file `name`: it replaces %s in the prefix, or is appended."""
    if "%s" in prefix:  # not the % operator: a prefix may hold %20 and other percent signs
        return prefix.replace("%s", name)
    return prefix + name if prefix.startswith("pipe:") or prefix.endswith(("/", "=")) else f"{prefix}/{name}"


def printable(text: str, name: str = "") -> str:
    """A prefix, the file `name` under it, or an error's text, without secrets.

    URLs lose user, password and query. Of a command only its program and its URLs remain.
    """
    command = text.startswith("pipe:")
    text = re.sub(r"(\w:/+)\S*@", r"\1", text if command or not name else locate(text, name))
    text = re.sub(r"(\w:/+[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?...", text)
    if command:
        words: list[str] = []
        with contextlib.suppress(ValueError):  # a quote is not closed
            words = shlex.split(text.removeprefix("pipe:"))
        program = next((word for word in words if re.fullmatch(r"[\w./-]+", word)), "")  # not TOKEN=…
        text = " … ".join([f"pipe:{program}", *re.findall(r"[a-z0-9+]+://[^\s'\"]+", text)])
    return f"{name} from {text}" if command and name else text


async def refuse_whole_file(response: Any) -> None:
    """A hook of aiohttp: a server that ignores ranges would send a whole shard for each block."""
    if response.status == 200 and "Range" in response.request_info.headers:
        raise ValueError("the server ignores ranges; read it with --shards='pipe:curl -sSf URL'")


os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else gcsfs uses gRPC: loaders crash after a fork
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each error that it raises


def http_status(error: BaseException) -> int:
    """The HTTP status behind an error of aiohttp, gcsfs, s3fs (its cause is botocore's) or huggingface_hub, or 0."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", 0)
    return status if isinstance(status, int) else 0


class Files:
    """Reads ranges of files in a folder, or under a URL of any protocol that fsspec knows."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        http = {"client_kwargs": {"trust_env": True, "raise_for_status": refuse_whole_file}}  # obeys http_proxy
        self.options = http if prefix.startswith("http") else {}

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        """`length` bytes of a file; fewer only at its end. UserError, a PermanentError if a retry cannot help."""
        part = {"start": offset, "end": offset + length}  # by name: s3fs has another parameter in front
        try:
            path = locate(self.prefix, name)
            fs = fsspec.filesystem("file")  # fsspec keeps one of each kind a process
            if "://" in path:
                fs, path = fsspec.url_to_fs(path, **self.options)
            if fs.async_impl:
                return fsspec.asyn.sync(fs.loop, fs._cat_file, path, timeout=self.timeout, **part)
            return fs.cat_file(path, cache_type="none", **part)  # no read-ahead
        except fsspec.FSTimeoutError:
            problem, permanent = f"no answer within {self.timeout:g} s", False
        except FileNotFoundError:
            problem, permanent = "no such file", True
        except Exception as error:  # each protocol has its own kinds
            if (status := http_status(error)) == 416:  # the file ends before
                return b""
            permanent = isinstance(error, PERMANENT) or (400 <= status < 500 and status not in (408, 425, 429))
            problem = reason(Exception(f"{type(error).__name__}: {printable(str(error))}"))  # no secret is cut in two
        raise (PermanentError if permanent else UserError)(f"{printable(self.prefix, name)}: {problem}")

    def close(self) -> None:
        """Nothing is open between reads."""


# Before a command: a process that ends the command's group when this program's end of the pipe, its input, closes.
GUARD = "exec 3<&0 </dev/null; { read -r _; kill -9 0; } <&3 >/dev/null 2>&1 & exec 3<&-; "


class Command:
    """Reads the output of a command, forwards only: it is started for a file and read on as ranges are wanted.

    The command and all that it starts end with close(), or with this process. Its messages go to stderr; its exit
    status only explains missing bytes.
    """

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        self.name, self.position = "", 0
        self.process: subprocess.Popen | None = None

    def receive(self, size: int) -> bytes:
        """Some bytes, at most `size`; none at the end. UserError if none come for a time, or the command failed."""
        poll = select.poll()
        poll.register(self.process.stdout)
        if not poll.poll(1000 * self.timeout):
            raise UserError(f"no byte for {self.timeout:g} s")
        data = self.process.stdout.read(size)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its output, and does not end
            if not data and (status := self.process.wait(self.timeout)):
                raise UserError(f"exit status {status} after {self.position} bytes; its message is above")
        return data

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        """`length` bytes of a file; fewer only at its end. UserError after a failure: the next read starts anew."""
        parts: list[bytes] = []
        try:
            if name != self.name or offset < self.position:
                self.close()
                self.process = subprocess.Popen(
                    GUARD + locate(self.prefix, name).removeprefix("pipe:"), shell=True, bufsize=0,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                )
                self.name, self.position = name, 0
            while (size := offset + length - self.position) > 0 and (data := self.receive(min(size, 1 << 20))):
                parts.append(data[max(0, offset - self.position) :])  # what precedes is discarded
                self.position += len(data)
            if size > 0:
                self.name = ""
        except (UserError, OSError, ValueError) as error:  # too many processes, or a null byte in the command
            self.name = ""
            raise UserError(f"{printable(self.prefix, name)}: {reason(error)}") from None
        return b"".join(parts)

    def close(self) -> None:
        """From any thread: end the command; a read in progress fails."""
        if self.process:
            self.process.stdin.close()


Source = Files | Command


def open_source(prefix: str, timeout: float) -> Source:
    """What reads files under this prefix. timeout: seconds for a read; of a command, without a byte."""
    return (Command if prefix.startswith("pipe:") else Files)(prefix, timeout)


def retry(read: Callable[[], Any], seconds: float, stop: threading.Event | None = None) -> Any:
    """read(); after a UserError again, for `seconds` after the first one, but not after stop.set().

    The pauses are 1, 2, 4 … s, at most 60, each times 0.5 to 1 at random: a thousand readers do not return at once.
    """
    stop, deadline = stop or threading.Event(), 0.0
    for failures in itertools.count():
        try:
            return read()
        except UserError as error:
            now = time.monotonic()
            deadline = deadline or now + seconds
            if isinstance(error, PermanentError) or now >= deadline or stop.is_set():
                raise
            pause = min(min(60, 2**failures) * random.uniform(0.5, 1), deadline - now)
            warn(f"{error}; next try in {pause:.1f} s, for {deadline - now:.0f} s at most")
        stop.wait(pause)


# ---------------------------------------------------------------- index
# The index lists every block before any is read. That makes epochs exact, lengths known, and missing bytes visible.

SHARD_NAME, INDEX_NAME = "imagenet-{}-{:06d}.tar", "imagenet-{}.json"
# Names end up in a shell command and in a path: only those that are safe in both are accepted.
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar")
MAX_BLOCK, MAX_SAMPLES, MAX_CLASSES = 1 << 30, 1 << 16, 1 << 16  # bytes and samples of a block, classes


class Block(NamedTuple):
    """A run of consecutive samples in one shard: the unit that is read, checked and cached."""

    shard: int  # position in Index.entries
    offset: int  # bytes
    length: int  # bytes
    samples: int
    crc32: int

    def holds(self, data: bytes) -> bool:
        """Whether these are the block's bytes."""
        return len(data) == self.length and zlib.crc32(data) == self.crc32


@dataclass(frozen=True)
class Index:
    """The index of a split. A sample's number is its position in the order of the blocks and shards."""

    prefix: str  # of the shards
    classes: list[str]  # wnids; a label is a position in this list
    entries: list[dict[str, Any]]  # one a shard, as in the file: url, nsamples, filesize, sha256, blocks
    blocks: list[Block]
    class_names: list[str] | None = None  # human-readable

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [blocks + 1]: number of each block's first sample, and the total."""
        return np.cumsum([0] + [block.samples for block in self.blocks])

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    @property
    def seekable(self) -> bool:
        """Whether any range can be read. A command's output can only be read forwards."""
        return not self.prefix.startswith("pipe:")

    @cached_property
    def digest(self) -> str:
        """Of all that the order of an epoch depends on."""
        content = json.dumps([self.entries, [block.samples for block in self.blocks]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def parse_index(data: bytes, prefix: str) -> Index:
    """An index from its JSON text. ValueError says what is wrong; no text can do harm."""

    def check(valid: bool, what: str) -> None:
        if not valid:
            raise ValueError(f"not an index of shards: {what}")

    try:
        content = json.loads(data)
        entries, classes, class_names = content["shardlist"], content["classes"], content.get("class_names")
        for entry in entries:
            name, end, samples = entry["url"], 0, 0
            check(bool(SHARD.fullmatch(name)), f"the name {name!a:.80}")
            check(bool(re.fullmatch("[0-9a-f]{64}", entry["sha256"])), f"the checksum of {name}")
            for offset, length, number, crc32 in entry["blocks"]:
                valid = all(type(x) is int for x in (offset, length, number, crc32)) and offset == end
                check(valid and 0 < length <= MAX_BLOCK and 0 < number <= MAX_SAMPLES, f"a block of {name}")
                end, samples = end + length, samples + number
            check(samples == entry["nsamples"] and end <= entry["filesize"], f"the size of {name}")
        check(len({entry["url"] for entry in entries}) == len(entries), "a shard twice")
        check(any(entry["blocks"] for entry in entries), "no samples")
        check(all(type(name) is str for name in classes + (class_names or [])), "the classes")
        check(len(classes) > 0 and len(class_names or classes) == len(classes), "the number of classes")
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        text = reason(error) if "not an index" in str(error) else f"expected an index, found {data[:60]!r}"
        raise ValueError(text) from None
    blocks = [Block(number, *block) for number, entry in enumerate(entries) for block in entry["blocks"]]
    return Index(prefix, classes, entries, blocks, class_names)


def read_index(prefix: str, split: str, retry_for: float = 0, timeout: float = 60, index: str | None = None) -> Index:
    """Read and check imagenet-SPLIT.json under `prefix`, or under `index` where it lies elsewhere than the shards.

    A failed read is repeated for 30 s at most, so that a wrong host or command shows soon.
    """
    name, source = INDEX_NAME.format(split), open_source(index or prefix, timeout)
    try:
        with contextlib.closing(source):
            return parse_index(retry(partial(source.read, name), min(retry_for, 30)), prefix)
    except ValueError as error:
        raise UserError(f"{printable(source.prefix, name)}: {error}") from None
    except UserError as error:
        remedy = "imagenet_shards.py makes it"
        if is_local(source.prefix) and not os.path.isdir(source.prefix):
            remedy = "there is no such folder; a URL begins with http:// or the like, a command with pipe:"
        raise UserError(f"{error}; {remedy}") from None


# ---------------------------------------------------------------- blocks → streams
# A block is fetched and checked as a whole before any sample of it is used. So a failed read can simply be repeated.


def fetch(source: Source, index: Index, block: Block) -> bytes:
    """A block's bytes from its source, checked. UserError that names the shard and its source."""
    name = index.entries[block.shard]["url"]
    data = source.read(name, block.offset, block.length)
    if not block.holds(data):
        where = f"{printable(source.prefix, name)}, {plural(block.samples, 'sample')} at byte {block.offset}"
        found = f"{len(data)} of {block.length} bytes, CRC-32 {zlib.crc32(data):08x}, beginning {data[:30]!r}"
        kind = PermanentError if is_local(source.prefix) else UserError
        raise kind(f"{where}: found {found}; CRC-32 should be {block.crc32:08x}; copy or write the shard again")
    return data


RESERVE = 10_000_000_000  # bytes that a cache leaves free on its disk, but at most a tenth of the disk


def fetch_cached(read: Callable[[], bytes], cache: Path, index: Index, block: Block, cache_full: Event) -> bytes:
    """A block's bytes from the cache, checked; else what read() returns, which then goes into the cache.

    Many processes may share the folder: a file that is incomplete or wrong is read and written again. A disk that is
    nearly full or read-only costs only the cache, which `cache_full` says to all workers.
    """
    path = cache / f"{index.entries[block.shard]['sha256'][:16]}-{block.offset}-{block.length}"
    with contextlib.suppress(OSError):
        data = path.read_bytes() if path.is_file() else b""
        if block.holds(data):
            return data
    data = read()
    if not cache_full.is_set():
        try:
            disk = shutil.disk_usage(cache)
            if disk.free - len(data) < min(RESERVE, disk.total // 10):
                raise OSError("the disk is nearly full")
            path.unlink(missing_ok=True)  # a link there is not followed, a FIFO not waited for
            path.write_bytes(data)
        except OSError as error:
            if not cache_full.is_set():
                cache_full.set()
                warn(f"--cache={cache}: {reason(error)}; continuing without")
    return data


def open_blocks(
    blocks: Iterable[dict[str, Any]], index: Index, retry_for: float, timeout: float, cache: Path | None = None,
    cache_full: Event | None = None, ahead: int = 4,
) -> Iterator[dict[str, Any]]:
    """A stage in the place of WebDataset's url_opener: {"url", "block"} → {"url", "block", "stream"}.

    "block" is a position in index.blocks, "stream" yields its bytes, a run of tar members. They are complete and have
    the CRC-32 that the index lists. A daemon thread reads at most `ahead` blocks in advance. UserError as fetch(),
    after retries, where its block is due.
    """
    source, stop = open_source(index.prefix, timeout), threading.Event()
    results: queue.Queue[Any] = queue.Queue(ahead - 1)  # and one in hand

    def work() -> None:
        try:
            for item in blocks:
                block = index.blocks[item["block"]]
                read = partial(retry, partial(fetch, source, index, block), retry_for, stop)
                data = fetch_cached(read, cache, index, block, cache_full) if cache else read()
                results.put(item | {"stream": io.BytesIO(data)})
                if stop.is_set():
                    return
            results.put(None)
        except BaseException as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        source.close()
        with contextlib.suppress(queue.Empty):  # lets the thread put what it has in hand
            results.get_nowait()


# ---------------------------------------------------------------- images

IMAGES = ("jpg", "jpeg", "png")  # extensions of a sample's image
Image.MAX_IMAGE_PIXELS = 44_739_242  # Pillow raises an error at twice as many
# Pillow's warnings do not say of which image they are. Their causes, such as invalid EXIF data, do no harm.
warnings.filterwarnings("ignore", module=r"PIL\.")


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The undecoded image of a sample."""
    return next(sample[extension] for extension in IMAGES if extension in sample)


def open_image(file: BinaryIO) -> Image.Image:
    """A JPEG or PNG, whatever its name says (n02105855_2933.JPEG is a PNG): its header. ValueError for other files."""
    try:
        return Image.open(file, formats=["JPEG", "PNG"])
    except UnidentifiedImageError:  # whose text names no file, but an object in memory
        raise ValueError("neither JPEG nor PNG" if file.seek(0, os.SEEK_END) else "empty file") from None


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits with 8; another one as it is. Pillow's convert() would clip most values to white."""
    if image.mode.startswith("I"):
        return image.point(lambda value: value * (1 / 256)).convert("L")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, whatever it was: CMYK, grey, with a palette."""
    image = to_8_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # an RGB image it would only copy


def decode_image(data: bytes, load: bool = True) -> Image.Image:
    """The decoded image, or with load=False its header; ValueError says why it can't be decoded."""
    try:
        image = open_image(io.BytesIO(data))
        if load:
            image.load()
        return image
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # Pillow raises many kinds on invalid bytes
        raise ValueError(reason(error)) from None


def validate_image(data: bytes) -> None:
    """ValueError if these bytes are not a JPEG or PNG that can be decoded.

    Nearly all complete files pass by their first and last bytes; only others are decoded.
    """
    jpeg, png = data.startswith(b"\xff\xd8\xff"), data.startswith(b"\x89PNG\r\n\x1a\n")
    part, end = (b"\xff\xda", b"\xff\xd9") if jpeg else (b"IDAT", b"IEND")  # how the last part begins and ends
    if data.endswith(b"\0") and data.rfind(end) < data.rfind(part):
        raise ValueError("zeros in the place of its end")  # as a power cut leaves them; Pillow decodes them
    if not (jpeg or png) or end not in data[-1024:]:
        decode_image(data)
    elif png or 512 * len(data) > Image.MAX_IMAGE_PIXELS:  # a JPEG has a bit or more for each 8 × 8 pixels
        decode_image(data, load=False)  # refuses too many pixels


def resize_image(data: bytes, pixels: int, quality: int) -> bytes:
    """A JPEG of the image with a shorter side of `pixels`; the bytes unmodified if it has no more than that.

    ValueError if they can't be decoded. `quality` is libjpeg's, 1 to 95.
    """
    image = decode_image(data)
    scale, stream = pixels / min(image.size), io.BytesIO()
    if scale >= 1:
        return data
    image = to_8_bits(image)
    image = image if image.mode == "L" else to_rgb(image)
    size = round(image.width * scale), round(image.height * scale)
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


# ---------------------------------------------------------------- tree → image files

# What torchvision.datasets.ImageFolder takes for an image, so that nothing is left out that it would read.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# WebDataset splits a member's name at its first dot; ustar has room for 100 bytes, ".jpg" included.
KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")
# SHA-256 of ImageNet's 1,000 sorted wnids, joined by newlines; and its number of images.
IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}


class ImageFile(NamedTuple):
    """An image file in the tree."""

    path: str  # relative to the tree's root: train/n01440764/n01440764_10026.JPEG
    label: int  # class number, as torchvision assigns it
    size: int  # bytes
    key: str  # the sample's name in its shard


def find_classes(folder: Path) -> list[str]:
    """The sorted names of a split's class folders; none for a flat val/ of images."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --imagenet must name the folder that holds train/ and val/")
    names = sorted(os.listdir(folder))
    if archives := [name for name in names if name.endswith(".tar")]:
        raise UserError(f"{folder}: found {archives[0]!a}; unpack archives into class folders and remove them")
    return [name for name in names if (folder / name).is_dir()]


def find_files(folder: Path) -> list[str]:
    """The image files below a folder, sorted as torchvision sorts them; OSError if any part of it can't be read."""
    files: list[str] = []
    folders, seen = [str(folder)], set()
    for parent in folders:  # which grows meanwhile
        if (path := os.path.realpath(parent)) in seen:
            raise UserError(f"{parent}: a link to {path}, which is listed already; remove the link")
        seen.add(path)
        for entry in os.scandir(parent):
            image = entry.name.lower().endswith(EXTENSIONS)
            if image and not entry.is_dir() and not entry.is_file():
                raise UserError(f"{entry.path}: not a regular file; remove it")
            folders += [entry.path] * entry.is_dir()
            files += [entry.path] * (image and entry.is_file())
    return sorted(files, key=os.path.split)


def find_beside(root: Path, name: str) -> Path | None:
    """A file in the tree's root or up to three levels above it, as Kaggle has it (the root is ILSVRC/Data/CLS-LOC)."""
    return next(filter(Path.is_file, (folder / name for folder in [root, *root.absolute().parents[:3]])), None)


def label_flat_val(folder: Path, path: Path | None) -> list[tuple[str, str]]:
    """(file, wnid) of the images in Kaggle's flat val/, from LOC_val_solution.csv: `path`, or found beside the tree."""
    path = path or find_beside(folder.parent, "LOC_val_solution.csv")
    if not path:
        advice = "expected a folder per class, or Kaggle's LOC_val_solution.csv (--val-labels)"
        raise UserError(f"{folder}: no class folders; {advice}")
    text = path.read_text(errors="replace")  # lines such as ILSVRC2012_val_00048981,n03995372 85 1 499 272 …
    wnids = dict(re.findall(r"^(\w+),(n\d{8}) ", text, re.MULTILINE))
    try:
        return [(file, wnids[Path(file).stem]) for file in find_files(folder)]
    except KeyError as error:
        raise UserError(f"{path}: no label of {error} in {folder}; name the right file with --val-labels") from None


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


def warn_missing(where: object, classes: list[str], found: set[str]) -> None:
    """Warn of classes that have no image."""
    if missing := [name for name in classes if name not in found]:
        warn(f"{where}: no images of {plural(len(missing), 'class')}, {missing[0]!a} …")


def list_split(root: Path, split: str, val_labels: Path | None = None) -> tuple[list[str], list[ImageFile]]:
    """The classes and image files of a split, sorted. UserError or OSError for a tree that can't be read completely.

    The classes are those of train/, if it exists, of which val/ may lack some.
    """
    folder, train = root / split, root / "train"
    folders = find_classes(folder)
    files = [(file, name) for name in folders for file in find_files(folder / name)]
    if split == "val" and not folders:
        files = label_flat_val(folder, val_labels)
    elif beside := [name for name in os.listdir(folder) if name.lower().endswith(EXTENSIONS)]:
        warn(f"{folder}: {plural(len(beside), 'image')} beside the class folders left out, {min(beside)!a} …")
    found = {name for _, name in files}
    classes = find_classes(train) if train.is_dir() else folders or sorted(found)
    if not found or (split == "train" and len(found) < len(classes)):
        empty = f"class folder {min({*classes} - found)!a}" if found else "any class folder"
        raise UserError(f"{folder}: no images in {empty}; expected {folder}/n01440764/*.JPEG … and no empty folders")
    if unknown := sorted({*folders, *found} - {*classes}):
        raise UserError(f"{folder}: class {unknown[0]!a} is not in train/; give both splits the same class folders")
    warn_missing(folder, classes, found)
    start, labels = len(os.path.join(folder, "")), {name: label for label, name in enumerate(classes)}
    keys = make_keys([(file[start:], name) for file, name in files])
    return classes, [
        ImageFile(f"{split}/{file[start:]}", labels[name], os.path.getsize(file), key)
        for (file, name), key in zip(files, keys)
    ]


def is_imagenet(classes: list[str]) -> bool:
    """Whether these are the 1,000 classes of ImageNet, in their order."""
    return hashlib.sha256("\n".join(classes).encode(errors="replace")).hexdigest() == IMAGENET_CLASSES


def find_class_names(root: Path | None, classes: list[str]) -> list[str] | None:
    """Human-readable names in label order: Kaggle's ("tench, Tinca tinca") or torchvision's; None for other classes."""
    if root and (path := find_beside(root, "LOC_synset_mapping.txt")):
        names = dict(re.findall("^([^ \n]+) (.*)$", path.read_text(errors="replace"), re.MULTILINE))
        if set(classes) <= set(names):
            return [names[wnid] for wnid in classes]
    if is_imagenet(classes):
        from torchvision.models import ResNet50_Weights  # takes a second

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return None


# ---------------------------------------------------------------- image files → plan
# Everything is decided here, from names and sizes alone. So any process can write any shard, in any order and any
# number of times, and always writes the same bytes.


TAR_BYTES = 2048  # that an image takes in a shard beside its own: two headers of 512 bytes, a label, padding


class Plan(NamedTuple):
    """The conversion of one split."""

    root: Path
    split: str
    contents: list[list[ImageFile]]  # of each shard
    recipe: dict[str, Any]  # what decides the bytes
    header: dict[str, Any]  # what the index has beside its entries: classes, class_names, recipe


def plan_shards(images: list[ImageFile], seed: int, maxsize: int, maxcount: int) -> list[list[ImageFile]]:
    """Shuffle the images and divide them into shards.

    A shard is closed as webdataset.ShardWriter does it: once it holds maxsize bytes or maxcount samples.
    """
    images = images.copy()
    random.Random(seed).shuffle(images)
    contents: list[list[ImageFile]] = []
    size = maxsize
    for image in images:
        if size >= maxsize or len(contents[-1]) >= maxcount:
            contents.append([])
            size = 0
        contents[-1].append(image)
        size += image.size + len(str(image.label))
    return contents


def make_plan(root: Path, split: str, recipe: dict[str, Any], val_labels: Path | None = None) -> Plan:
    """List one split and plan its shards; reads no image. `recipe` has seed, maxsize, maxcount, block_size and resize.

    The plan goes by the sizes of the originals, so --resize makes smaller shards of the same samples.
    """
    classes, images = list_split(root, split, val_labels)
    if is_imagenet(classes) and len(images) != IMAGENET_IMAGES[split]:
        expected = f"ImageNet has {IMAGENET_IMAGES[split]:,}; is the tree complete?"
        warn(f"{root / split}: {plural(len(images), 'image')}, {expected}")
    tree = hashlib.sha256()
    for image in images:
        tree.update(b"%s %d %d\n" % (os.fsencode(image.path), image.label, image.size))
    contents, size = plan_shards(images, recipe["seed"], recipe["maxsize"], recipe["maxcount"]), recipe["block_size"]
    blocks = (images[i : i + size] for images in contents for i in range(0, len(images), size))
    if (largest := max(sum(min(image.size, LIMIT) + TAR_BYTES for image in block) for block in blocks)) > MAX_BLOCK:
        problem = f"a block of {format_bytes(largest)}, readers accept {format_bytes(MAX_BLOCK)}"
        raise UserError(f"--block-size={size}: {problem}; give a smaller one")
    recipe = recipe | {"images": len(images), "shards": len(contents), "tree": tree.hexdigest()}
    header = {"classes": classes, "class_names": find_class_names(root, classes), "recipe": recipe}
    return Plan(root, split, contents, recipe, header)


# ---------------------------------------------------------------- image files → one shard
# The only part that touches images: their bytes are copied unmodified after a look at both ends.


def make_samples(plan: Plan, images: list[ImageFile], invalid: list[list[str]]) -> Iterator[dict[str, Any]]:
    """WebDataset's samples of these images. Those of invalid images are left out; [path, problem] tells of each."""
    resize = plan.recipe["resize"]
    for image, later in itertools.zip_longest(images, images[16:]):
        if later and hasattr(os, "posix_fadvise"):  # the kernel reads 16 files ahead, which keeps a disk busy
            with open(plan.root / later.path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        try:
            if image.size > LIMIT:
                raise ValueError(f"{format_bytes(image.size)}; {format_bytes(LIMIT)} are allowed")
            data = (plan.root / image.path).read_bytes()
            if len(data) != image.size:
                problem = f"{len(data)} bytes, but {image.size} when listed; do not change the tree, and rerun"
                raise UserError(f"{plan.root / image.path}: {problem}")
            validate_image(data)
            jpg = resize_image(data, *resize[:2]) if resize else data
        except ValueError as error:
            invalid.append([image.path, reason(error)])
        else:
            yield {"__key__": image.key, "jpg": jpg, "cls": image.label}


def make_entry(file: BinaryIO, name: str, ends: list[int], block_size: int) -> dict[str, Any]:
    """The index entry of a shard whose samples end at these positions; reads the shard.

    ValueError unless a tar file's trailer follows the last sample.
    """
    sha256, blocks, position = hashlib.sha256(), [], 0
    for i in range(0, len(ends), block_size):
        block = ends[i : i + block_size]
        data = file.read(block[-1] - position)
        sha256.update(data)
        blocks.append([position, len(data), len(block), zlib.crc32(data)])
        position = block[-1]
    trailer = file.read(LIMIT)
    sha256.update(trailer)
    if len(trailer) < 1024 or trailer.strip(b"\0"):  # Python's tarfile ends in silence at a damaged header
        raise ValueError(f"no end of a tar file after {plural(len(ends), 'sample')}; is it truncated or damaged?")
    counts = {"nsamples": len(ends), "filesize": position + len(trailer)}
    return {"url": name} | counts | {"sha256": sha256.hexdigest(), "blocks": blocks}


RECORDS = ".finished"  # folder in the target, with a file per finished shard


def write_shard(
    plan: Plan, number: int, images: list[ImageFile], folder: Path, skip_invalid: bool
) -> tuple[dict[str, Any], list[list[str]]]:
    """Write one shard and its record: the recipe, and the shard's entry in the index.

    Returns the entry, and [path, problem] of each invalid image, which the entry's "skipped" lists too. If they are not
    to be skipped, all images are read, but no shard is stored.
    """
    name, ends = SHARD_NAME.format(plan.split, number), []
    invalid: list[list[str]] = []
    temporary = folder / f"{name}.tmp"
    try:
        with (
            open(temporary, "w+b", 1 << 20) as file,
            wds.ShardWriter(
                f"imagenet-{plan.split}-%06d.tar", start_shard=number, maxcount=len(images), maxsize=math.inf,
                verbose=0, opener=lambda name: file,
                mtime=0,  # a float time would add a kilobyte of PAX headers to every member, and change with every run
            ) as writer,
        ):
            for sample in make_samples(plan, images, invalid):
                writer.write(sample)
                ends.append(writer.tarstream.tarstream.offset)
        if invalid and not skip_invalid:
            temporary.unlink()
            return {}, invalid
        with open(temporary, "rb") as file:  # from the page cache
            entry = make_entry(file, name, ends, plan.recipe["block_size"])
        entry |= {"skipped": invalid} if invalid else {}
        record = json.dumps({"recipe": plan.recipe, "entry": entry})
        (folder / name).unlink(missing_ok=True)
        write_file(folder / RECORDS / f"{name}.json", record.encode())  # before the shard gets its name
        publish(temporary, folder / name)
    except OSError as error:
        raise UserError(f"{error.filename or temporary}: {reason(error)}; fix it and rerun") from None
    return entry, invalid


# ---------------------------------------------------------------- plan → all shards and the index


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def write_index(folder: Path, split: str, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write imagenet-SPLIT.json in the format of wids, which ignores the keys that are ours, with a line per shard.

    Then _info.json for timm's reader (--dataset wds/imagenet --data-dir FOLDER), from the indexes that exist.
    """
    path = folder / INDEX_NAME.format(split)
    header = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"imagenet-{split}"} | header
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    rows = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    data = ("{\n" + ",\n".join(lines) + f',\n"shardlist": [\n{rows}\n]\n}}\n').encode()
    try:
        index = parse_index(data, str(folder))  # what a reader would refuse is not written
    except ValueError as error:
        raise UserError(f"{path}: not written, because it would be {error}") from None
    write_file(path, data)
    splits = {}
    for ours, name in (("train", "train"), ("val", "validation")):
        with contextlib.suppress(LookupError, TypeError):  # no index
            listed = read_json(folder / INDEX_NAME.format(ours))["shardlist"]
            lengths, files = [entry["nsamples"] for entry in listed], [entry["url"] for entry in listed]
            splits[name] = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
    write_file(folder / "_info.json", (json.dumps({"splits": splits}, indent=1) + "\n").encode())
    size = sum(entry["filesize"] for entry in entries)
    skipped = sum(len(entry.get("skipped", [])) for entry in entries)
    print(f"# {path}: {plural(len(entries), 'shard')}, {plural(index.total, 'image')}, {format_bytes(size)}, "
          f"{plural(len(index.classes), 'class')}" + (f", {plural(skipped, 'invalid image')} skipped" * bool(skipped)))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards that are named as this script names them."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(rf"imagenet-{split}-\d{{6,}}\.tar", path.name))


def finished_shards(plan: Plan, folder: Path, skip_invalid: bool) -> dict[str, dict[str, Any]]:
    """Index entries, by name, of the shards that any run of this conversion has finished.

    A shard that lacks invalid images is not finished for a run that does not skip them. UserError if the folder holds
    shards, or an index, of another conversion.
    """
    finished, paths, index = {}, find_shards(folder, plan.split), folder / INDEX_NAME.format(plan.split)
    for path in paths or [index] * index.exists():
        record = read_json(folder / RECORDS / f"{path.name}.json" if paths else index)
        then, now, entry = record.get("recipe"), plan.recipe, record.get("entry", {})
        if then != now:
            changes = ["no record of it"]
            if isinstance(then, dict):
                changes = [f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
            advice = "use the same tree and arguments, another --shards, or --overwrite to start over"
            raise UserError(f"{path}: of another conversion ({'; '.join(changes)}); {advice}")
        if path.stat().st_size == entry.get("filesize") and (skip_invalid or "skipped" not in entry):
            finished[path.name] = entry
    return finished


def convert(
    plan: Plan, folder: Path, entries: dict[str, dict[str, Any]], skip_invalid: bool, workers: int
) -> None:
    """Write the shards that are not finished, then the index, unless there are invalid images not to be skipped."""
    names, invalid = [SHARD_NAME.format(plan.split, number) for number in range(len(plan.contents))], []
    todo = [number for number, name in enumerate(names) if name not in entries]
    if todo:
        if entries:
            print(f"# {plan.split}: keeping {len(entries)} of {plural(len(names), 'shard')} that are finished")
        for name in (INDEX_NAME.format(plan.split), "_info.json"):
            (folder / name).unlink(missing_ok=True)
    starts = list(itertools.accumulate(map(len, plan.contents), initial=0))
    jobs = {n: (plan._replace(contents=[]), n, plan.contents[n], folder, skip_invalid) for n in todo}
    total = sum(len(plan.contents[n]) for n in todo)
    with tqdm(total=total, desc=plan.split, unit=" images", disable=None if todo else True) as bar:
        for number, (entry, problems) in run_jobs(write_shard, jobs, workers):
            invalid += problems
            bar.update(len(plan.contents[number]))
            if entry:
                entries[names[number]], size = entry, format_bytes(entry["filesize"])
                tqdm.write(f"# writing {folder / names[number]} {entry['nsamples']} {size} {starts[number]}")
    for path, problem in sorted(invalid):
        warn(f"invalid image {plan.root / path}: {problem}")
    if invalid and not skip_invalid:
        raise UserError(f"{plan.root / plan.split}: {plural(len(invalid), 'invalid image')}, listed above; rerun with "
                        "--skip-bad to leave them out and keep the finished shards, or fix them and use --overwrite")
    write_index(folder, plan.split, plan.header, [entries[name] for name in names])


def pack(args: argparse.Namespace, splits: list[str]) -> None:
    """Convert the splits. What can be refused is refused before the first shard is written."""
    if not is_local(args.shards):
        raise UserError(f"--shards={printable(args.shards)}: not a folder; pack into one, then copy it")
    folder, below = Path(args.shards), ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # as Kaggle has it
    roots = [args.imagenet / path for path in below if any((args.imagenet / path / split).is_dir() for split in splits)]
    root = roots[0] if roots else args.imagenet
    recipe = {name: getattr(args, name) for name in ("seed", "maxsize", "maxcount", "block_size")} | {"resize": None}
    if args.resize:  # encoders differ in bytes
        libjpeg = PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")
        recipe["resize"] = [args.resize, args.quality, f"Pillow {PIL.__version__}, libjpeg {libjpeg}"]
    plans = [make_plan(root, split, recipe, args.val_labels) for split in splits]
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    with lock_folder(folder / RECORDS):
        replaced = [path for split in splits for path in find_shards(folder, split) if args.overwrite]
        finished = [{} if args.overwrite else finished_shards(plan, folder, args.skip_bad) for plan in plans]
        needed = sum(min(image.size, LIMIT) + TAR_BYTES for plan, entries in zip(plans, finished)
                     for n, images in enumerate(plan.contents) if SHARD_NAME.format(plan.split, n) not in entries
                     for image in images)
        overwritten = [*replaced, *folder.glob("*.tar.tmp")]  # of a killed run
        free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in overwritten)
        if needed > free and not args.resize:  # it makes images smaller, by how much is not known
            raise UserError(f"--shards={folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free")
        if args.overwrite:
            indexes = [folder / INDEX_NAME.format(split) for split in splits]
            for path in [*indexes, folder / "_info.json", *replaced]:  # the index first: what it lists is there
                path.unlink(missing_ok=True)
        for plan, entries in zip(plans, finished):
            convert(plan, folder, entries, args.skip_bad, args.workers)


# ---------------------------------------------------------------- shards → what is wrong, or an index


def verify_shard(index: Index, number: int, args: argparse.Namespace) -> str:
    """What is wrong with a shard; empty if every byte is as the index says."""
    entry, sha256, end = index.entries[number], hashlib.sha256(), 0
    try:
        with contextlib.closing(open_source(index.prefix, args.timeout)) as source:
            for block in (block for block in index.blocks if block.shard == number):
                data = retry(partial(fetch, source, index, block), args.retry_for)
                sha256.update(data)
                end += len(data)
                if args.decode:
                    for sample in group_by_keys(tar_file_expander([{"url": entry["url"], "stream": io.BytesIO(data)}])):
                        decode_image(image_bytes(sample))
            trailer = retry(partial(source.read, entry["url"], end), args.retry_for)
        sha256.update(trailer)
        if (end + len(trailer), sha256.hexdigest()) != (entry["filesize"], entry["sha256"]):
            raise ValueError(f"{end + len(trailer)} of {entry['filesize']} bytes, SHA-256 {sha256.hexdigest()}")
    except UserError as error:
        return str(error)
    except ValueError as error:
        return f"{entry['url']}: {reason(error)}"
    return ""


def verify(args: argparse.Namespace, splits: list[str]) -> None:
    """Compare every byte of the shards with the index. UserError if anything differs."""
    for split in splits:
        index = read_index(args.shards, split, args.retry_for, args.timeout, args.index and str(args.index))
        jobs = {number: (index, number, args) for number in range(len(index.entries))}
        results = tqdm(run_jobs(verify_shard, jobs, args.workers), total=len(jobs), unit=" shards", disable=None)
        problems = sorted(problem for _, problem in results if problem)
        for problem in problems:
            warn(f"problem: {problem}")
        if problems:
            raise UserError(f"{plural(len(problems), 'shard')} with a problem, listed above; write or fetch them again")
        print(f"# {split}: {plural(len(jobs), 'shard')}, {plural(index.total, 'image')}: all as the index says")


def open_shard(args: argparse.Namespace, name: str) -> BinaryIO:
    """A shard as a file. Of a URL or a command it is a temporary copy."""
    if is_local(args.shards):
        return open(locate(args.shards, name), "rb")
    file = tempfile.TemporaryFile()
    with contextlib.closing(open_source(args.shards, args.timeout)) as source:
        while data := retry(partial(source.read, name, file.tell(), 8 << 20), args.retry_for):
            file.write(data)
    file.seek(0)
    return file


def index_shard(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], set[int]]:
    """(The entry in the index, the labels) of a shard that another program wrote."""
    ends, labels, head = [], set(), b""
    try:
        with open_shard(args, name) as file:
            head = file.read(40)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                # Names without a key, such as macOS's ._x.jpg, are not part of a sample: as WebDataset does it.
                members = ((*base_plus_ext(m.name), m) for m in tar if m.isreg() and not m.issparse())
                keyed = (member for member in members if member[0] is not None)
                for key, group in itertools.groupby(keyed, key=lambda member: member[0]):
                    parts = [(extension.lower(), member) for _, extension, member in group]
                    sample = dict(parts)
                    if len(sample) < len(parts) or "cls" not in sample or len(sample.keys() & {*IMAGES}) != 1:
                        raise ValueError(f"{key}: {', '.join(sample)}; expected cls and one of {', '.join(IMAGES)}")
                    labels.add(int(tar.extractfile(sample["cls"]).read(20)))
                    _, last = parts[-1]
                    ends.append(last.offset_data + -(-last.size // 512) * 512)
                ends[-1:] = [tar.offset] * bool(ends)  # what follows the last sample belongs to it
            if not labels <= {*range(MAX_CLASSES)}:
                raise ValueError(f"labels from {min(labels)} to {max(labels)}; 0 to {MAX_CLASSES - 1} are allowed")
            file.seek(0)
            return make_entry(file, name, ends, args.block_size), labels
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{printable(args.shards, name)}: {reason(error)}; it begins with {head!r}") from None


def index_only(args: argparse.Namespace, splits: list[str]) -> None:
    """Make indexes of shards that another program wrote, and write them into a folder."""
    folder, local = args.index or Path(args.shards), is_local(args.shards)
    for split in splits:
        names = args.names or [path.name for path in find_shards(Path(args.shards), split) if local]
        if not (names and (local or args.index)):
            advice = "give their file names with --names, and for shards at a URL a folder with --index"
            raise UserError(f"--shards={printable(args.shards)}: no {split} shards to index; {advice}")
        jobs, entries = {name: (name, args) for name in names}, {}
        labels: set[int] = set()
        results = run_jobs(index_shard, jobs, args.workers)
        for name, (entry, found) in tqdm(results, total=len(jobs), unit=" shards", disable=None):
            entries[name], labels = entry, labels | found
        highest = max(labels, default=0)
        classes, class_names = [str(number) for number in range(highest + 1)], None
        if args.classes:
            lines = args.classes.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            classes = [line.strip() for line in lines if line.strip()]
            if all(re.match(r"n\d{8} ", line) for line in classes):  # such as "n01440764 tench, Tinca tinca"
                classes, class_names = [line[:9] for line in classes], [line[10:] for line in classes]
        if highest >= len(classes):
            raise UserError(f"--classes={args.classes}: {plural(len(classes), 'class')}, but a label is {highest}")
        header = {"classes": classes, "class_names": class_names or find_class_names(None, classes), "recipe": None}
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, split, header, [entries[name] for name in names])
        warn_missing(printable(args.shards), classes, {classes[label] for label in labels})


# ---------------------------------------------------------------- command line


def bounded(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of this kind, int or float, within [low, high]; 1e9 is an int too."""
    limits = f"of at least {low:,}" if high == math.inf else f"from {low:,} to {high:,}"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):  # int() of NaN and infinity
            value = float(text)
            if low <= value <= high and kind(value) == value < math.inf:
                return kind(value)
        raise argparse.ArgumentTypeError(f"{text!a} is not a {'whole ' * (kind is int)}number {limits}")

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


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except None and False, and those that the text itself states."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default is None or action.default is False or "default:" in action.help
        return action.help if stated else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line without values. Flags are not abbreviated."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The flags' values; exits with status 2 after an error."""
        args, unknown = self.parse_known_args(argv)
        if unknown:  # a part of an unquoted command may be a secret
            flag = re.match("--[a-z-]*", unknown[0]) or ["a word without a flag"]
            self.error(f"unrecognized arguments: {flag[0]}; give values as --flag=VALUE, in quotes if they have spaces")
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    whole = bounded(int, 1)
    parser = Parser("Pack ImageNet's image files into WebDataset shards and an index; verify or index shards.")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--imagenet", metavar="DIR", type=path_arg, help="convert the folder that holds train/ and val/")
    add("--verify", action="store_true", help="read finished shards and compare every byte with the index")
    add("--index-only", action="store_true", help="make an index of shards that another program wrote")
    add = parser.add_argument
    add("--shards", metavar="PREFIX", type=prefix_arg, default="./data",
        help="folder of shards and index; to read also http(s)://, s3://, gs://, hf://, or pipe:COMMAND that prints a "
        "file, where %%s becomes the file's name")
    add("--splits", default="train,val", choices=["train", "val", "train,val"], help="splits to write or read")
    add("--workers", type=bounded(int, 1, 1024), default=count_cores(), help="processes, with a shard each")
    add("--block-size", type=bounded(int, 1, MAX_SAMPLES), default=64, help="samples in a block")
    add = parser.add_argument_group("with --imagenet").add_argument
    add("--seed", type=int, default=0, help="of the one shuffle of each split")
    add("--maxsize", type=whole, default="1e9", help="a shard ends when it has as many bytes")
    add("--maxcount", type=whole, default=100000, help="… or this many samples")
    add("--resize", type=whole, help="shrink images to a shorter side of so many pixels, encoded as JPEG")
    add("--quality", type=bounded(int, 1, 95), default=90, help="of these JPEGs, 1 to 95")
    add("--val-labels", type=path_arg,
        help="LOC_val_solution.csv for a flat val/ (default: the one beside or above the tree)")
    add("--skip-bad", action="store_true", help="leave out, and list, images that are not a valid JPEG or PNG")
    add("--overwrite", action="store_true", help="write all shards anew, also over those of another tree or arguments")
    add = parser.add_argument_group("with --verify and --index-only").add_argument
    add("--decode", action="store_true", help="with --verify: decode every image")
    add("--index", type=path_arg, help="folder of the index, if it is not with the shards")
    add("--names", type=expand_urls, action="extend",
        help="with --index-only: shards of one split, for example 'imagenet1k-train-{0000..1023}.tar'")
    add("--classes", type=path_arg, help="with --index-only: file with the classes in label order, one a line")
    add("--retry-for", type=bounded(float, 0), default=300, help="seconds to repeat a failed read")
    add("--timeout", type=bounded(float, 0.1), default=60, help="seconds for a read; of a command, without a byte")
    args = parser.parse_args(argv)
    if args.names and not (args.index_only and "," not in args.splits and all(map(SHARD.fullmatch, args.names))):
        parser.error("argument --names: needs --index-only, --splits=train or --splits=val, and names of .tar files")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit status: 0, or 1 after an error."""
    args = parse_args(argv)
    work = pack if args.imagenet else verify if args.verify else index_only
    return run_script(partial(work, args, args.splits.split(",")))


if __name__ == "__main__":
    sys.exit(main())
