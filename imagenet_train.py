"""Trains a ResNet on ImageNet from WebDataset shards, with PyTorch Lightning.

    python3 imagenet_train.py --shards=./data
    python3 imagenet_train.py --shards='pipe:curl -s http://localhost:8080/' --devices=8
    python3 imagenet_train.py --shards='pipe:gsutil cat gs://bucket/%s' --resume

In:  what imagenet_shards.py wrote, in a folder, at a URL, or behind a command that prints a file.
Out: checkpoints, logs and the trained weights in --output.

Guarantee: no sample is used twice in an epoch, and fewer than ranks x batch are left out; validation sees every sample
once. Every byte is checked before it is used. A run that is killed and resumed makes the same batches; with other
settings (ranks, workers, batch size), the rest of the epoch. The default recipe is NVIDIA's (77.1 % top-1).

The pipeline that WebDataset's documentation teaches is

    wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node)
        .shuffle(2000).decode("pil").to_tuple("jpg", "cls").batched(256)

EpochDataset.pipeline() has the same stages. These are replaced:

| stage | here | what would otherwise go wrong |
|---|---|---|
| urls, shardshuffle | a permutation of blocks of 64 samples | the order repeats every epoch; neighbours stay together |
| split_by_node | each reader gets a run of the permutation | ranks make unequal numbers of batches and wait for ever |
| opening a URL | ranged reads, CRC-32, retries | a failed download ends the epoch early, in silence |
| shuffle(2000) | wds.shuffle over sample numbers, with a seed | an interrupted run cannot resume |
| decode("pil") | JPEG and PNG; crop, then resize, in uint8 | unpickling runs code from .pyd members; half the speed |
| batched(256) | wds.batched, filled up to B rows | a short batch recompiles the model, weights ranks unequally |
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import csv
import difflib
import hashlib
import http.client
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
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
import webdataset as wds
from PIL import Image, ImageDraw
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm
from webdataset.tariterators import group_by_keys


class TrainError(Exception):
    """A user-fixable error, in one line: the input, the problem, the remedy."""


class PermanentError(TrainError):
    """An error that a retry cannot fix."""


def warn(text: str) -> None:
    """Print a line on stderr, under the script's name."""
    print(f"imagenet_train.py: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- prefix → bytes
# A source reads a range of a file. What it returns is not trusted: the caller checks its length and CRC-32.

LIMIT = 64 << 20  # bytes, of an index or a tar member; ImageNet's largest image has a quarter of that


def locate(prefix: str, name: str) -> str:
    """The path, URL or pipe:COMMAND of the file `name`: it replaces %s in the prefix, or is appended."""
    quoted = shlex.quote(name) if prefix.startswith("pipe:") else name
    if "%s" in prefix:  # not the % operator: a prefix may hold %20 and other percent signs
        return prefix.replace("%s", quoted)
    return prefix + quoted if prefix.startswith("pipe:") or prefix.endswith(("/", "=")) else f"{prefix}/{quoted}"


def printable(location: str) -> str:
    """A location as an error message shows it: URLs without user, password and query."""
    location = re.sub(r"(\w://)[^/\s@'\"]*@", r"\1", location)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", location)


def reason(error: Exception) -> str:
    """An error's text in one line; of a long one the end, where tracebacks and commands say what happened."""
    return " ".join(str(error).split())[-300:] or type(error).__name__


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name before the text of a TrainError."""
    try:
        yield
    except TrainError as error:
        raise type(error)(f"{what}: {error}") from None


class Folder:
    """Reads files of a folder."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix = prefix

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        """`length` bytes of a file; fewer only at its end. TrainError, a PermanentError where a retry cannot help."""
        try:
            with open(locate(self.prefix, name), "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise PermanentError(error.strerror) from None


class Web:
    """Reads ranges of files over HTTP, a request each. Obeys http_proxy and https_proxy."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        self.ranges = True  # or the server ignored the range of the last read

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        url = urllib.parse.urlsplit(locate(self.prefix, name))
        user, _, host = url.netloc.rpartition("@")
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if user:
            headers["Authorization"] = "Basic " + base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request = urllib.request.Request(url._replace(netloc=host).geturl(), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                self.ranges = response.status == 206
                data = response.read(length)
                if response.length and len(data) < length == LIMIT:  # an index, which has no checksum
                    raise TrainError(f"found {len(data)} bytes, {response.length} are missing")
                return data
        except urllib.error.HTTPError as error:
            permanent = 400 <= error.code < 500 and error.code not in (408, 425, 429)
            raise (PermanentError if permanent else TrainError)(f"HTTP status {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError with the cause as its reason
            raise TrainError(reason(getattr(error, "reason", error))) from None


# What curl, gsutil, aws, sh and the kernel print when a file does not exist or may not be read.
PERMANENT = re.compile(
    r"exit status 12[67]\b|error( code)?: 40[134]\b|40[134] (Not Found|Forbidden|Unauthorized)|No such file"
    r"|Exception: 40[134] |\(40[134]\)|Not a directory|Is a directory|Permission denied|No URLs matched|NoSuchKey"
    r"|NoSuchBucket|AccessDenied|Unable to locate credentials|not found",
    re.IGNORECASE,
)


def kill(process: subprocess.Popen) -> None:
    """End a command and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or runs as another user
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


class Command:
    """Reads the output of a command, forwards only: it is started for a file and read on as ranges are wanted.

    The command's exit status and messages only explain missing bytes; they decide nothing about those that came.
    """

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timeout
        self.name, self.position, self.closed = "", 0, False
        self.process: subprocess.Popen | None = None

    def start(self, name: str) -> None:
        if self.process:
            kill(self.process)
            self.process.stdout.close()
        self.name, self.position, self.messages = name, 0, tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            locate(self.prefix, name).removeprefix("pipe:"), shell=True, bufsize=0, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self.messages,
            start_new_session=True,  # a process group, so that kill() also ends the command's children
        )
        if self.closed:  # close() may have come before this process
            kill(self.process)

    def take(self, offset: int, length: int) -> bytes:
        """These bytes of the output; fewer only at its end. TrainError if none come for `timeout` seconds."""
        pipe, parts, poll = self.process.stdout, [], select.poll()
        poll.register(pipe)
        while self.position < offset + length:
            if not poll.poll(1000 * self.timeout):
                raise TrainError(f"no byte for {self.timeout:g} s")
            if not (data := pipe.read(min(offset + length - self.position, 1 << 20))):
                break
            parts.append(data[max(0, offset - self.position) :])  # what precedes is discarded
            self.position += len(data)
        return b"".join(parts)

    def read(self, name: str, offset: int = 0, length: int = LIMIT) -> bytes:
        if self.process and name == self.name and self.position <= offset:
            with contextlib.suppress(TrainError):  # a server may close a connection that waited: not an error yet
                if len(data := self.take(offset, length)) == length:
                    return data
        self.start(name)
        data = self.take(offset, length)
        if len(data) < length:
            try:
                status = self.process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise TrainError("the command closed its output but does not end") from None
            if status:
                self.messages.seek(0)
                said = " ".join(self.messages.read().decode(errors="replace").split())[-300:] or "no message"
                text = f"the command failed with exit status {status}: {said}"
                text = f"found {len(data)} bytes, then {text}" if data else text
                raise (PermanentError if PERMANENT.search(text) else TrainError)(text)
        return data

    def close(self) -> None:
        """From another thread: end the command; a read in progress fails, later ones too."""
        self.closed = True
        if self.process:
            kill(self.process)


COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gsutil -q cat {}"}  # what reads these URLs
COMMANDS |= dict.fromkeys(["http", "https"], "curl -sSfL --connect-timeout 30 {}")  # from servers that have no ranges


def as_command(prefix: str) -> str:
    """The pipe:COMMAND that reads files under a URL. PermanentError if no command is known for its protocol."""
    protocol = prefix.partition("://")[0]
    if protocol not in COMMANDS:
        raise PermanentError(f"{printable(prefix)}: cannot read {protocol}:// URLs; name a command: pipe:COMMAND %s")
    return "pipe:" + COMMANDS[protocol].format(shlex.quote(locate(prefix, "%s")))


def open_source(prefix: str, timeout: float) -> Folder | Web | Command:
    """What reads files under this prefix. timeout: seconds without a byte after which a read fails."""
    if prefix.startswith(("http://", "https://")):
        return Web(prefix, timeout)
    if re.match(r"[a-z][a-z0-9+.-]*://", prefix):
        prefix = as_command(prefix)
    return Command(prefix, timeout) if prefix.startswith("pipe:") else Folder(prefix, timeout)


def retry(read: Callable[[], Any], retries: int, stop: threading.Event | None = None) -> Any:
    """read(); after a TrainError again, up to `retries` times, with exponential back-off and jitter.

    The pauses are 1, 2, 4 … s, at most 60, each times 0.5 to 1 at random, so that a thousand readers do not return to a
    server at once. PermanentError is not retried; after stop.set() nothing is.
    """
    for failures in itertools.count(1):
        try:
            return read()
        except TrainError as error:
            if isinstance(error, PermanentError) or failures > retries or stop and stop.is_set():
                raise
            pause = min(60, 2 ** (failures - 1)) * random.uniform(0.5, 1)
            warn(f"{error}; retry {failures} of {retries} in {pause:.1f} s")
        stop.wait(pause) if stop else time.sleep(pause)


# ---------------------------------------------------------------- prefix → index
# The index lists every block before any is read. That makes epochs exact, lengths known, and missing bytes visible.


class Block(NamedTuple):
    """A run of consecutive samples in one shard: the unit that is read, checked and cached."""

    shard: int  # position in Index.names
    offset: int  # bytes
    length: int  # bytes
    samples: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """The index of a split, or a tree of image files as one whose blocks are files of one sample.

    A sample's number is its position in the order of the blocks, which is that of the shards.
    """

    prefix: str  # of the shards
    classes: list[str]  # wnids; a label is a position in this list
    names: list[str]  # of the shards
    sizes: list[int]  # of the shards, bytes
    checksums: list[str]  # of the shards, SHA-256
    blocks: list[Block]
    class_names: list[str] | None = None  # human-readable
    tree: bool = False  # names are paths below the prefix, WNID/KEY.JPEG; sizes, lengths and checksums are unknown

    @cached_property
    def starts(self) -> list[int]:
        """Number of each block's first sample, and the total."""
        return list(itertools.accumulate((block.samples for block in self.blocks), initial=0))

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def seekable(self) -> bool:
        """Whether any range can be read. A command's output can only be read forwards."""
        return not self.prefix.startswith("pipe:")

    @cached_property
    def digest(self) -> str:
        """Of all that the order of an epoch depends on."""
        content = "\n".join([*self.names, *self.checksums, *(str(block.samples) for block in self.blocks)])
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
        if content["__kind__"] == "imagenet-conversion-not-finished":
            raise ValueError("the conversion is not finished; rerun imagenet_shards.py until it writes the index")
        shards, classes, class_names = content["shardlist"], content["classes"], content.get("class_names")
        if any("blocks" not in shard for shard in shards):
            command = f"python3 imagenet_shards.py --index-only --shards={printable(prefix)}"
            raise ValueError(f"the index lists no blocks; add them with: {command}")
        names, sizes, checksums = ([shard[key] for shard in shards] for key in ("url", "filesize", "sha256"))
        blocks = [Block(number, *block) for number, shard in enumerate(shards) for block in shard["blocks"]]
        # Names end up in a shell command and a path: only what imagenet_shards.py could have written is accepted.
        invalid: list[Any] = [x for x in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar", x)]
        invalid += [x for x in checksums if not re.fullmatch("[0-9a-f]{64}", x)]
        invalid += [x for x in classes + (class_names or classes) if not isinstance(x, str)]
        invalid += [x for x in sizes if type(x) is not int]
        invalid += [b for b in blocks if any(type(x) is not int or not 0 <= x < 1 << 50 for x in b)]
        invalid += [b for b in blocks if not invalid and (not b.samples or b.length > 1 << 30)]
        if not invalid:
            ends = [block.offset + block.length for block in blocks]
            invalid += [b for b, end in zip(blocks, ends) if end > sizes[b.shard]]
            invalid += [b for a, b, end in zip(blocks, blocks[1:], ends) if a.shard == b.shard and b.offset != end]
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"expected an index, found {describe(data)}") from None
    if invalid:
        raise ValueError(f"the index holds an invalid value, {str(invalid[0])[:80]!r}")
    if not classes or not blocks or len(set(names)) < len(shards) or len(class_names or classes) != len(classes):
        raise ValueError("the index lists no classes, no images, or a shard twice")
    return Index(prefix, classes, names, sizes, checksums, blocks, class_names)


def read_file(prefix: str, name: str, timeout: float) -> bytes:
    """A file of at most 64 MiB. TrainError names it."""
    source = open_source(prefix, timeout)
    with naming(printable(locate(source.prefix, name))):
        try:
            return source.read(name)
        finally:
            if isinstance(source, Command):
                source.close()


def readable_prefix(prefix: str, name: str, timeout: float) -> str:
    """The prefix; a URL without ranges as a command. Of a web server that is tried with ten bytes of a file."""
    source = open_source(prefix, timeout)
    if isinstance(source, Web):
        with naming(printable(locate(prefix, name))):
            source.read(name, 0, 10)
        return prefix if source.ranges else as_command(prefix)
    return source.prefix


def read_index(shards: str, split: str, retries: int = 0, timeout: float = 60, index: str | None = None) -> Index:
    """Read and check imagenet-SPLIT.json under `shards`, or under `index` where it lies elsewhere than the shards.

    TrainError if it does not exist or is not an index, with the remedy.
    """
    prefix, name = index or shards, f"imagenet-{split}.json"
    flag = f"{'--index' if index else '--shards'}={printable(prefix)}"
    local = not re.match(r"pipe:|[a-z][a-z0-9+.-]*://", prefix) and "%s" not in prefix
    if local and not Path(prefix).is_dir():
        raise PermanentError(f"{flag}: no such folder; imagenet_shards.py makes it")
    if local and Path(prefix, split).is_dir() and not Path(prefix, name).exists():
        raise PermanentError(f"{flag}: a tree of images, not shards; run imagenet_shards.py, or use --imagenet")
    try:
        data = retry(partial(read_file, prefix, name, timeout), retries)
    except TrainError as error:
        remedy = "make it with imagenet_shards.py" if local else f"is {flag} right?"
        raise type(error)(f"{error}; {remedy}") from None
    try:
        found = parse_index(data, shards)
    except ValueError as error:
        raise TrainError(f"{printable(locate(prefix, name))}: {error}; {flag} must name the shards' place") from None
    return replace(found, prefix=retry(partial(readable_prefix, shards, found.names[0], timeout), retries))


def read_tree(folder: Path, split: str) -> Index:
    """A split of ImageNet's own files as an index: all that follows is the same, only slower to read.

    Classes and files are those of torchvision.datasets.ImageFolder. TrainError if it finds none.
    """
    root = folder.expanduser() / split
    try:
        found = torchvision.datasets.ImageFolder(root)
    except OSError as error:
        text = str(error.strerror or error).splitlines()[0]
        raise TrainError(f"--imagenet={folder}: {text}; give the folder that holds train/ and val/") from None
    names = [os.path.relpath(path, root) for path, _ in found.samples]
    blocks = [Block(number, 0, LIMIT, 1, 0) for number in range(len(names))]
    return Index(str(root), found.classes, names, [0] * len(names), [], blocks, tree=True)


# ---------------------------------------------------------------- index → order
# The order of an epoch is a pure function of index, seed and settings. Every process computes it alone; a resumed run
# computes what was used.


class Division(NamedTuple):
    """How the samples of an epoch, or those left of it, are divided among ranks and their workers.

    An epoch has several if a run was resumed within it with other settings; a checkpoint holds their list.
    """

    seekable: bool  # blocks are permuted; or shards, whose blocks stay in order
    world: int  # ranks
    workers: int  # readers of a rank, at least 1
    batch: int  # samples a rank and step
    shuffle: int  # samples in a reader's shuffle buffer
    done: int = 0  # batches that every rank has made


def steps_of(left: int, training: bool, world: int, batch: int) -> int:
    """Batches that every rank makes of `left` samples: in training full ones, or a single one that is filled up."""
    full = left // (world * batch)
    return full if training and full else math.ceil(math.ceil(left / world) / batch)


def batches_of(steps: int, worker: int, workers: int) -> range:
    """The run of a rank's batches that one of its workers makes.

    The DataLoader takes batches from workers in turn, so the first steps % workers of them make one more.
    """
    first = worker * (steps // workers) + min(worker, steps % workers)
    return range(first, first + steps // workers + (worker < steps % workers))


def batches_done(worker: int, division: Division) -> int:
    """How many of a rank's `done` batches one of its workers has made."""
    return len(range(worker, division.done, division.workers))


def positions_of(left: int, training: bool, division: Division, rank: int, worker: int) -> range:
    """The positions on the line of `left` samples that belong to one reader."""
    _, world, workers, batch, *_ = division
    steps = steps_of(left, training, world, batch)
    if training and left >= world * batch:
        first, last = rank * steps * batch, (rank + 1) * steps * batch
    else:  # rounded up, so that rank 0 has samples if there are any
        first, last = -(-rank * left // world), -(-(rank + 1) * left // world)
    mine = batches_of(steps, worker, workers)
    return range(min(first + mine.start * batch, last), min(first + mine.stop * batch, last))


class Line:
    """The samples of an epoch that are not yet used, block by block, in the order in which they are divided."""

    def __init__(self, index: Index, training: bool, seekable: bool, seed: int, epoch: int, used: bytearray) -> None:
        units: list = list(range(len(index.blocks)))
        if not seekable:
            units = [list(shard) for _, shard in itertools.groupby(units, lambda number: index.blocks[number].shard)]
        if training:
            random.Random(f"{seed}/{epoch}").shuffle(units)
        self.blocks = units if seekable else list(itertools.chain.from_iterable(units))
        self.starts, self.used = index.starts, used
        free = (used.count(0, self.starts[block], self.starts[block + 1]) for block in self.blocks)
        self.ends = list(itertools.accumulate(free))  # positions on the line

    def __len__(self) -> int:
        return self.ends[-1]

    def samples(self, positions: range) -> dict[int, list[int]]:
        """The numbers of the samples at these positions, which adjoin, by their block."""
        numbers = {}
        place = bisect.bisect_right(self.ends, positions.start)
        begin = self.ends[place - 1] if place else 0
        while begin < positions.stop:
            block = self.blocks[place]
            free = [n for n in range(self.starts[block], self.starts[block + 1]) if not self.used[n]]
            numbers[block] = free[max(0, positions.start - begin) : positions.stop - begin]
            begin, place = self.ends[place], place + 1
        return numbers


def shuffled(
    samples: dict[int, list[int]], division: Division, seed: int, epoch: int, rank: int, worker: int
) -> list[int]:
    """One reader's samples in the order in which they are used: WebDataset's shuffle buffer, over numbers."""
    rng = random.Random(f"{seed}/{epoch}/{rank}/{worker}")
    rng.randint = lambda a, b: int(rng.random() * (b + 1))  # type: ignore[method-assign]  # a is 0; twice as fast
    shuffle = wds.shuffle(division.shuffle, initial=division.shuffle // 4, rng=rng)
    return list(shuffle(itertools.chain.from_iterable(samples.values())))


def reader_samples(
    line: Line, training: bool, division: Division, seed: int, epoch: int, rank: int, worker: int
) -> tuple[dict[int, list[int]], set[int], list[int]]:
    """One reader's samples: (all by block, in the line's order; those already used; the others in the order of use)."""
    samples = line.samples(positions_of(len(line), training, division, rank, worker))
    order = shuffled(samples, division, seed, epoch, rank, worker)
    taken = batches_done(worker, division) * division.batch
    return samples, set(order[:taken]), order[taken:]


def used_samples(index: Index, seed: int, epoch: int, history: Sequence[Division]) -> bytearray:
    """A 1 for every sample that all readers of these divisions have used of a training epoch."""
    used = bytearray(index.total)
    for division in history:
        line = Line(index, True, division.seekable, seed, epoch, used.copy())
        for rank, worker in itertools.product(range(division.world), range(division.workers)):
            for number in reader_samples(line, True, division, seed, epoch, rank, worker)[1]:
                used[number] = 1
    return used


def remaining_steps(index: Index, training: bool, history: Sequence[Division]) -> int:
    """Batches that every rank makes under the last of an epoch's divisions, those done included."""
    left = index.total
    for division in history[:-1]:
        left -= division.done * division.world * division.batch
    return steps_of(left, training, history[-1].world, history[-1].batch)


def plan_reader(
    index: Index, training: bool, seed: int, epoch: int, history: Sequence[Division], rank: int, worker: int
) -> tuple[list[int], list[int]]:
    """What one reader does in the rest of an epoch: (samples in the order of use, blocks in the order of fetching).

    history: the epoch's divisions; the last is in force. A reader fetches the blocks in the line's order, which for a
    command is forwards, and before it uses a sample those that precede it; so the shuffle buffer bounds its memory.
    """
    division = history[-1]
    used = used_samples(index, seed, epoch, history[:-1])
    line = Line(index, training, division.seekable, seed, epoch, used)
    samples, already_used, order = reader_samples(line, training, division, seed, epoch, rank, worker)
    return order, [block for block, numbers in samples.items() if not already_used.issuperset(numbers)]


# ---------------------------------------------------------------- order → samples
# A block is fetched and checked as a whole before any sample of it is used. So a failed read can simply be repeated.


def crop_size(epoch: int, epochs: int, first: int, last: int) -> int:
    """The side of a training crop, pixels: `first` for half of the epochs, `last` in the final fifth, growing between.

    The schedule is that of MosaicML Composer's ProgressiveResizing, in steps of 32 px, for which models are fast.
    """
    grown = min(max(10 * epoch - 5 * epochs, 0), 3 * epochs)  # of 3 · epochs
    return last if grown == 3 * epochs else first + grown * (last - first) // (3 * epochs * 32) * 32


@dataclass(frozen=True)
class LoaderConfig:
    """All that decides which batches one rank gets, and how."""

    index: Index
    training: bool
    batch: int  # images a rank and step
    size: int  # pixels, side of the crop; in training that of the last epochs
    resize: int = 256  # pixels, shorter side before the crop; validation only
    shuffle: int = 0  # samples in a reader's shuffle buffer
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0  # loader processes of this rank; 0: the main process reads
    retries: int = 5  # of a failed read
    timeout: float = 60  # seconds without a byte after which a read fails
    cache: Path | None = None  # folder for blocks that were read
    max_bad: int = 0  # undecodable images a rank and epoch that are not an error
    first_size: int = 0  # pixels, side of the crop in the first epochs; 0: as in the last
    epochs: int = 1  # of the run

    @property
    def division(self) -> Division:
        return Division(self.index.seekable, self.world, max(1, self.workers), self.batch, self.shuffle)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return steps_of(self.index.total, self.training, self.world, self.batch)

    def crop(self, epoch: int) -> int:
        """The side of this epoch's crops, pixels."""
        return crop_size(epoch, self.epochs, self.first_size or self.size, self.size)


def fetch(source: Folder | Web | Command, index: Index, block: Block) -> bytes:
    """A block's bytes from its source, checked. TrainError that names shard, block, source and what was found."""
    name, count = index.names[block.shard], f"{block.samples} sample{'s' * (block.samples > 1)}"
    place = name if index.tree else f"{name}, {count} at byte {block.offset}"
    with naming(f"{place}, from {printable(locate(index.prefix, name))}"):
        data = source.read(name, block.offset, block.length)
        if index.tree or len(data) == block.length and zlib.crc32(data) == block.crc32:
            return data
        problem = f"CRC-32 is {zlib.crc32(data):08x}, the index lists {block.crc32:08x}; found {describe(data)}"
        if len(data) < block.length:
            problem = f"found {len(data)} of {block.length} bytes, {describe(data)}"
        if isinstance(source, Folder):
            raise PermanentError(f"{problem}; copy or convert the shard again")
        raise (PermanentError if PERMANENT.search(problem) else TrainError)(problem)  # a page may say 404


def fetch_cached(read: Callable[[], bytes], config: LoaderConfig, block: Block, disk_full: Event) -> bytes:
    """A block's bytes from the cache, checked; else what read() returns, which then goes into the cache.

    A file's name says which bytes it must hold. Many processes may share the folder. A disk that is full or read-only
    costs only the cache: `disk_full` is set, reported once for all workers, and no more files are written.
    """
    path = config.cache / f"{config.index.checksums[block.shard][:16]}-{block.offset}-{block.length}"
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if len(data) == block.length and zlib.crc32(data) == block.crc32:
            return data
    data, temporary = read(), path.with_name(f"tmp-{uuid.uuid4().hex}")
    if not disk_full.is_set():
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not disk_full.is_set():
                disk_full.set()
                warn(f"--cache={config.cache}: {error.strerror}; continuing without")
    return data


IMAGES = ("jpg", "jpeg", "png")  # extensions of the members that hold a sample's image


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The undecoded image of a sample."""
    return next(sample[extension] for extension in IMAGES if extension in sample)


def unpack(data: bytes, block: Block, index: Index) -> list[dict[str, Any]]:
    """The samples of a block, a run of tar members: {"__key__", "__url__", "cls", "jpg" …}, values bytes.

    PermanentError if they are not those that the index lists: its checksum is right, so a retry cannot help.
    """
    name, members = index.names[block.shard], []
    if index.tree:
        label = bisect.bisect_left(index.classes, Path(name).parts[0])
        return [{"__key__": Path(name).stem, "__url__": name, "cls": str(label).encode(), "jpg": data}]
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = data[member.offset_data : member.offset_data + member.size]  # extractfile() is slower
                if member.isreg() and (member.issparse() or len(content) < member.size):
                    raise ValueError(f"member {member.name!r} of {member.size} bytes is not in its block")
                if member.isreg():
                    members.append({"fname": member.name, "data": content, "__url__": name})
        samples = list(group_by_keys(members))
        if len(samples) != block.samples:
            raise ValueError(f"{len(samples)} samples, the index lists {block.samples}")
        for sample in samples:
            if "cls" not in sample or not sample.keys() & {*IMAGES}:
                raise ValueError(f"sample {sample['__key__']!r} has no image or no cls")
        return samples
    except (ValueError, tarfile.TarError) as error:
        raise PermanentError(f"{name}, block at byte {block.offset}: {reason(error)}; make the index again") from None


def read_ahead(fetch: Callable[[Any], bytes], blocks: Sequence[Any], ahead: int = 4) -> Iterator[bytes]:
    """fetch(block) of each block, in order, from a daemon thread that is at most `ahead` blocks in advance."""
    results: queue.Queue[Future] = queue.Queue(ahead - 1)  # and one in hand
    stop = threading.Event()

    def work() -> None:
        for block in blocks:
            result: Future[bytes] = Future()
            try:
                result.set_result(fetch(block))
            except BaseException as error:
                result.set_exception(error)
            results.put(result)
            if stop.is_set():
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        for _ in blocks:
            yield results.get().result()
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):  # lets the thread put what it has in hand
            results.get_nowait()


def read_samples(
    order: Iterable[int], blocks: list[int], config: LoaderConfig, disk_full: Event
) -> Iterator[dict[str, Any]]:
    """The samples with these numbers, in order, undecoded: {"__key__", "__url__", "cls", "jpg"}; TrainError as fetch.

    blocks: those that hold them, in the order in which they are fetched.
    """
    index, order = config.index, list(order)
    held: dict[int, dict[str, Any]] = {}
    due, source, stop = set(order), open_source(index.prefix, config.timeout), threading.Event()

    def fetch_block(number: int) -> bytes:
        block = index.blocks[number]
        read = partial(retry, partial(fetch, source, index, block), config.retries, stop)
        return fetch_cached(read, config, block, disk_full) if config.cache else read()

    fetched = zip(blocks, read_ahead(fetch_block, blocks))
    try:
        for number in order:
            while number not in held:
                block, data = next(fetched)
                samples = enumerate(unpack(data, index.blocks[block], index), start=index.starts[block])
                held.update((n, sample) for n, sample in samples if n in due)
            yield held.pop(number)
    finally:
        stop.set()
        if isinstance(source, Command):
            source.close()


# ---------------------------------------------------------------- samples → batches
# From here to the device an image is uint8 [S, S, 3], as Pillow makes it: a quarter of float32's bytes to copy, and a
# permuted view of it is the channels_last tensor that GPUs prefer.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]; torchvision's constants
IGNORE_INDEX = -1  # label of a row that does not count: padding, or an image that could not be decoded


def random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom as torchvision's RandomResizedCrop draws them: 8–100 % of the area, 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # too long or too tall: the middle
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_crop(width: int, height: int, size: int, resize: int) -> tuple[float, float, float, float]:
    """The box, in the image's own pixels, that torchvision's Resize(resize) and CenterCrop(size) leave."""
    short = min(width, height)
    w, h = int(resize * width / short), int(resize * height / short)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return left * width / w, top * height / h, (left + size) * width / w, (top + size) * height / h


def jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, position of the height's two bytes) of a JPEG in one scan, as nearly all are, from its header.

    None for others: progressive, incomplete or damaged files, other formats, and more pixels than Pillow allows.
    """
    at, frame = 2, None
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-1024:]:
        return None
    while at + 10 <= len(data) and data[at] == 0xFF != data[at + 1]:  # ITU T.81, B.1: marker, length, content
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1):  # the header of a sequential image
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            frame = (width, height, at + 5) if 0 < width * height <= Image.MAX_IMAGE_PIXELS else None
        if marker == 0xDA:  # pixels begin; in one scan, if it has all components
            return frame if frame and data[at + 4] == components else None
        at += 2 + length
    return None


def shorten_jpeg(file: io.BytesIO, frame: tuple[int, int, int], bottom: int) -> None:
    """Write a smaller height into a JPEG's header, so that its decoder stops soon below row `bottom`.

    The rows above it are decoded alike. On average a seventh of an image's rows are below its crop.
    """
    _, height, height_at = frame
    if bottom + 2 < height:  # 2 more: the last rows' colours are interpolated from both sides
        file.seek(height_at)
        file.write((bottom + 2).to_bytes(2, "big"))


def resize_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] → uint8 [size, size, 3], within 2 levels of Pillow's bilinear filter, in half of its time."""
    # Torch resizes bytes without repacking them, and keeps them so, if the strides, the batch's too, say channels_last.
    batch = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def open_image(file: io.BytesIO) -> Image.Image:
    """A JPEG or PNG, whatever its name says (n02105855_2933.JPEG is a PNG). Only the header is read."""
    image = Image.open(file, formats=["JPEG", "PNG"])
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow would only warn, up to twice as many
        raise ValueError(f"{image.width} × {image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} allowed")
    return image


def read_rgb(file: io.BytesIO) -> Image.Image:
    """The decoded image, of greyscale and CMYK files too."""
    image = open_image(file)
    return image if image.mode == "RGB" else image.convert("RGB")  # an RGB image it would only copy


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, 3]."""
    return torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(image.height, image.width, 3)


def sample_rng(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> random.Random:
    """What draws a sample's augmentation: a function of (seed, epoch, key)."""
    return random.Random(f"{config.seed}/{epoch}/{sample['__key__']}")


def train_image(data: bytes, config: LoaderConfig, rng: random.Random) -> torch.Tensor:
    """A random crop, mirrored at random: uint8 [size, size, 3].

    Another augmentation goes here. Draw its parameters from `rng`, which is sample_rng()'s: then an image gets the same
    ones whoever decodes it, also after a resume.
    """
    file, frame = io.BytesIO(data), jpeg_frame(data)
    width, height = frame[:2] if frame else open_image(file).size  # 0.03 ms more
    box = random_crop(width, height, rng)
    if frame:
        shorten_jpeg(file, frame, box[3])
    pixels = resize_pixels(pixels_of(read_rgb(file).crop(box)), config.size)
    return pixels.flip(1) if rng.random() < 0.5 else pixels


def val_image(data: bytes, config: LoaderConfig) -> torch.Tensor:
    """The image's middle, as torchvision's Resize and CenterCrop make it: uint8 [size, size, 3]."""
    image = read_rgb(io.BytesIO(data))
    box = center_crop(*image.size, config.size, config.resize)
    return pixels_of(image.resize((config.size, config.size), Image.Resampling.BILINEAR, box=box))


def decode(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> tuple[torch.Tensor, int]:
    """One sample as (uint8 [size, size, 3], label); for another data set change how the two are read from it.

    TrainError names the shard and the key of a sample that cannot be decoded.
    """
    try:
        label = int(sample["cls"])
        if not 0 <= label < len(config.index.classes):
            raise ValueError(f"label {label}, but the index has {len(config.index.classes)} classes")
        data = image_bytes(sample)
        if config.training:
            return train_image(data, config, sample_rng(sample, config, epoch)), label
        return val_image(data, config), label
    except Exception as error:  # Pillow raises many kinds on bad bytes
        raise TrainError(f"{sample['__url__']}: {sample['__key__']}: {reason(error)}") from None


def decode_all(
    samples: Iterable[dict[str, Any]], config: LoaderConfig, epoch: int
) -> Iterator[tuple[torch.Tensor | None, int | str]]:
    """(image, label) of each sample; (None, error message) of one that cannot be decoded."""
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's, of bytes; nobody writes to them
    for sample in samples:
        try:
            yield decode(sample, config, epoch)
        except TrainError as error:
            yield None, str(error)


class Collate:
    """Decoded samples as one batch: [images uint8 [B, S, S, 3], labels int64 [B], error messages: list of str].

    A batch always has B rows. Rows that are missing, or could not be decoded, have the label −1 and the pixels of the
    first good row, because batch normalisation sees them. TrainError if there is no good row.

    In a loader process the images lie in one of four buffers that it shares with the main process and uses in turn:
    fresh memory would cost as much time as resizing. The DataLoader lets a process make two batches ahead, so the last
    two that were handed out stay valid.
    """

    def __init__(self, batch: int, size: int) -> None:
        self.batch, count = batch, 4 if get_worker_info() else 0
        buffers = [torch.empty(batch * size * size * 3, dtype=torch.uint8).share_memory_() for _ in range(count)]
        self.buffers = itertools.cycle(buffers)  # of the size of the largest crops

    def __call__(self, samples: list[tuple[torch.Tensor | None, int | str]]) -> list:
        errors = [error for image, error in samples if image is None]
        good = next((image for image, _ in samples if image is not None), None)
        if good is None:
            raise TrainError(f"none of {len(samples)} images of a batch can be decoded: {errors[0]}")
        rows = samples + [(None, "")] * (self.batch - len(samples))
        images = [good if image is None else image for image, _ in rows]
        labels = [IGNORE_INDEX if image is None else label for image, label in rows]
        buffer = next(self.buffers, None)
        out = None if buffer is None else buffer[: self.batch * good.numel()].view(self.batch, *good.shape)
        return [torch.stack(images, out=out), torch.tensor(labels), errors]


def pad(batches: Iterable[list], count: int, batch: int, size: int) -> Iterator[list]:
    """The batches, then `count` of rows that do not count, because other ranks have more."""
    yield from batches
    for _ in range(count):
        yield [torch.zeros(batch, size, size, 3, dtype=torch.uint8), torch.full((batch,), IGNORE_INDEX), []]


class EpochDataset(IterableDataset):
    """One rank's batches, from within an epoch to the end of the last epoch. Each loader process makes its share."""

    def __init__(self, config: LoaderConfig, epoch: int, history: list[Division], disk_full: Event) -> None:
        self.config, self.epoch, self.history, self.disk_full = config, epoch, history, disk_full

    def pipeline(self, epoch: int, history: list[Division], worker: int, collate: Collate) -> wds.DataPipeline:
        """One reader's batches of the rest of one epoch, as WebDataset stages."""
        config = replace(self.config, size=self.config.crop(epoch))
        order, blocks = plan_reader(config.index, config.training, config.seed, epoch, history, config.rank, worker)
        made = batches_done(worker, history[-1])
        steps = remaining_steps(config.index, config.training, history)
        count = len(batches_of(steps, worker, history[-1].workers)) - made - math.ceil(len(order) / config.batch)
        return wds.DataPipeline(
            lambda: iter(order),  #                                            sample numbers, shuffled
            partial(read_samples, blocks=blocks, config=config, disk_full=self.disk_full),  # {"__key__", "jpg", "cls"}
            partial(decode_all, config=config, epoch=epoch),  #                (uint8 [S, S, 3], label)
            wds.batched(config.batch, collation_fn=collate),  #                [uint8 [B, S, S, 3], int64 [B], errors]
            partial(pad, count=count, batch=config.batch, size=config.size),  # as many on every rank
        )

    def __iter__(self) -> Iterator[list | TrainError]:
        config, info, history = self.config, get_worker_info(), self.history
        collate = Collate(config.batch, config.size)
        # The DataLoader takes batches from its processes in turn and does not start over with an epoch: batch `turn` of
        # the epoch, modulo workers, comes from process 0.
        turn = history[-1].done
        for epoch in range(self.epoch, max(config.epochs, self.epoch + 1)):
            worker = ((info.id if info else 0) + turn) % max(1, config.workers)
            try:
                yield from self.pipeline(epoch, history, worker, collate)
            except TrainError as error:
                yield error  # handed over like a batch: the DataLoader would wrap it in a page of traceback
                return
            turn -= remaining_steps(config.index, config.training, history)
            history = [config.division]


# ---------------------------------------------------------------- batches, epoch after epoch
# Training's loader processes live for the whole run and go on into the next epoch while validation runs. Validation's
# are started for each validation and end with it.

# Not Python's default: under forkserver (Python 3.14) a SIGTERM to the process group kills the loader processes.
START_METHOD = "fork" if sys.platform == "linux" else None


def end_with_parent(worker: int) -> None:
    """In a loader process: end with the main process, and not before.

    After a SIGKILL: the DataLoader's own check misses an early one. And torchrun sends SIGTERM to the main process's
    group, which then still needs the batch in hand.
    """
    os.setpgrp()
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for_any([parent]), os._exit(1)), daemon=True).start()


