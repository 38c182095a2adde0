"""Train a ResNet on ImageNet from WebDataset shards: from a prefix to a gradient, with PyTorch Lightning.

    python imagenet_train.py --shards=./data
    python imagenet_train.py --shards='pipe:curl -s http://localhost:8080/' --devices=8
    python imagenet_train.py --shards='pipe:gsutil cat gs://bucket/%s' --resume

In:  a prefix under which imagenet_shards.py's shards and index lie: a folder, a URL or a command that prints a file.
Out: --output holds last.ckpt, best.ckpt and logs/; the terminal shows loss, top-1, images/s and the wait for data.

Guarantee: in an epoch no image is trained on twice and fewer than ranks × batch rest; validation sees every image
exactly once, on any number of ranks, or says so and fails. The order, the crops and the flips are a function of the
seed: a run that is killed and resumed makes the batches that it would have made. Nothing is skipped in silence.

The defaults are the recipe for which NVIDIA published 77.1 ± 0.1 % top-1 (ResNet-50 v1.5, 90 epochs).
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
import webdataset as wds
from PIL import Image, ImageDraw
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm


class TrainError(Exception):
    """What the user can mend, in one line: what was named, what is there, what to do."""


class PermanentError(TrainError):
    """Trying again is no use."""


# ---------------------------------------------------------------- prefix → bytes
# A prefix is a folder, a URL or a command, and whatever it is, here it becomes a stream of bytes and a verdict. The
# verdict comes last: a download that breaks looks like a short file until its command's exit status is known.


def locate(prefix: str, name: str) -> str:
    """Where the file `name` lies: a path, or pipe:COMMAND. %s in the prefix becomes the name; else it is appended."""
    command = prefix.startswith("pipe:")
    quoted = shlex.quote(name) if command else name
    if "%s" in prefix:  # not the % operator: a prefix may hold %20 and other percent signs
        place = prefix.replace("%s", quoted)
    elif command or prefix.endswith(("/", "=")):
        place = prefix + quoted
    else:
        place = f"{prefix}/{quoted}"
    if place.startswith(("http://", "https://")):
        # -f: a 404 is an error, not a page. Not --retry: inside a pipe it repeats bytes that were delivered.
        return f"pipe:curl -sSfL --connect-timeout 30 {shlex.quote(place)}"
    if not command and re.match(r"[a-z][a-z0-9+.-]*://", place):
        raise PermanentError(f"{prefix}: can't read this kind of URL; name a command, say pipe:gsutil cat gs://bucket/%s")
    return place


class Patient(io.RawIOBase):
    """The reading end of a pipe. TimeoutError if no byte comes for `timeout` seconds."""

    def __init__(self, pipe: io.FileIO, timeout: float) -> None:
        self.pipe, self.timeout, self.poll = pipe, timeout, select.poll()
        self.poll.register(pipe)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self.poll.poll(1000 * self.timeout):
            raise TimeoutError(f"no byte came for {self.timeout:g} s")
        return self.pipe.readinto(buffer)


class Source:
    """The bytes of one file, to read once from its beginning. OSError if it can't be opened, or stalls.

    Whether a command failed is known only after its last byte, from `trouble`: before that, neither damage nor an end
    of the data can be told from a download that broke. More than `limit` bytes are a ValueError: no server makes us
    read for ever.
    """

    def __init__(self, place: str, timeout: float, limit: int) -> None:
        self.place, self.timeout, self.limit, self.process = place, timeout, limit, None
        self.found = 0  # bytes
        if not place.startswith("pipe:"):
            self.stream = open(place, "rb", buffering=8 << 20)  # few large reads: disks that spin like them
            return
        self.messages = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            place.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            bufsize=0,
            start_new_session=True,  # so that close() ends the whole command, its children included
        )
        self.stream = io.BufferedReader(Patient(self.process.stdout, timeout), 1 << 20)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        data = self.stream.read(size)
        self.found += len(data)
        if self.found > self.limit:
            raise ValueError(f"more than {self.limit} bytes")
        return data

    def trouble(self) -> str | None:
        """Read what is left, wait for the command, and say what is wrong with it; None if nothing is."""
        try:
            while self.read(1 << 16):
                pass
        except ValueError as error:
            return str(error)
        if self.process is None:
            return None
        try:
            status = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return f"the command did not end within {self.timeout:g} s of its last byte"
        self.messages.seek(0)
        said = self.messages.read()[-400:].decode(errors="replace").strip().replace("\n", " | ")
        return f"the command ended with exit status {status}, saying {said!r}" if status else None

    def close(self) -> None:
        """End the command, if it still runs, and let go of everything; silent, for a reader may stop early."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            self.messages.close()
        self.stream.close()


# What curl, gsutil, aws, sh, the kernel and web servers' pages say when the file is not there, or not for us.
PERMANENT = re.compile(
    r"exit status 12[67]\b|error( code)?: 40[134]\b|40[134] (Not Found|Forbidden|Unauthorized)|No such file"
    r"|Exception: 40[134] |\(40[134]\)|Not a directory|Is a directory|Permission denied|No URLs matched|NoSuchKey"
    r"|NoSuchBucket|AccessDenied|Unable to locate credentials|not found",
    re.IGNORECASE,
)


def failure(text: str, trouble: str) -> TrainError:
    """The error that says `text`: a PermanentError if its cause, `trouble`, is one that won't pass."""
    return PermanentError(text) if PERMANENT.search(trouble) else TrainError(text)