START_TIMEOUT = 60  # seconds in which a loader process calls end_with_parent()


def start_loading(dataset: EpochDataset, workers: int) -> Iterator[list]:
    """The dataset's batches, from new loader processes. TrainError if they don't start.

    Python before 3.10.15 and 3.11.10 may deadlock in a new process if a thread, such as those of torch.distributed,
    starts or ends at that moment (https://github.com/python/cpython/issues/112275). Such a process is replaced.
    """
    for _ in range(3):
        others = set(multiprocessing.active_children())
        batches = iter(DataLoader(
            dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(),
            worker_init_fn=end_with_parent, multiprocessing_context=START_METHOD if workers else None,
        ))
        waiting = set(multiprocessing.active_children()) - others if START_METHOD == "fork" else set()
        begun = time.monotonic()
        while waiting and time.monotonic() - begun < START_TIMEOUT:
            waiting = {process for process in waiting if process.is_alive() and os.getpgid(process.pid) != process.pid}
            time.sleep(0.01)
        if not waiting:
            return batches
        for process in waiting:
            with contextlib.suppress(RuntimeError):  # by which PyTorch reports a killed process
                process.kill()
                process.join()
            process.join()
    raise TrainError(f"loader processes did not start within {START_TIMEOUT} s; use a newer Python or fewer --workers")


class Loader:
    """One rank's batches, an epoch for each iter(): [images uint8 [B, S, S, 3], labels int64 [B], −1: does not count].

    The memory of images is used again: a batch and the one before stay valid, clone what is to be kept longer.

    It keeps its own epoch and place, because Lightning calls iter() before it knows the epoch, and more than once:
    nothing happens before a batch is asked for. A checkpoint has rank 0's state_dict(), which is every rank's.
    """

    def __init__(self, config: LoaderConfig, lightning_epoch: Callable[[], int] | None = None) -> None:
        self.config, self.lightning_epoch = config, lightning_epoch
        self.epoch, self.history = 0, [config.division]
        self.position = (0.0, 0.0)  # in epochs, where the last batch began and ended
        self.last_steps = 0  # of the epoch before
        self.disk_full = multiprocessing.get_context(START_METHOD).Event()  # the cache's
        self.bad = 0  # images of this epoch that could not be decoded, on this rank
        self.waited = 0.0  # seconds, in all, that the training loop waited for a batch
        self.batches: Iterator[list] | None = None

    @property
    def done(self) -> int:
        """Batches of the epoch that were handed out."""
        return sum(division.done for division in self.history)

    def __len__(self) -> int:
        """Batches of Lightning's epoch, exactly, on every rank: Lightning skips validation in silence if fewer come.

        That epoch is the one before if only its validation is due.
        """
        if self.lightning_epoch and self.lightning_epoch() < self.epoch:
            return self.last_steps
        earlier = sum(division.done for division in self.history[:-1])
        return earlier + remaining_steps(self.config.index, self.config.training, self.history)

    def advance(self) -> None:
        """Count a batch that is handed out."""
        total, steps, last = self.config.index.total, len(self), self.history[-1]
        used = sum(division.done * division.world * division.batch for division in self.history)
        self.position = self.epoch + used / total, self.epoch + min(1, (used + last.world * last.batch) / total)
        self.history[-1] = last._replace(done=last.done + 1)
        if self.done == steps:
            self.last_steps, self.history = steps, [self.config.division]
            self.epoch += self.config.training

    def next_batch(self) -> list:
        """What the loader processes made; starts them if there are none. TrainError if they failed."""
        begun = time.perf_counter()
        try:
            if self.batches is None:
                dataset = EpochDataset(self.config, self.epoch, self.history.copy(), self.disk_full)
                self.batches = start_loading(dataset, self.config.workers)
            batch = next(self.batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            remedy = "is memory or /dev/shm too small? Use fewer --workers or a smaller --shuffle"
            raise TrainError(f"a loader process was killed ({error}); {remedy}") from None
        self.waited += time.perf_counter() - begun
        if isinstance(batch, TrainError):
            raise batch
        return batch

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        config = self.config
        if not self.done:
            self.bad = 0
        for _ in range(len(self) - self.done):
            *batch, errors = self.next_batch()
            for error in errors:
                tqdm.write(f"imagenet_train.py: not used: {error}", file=sys.stderr)  # above a progress bar
            self.bad += len(errors)
            if self.bad > config.max_bad:
                limit = f"--max-bad={config.max_bad}"
                raise TrainError(f"{self.bad} undecodable images in an epoch, {limit}; last: {errors[-1]}")
            self.advance()
            if not config.training and not self.done:
                self.batches = None
            yield batch

    def order_digest(self, history: Sequence[Division]) -> str:
        """Of the first reader's order: it changes if a library or this script computes another one."""
        if not history:
            return ""
        history = [*history[:-1], history[-1]._replace(done=0)]
        order, _ = plan_reader(self.config.index, True, self.config.seed, self.epoch, history, 0, 0)
        return hashlib.sha256(array("q", order).tobytes()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        history = [division for division in self.history if division.done]
        state = {"epoch": self.epoch, "steps": self.last_steps, "history": list(map(list, history))}
        state |= {"index": self.config.index.digest, "seed": self.config.seed, "order": self.order_digest(history)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. TrainError if it is within an epoch of another index, seed or order."""
        self.epoch, self.last_steps = state["epoch"], state["steps"]
        history = [Division(*values) for values in state["history"]]
        ours = {"index": self.config.index.digest, "seed": self.config.seed, "order": self.order_digest(history)}
        mismatches = [f"{key} {state[key]} there, {value} here" for key, value in ours.items() if state[key] != value]
        if history and mismatches:
            raise TrainError(
                "--resume: the checkpoint is within an epoch of other data or another order ("
                f"{'; '.join(mismatches)}); resume from one at an epoch's end, such as best.ckpt"
            )
        if not history or history[-1]._replace(done=0) != self.config.division:
            history.append(self.config.division)
        self.history = history

    def describe_resume(self) -> str:
        """What is resumed, with which settings, and how much is read again. Takes seconds on all of ImageNet."""
        config, now = self.config, self.history[-1]
        if not self.done:
            return f"resuming at the start of epoch {self.epoch + 1}"
        used = used_samples(config.index, config.seed, self.epoch, self.history)
        again = 0
        for start, block in zip(config.index.starts, config.index.blocks):
            count = used.count(1, start, start + block.samples)
            again += block.length * (0 < count < block.samples)
        settings = f"{now.world} ranks x {now.workers} readers x batch {now.batch}"
        before = "" if now.done else ", begun with other settings"
        return (
            f"resuming in epoch {self.epoch + 1} after {self.done} of {len(self)} batches{before}, with {settings}; "
            f"{again / 1e6:,.1f} MB are read again"
        )


class ImageNetData(pl.LightningDataModule):
    """The loaders of both splits, for this rank.

    The training loader's place is restored here: Lightning restores a loader's own state too, but only within an
    epoch, and a run that is resumed at an epoch's end would start over with the first epoch's batches.
    """

    def __init__(self, train: LoaderConfig, val: LoaderConfig, make: Callable[..., Loader] = Loader) -> None:
        super().__init__()
        self.train, self.val, self.make = train, val, make
        self.loader: Loader | None = None
        self.state: dict | None = None

    def ranked(self, config: LoaderConfig) -> LoaderConfig:
        """For this rank."""
        return replace(config, rank=self.trainer.global_rank, world=self.trainer.world_size)

    def train_dataloader(self) -> Loader:
        """Always the same one: Lightning asks again for every epoch, because its length may change."""
        if self.loader is None:
            self.loader = self.make(self.ranked(self.train), lightning_epoch=lambda: self.trainer.current_epoch)
            if self.state:
                self.loader.load_state_dict(self.state)
                rank_zero_only(print)(self.loader.describe_resume())
        return self.loader

    def val_dataloader(self) -> Loader:
        return Loader(self.ranked(self.val))

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.state = state

    def teardown(self, stage: str) -> None:
        if self.loader:
            self.loader.batches = None  # ends the loader processes


# ---------------------------------------------------------------- batches → gradients
# Lightning has the loop, the devices, the ranks and the precision. What it can't know is here: the model and its
# recipe, the exact count of validated images, and from which moments a run can go on.


def lr_factor(position: tuple[float, float], warmup: float, epochs: float) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine decay to 0. All in epochs.

    position: start and end of the step. Warm-up is evaluated at the end and decay at the start, so no step has rate 0.
    """
    start, end = position
    if end < warmup:
        return end / warmup
    return 0.5 * (1 + math.cos(math.pi * max(0.0, start - warmup) / (epochs - warmup)))


def build_model(name: str, classes: int) -> torch.nn.Module:
    """A freshly initialised classification model of torchvision.models with `classes` outputs."""
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)


def check_sizes(name: str, *sizes: int) -> None:
    """TrainError if the model does not accept images of these sizes. Only shapes are computed: no data, no weights."""
    # RegNet's constructor reads values of tensors, which the meta device does not have.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = build_model(name, 2).to("meta").eval()
    for size in sizes:
        try:
            model(torch.empty(1, 3, size, size, device="meta"))
        except Exception as error:  # assertions, shapes that do not fit: each model has its own
            raise TrainError(f"--model={name} takes no images of {size} × {size} px: {error}") from None


def named_weights(model: str, weights: str | None) -> torchvision.models.WeightsEnum | None:
    """torchvision's weights of this model and name; None if `weights` is a file."""
    return torchvision.models.get_model_weights(model).__members__.get(weights)


def read_weights(model: str, weights: str) -> dict[str, torch.Tensor]:
    """The state dict that --weights names: torchvision's weights of this model, or a file. Raises TrainError."""
    named = named_weights(model, weights)
    if named and model in ("googlenet", "inception_v3"):
        raise TrainError(f"--weights={weights}: {model}'s published weights expect inputs of another normalisation")
    try:  # weights_only: no code in the file is run
        if named:
            state = named.get_state_dict(progress=rank_zero_only.rank == 0, check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:
        names = ", ".join(torchvision.models.get_model_weights(model).__members__)
        problem = f"{error.strerror or error}; for {model} give a file or one of {names}"
        raise TrainError(f"--weights={weights}: {problem}") from None
    except Exception as error:  # of many kinds: pickle's, zip's
        raise TrainError(f"--weights={weights}: not a file of weights ({type(error).__name__})") from None
    for key in ("state_dict", "model"):  # checkpoints: of this script and of others, of torchvision's references
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {key.removeprefix("module.").removeprefix("model."): value for key, value in state.items()}
    # torchvision's DenseNet files have older names: norm.1 for norm1.
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=\d\.)", r"\1", key): state[key] for key in state}


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], classes: int) -> list[str]:
    """Copy the weights into the model. ValueError if they do not fit.

    If they are for another number of classes, the last layer keeps its random values: returns the names of its tensors.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.lower().startswith("aux")}
    differ = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    last = {key for key in differ if len(own[key]) == classes and own[key].shape[1:] == state[key].shape[1:]}
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # missing in files of PyTorch 0.4 and before
    if mismatches := (differ - last) | ((own.keys() ^ state.keys()) - counters):
        raise ValueError(f"{len(mismatches)} tensors do not fit, such as {min(mismatches)}")
    for key in (own.keys() & state.keys()) - last:
        own[key].copy_(state[key])  # not load_state_dict(): some models want a version that a file may lack
    return sorted(last)


class Classifier(pl.LightningModule):
    """The network, its loss, its optimiser and its metrics.

    lr: peak, for 256 images a global batch · warmup_epochs: epochs of linear warm-up · images: in validation
    """

    def __init__(
        self, model: str, classes: int, lr: float, momentum: float, weight_decay: float, label_smoothing: float,
        warmup_epochs: float, images: int, seed: int = 0, compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(model, classes).to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        accuracy = partial(MulticlassAccuracy, classes, average="micro", ignore_index=IGNORE_INDEX)
        self.accuracy = MetricCollection({f"val_top{k}": accuracy(top_k=min(k, classes)) for k in (1, 5)})
        self.loss, self.seen = MeanMetric(), SumMetric()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S, 3] → logits [B, classes]. The permuted view is channels_last as it lies: no copy."""
        return self.model((images.permute(0, 3, 1, 2) - self.mean) / self.std)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD. The learning rate is set before each step."""
        h = self.hparams
        groups = [  # norms and biases are the parameters with one dimension: He et al., arXiv:1812.01187, section 3.1
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": h.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=h.lr, momentum=h.momentum)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Momentum and weight decay come from the flags, not from the checkpoint."""
        decay, no_decay = checkpoint["optimizer_states"][0]["param_groups"]
        decay |= {"momentum": self.hparams.momentum, "weight_decay": self.hparams.weight_decay}
        no_decay |= {"momentum": self.hparams.momentum}

    def on_train_start(self) -> None:
        """TrainError unless all ranks start at the same position: each reads the checkpoint that its machine sees."""
        loader = self.trainer.datamodule.loader
        ours = loader.epoch, loader.done, self.global_step
        positions = [ours] * self.trainer.world_size
        if len(positions) > 1:
            torch.distributed.all_gather_object(positions, ours)
        if len(set(positions)) > 1:
            raise TrainError(
                f"--resume: ranks would resume at different (epoch, batch, step): {positions}; is --output a folder "
                "that all machines share?"
            )

    def on_train_batch_start(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Set the learning rate. It depends only on the flags and on the position in epochs, also after a resume."""
        h, epochs, data = self.hparams, self.trainer.max_epochs, self.trainer.datamodule
        peak = h.lr * data.train.batch * self.trainer.world_size / 256
        for group in self.optimizers().param_groups:
            group["lr"] = peak * lr_factor(data.loader.position, min(h.warmup_epochs, epochs / 2), epochs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loader = self.trainer.datamodule.loader
        if batch_idx != (loader.done - 1) % len(loader):
            raise RuntimeError(f"Lightning is at batch {batch_idx}, the loader at {loader.done}: batches would be lost")
        # Dropout too is a function of (seed, step, rank): a resumed run draws what it would have drawn.
        # Not torch.manual_seed: without a GPU it writes down the whole stack, each time, for when one comes.
        generator = torch.cuda if self.device.type == "cuda" else torch.default_generator
        draw = random.Random(f"{self.hparams.seed}/{self.global_step}/{self.global_rank}")
        generator.manual_seed(draw.getrandbits(63))
        # The sum over valid rows, divided by all rows: a sample has the same weight on every rank.
        options = dict(label_smoothing=self.hparams.label_smoothing, ignore_index=IGNORE_INDEX, reduction="sum")
        return F.cross_entropy(self(images), labels, **options) / len(labels)

    def on_train_epoch_end(self) -> None:
        bad = torch.tensor(float(self.trainer.datamodule.loader.bad), device=self.device)
        if bad := int(self.trainer.strategy.reduce(bad, reduce_op="sum")):
            self.print(f"epoch {self.current_epoch + 1}: {bad} images could not be decoded and were left out")

    def on_validation_epoch_start(self) -> None:
        self.accuracy.reset(), self.loss.reset(), self.seen.reset()
        if self.trainer.world_size > 1:  # batch-norm statistics differ between ranks; rank 0's are saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        real = (labels != IGNORE_INDEX).sum()
        logits = self(images).float()
        self.seen.update(real)
        self.accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        self.loss.update(loss / real.clamp(min=1), weight=real)

    def on_validation_epoch_end(self) -> None:
        """Log and print the result; TrainError unless every image was seen exactly once over all ranks."""
        seen, wanted = int(self.seen.compute()), self.hparams.images
        result = {"val_loss": self.loss.compute(), **self.accuracy.compute()}
        self.log_dict(result | {"epoch": self.current_epoch + 1.0}, sync_dist=True)  # equal on all ranks already
        top1, top5 = (100 * float(result[f"val_top{k}"]) for k in (1, 5))
        fitting = self.trainer.state.fn == "fit"
        position = f" (epoch {self.current_epoch + 1}, step {self.global_step})" if fitting else ""
        self.print(
            f"validated {seen}/{wanted} images: top-1 {top1:.2f} %, top-5 {top5:.2f} %, "
            f"loss {float(result['val_loss']):.4f}{position}"
        )
        if seen != wanted:
            raise TrainError(f"validation saw {seen} images, the index lists {wanted}")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step: whenever the run is killed, the old file or the new one is there, complete.

    Lightning writes to TMPDIR first and, if that is another file system, copies from there over the old checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: None = None) -> None:
        """TrainError if the disk is full or read-only."""
        folder, data = Path(path).parent, io.BytesIO()
        temporary = folder / "checkpoint.tmp"  # always this name: the next save replaces what a killed one left
        torch.save(checkpoint, data)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # the data reaches the disk before the name does
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            kept = "the previous one is kept" if os.path.exists(path) else "there is no previous one"
            raise TrainError(f"{path}: can't save the checkpoint: {error.strerror}; {kept}") from None
        with contextlib.suppress(OSError):  # some network file systems can't sync a folder
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt: every `every` steps, before and after validation, at --max-steps and on SIGTERM.

    Not Lightning's ModelCheckpoint: that saves a run which --max-steps ends within an epoch as if the epoch were over,
    and one that is killed in validation goes on without it.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.validation_due = path, every, False

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        wanted = trainer.global_step == trainer.max_steps or (self.every and trainer.global_step % self.every == 0)
        if wanted and trainer.datamodule.loader.done:  # after an epoch's last step validation comes, and saves
            trainer.save_checkpoint(self.path)

    def on_validation_start(self, trainer: pl.Trainer, *args) -> None:
        self.validation_due = True
        trainer.save_checkpoint(self.path)
        self.validation_due = False

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        if self.validation_due:  # as if it had begun: then Lightning does it when it resumes
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"] |= {"ready": 1, "started": 1}

    def on_train_epoch_end(self, trainer: pl.Trainer, *args) -> None:
        if trainer.datamodule.loader.done == 0:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and not trainer.validating:
            trainer.save_checkpoint(self.path)


SIGTERM_TIMEOUT = 20  # seconds for the next step after SIGTERM; clusters send SIGKILL after 30


class SigtermHandler(pl.Callback):
    """On SIGTERM, ends the run on all ranks after the same step with SIGTERMException, whichever rank got the signal.

    Lightning's handler broadcasts a flag wherever the signal arrives, so that the ranks' collectives no longer match,
    and another before each step, which waits for the device. Here the ranks exchange their flags through the key-value
    store by which they found each other, and read them one step later. No collective and no device takes part.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.requested, self.steps, self.ended = checkpoint, False, 0, threading.Event()

    def setup(self, trainer: pl.Trainer, *args, **kwargs) -> None:
        trainer._accelerator_connector.cluster_environment.auto_requeue = False  # on Slurm: Lightning's own checkpoints

    def on_train_start(self, trainer: pl.Trainer, *args) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        # Python runs a signal's handler in the main thread, so not while that waits in a collective for another rank.
        # The byte in the wake-up descriptor comes at once.
        signal.signal(signal.SIGTERM, lambda *args: None)  # Lightning restores the previous handler at the end
        signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        threading.Thread(target=self.watch, args=(trainer, signals), daemon=True).start()

    def watch(self, trainer: pl.Trainer, signals: int) -> None:
        """In a thread: wait for the signal, and exit if no step ends within SIGTERM_TIMEOUT after it."""
        while os.read(signals, 1) != bytes([signal.SIGTERM]):
            pass
        self.requested, step = True, None
        while step != self.steps:
            step = self.steps
            if self.ended.wait(SIGTERM_TIMEOUT):
                return
        exists = self.checkpoint.exists()
        resume = f"--resume continues from {self.checkpoint}" if exists else "there is no checkpoint yet"
        warn(f"SIGTERM: rank {trainer.global_rank} completed no step within {SIGTERM_TIMEOUT} s; {resume}")
        self.on_exception(trainer, None, TimeoutError())
        os._exit(128 + signal.SIGTERM)

    def sync(self, trainer: pl.Trainer, *args) -> None:
        """After each step: SIGTERMException, on all ranks, if SIGTERM had reached any of them by the previous step."""
        self.steps += 1
        requested: int = self.requested
        if trainer.world_size > 1:
            store, key = torch.distributed.distributed_c10d._get_default_store(), "sigterm/{}".format
            count = store.add(key(self.steps), 1 + (requested << 32))  # the lower half counts ranks
            if count % (1 << 32) == trainer.world_size:  # the last rank: all have read the step before the previous
                store.set(key(f"{self.steps}/any"), str(count >> 32))
                store.delete_key(key(self.steps - 2)), store.delete_key(key(f"{self.steps - 2}/any"))
            requested = self.steps > 1 and int(store.get(key(f"{self.steps - 1}/any")))
        # After an epoch's last step, its validation is due: LastCheckpoint says so before it starts.
        if requested and (trainer.validating or trainer.datamodule.loader.done):
            trainer.strategy.barrier()  # the store may be in rank 0's process, which must not end before all have read
            raise SIGTERMException

    on_train_batch_end = on_validation_epoch_start = on_validation_batch_end = sync

    def on_train_end(self, *args) -> None:
        self.ended.set()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule | None, exception: BaseException) -> None:
        """Also ends the ranks that Lightning started, which may wait for this one."""
        self.ended.set()
        if trainer.strategy.launcher:
            if not isinstance(exception, SIGTERMException):
                trainer.strategy.launcher.kill(signal.SIGKILL)
            trainer.strategy.launcher.procs.clear()  # Lightning kills this process when it sees that one of them ended