def retry(read: Callable[[], Iterator], retries: int) -> Iterator:
    """All that read() yields; after a TrainError it is called again, to go on where it was.

    Up to `retries` times without an item between, after 1, 2, 4 … s, at most 60, each times 0.5 to 1 at random, so
    that a thousand workers do not come back to a server at once.
    """
    failures = 0
    while True:
        try:
            for item in read():
                failures = 0
                yield item
            return
        except TrainError as error:
            failures += 1
            if isinstance(error, PermanentError) or failures > retries:
                raise
            pause = min(60, 2 ** (failures - 1)) * random.uniform(0.5, 1)
            print(f"imagenet_train.py: {error}; try {failures} of {retries} in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


# ---------------------------------------------------------------- prefix → index
# The index says what should come before anything comes. That makes epochs exact, lengths known, and loss visible.


class Index(NamedTuple):
    """What imagenet_shards.py wrote about a split, or read_tree() found."""

    prefix: str
    classes: list[str]  # wnids; a label is a position in this list
    names: list[str]  # of the shards
    counts: list[int]  # samples in each
    sizes: list[int]  # bytes of each
    checksums: list[str]  # SHA-256 of each, hexadecimal
    tree: bool = False  # of image files: a name is a path below the prefix, WNID/KEY.JPEG, for a shard of one sample

    @property
    def total(self) -> int:
        return sum(self.counts)


def read_text(prefix: str, name: str, timeout: float) -> Iterator[bytes]:
    """One file's bytes, of which there may be 64 MiB; TrainError if they can't be read."""
    try:
        source = Source(locate(prefix, name), timeout, limit=64 << 20)
    except OSError as error:
        raise PermanentError(f"{locate(prefix, name)}: {error.strerror}; make it with imagenet_shards.py") from None
    try:
        data = source.read(64 << 20)
        trouble = source.trouble()
    except OSError as error:
        trouble = str(error)
    finally:
        source.close()
    if trouble:
        raise failure(f"{name}: {trouble}; is --shards={prefix} right?", trouble)
    yield data


def read_index(prefix: str, split: str, retries: int = 0, timeout: float = 60) -> Index:
    """Read and check imagenet-SPLIT.json; TrainError if it is not there, cut, or not an index."""
    name = f"imagenet-{split}.json"
    data = next(retry(partial(read_text, prefix, name, timeout), retries))
    place, advice = locate(prefix, name), f"--shards={prefix} must lead to what imagenet_shards.py wrote"
    try:
        found = json.loads(data)
        columns = [[shard[key] for shard in found["shardlist"]] for key in ("url", "nsamples", "filesize", "sha256")]
        index = Index(prefix, found["classes"], *columns)
        # Names end up in a shell command and a path: only what imagenet_shards.py could have written passes.
        odd = [x for x in index.names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar", x)]
        odd += [x for x in index.checksums if not re.fullmatch("[0-9a-f]{64}", x)]
        odd += [x for x in index.counts + index.sizes if type(x) is not int or not 0 <= x < 1 << 50]
        odd += [x for x in index.classes if not isinstance(x, str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = f"{len(data)} bytes that begin {data[:60]!r}" if data else "nothing"
        raise TrainError(f"{place}: expected an index, found {kind}; {advice}") from None
    if odd or not index.classes or not index.total or len(set(index.names)) < len(index.names):
        what = f"holds {str(odd[0])[:60]!r}" if odd else "has no images, no classes, or a shard twice"
        raise TrainError(f"{place}: the index {what}; {advice}")
    return index


def read_tree(folder: Path, split: str) -> Index:
    """ImageNet's own files as shards of one sample each: all that follows is the same, only slower to read.

    Classes and files as torchvision.datasets.ImageNet has them: its base class, which needs no devkit. TrainError if
    it finds none.
    """
    root = folder.expanduser() / split
    try:
        found = torchvision.datasets.ImageFolder(root)
    except OSError as error:
        text = str(error.strerror or error).splitlines()[0]
        raise TrainError(f"--imagenet={folder}: {text}; name the folder that holds train/ and val/") from None
    names = [os.path.relpath(path, root) for path, _ in found.samples]
    return Index(str(root), found.classes, names, [1] * len(names), [0] * len(names), [], tree=True)


# ---------------------------------------------------------------- index → pieces
# Who reads what is computed, not agreed upon: each of a thousand readers calls the same function with its own numbers.


class Piece(NamedTuple):
    """A run of samples in one shard."""

    shard: int
    start: int
    stop: int


def steps_per_epoch(total: int, training: bool, world: int, batch: int) -> int:
    """Batches that every rank makes: full ones only in training, enough for the largest share in validation."""
    return total // (world * batch) if training else math.ceil(math.ceil(total / world) / batch)


def batches_of(steps: int, worker: int, workers: int) -> range:
    """The run of a rank's batches that one of its workers makes.

    The loader takes batches from workers in turn, so the first steps % workers of them make one more.
    """
    first = worker * (steps // workers) + min(worker, steps % workers)
    return range(first, first + steps // workers + (worker < steps % workers))


def pieces_of(
    counts: list[int], training: bool, seed: int, epoch: int, rank: int, world: int, worker: int, workers: int, batch: int
) -> list[Piece]:
    """What one reader reads in one epoch, in order: a pure function, so that readers agree without a word.

    Lay the epoch's shards, permuted by (seed, epoch) in training, on one line of N samples. In training rank r owns
    the positions [r·steps·B, (r+1)·steps·B), in validation [r·N//world, (r+1)·N//world). Its batches are runs of its
    positions, and each worker makes a run of its batches.
    """
    total = sum(counts)
    order = list(range(len(counts)))
    steps = steps_per_epoch(total, training, world, batch)
    if training:
        random.Random(f"{seed}/{epoch}").shuffle(order)
        first, last = rank * steps * batch, (rank + 1) * steps * batch
    else:
        first, last = rank * total // world, (rank + 1) * total // world
    mine = batches_of(steps, worker, workers)
    start, stop = (min(first + n * batch, last) for n in (mine.start, mine.stop))

    ends = list(itertools.accumulate(counts[shard] for shard in order))
    pieces = []
    for place in range(bisect.bisect_right(ends, start), len(ends)):
        begin = ends[place] - counts[order[place]]
        if begin >= stop:
            break
        pieces.append(Piece(order[place], max(start - begin, 0), min(stop, ends[place]) - begin))
    return [piece for piece in pieces if piece.start < piece.stop]


# ---------------------------------------------------------------- pieces → samples
# webdataset.WebDataset(urls) reads whole shards. Here several readers may share one, each with its own start and stop,
# and nothing is believed before its shard has proved whole; a failure is mended from the next sample on.

LARGEST = 64 << 20  # bytes of a member; ImageNet's largest image has a quarter of that


@dataclass(frozen=True)
class LoaderConfig:
    """All that decides which batches one rank gets, and how."""

    index: Index
    training: bool
    batch: int  # images a rank and step
    size: int  # pixels, side of the crop; in training that of the last epochs
    resize: int = 256  # pixels, shorter side before the crop; validation only
    shuffle: int = 0  # undecoded samples in a worker's shuffle buffer
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0  # loader processes of this rank; 0: the main process reads
    retries: int = 5
    timeout: float = 60  # seconds without a byte after which a command is ended
    cache: Path | None = None  # folder for copies of what commands bring
    max_bad: int = 0  # undecodable images a rank and epoch that are not an error
    first_size: int = 0  # pixels, side of the crop in the first epochs; 0: as in the last
    epochs: int = 1  # over which it grows

    @property
    def steps(self) -> int:
        return steps_per_epoch(self.index.total, self.training, self.world, self.batch)


class Copy:
    """A file in the cache to be, from the bytes on their way to training. It gets its name when it is whole.

    The name holds the index's checksum, so a file of that name fits that index. A disk that is full or read-only
    costs only the copy: `full` is set, said once for all workers, and no more copies are made.
    """

    def __init__(self, source: Source, path: Path, checksum: str, full: Event) -> None:
        self.source, self.path, self.checksum, self.full = source, path, checksum, full
        self.temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{time.monotonic_ns()}")
        self.sha256 = hashlib.sha256()
        self.file = self._attempt(lambda: open(self.temporary, "xb", buffering=1 << 20))

    def _attempt(self, action: Callable):
        try:
            return action()
        except OSError as error:
            self.drop()
            if not self.full.is_set():
                self.full.set()
                print(f"imagenet_train.py: --cache: {self.path.parent}: {error.strerror}; going on without", file=sys.stderr)

    def read(self, size: int) -> bytes:
        data = self.source.read(size)
        if self.file:
            self.sha256.update(data)
            self._attempt(lambda: self.file.write(data))
        return data

    def keep(self) -> None:
        """Call when the source ended well. Bytes that do not fit the index are dropped."""
        if self.file and self.sha256.hexdigest() == self.checksum:
            self._attempt(lambda: (self.file.close(), os.replace(self.temporary, self.path)))

    def drop(self) -> None:
        """Remove what is not kept; does nothing after keep()."""
        file, self.file = getattr(self, "file", None), None
        with contextlib.suppress(OSError):
            if file:
                file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def tar_members(read: Callable[[int], bytes]) -> Iterator[tuple[str, bytes]]:
    """(name, data) of every file in a plain ustar stream; ValueError says what is wrong with it.

    Python's tarfile takes a cut header for the end of the archive; here only two zero blocks, or no more
    bytes at a member's boundary, are an end.
    """
    while header := read(512):
        if header == bytes(512):
            return
        if header.lstrip()[:1] == b"<":
            words = re.sub("<[^>]*>", " ", header.decode(errors="replace")).split()
            raise ValueError(f"a page that says {' '.join(words)[:160]!r}")
        if len(header) < 512:
            raise ValueError("cut within a header")
        checksum = sum(header[:148]) + sum(b"        ") + sum(header[156:])
        try:
            right = int(header[148:156].strip(b"\0 "), 8) == checksum
            size = int(header[124:136].strip(b"\0 "), 8)
        except ValueError:
            right = False
        if not right or size < 0:
            raise ValueError("a damaged tar header")
        if size > LARGEST:
            raise ValueError(f"a member of {size} bytes, more than the {LARGEST} allowed")
        padded = size + -size % 512
        data = read(padded)
        if len(data) < padded:
            raise ValueError("cut within a member")
        if header[156:157] in (b"0", b"\0"):  # a regular file; PAX and GNU extras tell nothing that we need
            yield header[:100].rstrip(b"\0").decode("ascii", "replace"), data[:size]


def tar_samples(read: Callable[[int], bytes]) -> Iterator[dict]:
    """Samples {"__key__": str, "cls": bytes, "jpg": bytes} from adjacent members; ValueError as tar_members."""
    sample: dict = {}
    for name, data in tar_members(read):
        key, _, extension = name.partition(".")
        if extension not in ("cls", "jpg"):
            continue
        if sample.setdefault("__key__", key) != key or extension in sample:
            raise ValueError(f"sample {sample['__key__']!r} lacks a member")
        sample[extension] = data
        if len(sample) == 3:
            yield sample
            sample = {}
    if sample:
        raise ValueError(f"sample {sample['__key__']!r} lacks a member")


def read_once(config: LoaderConfig, piece: Piece, full: Event, delivered: list[str]) -> Iterator[dict]:
    """The samples of one piece but those already delivered, whose keys these are; it adds those that it delivers.

    TrainError, at the latest after the last sample, if the shard is not what the index says.
    """
    name, count, size, checksum = (column[piece.shard] for column in config.index[2:6])
    place, copy = locate(config.index.prefix, name), None
    cached = config.cache and place.startswith("pipe:") and config.cache / f"{checksum[:16]}-{name}"
    hit = cached and cached.is_file() and cached.stat().st_size == size
    try:
        source = Source(str(cached) if hit else place, config.timeout, limit=size)
    except OSError as error:
        raise failure(f"{name}: {place}: {error.strerror}; is the folder whole?", error.strerror) from None
    found, trouble, damaged = 0, "", False
    try:
        if cached and not hit and not full.is_set():
            copy = Copy(source, cached, checksum, full)
        try:
            keys = set()
            for sample in tar_samples((copy or source).read):
                key, place_in_piece = sample["__key__"], found - piece.start
                if key in keys:
                    raise ValueError(f"{key!r} again")  # as from a download that was begun anew within the stream
                keys.add(key)
                found += 1
                if 0 <= place_in_piece < len(delivered) and key != delivered[place_in_piece]:
                    raise PermanentError(f"{name}: sample {found} is {key!r} now, was {delivered[place_in_piece]!r} at an earlier try")
                if len(delivered) <= place_in_piece and found <= piece.stop:
                    delivered.append(key)
                    yield sample | {"__shard__": name}
                if found == piece.stop < count:
                    return  # the rest is other readers' work
            while copy and copy.read(1 << 16):  # what follows the archive's end belongs to the file
                pass
            damaged = found != count
        except ValueError as error:
            trouble, damaged = f", then {error}", True
        if said := source.trouble():  # the command's own word explains what looks like damage
            trouble += f"; {said}"
        if copy and not trouble and not damaged:
            copy.keep()
    except OSError as error:  # stalled, or a disk that fails
        trouble = f"; {error}"
    finally:
        if copy:
            copy.drop()
        source.close()
    if trouble or damaged:
        text = f"{name}: found {found} of {count} samples{trouble} in {source.place!r}"
        if hit:
            cached.unlink(missing_ok=True)
            raise TrainError(f"{text}, which is removed now")
        if damaged and source.process is None:
            raise PermanentError(f"{text}; make the shard again")
        raise failure(text, trouble)


def read_pieces(pieces: Iterable[Piece], config: LoaderConfig, full: Event) -> Iterator[dict]:
    """The samples of all pieces, undecoded, in order; after a failure it goes on with the next one not delivered."""
    for piece in pieces:
        yield from retry(partial(read_once, config, piece, full, []), config.retries)


def read_files(pieces: Iterable[Piece], config: LoaderConfig) -> Iterator[dict]:
    """As read_pieces, from the files of a tree. TrainError names one that can't be read."""
    labels = {wnid: str(label).encode() for label, wnid in enumerate(config.index.classes)}
    for piece in pieces:
        name = config.index.names[piece.shard]
        try:
            data = Path(config.index.prefix, name).read_bytes()
        except OSError as error:
            raise TrainError(f"{error.filename}: {error.strerror}; is the folder whole?") from None
        yield {"__key__": Path(name).stem, "cls": labels[Path(name).parts[0]], "jpg": data, "__shard__": name}


# ---------------------------------------------------------------- samples → batches
# From here to the device an image is uint8 [S, S, 3], as Pillow makes it: a quarter of float32's bytes to copy, and as
# a permuted view it is the channels_last tensor that GPUs prefer.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]; torchvision's constants
IGNORE_INDEX = -1  # the label of a row that only fills up a validation batch


def random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom as torchvision.transforms.RandomResizedCrop draws them: 8–100 % of the area, 3:4 to 4:3."""
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


def end_below(data: bytes, bottom: int) -> io.BytesIO:
    """The file; a JPEG with a smaller height in its header, so that its decoder stops soon below row `bottom`.

    The rows above come out the same, and a crop leaves a seventh of an image's rows below itself, on average. A file of
    several scans (progressive), or without its end, stays as it is.
    """
    stream, at, height_at = io.BytesIO(data), 2, 0
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-1024:]:
        return stream
    while at + 10 <= len(data) and data[at] == 0xFF != data[at + 1]:  # ITU T.81, B.1: a marker, a length, that many bytes
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1):  # the header of a sequential image: precision, height, width, components
            height_at, height, components = at + 5, int.from_bytes(data[at + 5 : at + 7], "big"), data[at + 9]
        if marker == 0xDA:  # pixels begin; in one scan, if it has all components
            if height_at and data[at + 4] == components and bottom + 2 < height:
                stream.seek(height_at)
                stream.write((bottom + 2).to_bytes(2, "big"))  # 2: the last rows' colours are drawn from both sides
                stream.seek(0)
            break
        at += 2 + length
    return stream


def scale(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] → uint8 [size, size, 3], within 2 levels of Pillow's bilinear filter, in half of its time."""
    # Torch resizes bytes without repacking them, and keeps them so, if the strides, the batch's too, say channels_last.
    batch = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def decode(sample: dict, config: LoaderConfig, epoch: int) -> tuple[torch.Tensor, int]:
    """One sample → (uint8 [size, size, 3], label). TrainError names the shard and the key of what can't be decoded.

    The crop and the flip are drawn from (seed, epoch, key), so it does not matter who decodes the image, or when.
    """
    size = config.size
    try:
        label = int(sample["cls"])
        if not 0 <= label < len(config.index.classes):
            raise ValueError(f"label {label}, but the index has {len(config.index.classes)} classes")
        # The member's name may lie: n02105855_2933.JPEG is a PNG. This reads only the header.
        open_image, data = partial(Image.open, formats=["JPEG", "PNG"]), sample["jpg"]
        image = open_image(io.BytesIO(data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow would only warn, up to twice as many
            raise ValueError(f"{image.width} × {image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} allowed")
        if config.training:
            rng = random.Random(f"{config.seed}/{epoch}/{sample['__key__']}")
            box = random_crop(*image.size, rng)
            image = open_image(end_below(data, box[3]))
        if image.mode != "RGB":
            image = image.convert("RGB")  # greyscale and CMYK; an RGB image it would only copy
        if config.training:
            image = image.crop(box)
        else:
            box = center_crop(*image.size, size, config.resize)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(image.height, image.width, 3)
        if config.training:
            pixels = scale(pixels, size)
            pixels = pixels.flip(1) if rng.random() < 0.5 else pixels
        return pixels, label
    except Exception as error:  # Pillow raises many kinds on bad bytes
        raise TrainError(f"{sample['__shard__']}: {sample['__key__']}: {str(error) or type(error).__name__}") from None


def decode_all(samples: Iterable[dict], config: LoaderConfig, epoch: int) -> Iterator[tuple[torch.Tensor | None, int | str]]:
    """(image, label) of each sample; (None, why) of one that can't be decoded."""
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's, of bytes; nobody writes to them
    for sample in samples:
        try:
            yield decode(sample, config, epoch)
        except TrainError as error:
            yield None, str(error)


class Collate:
    """Samples → [images uint8 [B, S, S, 3], labels int64 [B], what is wrong with those left out: list of str].

    In a loader process the images lie in one of four buffers that it shares with the main one and uses in turn: fresh
    memory for each batch would cost as much as resizing it. DataLoader lets a process make two batches ahead, so the
    last two that it has handed out stay as they are.
    """

    def __init__(self, config: LoaderConfig) -> None:
        shape = config.batch, config.size, config.size, 3
        count = 4 if get_worker_info() else 0
        self.buffers = itertools.cycle([torch.empty(shape, dtype=torch.uint8).share_memory_() for _ in range(count)])

    def __call__(self, samples: list) -> list:
        good = [(image, label) for image, label in samples if image is not None]
        bad = [why for image, why in samples if image is None]
        if not good:
            raise TrainError(f"not one image of a batch can be decoded: {bad[0]}")
        images, labels = zip(*good)
        buffer = next(self.buffers, None)
        images = torch.stack(images, out=None if buffer is None else buffer[: len(images)])
        return [images, torch.tensor(labels), bad]


def pad(batches: Iterator[list], config: LoaderConfig, count: int) -> Iterator[list]:
    """Exactly `count` batches; in validation full ones: the last is filled up, and ranks with fewer get empty ones."""
    nothing = [torch.empty(0, config.size, config.size, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), []]
    for _ in range(count):
        images, labels, bad = next(batches, nothing)
        if not config.training and (missing := config.batch - len(labels)):
            images = F.pad(images, (0, 0) * 3 + (0, missing))  # a copy, so only where it is needed
            labels = F.pad(labels, (0, missing), value=IGNORE_INDEX)
        yield [images, labels, bad]


class EpochDataset(IterableDataset):
    """One rank's batches of one epoch, after the first `done`. In each loader process it makes that worker's share."""

    def __init__(self, config: LoaderConfig, epoch: int, done: int, full: Event) -> None:
        self.config, self.epoch, self.done, self.full = config, epoch, done, full

    def __iter__(self) -> Iterator[list[torch.Tensor] | TrainError]:
        config, info = self.config, get_worker_info()
        workers = max(1, config.workers)
        # The loader takes batches from its processes in turn and begins with process 0: after `done` batches that one
        # stands in for the worker whose turn it is.
        worker = ((info.id if info else 0) + self.done) % workers
        made = len(range(worker, self.done, workers))  # this worker's batches among the first `done`
        count = len(batches_of(config.steps, worker, workers)) - made
        pieces = pieces_of(config.index.counts, config.training, config.seed, self.epoch, config.rank, config.world, worker, workers, config.batch)
        read = partial(read_files, config=config) if config.index.tree else partial(read_pieces, config=config, full=self.full)
        batches = wds.DataPipeline(
            lambda: iter(pieces),
            read,  #                                              → samples, undecoded but verified
            wds.shuffle(config.shuffle, initial=config.shuffle // 4, seed=f"{config.seed}/{self.epoch}/{config.rank}/{worker}"),
            wds.slice(made * config.batch, None),  #                   → those that a resumed run has not used yet
            partial(decode_all, config=config, epoch=self.epoch),  #   → (uint8 [S, S, 3], label)
            wds.batched(config.batch, collation_fn=Collate(config)),  #     → [uint8 [B, S, S, 3], int64 [B], names of bad ones]
            partial(pad, config=config, count=count),
        )
        try:
            yield from batches
        except TrainError as error:
            yield error  # handed over like a batch: DataLoader would wrap it in a page of traceback


def crop_size(epoch: int, epochs: int, first: int, last: int) -> int:
    """The side of a training crop, pixels: `first` for half of the epochs, `last` in the final fifth, growing between.

    The schedule is that of MosaicML Composer's ProgressiveResizing, in steps of 32 px, for which models are fast.
    """
    grown = min(max(10 * epoch - 5 * epochs, 0), 3 * epochs)  # of 3 · epochs
    return last if grown == 3 * epochs else first + grown * (last - first) // (3 * epochs * 32) * 32


def end_with_parent(worker: int) -> None:
    """In a loader process: end with the main one and not before.

    After a SIGKILL: DataLoader's own watch misses an early one. And torchrun sends SIGTERM to the main one's process
    group, which then still needs the batch in hand.
    """
    os.setpgrp()
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for_any([parent]), os._exit(1)), daemon=True).start()


class Loader:
    """One rank's batches, epoch after epoch: [images uint8 [B, S, S, 3], labels int64 [B], −1 for padding].

    The memory of images is used again: a batch and the one before stay as they are, clone what is to be kept longer.

    It owns its epoch and its place in it, because Lightning calls iter() before it knows the epoch. Lightning puts
    state_dict() into each checkpoint; only rank 0's is kept, so nothing in it may differ between ranks.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.epoch, self.done = config, 0, 0
        self.full = multiprocessing.Event()  # of all workers: the cache's disk takes no more
        self.bad = 0  # images of this epoch that could not be decoded, on this rank
        self.waited = 0.0  # seconds, in all, that the training loop stood still for want of a batch
        self.position = 0.0, 0.0  # in epochs: start and end of the batch last handed out

    def __len__(self) -> int:
        """Exact, on every rank: Lightning skips validation in silence if fewer come."""
        return self.config.steps

    def crop(self) -> int:
        """The side of this epoch's crops, pixels."""
        config = self.config
        return crop_size(self.epoch, config.epochs, config.first_size or config.size, config.size)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        epoch, done, config = self.epoch, self.done, self.config
        batches = iter(
            DataLoader(
                EpochDataset(replace(config, size=self.crop()), epoch, done, self.full),
                batch_size=None,  # they come as batches
                num_workers=config.workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=end_with_parent,
            )
        )
        self.bad = 0
        while done < len(self):
            begun = time.perf_counter()
            try:
                batch = next(batches)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise TrainError(
                    f"a loader process was killed ({error}); is memory or /dev/shm too small? "
                    "Give fewer --workers or a smaller --shuffle"
                ) from None
            if isinstance(batch, TrainError):
                raise batch
            self.waited += time.perf_counter() - begun
            *batch, bad = batch
            for why in bad:
                print(f"imagenet_train.py: left out {why}", file=sys.stderr, flush=True)
            self.bad += len(bad)
            if self.bad > config.max_bad:
                raise TrainError(f"{self.bad} undecodable images in an epoch, {config.max_bad} allowed; last {bad[-1]}")
            share = config.world * config.batch / config.index.total
            self.position = epoch + done * share, epoch + (done + 1) * share
            done += 1
            self.epoch, self.done = (epoch, done) if done < len(self) else (epoch + 1, 0)
            yield batch

    def _plan(self) -> dict[str, int]:
        """What must not change in the middle of an epoch."""
        names = ("batch", "shuffle", "seed", "world", "workers")
        return {name: getattr(self.config, name) for name in names} | {"images": self.config.index.total}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done} | self._plan()

    def load_state_dict(self, state: dict[str, int]) -> None:
        plan = self._plan()
        odd = [f"{name} {state.get(name)} then, {plan[name]} now" for name in plan if state.get(name) != plan[name]]
        if odd and state["done"]:
            raise TrainError(
                f"--resume: the checkpoint lies within an epoch and was made with other settings ({'; '.join(odd)}); "
                "resume with the same ones, or from a checkpoint of an epoch's end such as best.ckpt"
            )
        self.epoch, self.done = state["epoch"], state["done"]


class ImageNetData(pl.LightningDataModule):
    """The loaders of both splits, for this rank.

    The training loader's place is restored here: Lightning restores a loader's own state too, but only within an
    epoch, and a run that resumed at an epoch's end would start over with the first epoch's batches.
    """

    def __init__(self, train: LoaderConfig, val: LoaderConfig, make: Callable[[LoaderConfig], Loader] = Loader) -> None:
        super().__init__()
        self.train, self.val, self.make = train, val, make
        self.place: dict | None = None

    def ranked(self, config: LoaderConfig) -> LoaderConfig:
        """For this rank."""
        return replace(config, rank=self.trainer.global_rank, world=self.trainer.world_size)

    def train_dataloader(self) -> Loader:
        self.loader = self.make(self.ranked(self.train))
        if self.place:
            self.loader.load_state_dict(self.place)
        return self.loader

    def val_dataloader(self) -> Loader:
        return Loader(self.ranked(self.val))

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.place = state


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
    """TrainError if the model does not take images of these sizes; tried without weights or data, in a moment."""
    with torch.device("meta"):
        model = build_model(name, 2).eval()
        for size in sizes:
            try:
                model(torch.empty(1, 3, size, size))
            except Exception as error:  # assertions, shapes that do not fit: each model has its own
                raise TrainError(f"--model={name} takes no images of {size} × {size} px: {error}") from None


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
        self.print(
            f"validated {seen}/{wanted} images: top-1 {top1:.2f} %, top-5 {top5:.2f} %, "
            f"loss {float(result['val_loss']):.4f} (epoch {self.current_epoch + 1}, step {self.global_step})"
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
        if trainer.state.fn == "fit":
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

    def on_validation_start(self, trainer: pl.Trainer, *args) -> None:
        if trainer.state.fn == "validate":  # without training
            self.on_train_start(trainer)

    def watch(self, trainer: pl.Trainer, signals: int) -> None:
        """In a thread: wait for the signal, and exit if no step ends within SIGTERM_TIMEOUT after it."""
        while os.read(signals, 1) != bytes([signal.SIGTERM]):
            pass
        self.requested, step = True, None
        while step != self.steps:
            step = self.steps
            if self.ended.wait(SIGTERM_TIMEOUT):
                return
        resume = f"--resume continues from {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint yet"
        error = f"SIGTERM: rank {trainer.global_rank} completed no step within {SIGTERM_TIMEOUT} s; {resume}"
        print(f"imagenet_train.py: {error}", file=sys.stderr, flush=True)
        self.on_exception(trainer, None, TimeoutError())
        os._exit(128 + signal.SIGTERM)

    def sync(self, trainer: pl.Trainer, *args) -> None:
        """After each step: SIGTERMException, on all ranks, if SIGTERM had reached any of them by the previous step."""
        self.steps += 1
        requested = self.requested
        if trainer.world_size > 1:
            store, key = torch.distributed.distributed_c10d._get_default_store(), "sigterm/{}".format
            count = store.add(key(self.steps), 1 + (requested << 32))  # the lower half counts ranks
            if count % (1 << 32) == trainer.world_size:  # the last rank: all have read the step before the previous
                store.set(key(f"{self.steps}/any"), str(count >> 32))
                store.delete_key(key(self.steps - 2)), store.delete_key(key(f"{self.steps - 2}/any"))
            requested = self.steps > 1 and int(store.get(key(f"{self.steps - 1}/any")))
        # After an epoch's last step, its validation is due: LastCheckpoint says so before it starts.
        if requested and (trainer.validating or trainer.datamodule.loader.done):
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
            "epoch": trainer.current_epoch + 1.0, "lr": trainer.optimizers[0].param_groups[0]["lr"],
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


# ---------------------------------------------------------------- preview


def preview(config: LoaderConfig, path: Path) -> None:
    """Draw the first training batch, at most 64 images, as they go to the device, with label and wnid."""
    images, labels = next(iter(Loader(config)))
    labels, size = labels.tolist(), images.shape[1]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = max(size, 90) + 4, size + 16
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (pixels, label) in enumerate(zip(images, labels)):
        left, top = place % columns * width, place // columns * height
        sheet.paste(Image.fromarray(pixels.numpy()), (left, top))
        draw.text((left + 2, top + size + 2), f"{label} {config.index.classes[label]}", "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"{path}: {len(images)} images of the first training batch, {size} × {size} px")


# ---------------------------------------------------------------- command line


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number of this kind within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that tell something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a torchvision model on ImageNet from WebDataset shards.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    count, pixels, real = number(int, 1), number(int, 16, 4096), number(float, 0)
    models = torchvision.models.list_models(module=torchvision.models)

    data = parser.add_argument_group("data")
    add = data.add_mutually_exclusive_group().add_argument
    add("--shards", "--base", metavar="PREFIX", default="./data",
        help="where the shards lie: a folder, http(s)://…, or pipe:COMMAND; %%s becomes a file's name or it is appended")
    add("--imagenet", metavar="DIR", type=Path, default=None,
        help="ImageNet's own files, in train/ and val/, instead of shards; all else stays, so this shows what shards give")
    add = data.add_argument
    add("--batch-size", metavar="N", type=count, default=256, help="images per device and step")
    add("--workers", metavar="N", type=number(int, 0), default=None,
        help="loader processes per rank (default: this rank's share of the cores)")
    add("--train-size", metavar="PX", type=pixels, default=224, help="side of a training crop, pixels")
    add("--progressive", metavar="PX", type=pixels, default=None,
        help="begin with training crops of PX; they grow to --train-size between half and four fifths of the epochs")
    add("--val-size", metavar="PX", type=pixels, default=224, help="side of the validation crop, pixels")
    add("--val-resize", metavar="PX", type=pixels, default=256, help="shorter side before the validation crop, pixels")
    add("--shuffle", metavar="N", type=number(int, 0), default=2000,
        help="undecoded samples (about 110 KB each) in a worker's shuffle buffer")
    add("--cache", metavar="DIR", type=Path, default=None,
        help="folder on a local disk for copies of what a URL or a command brings (default: none)")
    add("--retries", metavar="N", type=number(int, 0), default=5, help="of a failing read, before it is an error")
    add("--timeout", metavar="S", type=number(float, 0.1), default=60, help="seconds without a byte that end a command")
    add("--max-bad", metavar="N", type=number(int, 0), default=100,
        help="undecodable training images that a rank leaves out and names in an epoch, before it is an error")
    add("--seed", type=number(int, 0, 2**31), default=0, help="decides weights, order, crops and flips")
    add("--preview", metavar="FILE.png", type=Path, help="write a labelled sheet of a training batch, and exit")
    add("--benchmark", metavar="STEPS", type=count, nargs="?", const=100,
        help="measure loader, training step and both over STEPS (100) batches, say what limits, and exit")

    add = parser.add_argument_group("model and recipe (defaults: NVIDIA's ResNet-50 v1.5, 90 epochs)").add_argument
    add("--model", metavar="NAME", choices=models, default="resnet50",
        help="any classification model of torchvision.models")
    add("--lr", type=real, default=0.256, help="peak learning rate for a global batch of 256; scaled with the real one")
    add("--momentum", type=number(float, 0, 1), default=0.875, help="of SGD")
    add("--weight-decay", type=real, default=1 / 32768, help="not on norms and biases")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, help="share of the target spread over all classes")
    add("--warmup-epochs", type=real, default=8, help="epochs of linear warm-up, at most half the run")
    add("--compile", action="store_true", help="compile the model with torch.compile")

    add = parser.add_argument_group("trainer (Lightning's names)").add_argument
    add("--accelerator", default="auto", help="auto, cpu, gpu, …")
    add("--devices", default="auto", help="per node: auto, a number, or a list such as 0,2")
    add("--num-nodes", metavar="N", type=count, default=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        help="machines; torchrun sets it")
    add("--precision", default=None, help="32-true, bf16-mixed, … (default: bf16-mixed on a GPU that has it)")
    add("--max-epochs", metavar="N", type=count, default=90, help="epochs to train")
    add("--max-steps", metavar="N", type=number(int, -1), default=-1, help="stop after as many steps; -1: no limit")
    add("--log-every", metavar="N", type=count, default=50, help="steps between two entries of the log")

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", type=Path, default="./output", help="folder for checkpoints and logs")
    add("--checkpoint-every", metavar="N", type=number(int, 0), default=0,
        help="steps between checkpoints within an epoch; 0: at its end only")
    add("--resume", metavar="PATH", nargs="?", const="", default=None,
        help="go on from a checkpoint; without PATH from the last one in --output, if there is one")
    args = parser.parse_args(argv)
    if args.val_size > args.val_resize:
        parser.error(f"--val-size {args.val_size} does not fit into --val-resize {args.val_resize}")
    if args.progressive and args.progressive > args.train_size:
        parser.error(f"--progressive {args.progressive} is more than --train-size {args.train_size}")
    if args.preview and args.preview.suffix != ".png":
        parser.error(f"--preview {args.preview}: give a name that ends in .png")
    return args


def find_checkpoint(args: argparse.Namespace, classes: int) -> Path | None:
    """The checkpoint to go on from. TrainError if it is missing or unfit, or if a fresh run would overwrite one."""
    last = args.output / "last.ckpt"
    if args.resume is None and last.exists():
        raise TrainError(f"{last}: exists; --resume to go on from it, --output for another folder, or remove it")
    if args.resume == "" and not last.exists():
        rank_zero_only(print)(f"--resume: no {last} yet, so this is a fresh start")
    path = Path(args.resume) if args.resume else last
    if not args.resume and not last.exists():
        return None
    try:
        made = torch.load(path, mmap=True, weights_only=True)["hyper_parameters"]  # weights_only: it can run no code
        odd = [f"{k} {made[k]} there, {v} here" for k, v in (("model", args.model), ("classes", classes)) if made[k] != v]
    except OSError as error:
        raise TrainError(f"--resume={path}: {error.strerror}") from None
    except Exception as error:  # of many kinds: pickle's, zip's, a missing key
        raise TrainError(f"--resume={path}: not a checkpoint of this program ({type(error).__name__})") from None
    if odd:
        raise TrainError(f"--resume={path}: made with {', '.join(odd)}; give the same, or another --output")
    return path


def make_cache(folder: Path | None) -> Path | None:
    """The folder, made and cleared of what killed runs left half done; None, with a warning, if it can't be written."""
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.tar.tmp-*"):
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink(missing_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        text = f"imagenet_train.py: --cache={folder}: {error.strerror}; going on without"
        rank_zero_only(print)(text, file=sys.stderr)
        return None


def make_model(args: argparse.Namespace, index: Index, images: int) -> Classifier:
    """The model as the flags want it, for this index's classes and `images` images in validation."""
    recipe = ("model", "lr", "momentum", "weight_decay", "label_smoothing", "warmup_epochs", "seed", "compile")
    return Classifier(classes=len(index.classes), images=images, **{name: getattr(args, name) for name in recipe})


def make_trainer(args: argparse.Namespace, **changes) -> pl.Trainer:
    """Lightning's Trainer as the flags want it, or else `changes`; TrainError for a device or precision not to be had."""
    precision = args.precision
    if precision is None:
        gpu = args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    output = args.output.absolute()
    loggers = [CSVLogger(output, name="logs")]
    try:
        loggers.append(TensorBoardLogger(output, name="logs", version=loggers[0].version))
    except ModuleNotFoundError:
        pass  # TensorBoard is not installed
    callbacks = [
        ProgressBar(),
        SigtermHandler(output / "last.ckpt"),
        ModelCheckpoint(output, "best", monitor="val_top1", mode="max", enable_version_counter=False),
        LastCheckpoint(output / "last.ckpt", args.checkpoint_every),  # last, because it saves the best one's state too
    ]
    options = dict(
        accelerator=args.accelerator, devices=args.devices, num_nodes=args.num_nodes, precision=precision,
        max_epochs=args.max_epochs, max_steps=args.max_steps, log_every_n_steps=args.log_every,
        logger=loggers, callbacks=callbacks, default_root_dir=output, plugins=[AtomicCheckpointIO()],
        enable_model_summary=False, enable_progress_bar=False,  # ProgressBar is ours
        num_sanity_val_steps=0, use_distributed_sampler=False, benchmark=True,
    )
    try:
        return pl.Trainer(**options | changes)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        flags = f"--accelerator={args.accelerator} --devices={args.devices} --precision={precision}"
        raise TrainError(f"{flags}: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------- benchmark


def image_bytes(index: Index) -> float:
    """Bytes to read for an image, on average; of a tree, by a thousand of its files."""
    if not index.tree:
        return sum(index.sizes) / index.total
    names = random.Random(0).sample(index.names, min(1000, index.total))
    return sum(os.path.getsize(Path(index.prefix, name)) for name in names) / len(names)


class OneBatch(Loader):
    """The same batch, on the device from the start, again and again: training as if loading cost nothing."""

    def __init__(self, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config)
        size = self.crop()
        self.images = torch.randint(0, 256, (config.batch, size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, len(config.index.classes), (config.batch,), device=device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        while self.done < len(self):
            self.done += 1
            yield [self.images, self.labels]


def device_clock() -> float:
    """Seconds, once the device has done its work: it is behind."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(pl.Callback):
    """The seconds that all steps after the first `skip` take, the device's part included."""

    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        if trainer.global_step == self.skip:
            self.begun = device_clock()
        if trainer.global_step == trainer.max_steps:
            self.seconds = device_clock() - self.begun


def verdict(load: float, step: float, workers: int, cores: int, device: str) -> str:
    """What limits, and what to do, from images/s of the loader and of the step alone; cores and workers a rank."""
    need = math.ceil(max(workers, 1) * step / load)
    if load >= step:
        return f"step-bound: {device} takes {step:,.0f}, the loader would give {load / step:.1f} times as many"
    if need <= cores:
        return f"input-bound: {workers} workers give {load:,.0f}, {device} takes {step:,.0f}: use --workers={need}"
    return (
        f"input-bound: {device} takes {step:,.0f}, for which it needs {need} workers a rank on as many cores, not {cores}: "
        "smaller images (imagenet_shards.py --resize, --train-size) need fewer"
    )


def timed_fit(
    args: argparse.Namespace, config: LoaderConfig, skip: int, count: int, one_batch: bool
) -> tuple[float, pl.Trainer]:
    """Seconds of `count` training steps after the first `skip`, from the loader or from one batch; and the trainer."""
    watch = Stopwatch(skip)
    trainer = make_trainer(
        args, callbacks=[watch, SigtermHandler(args.output / "last.ckpt"), ProgressBar()], logger=False, enable_checkpointing=False, limit_val_batches=0,
        max_epochs=1, max_steps=skip + count,
    )
    make = partial(OneBatch, device=trainer.strategy.root_device) if one_batch else Loader
    trainer.fit(make_model(args, config.index, 0), datamodule=ImageNetData(config, config, make))
    return watch.seconds, trainer


def benchmark(args: argparse.Namespace, config: LoaderConfig, cores: int) -> None:
    """Print images/s, of all ranks, of the loader alone, the training step alone and both; and what limits them.

    cores: of this machine, for each of its ranks.
    """
    skip = 5 + 2 * config.workers  # the workers make two batches ahead each, which must not count
    count = min(args.benchmark, config.steps - skip)
    if count < 1:
        raise TrainError(
            f"--benchmark: an epoch has {config.steps} batches, too few for {skip} to warm up and one to measure; "
            "give a smaller --batch-size or fewer --workers"
        )
    images = count * config.batch * config.world

    seconds, trainer = timed_fit(args, config, skip, count, one_batch=True)
    step = images / seconds
    trainer.strategy.barrier()  # all ranks load at once, as in training
    batches = iter(Loader(replace(config, rank=trainer.global_rank)))
    for _ in itertools.islice(batches, skip):
        pass
    begun = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    load = images / (time.perf_counter() - begun)
    batches.close()
    both = images / timed_fit(args, config, skip, count, one_batch=False)[0]

    device = trainer.strategy.root_device.type
    rank_zero_only(print)(
        f"loader alone   {load:9,.1f} images/s, {load * image_bytes(config.index) / 1e6:,.1f} MB/s read\n"
        f"step alone     {step:9,.1f} images/s, with a batch that is on {device} already\n"
        f"both together  {both:9,.1f} images/s, {both / min(load, step):.0%} of the slower one\n"
        f"{verdict(load, step, config.workers, cores, device)}"
    )


def run(args: argparse.Namespace) -> None:
    """Cheap checks first, then what is asked for. TrainError for what the user can mend."""
    place = f"--imagenet={args.imagenet}" if args.imagenet else f"--shards={args.shards}"
    if args.imagenet:
        splits = {split: read_tree(args.imagenet, split) for split in ("train", "val")}
    else:
        splits = {split: read_index(args.shards, split, args.retries, args.timeout) for split in ("train", "val")}
    if splits["train"].classes != splits["val"].classes:
        raise TrainError(f"{place}: train and val have different classes; convert both from one tree")
    index, images = splits["train"], splits["val"].total
    check_sizes(args.model, args.train_size, args.val_size, args.progressive or args.train_size)
    checkpoint = None if args.benchmark else find_checkpoint(args, len(index.classes))

    common = dict(batch=args.batch_size, seed=args.seed, retries=args.retries, timeout=args.timeout,
                  cache=make_cache(args.cache))
    train = LoaderConfig(
        index, True, size=args.train_size, first_size=args.progressive or 0, epochs=args.max_epochs,
        shuffle=0 if index.tree else args.shuffle, max_bad=args.max_bad, **common,  # a tree's files come shuffled
    )
    if args.preview:
        return preview(replace(train, batch=min(train.batch, 64, index.total)), args.preview)
    trainer = make_trainer(args)
    world = trainer.world_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // (world // trainer.num_nodes))  # for a rank
    workers = cores if args.workers is None else args.workers
    train = replace(train, workers=workers, world=world)
    val = LoaderConfig(splits["val"], False, size=args.val_size, resize=args.val_resize, workers=workers, **common)
    if not train.steps:
        raise TrainError(
            f"--batch-size={args.batch_size} × {world} ranks: more than the {index.total} training images; "
            "give a smaller one"
        )
    rank_zero_only(print)(
        f"{args.model} on {world} {trainer.strategy.root_device.type} × {workers} workers, {trainer.precision}: "
        f"{index.total:,} train images in {len(index.names):,} {'files' if index.tree else 'shards'}, "
        f"{images:,} val in {len(splits['val'].names):,}, {len(index.classes)} classes; {train.steps:,} batches of "
        f"{args.batch_size} × {world} an epoch; from {args.imagenet or args.shards}"
    )
    pl.seed_everything(args.seed, verbose=False)
    if args.benchmark:
        return benchmark(args, train, cores)
    data = ImageNetData(train, val)
    trainer.fit(make_model(args, index, images), datamodule=data, ckpt_path=checkpoint, weights_only=True)
    kept = ", ".join(str(path) for path in (args.output / "best.ckpt", args.output / "last.ckpt") if path.exists())
    rank_zero_only(print)(f"checkpoints: {kept}; log: {trainer.logger.log_dir}/metrics.csv")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in ("pytorch_lightning", "lightning_fabric"):  # their tips; warnings still come through
        logging.getLogger(name).setLevel(logging.WARNING)
    hush = "does not have many workers|exists and is not empty|smaller than the logging|find the monitored key|LeafSpec"
    warnings.filterwarnings("ignore", f".*({hush}).*")  # Lightning's, of things that are meant so here
    try:
        run(args)
    except TrainError as error:
        print(f"imagenet_train.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of an output that can't be written, mostly
        print(f"imagenet_train.py: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"imagenet_train.py: --batch-size={args.batch_size}: the device has too little memory", file=sys.stderr)
        return 1
    except SIGTERMException:
        print(f"imagenet_train.py: SIGTERM: {args.output}/last.ckpt is saved; --resume goes on from it", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        print("imagenet_train.py: interrupted; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