class ProgressBar(pl.Callback):
    """Logs loss, learning rate, images/s and the share of time spent waiting for data, every log_every_n_steps steps.

    They are shown with the progress: on a terminal as a bar, elsewhere as a line each time.
    """

    def __init__(self) -> None:
        self.bar, self.text = tqdm(disable=True), ""
        self.window: tuple[int, float, float] | None = None  # where the next entry starts: step, seconds waited, clock

    def show(self, trainer: pl.Trainer, description: str, total: int, done: int = 0) -> None:
        self.bar.close()
        self.bar = tqdm(
            desc=description, total=total, initial=done, postfix=self.text, leave=False, dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}", file=sys.stdout,
            disable=None if trainer.is_global_zero else True,  # None: unless it is a terminal
        )

    def on_train_batch_start(self, trainer: pl.Trainer, module: Classifier, batch: list, batch_idx: int) -> None:
        if self.window is None:  # at the start and after validation, whose seconds are not counted
            self.window = trainer.global_step, trainer.datamodule.loader.waited, time.perf_counter()
            epoch = f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.show(trainer, epoch, trainer.num_training_batches, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Classifier, outputs: dict, batch: list, batch_idx: int
    ) -> None:
        self.bar.update()
        if trainer.global_step % trainer.log_every_n_steps:
            return
        loss = outputs["loss"].item()  # not self.log(…, prog_bar=True), which waits for the device in each step
        step, waited, clock = self.window
        self.window = trainer.global_step, trainer.datamodule.loader.waited, time.perf_counter()
        seconds = self.window[2] - clock
        speed = (self.window[0] - step) * len(batch[1]) * trainer.world_size / seconds
        wait = (self.window[1] - waited) / seconds
        module.log_dict({
            "epoch": trainer.datamodule.loader.position[1], "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": loss, "train_images/s": speed, "train_wait": wait,
        })
        self.text = f"loss {loss:.3f}, {speed:,.0f} img/s, wait {wait:.0%}"
        self.bar.set_postfix_str(self.text)
        if self.bar.disable and trainer.is_global_zero:
            epoch = f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            print(f"{epoch}, step {batch_idx + 1}/{trainer.num_training_batches}: {self.text}", flush=True)

    def on_validation_epoch_start(self, trainer: pl.Trainer, *args) -> None:
        self.window = None
        self.show(trainer, "Validation", trainer.num_val_batches[0])

    def on_validation_batch_end(self, *args) -> None:
        self.bar.update()

    def close(self, *args) -> None:
        self.bar.close()

    on_validation_epoch_end = on_train_end = on_exception = close


# ---------------------------------------------------------------- pictures
# --preview draws samples → one sheet; training draws metrics.csv → curves.png.


def first_samples(config: LoaderConfig) -> Iterator[dict[str, Any]]:
    """The undecoded samples of epoch 0 in the order of training, as one rank with one reader uses them."""
    order, blocks = plan_reader(config.index, True, config.seed, 0, [config.division], rank=0, worker=0)
    return read_samples(order, blocks, config, multiprocessing.Event())


def preview(config: LoaderConfig, path: Path) -> None:
    """Draw the first training batch: each image with its crop's outline, beside what the model sees, and the class."""
    size, samples = config.size, list(itertools.islice(first_samples(config), config.batch))
    columns, width, height = max(1, round(math.sqrt(0.75 * len(samples)))), 2 * size + 12, size + 28
    sheet = Image.new("RGB", (columns * width + 8, math.ceil(len(samples) / columns) * height + 4), "white")
    draw = ImageDraw.Draw(sheet)
    names = config.index.class_names or config.index.classes
    for position, (sample, (pixels, label)) in enumerate(zip(samples, decode_all(samples, config, epoch=0))):
        if pixels is None:
            continue  # can't be decoded: training reports it
        left, top = position % columns * width + 8, position // columns * height + 4
        original = read_rgb(io.BytesIO(image_bytes(sample)))
        box = random_crop(*original.size, sample_rng(sample, config, epoch=0))
        scale = size / max(original.size)
        original = original.resize([max(1, round(scale * side)) for side in original.size])
        ImageDraw.Draw(original).rectangle([round(scale * edge) for edge in box], outline="red", width=2)
        sheet.paste(original, (left + (size - original.width) // 2, top + (size - original.height) // 2))
        sheet.paste(Image.fromarray(pixels.numpy()), (left + size + 2, top))
        text = f"{label}  {names[int(label)].split(',')[0]}"[: size // 4]
        draw.text((left, top + size + 4), text, "black", font_size=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"{path}: {len(samples)} images of the first training batch, each beside what the model sees, {size} px")


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw loss, accuracy, learning rate and speed over the epochs of a metrics.csv, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    def values(name: str, factor: float = 1) -> dict[float, float]:
        """By position in epochs. After a resume the rows of repeated steps come twice; the later ones count."""
        return {float(row["epoch"]): factor * float(row[name]) for row in rows if row.get(name)}

    panels = {
        "loss": {"training": values("train_loss"), "validation": values("val_loss")},
        "accuracy, %": {"top-1": values("val_top1", 100), "top-5": values("val_top5", 100)},
        "learning rate": {"": values("lr")},
        "images/s": {"": values("train_images/s")},
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, panels.items()):
        for label, curve in curves.items():
            axes.plot(*zip(*sorted(curve.items())), label=label, marker="." if len(curve) < 50 else "")
        axes.set(title=title, xlabel="epoch", xlim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


class Results(pl.Callback):
    """After each validation: its metrics go into the checkpoint, for export(), and into curves.png."""

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        metrics = trainer.callback_metrics
        checkpoint["metrics"] = {name: float(metrics[name]) for name in metrics if name.startswith("val_")}

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        folder = Path(trainer.logger.log_dir)
        draw_curves(folder / "metrics.csv", folder / "curves.png")


# ---------------------------------------------------------------- command line


def bounded(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number of this kind within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except those that say nothing or that the text itself states."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default is None or action.default is False or "default:" in action.help
        return action.help if stated else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line instead of a page of usage, and names the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"imagenet_train.py: {message}\n")

    def parse_all(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            self.error(f"unrecognized argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return args


# Defaults of the flags, by the number of epochs.
RECIPES: dict[str, dict[str, float]] = {
    # NVIDIA's ResNet-50 v1.5, DeepLearningExamples, PyTorch/Classification/ConvNets: 77.1 % top-1.
    "90": dict(
        max_epochs=90, lr=0.256, momentum=0.875, weight_decay=1 / 32768, label_smoothing=0.1, warmup_epochs=8,
        train_size=224, val_size=224, val_resize=256,
    ),
    # After FFCV's rn50_16_epochs.yaml, without its blurpool and flips in validation. There lr is 1.7 for a global batch
    # of 4096, and its validation crop is 224/256 of the shorter side.
    "16": dict(
        max_epochs=16, lr=1.7 / 16, momentum=0.9, weight_decay=1e-4, label_smoothing=0.1, warmup_epochs=2,
        progressive=128, train_size=192, val_size=256, val_resize=292,
    ),
}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the images are and how they are loaded."""
    count, whole, pixels = bounded(int, 1), bounded(int, 0), bounded(int, 16, 4096)
    data = parser.add_argument_group("data")
    add = data.add_mutually_exclusive_group().add_argument
    add("--shards", "--base", metavar="PREFIX", default="./data",
        help="a folder, http(s)://… or pipe:COMMAND; file names are appended to it, or replace %%s in it")
    add("--imagenet", metavar="DIR", type=Path, help="train from ImageNet's own files, in train/ and val/, instead")
    add = data.add_argument
    add("--index", metavar="PREFIX", help="prefix of the index, if it is not beside the shards")
    add("--batch-size", metavar="N", type=count, default=256, help="images per device and step")
    add("--workers", metavar="N", type=whole, help="loader processes per rank (default: its share of the cores)")
    add("--train-size", metavar="PX", type=pixels, help="side of a training crop, pixels")
    add("--progressive", metavar="PX", type=pixels,
        help="start with training crops of PX, which grow to --train-size between half and four fifths of the epochs")
    add("--val-size", metavar="PX", type=pixels, help="side of the validation crop, pixels")
    add("--val-resize", metavar="PX", type=pixels, help="shorter side before the validation crop, pixels")
    add("--shuffle", metavar="N", type=whole, default=2000, help="samples in a worker's shuffle buffer, 110 KB each")
    add("--cache", metavar="DIR", type=Path, help="folder on a local disk for the blocks that are read (default: none)")
    add("--retries", metavar="N", type=whole, default=5, help="retries of a failed read, with exponential back-off")
    add("--timeout", metavar="S", type=bounded(float, 0.1), default=60,
        help="seconds without a byte until a read fails")
    add("--max-bad", metavar="N", type=whole, default=100,
        help="undecodable training images per rank and epoch that are reported and left out; more are an error")
    add("--seed", metavar="N", type=bounded(int, 0, 2**32 - 1), default=0,
        help="determines initial weights, order, crops and flips")
    add("--preview", metavar="FILE.png", type=Path,
        help="draw the first training batch, each image beside what the model sees, and exit")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, its training and its output."""
    count, whole, real = bounded(int, 1), bounded(int, 0), bounded(float, 0)
    add = parser.add_argument_group("model and recipe").add_argument
    add("--recipe", choices=RECIPES, default="90",
        help="defaults of epochs, rates and sizes: 90 epochs, NVIDIA's for ResNet-50 v1.5, or 16, after FFCV's")
    models = torchvision.models.list_models(module=torchvision.models)
    add("--model", metavar="NAME", choices=models, default="resnet50", help="any classification model of torchvision")
    add("--weights", metavar="NAME|FILE",
        help="start from torchvision's weights, such as IMAGENET1K_V1 or DEFAULT, or from a file with a state dict or "
        "checkpoint; the last layer is new if the number of classes differs")
    add("--evaluate", action="store_true",
        help="only validate --weights or --resume, for a NAME with torchvision's resize and crop unless given")
    add("--lr", metavar="X", type=real, help="peak learning rate for a global batch of 256; scaled with the actual one")
    add("--momentum", metavar="X", type=bounded(float, 0, 1), help="momentum of SGD")
    add("--weight-decay", metavar="X", type=real, help="not applied to norms and biases (default: 1/32768)")
    add("--label-smoothing", metavar="X", type=bounded(float, 0, 1), help="share of the target spread over all classes")
    add("--warmup-epochs", metavar="X", type=real, help="epochs of linear warm-up, at most half of the run")
    add("--compile", action="store_true", help="compile the model with torch.compile")

    add = parser.add_argument_group("trainer (Lightning's names)").add_argument
    add("--accelerator", metavar="NAME", default="auto", help="auto, cpu, gpu, …")
    add("--devices", metavar="N", default="auto", help="per node: auto, a number, or a list such as 0,2")
    add("--num-nodes", metavar="N", type=count, default=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        help="machines; torchrun sets it")
    add("--precision", metavar="NAME", help="32-true, bf16-mixed, … (default: bf16-mixed on a GPU that has it)")
    add("--max-epochs", metavar="N", type=count, help="epochs to train")
    add("--max-steps", metavar="N", type=bounded(int, -1), default=-1,
        help="stop after N steps; -1: no limit. The learning rate follows --max-epochs")
    add("--log-every", metavar="N", type=count, default=50, help="steps between two entries of the log")

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", type=Path, default="./output", help="each run writes its results to DIR/version_N")
    add("--checkpoint-every", metavar="N", type=whole, default=0, help="steps between checkpoints; 0: once an epoch")
    add("--resume", metavar="PATH", nargs="?", const="",
        help="continue from a checkpoint or version folder; without PATH from the newest last.ckpt in --output, if any")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    parser = Parser(
        description="Train a torchvision model on ImageNet from WebDataset shards.", formatter_class=Help,
        allow_abbrev=False,
    )
    add_data_flags(parser)
    add_training_flags(parser)
    parser.set_defaults(**RECIPES["90"])  # for --help
    parser.set_defaults(**RECIPES[parser.parse_all(argv).recipe])
    args = parser.parse_all(argv)
    if args.evaluate:
        if (args.weights is None) == (args.resume is None):
            parser.error("--evaluate: give --weights or --resume")
        if named := named_weights(args.model, args.weights):
            transforms = named.transforms()
            parser.set_defaults(val_size=transforms.crop_size[0], val_resize=transforms.resize_size[0])
            args = parser.parse_all(argv)
    if args.val_size > args.val_resize:
        parser.error(f"--val-size {args.val_size} does not fit into --val-resize {args.val_resize}")
    if args.progressive and args.progressive > args.train_size:
        parser.error(f"--progressive {args.progressive} is more than --train-size {args.train_size}")
    if args.preview and args.preview.suffix != ".png":
        parser.error(f"--preview {args.preview}: give a name that ends in .png")
    return args


def read_indexes(args: argparse.Namespace, splits: tuple[str, ...]) -> list[Index]:
    """The indexes of these splits. TrainError if one can't be read or they do not fit each other."""
    source = f"--imagenet={args.imagenet}" if args.imagenet else f"--shards={args.shards}"
    if args.imagenet:
        indexes = [read_tree(args.imagenet, split) for split in splits]
    else:
        indexes = [read_index(args.shards, split, args.retries, args.timeout, args.index) for split in splits]
    if any(index.classes != indexes[0].classes for index in indexes):
        raise TrainError(f"{source}: train and val have different classes; convert both from one tree")
    if len(indexes[0].classes) < 2:
        raise TrainError(f"{source}: has only the class {indexes[0].classes[0]}; training needs two or more")
    return indexes


def newest_checkpoint(output: Path) -> Path | None:
    """The last.ckpt below --output that was written last."""
    return max(output.glob("version_*/last.ckpt"), key=os.path.getmtime, default=None)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume names; None if it names none, or if there is none yet."""
    if not args.resume:
        return newest_checkpoint(args.output) if args.resume == "" else None
    path = Path(args.resume)
    return path / "last.ckpt" if path.is_dir() else path


def is_finished(path: Path, args: argparse.Namespace, classes: int) -> bool:
    """Whether the run of this checkpoint has no steps left. TrainError if the checkpoint can't be continued."""
    try:
        checkpoint = torch.load(path, mmap=True, weights_only=True)  # weights_only: no code in it is run
        made, step = checkpoint["hyper_parameters"], checkpoint["global_step"]
        epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        found, wanted = f"{made['classes']} classes of {made['model']}", f"{classes} classes of {args.model}"
    except OSError as error:
        raise TrainError(f"--resume={path}: {error.strerror}") from None
    except Exception as error:  # of many kinds: pickle's, zip's, a missing key
        raise TrainError(f"--resume={path}: not a checkpoint of this script ({type(error).__name__})") from None
    if found != wanted:
        raise TrainError(f"--resume={path}: for {found}, not {wanted}; give the same, or start without --resume")
    for name, done, limit in (("epoch", epoch, args.max_epochs), ("step", step, args.max_steps)):
        if 0 <= limit <= done:
            rank_zero_only(print)(f"--resume={path}: already at {name} {done} of {limit}; raise --max-{name}s")
            return True
    return False


def version_folder(output: Path, checkpoint: Path | None) -> Path:
    """The folder of this run: that of the last.ckpt that it continues, if it is in --output, or a new one.

    Ranks that look at different moments may differ. Only rank 0 writes, so only its answer matters.
    """
    if checkpoint and checkpoint.name == "last.ckpt" and checkpoint.parent.parent.resolve() == output.resolve():
        return output / checkpoint.parent.name
    return Path(CSVLogger(output, name="").log_dir)


def make_cache(folder: Path | None) -> Path | None:
    """The folder, made and cleared of what killed runs left half done; None, with a warning, if it can't be written."""
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("tmp-*"):
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink(missing_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        rank_zero_only(warn)(f"--cache={folder}: {error.strerror}; continuing without")
        return None


def make_model(args: argparse.Namespace, index: Index, images: int, weights: str | None = None) -> Classifier:
    """The model for this index's classes and `images` images in validation, with the weights of a name or a file."""
    recipe = ("model", "lr", "momentum", "weight_decay", "label_smoothing", "warmup_epochs", "seed", "compile")
    classes = len(index.classes)
    module = Classifier(classes=classes, images=images, **{name: getattr(args, name) for name in recipe})
    if weights:
        try:
            last = load_weights(module.model, read_weights(args.model, weights), classes)
        except ValueError as error:
            raise TrainError(f"{weights}: not for --model={args.model}: {error}") from None
        if last and args.evaluate:
            raise TrainError(f"{weights}: not for the {classes} classes of the images; there is nothing to evaluate")
        if last:
            rank_zero_only(print)(f"{weights}: not for {classes} classes; the last layer, {last[-1]}, starts at random")
    return module


class AppendingWriter(ExperimentWriter):
    """CSVLogger's writer deletes the metrics.csv of a run that is resumed; this one appends to it."""

    def _check_log_dir_exists(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.metrics_file_path, newline="") as file:
            self.metrics_keys = next(csv.reader(file), [])


def make_loggers(folder: Path) -> list[Logger]:
    """Logs in this folder, those of TensorBoard if it is installed."""
    place = dict(save_dir=folder.parent, name="", version=folder.name)
    loggers = [CSVLogger(**place)]
    if rank_zero_only.rank == 0:
        loggers[0]._experiment = AppendingWriter(str(folder))
    with contextlib.suppress(ModuleNotFoundError):
        loggers.append(TensorBoardLogger(**place))
    return loggers


def make_trainer(args: argparse.Namespace, folder: Path, **changes) -> pl.Trainer:
    """Lightning's Trainer by the flags, or else `changes`. TrainError for a device or precision that is not available.

    folder: of the run, for checkpoints
    """
    precision = args.precision
    if precision is None:
        gpu = args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    callbacks = [
        Results(),
        ProgressBar(),
        SigtermHandler(folder / "last.ckpt"),
        ModelCheckpoint(folder, "best", monitor="val_top1", mode="max", enable_version_counter=False),
        LastCheckpoint(folder / "last.ckpt", args.checkpoint_every),  # last, because it saves the best one's state too
    ]
    options = dict(
        accelerator=args.accelerator, devices=args.devices, num_nodes=args.num_nodes, precision=precision,
        max_epochs=args.max_epochs, max_steps=args.max_steps, log_every_n_steps=args.log_every,
        logger=False, callbacks=callbacks, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
        enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, benchmark=True,
        reload_dataloaders_every_n_epochs=1,  # so that Lightning asks for the length of every epoch
    )
    try:
        return pl.Trainer(**options | changes)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        flags = f"--accelerator={args.accelerator} --devices={args.devices} --precision={precision}"
        raise TrainError(f"{flags}: {str(error).splitlines()[0]}") from None


def make_configs(args: argparse.Namespace, indexes: list[Index], trainer: pl.Trainer | None) -> list[LoaderConfig]:
    """How to load the training split, if it is in the list, and the validation split. trainer: None for one rank."""
    world, nodes = (trainer.world_size, trainer.num_nodes) if trainer else (1, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, cores // (world // nodes)) if args.workers is None else args.workers
    common = dict(batch=args.batch_size, seed=args.seed, retries=args.retries, timeout=args.timeout, world=world,
                  workers=workers, cache=None if args.imagenet else make_cache(args.cache))
    configs = [LoaderConfig(indexes[-1], False, size=args.val_size, resize=args.val_resize, **common)]
    for index in indexes[:-1]:
        if index.total < args.batch_size * world:
            raise TrainError(f"--batch-size={args.batch_size} × {world} ranks: more than the {index.total} training "
                             "images; give a smaller one")
        configs.insert(0, LoaderConfig(
            index, True, size=args.train_size, first_size=args.progressive or 0, epochs=args.max_epochs,
            shuffle=0 if index.tree else args.shuffle, max_bad=args.max_bad, **common,  # a tree's files come shuffled
        ))
    return configs


def write_metrics(path: Path, args: argparse.Namespace, metrics: dict[str, float | str]) -> None:
    """metrics.json: what was measured, on what."""
    settings = {"model": args.model, "val_size": args.val_size, "val_resize": args.val_resize}
    path.write_text(json.dumps(settings | metrics, indent=2) + "\n")


@rank_zero_only
def export(folder: Path, args: argparse.Namespace) -> None:
    """Write model.pt, the state dict of the best epoch for torchvision's get_model(), and its metrics.json."""
    if (folder / "best.ckpt").exists():
        best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
        state = {key.removeprefix("model."): value for key, value in best["state_dict"].items()}
        AtomicCheckpointIO().save_checkpoint(state, folder / "model.pt")
        write_metrics(folder / "metrics.json", args,
                      {"epoch": best["epoch"] + 1, "step": best["global_step"]} | best["metrics"])
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def evaluate(args: argparse.Namespace) -> None:
    """Validate --weights, or the checkpoint of --resume, on all ranks. metrics.json goes into a new version folder."""
    [index] = read_indexes(args, ("val",))
    check_sizes(args.model, args.val_size)
    weights = args.weights or str(find_checkpoint(args) or "")
    if not weights:
        raise TrainError(f"--evaluate --resume: no version_N/last.ckpt in {args.output}; name a checkpoint")
    folder, show = version_folder(args.output, None), rank_zero_only(print)
    trainer = make_trainer(args, folder, callbacks=[ProgressBar()], enable_checkpointing=False)
    [config] = make_configs(args, [index], trainer)
    model = make_model(args, index, index.total, weights)
    device = f"{trainer.world_size} {trainer.strategy.root_device.type}, {trainer.precision}"
    show(f"{args.model} with {weights} on {device}: {index.total:,} val images, resized to {args.val_resize} px, "
         f"cropped to {args.val_size} px; from {args.imagenet or args.shards}")
    named = named_weights(args.model, weights)
    if named and named.transforms().interpolation.value != "bilinear":
        show(f"{weights}: published with bicubic resizing, here it is bilinear; the accuracy will differ slightly")
    trainer.validate(model, datamodule=ImageNetData(None, config), verbose=False)
    if trainer.is_global_zero:
        folder.mkdir(parents=True)
        result = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        write_metrics(folder / "metrics.json", args, {"weights": weights} | result)
        print(f"{folder}: metrics.json")


def run_training(args: argparse.Namespace) -> None:
    """Train, from the start or from the checkpoint of --resume, in a version folder. Cheap checks come first."""
    indexes = read_indexes(args, ("train", "val"))
    index, val = indexes
    check_sizes(args.model, args.train_size, args.val_size, args.progressive or args.train_size)
    if args.preview:
        config = make_configs(args, indexes, None)[0]
        return preview(replace(config, batch=min(config.batch, 32)), args.preview)
    checkpoint, show = find_checkpoint(args), rank_zero_only(print)
    folder = version_folder(args.output, checkpoint)
    if checkpoint and is_finished(checkpoint, args, len(index.classes)):
        return export(checkpoint.parent, args)
    if args.resume == "" and not checkpoint:
        show(f"--resume: no version_N/last.ckpt in {args.output} yet; starting from the beginning")
    trainer = make_trainer(args, folder)
    train, validation = make_configs(args, indexes, trainer)
    files = "files" if index.tree else "shards"
    show(
        f"{args.model} on {trainer.world_size} {trainer.strategy.root_device.type} × {train.workers} workers, "
        f"{trainer.precision}: {index.total:,} train images in {len(index.names):,} {files}, "
        f"{val.total:,} val in {len(val.names):,}, {len(index.classes)} classes; {train.steps:,} batches of "
        f"{args.batch_size} × {trainer.world_size} an epoch; from {args.imagenet or args.shards}"
    )
    pl.seed_everything(args.seed, verbose=False)
    model = make_model(args, index, val.total, None if checkpoint else args.weights)
    if trainer.is_global_zero:  # as late as this: a failed check leaves no folder. The folder of another run is refused
        folder.mkdir(parents=True, exist_ok=bool(checkpoint) and folder.resolve() == checkpoint.parent.resolve())
    trainer.loggers = make_loggers(folder)
    trainer.fit(model, datamodule=ImageNetData(train, validation), ckpt_path=checkpoint, weights_only=True)
    export(folder, args)


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit status: 0, 1 after an error, 128 + the signal's number after ^C or SIGTERM."""
    args = parse_args(argv)
    for name in ("pytorch_lightning", "lightning_fabric"):  # their tips; warnings still come through
        logging.getLogger(name).setLevel(logging.WARNING)
    ignored = (
        "does not have many workers|exists and is not empty|smaller than the logging|find the monitored key|LeafSpec"
        "|The dirpath has changed"
    )
    warnings.filterwarnings("ignore", f".*({ignored}).*")  # Lightning's, of things that are meant so here
    try:
        evaluate(args) if args.evaluate else run_training(args)
        return 0
    except TrainError as error:
        message, status = str(error), 1
    except OSError as error:  # mostly of an output that can't be written
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    except (RuntimeError, MemoryError) as error:
        cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if cpu or isinstance(error, torch.OutOfMemoryError):
            memory = "this machine" if cpu else "the device"
            message = f"--batch-size={args.batch_size}: {memory} has too little memory; give a smaller one"
        elif isinstance(error, torch.distributed.DistError) or "by peer" in str(error):
            message = "another rank ended; its message says why"
        else:
            raise
        status = 1
    except (SIGTERMException, KeyboardInterrupt, SystemExit) as error:  # Lightning makes the third of the second
        sigterm, newest = isinstance(error, SIGTERMException), newest_checkpoint(args.output)
        message = f"--resume continues from {newest}" if newest else "there is no checkpoint yet"
        message = f"{'SIGTERM' if sigterm else 'interrupted'}: {message}"
        status = 128 + (signal.SIGTERM if sigterm else signal.SIGINT)
    warn(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
