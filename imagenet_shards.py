"""ImageNet tree → WebDataset shards: 1,281,167 files become 147 tar files, byte for byte, and an index that says so.

    python imagenet_shards.py --imagenet=/data/imagenet --shards=./data
    python imagenet_shards.py --imagenet=/data/imagenet --shards='pipe:gsutil cp - gs://bucket/%s'

In:  DIR/{train,val}/<wnid>/*.JPEG, the tree of torchvision.datasets.ImageNet (its devkit is not needed).
Out: imagenet-train-000000.tar …, imagenet-val-000000.tar …   per image two members: KEY.cls, KEY.jpg
     imagenet-train.json, imagenet-val.json                   the index (wids v1): counts, sizes, SHA-256, classes
     _info.json                                               the same counts for timm's reader

KEY is the file's stem, KEY.cls its class number in ASCII (the rank of its wnid), KEY.jpg the file's own bytes.
The images are shuffled once, over the whole split, so that a shard is a fair sample of it.

Guarantee: an index that exists means that all its shards are whole. The same tree, seed and limits give the
same bytes, whatever the number of workers and however often the run was killed and started again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds
from PIL import Image as PillowImage
from tqdm import tqdm


class ShardError(Exception):
    """What the user can mend, in one line: what was named, what is there, what to do."""


def human(size: float) -> str:
    """Bytes for people, in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# ---------------------------------------------------------------- tree → images

# What torchvision.datasets.ImageFolder takes for an image, so that we never leave out what it would have seen.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# WebDataset splits a member's name at its first dot; plain ustar has room for 100 bytes.
KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


class Image(NamedTuple):
    """A file in the tree."""

    path: str  # below the tree's root: train/n01440764/n01440764_10026.JPEG
    label: int  # rank of its class folder in sorted order, as torchvision numbers it
    size: int  # bytes

    @property
    def key(self) -> str:
        """The sample's name in its shard: the file's stem."""
        return os.path.splitext(os.path.basename(self.path))[0]

    @property
    def payload(self) -> int:
        """Bytes of the sample's two members, as ShardWriter counts them for its maxsize."""
        return self.size + len(str(self.label))


def find_classes(root: Path, split: str) -> list[str]:
    """The sorted wnids of a split's class folders; ShardError if the tree is not one that we understand."""
    folder = root / split
    if not folder.is_dir():
        if (root / ARCHIVES[split]).exists():
            raise ShardError(
                f"{folder}: not there, but {ARCHIVES[split]} is; unpack it with "
                f"torchvision.datasets.ImageNet({str(root)!r}, {split!r}) and start again"
            )
        raise ShardError(
            f"{folder}: no such folder; --imagenet must name the folder that holds train/ and val/ of class folders"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ShardError(
            f"{folder}: no class folders in it; its images must lie in one folder a class, {folder}/n01440764/*.JPEG"
        )
    return classes


def list_images(root: Path, split: str, classes: list[str]) -> list[Image]:
    """All images of a split in sorted order; ShardError for an empty class or a name that a shard can't carry."""
    images: list[Image] = []
    real_root = root.resolve()
    owner: dict[str, str] = {}  # key → path: two equal keys would melt into one sample when read
    for label, wnid in enumerate(classes):
        before = len(images)
        for folder, _, names in sorted(os.walk(root / split / wnid, followlinks=True)):
            for name in sorted(names):
                if not name.lower().endswith(EXTENSIONS):
                    continue
                path = os.path.join(folder, name)
                if os.path.islink(path) and not Path(path).resolve().is_relative_to(real_root):
                    raise ShardError(f"{path}: a link out of the tree, to {os.path.realpath(path)}; copy the image in")
                try:
                    image = Image(os.path.relpath(path, root), label, os.path.getsize(path))
                except OSError as error:
                    raise ShardError(f"{path}: {error.strerror}; mend or remove it") from None
                if not KEY.fullmatch(image.key):
                    raise ShardError(f"{path}: a key may hold only A-Z a-z 0-9 _ - and 95 of them; rename the file")
                if image.key in owner:
                    raise ShardError(f"{path}: same name as {root / owner[image.key]}; keys must differ, rename one")
                owner[image.key] = image.path
                images.append(image)
        if len(images) == before:
            raise ShardError(f"{root / split / wnid}: no images in this class folder; fill it or remove it")
    return images


# ---------------------------------------------------------------- images → plan
# All decisions fall here, from names and sizes alone: what follows may be killed, repeated or spread over machines.


def plan_shards(images: list[Image], seed: int, maxsize: float, maxcount: int) -> list[list[Image]]:
    """The images of every shard, from names and sizes alone: shard k is known before a byte is read.

    So any process can write any shard, in any order, again and again, and always makes the same bytes.
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
        size += image.payload
    return shards


class Plan(NamedTuple):
    """One split's conversion."""

    root: Path
    split: str
    classes: list[str]
    shards: list[list[Image]]
    recipe: dict[str, Any]  # what decides the bytes; kept in the index, compared on a restart

    def name(self, number: int) -> str:
        return f"imagenet-{self.split}-{number:06d}.tar"


def make_plan(
    root: Path,
    split: str,
    seed: int,
    maxsize: float,
    maxcount: int,
    resize: int | None = None,
    quality: int = 90,
    blocksize: int = 64,
) -> Plan:
    """List one split and plan its shards; reads no image. ShardError as find_classes and list_images.

    The plan goes by the sizes of the originals, so --resize makes smaller shards of the same samples.
    """
    classes = find_classes(root, split)
    for other in ARCHIVES:  # a class that only one split has would number all after it differently
        if (root / other).is_dir() and (theirs := find_classes(root, other)) != classes:
            odd = sorted(set(theirs) ^ set(classes))
            raise ShardError(
                f"{root}: train/ and val/ differ in {len(odd)} class folders ({', '.join(odd[:3])}"
                f"{', …' if len(odd) > 3 else ''}), so their class numbers would differ; give both the same ones"
            )
    images = list_images(root, split, classes)
    tree = hashlib.sha256("\n".join(f"{i.path} {i.size}" for i in images).encode())
    recipe = {
        "seed": seed,
        "maxsize": int(maxsize),
        "maxcount": maxcount,
        "images": len(images),
        "tree": tree.hexdigest(),
        "resize": resize and [resize, quality],
        "blocksize": blocksize,
    }
    return Plan(root, split, classes, plan_shards(images, seed, maxsize, maxcount), recipe)


# ---------------------------------------------------------------- name → a place to write to
# A file exists under its name only when it is whole: in a folder by renaming it, in a bucket because its command is
# killed before it can take a broken stream for the end of the file.


def locate(prefix: str, name: str) -> str:
    """Where a file lies: in a folder, at a URL, or what pipe:COMMAND reads or writes; %s becomes the name."""
    if "%s" in prefix:
        return prefix.replace("%s", name)
    return prefix + name if prefix.startswith("pipe:") or prefix.endswith("/") else f"{prefix}/{name}"


class Part(NamedTuple):
    """Which of a split's shards to write: number − 1, then every parts-th; 1/1 is all of them."""

    number: int
    parts: int


class Target(NamedTuple):
    """Where shards go."""

    prefix: str  # a folder or pipe:COMMAND
    record: Path  # folder of the journals and a copy of the index: the prefix itself, if that is a folder

    @property
    def command(self) -> bool:
        return self.prefix.startswith("pipe:")


commands: set[int] = set()  # process groups that write for us


def end(command: int) -> None:
    """Kill a command and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command, signal.SIGKILL)


@contextlib.contextmanager
def writing(place: str) -> Iterator[BinaryIO]:
    """A stream to write one file to, which exists, whole, when the block has ended well, and otherwise never.

    In a folder it has a temporary name till then. A command gets the bytes on its standard input; if they are not to
    count it is killed before it sees their end, so that gsutil, say, stores nothing. ShardError if a command fails.
    """
    if not place.startswith("pipe:"):
        temporary = Path(f"{place}.tmp-{os.getpid()}")  # no two processes ever share one
        try:
            with open(temporary, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave a renamed file without its bytes
            os.replace(temporary, place)
        except OSError as error:
            raise ShardError(f"{error.filename or place}: {error.strerror}; mend that and start again") from None
        finally:
            temporary.unlink(missing_ok=True)
        return
    command, broken = place.removeprefix("pipe:"), False
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.PIPE, stdout=messages, stderr=messages, start_new_session=True
        )
        commands.add(process.pid)
        try:
            yield process.stdin
            process.stdin.close()
        except BrokenPipeError:
            broken = True  # it ended before its input, which is wrong even with status 0
        except BaseException:
            end(process.pid)
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            status = process.wait()
            commands.discard(process.pid)
        messages.seek(0)
        said = " ".join(messages.read().decode(errors="replace").split())[-300:]
    if status or broken:
        raise ShardError(f"{command}: took not all, exit status {status}, saying {said!r}; mend that and start again")


# ---------------------------------------------------------------- plan → one shard
# The only part that touches images: their bytes go from file to shard as they are, past a look at both ends.


def decoded(data: bytes) -> PillowImage.Image:
    """The image, decoded; ValueError says why these bytes are none."""
    if not data:
        raise ValueError("empty file")
    try:
        image = PillowImage.open(io.BytesIO(data), formats=["JPEG", "PNG"])
        image.load()
    except PillowImage.UnidentifiedImageError:
        raise ValueError("neither JPEG nor PNG") from None
    except Exception as error:  # Pillow raises many kinds on bad bytes
        raise ValueError(str(error)) from None
    return image


def check(data: bytes, decode: bool = False) -> None:
    """ValueError if these bytes are no JPEG or PNG that can be decoded.

    Whole files, nearly all, pass by their first and last bytes; unless `decode`, only a suspect is decoded.
    """
    jpeg = data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in data[-1024:]
    png = data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-1024:]
    if decode or not (jpeg or png):
        decoded(data)


def shrink(data: bytes, pixels: int, quality: int) -> bytes:
    """A JPEG of the image with a shorter side of `pixels`; the bytes as they are if it has no more than that.

    ValueError if they can't be decoded. `quality` is libjpeg's, 1 to 95.
    """
    image = decoded(data)
    scale = pixels / min(image.size)
    if scale >= 1:
        return data
    if image.mode not in ("RGB", "L"):  # CMYK, a PNG's palette
        image = image.convert("RGB")
    size = round(image.width * scale), round(image.height * scale)
    stream = io.BytesIO()
    image.resize(size, PillowImage.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


class ShardDigest:
    """Size, SHA-256 and blocks of a shard whose bytes pass through update(), in order."""

    def __init__(self) -> None:
        self.size, self.sha256 = 0, hashlib.sha256()
        self.blocks: list[list[int]] = []  # [offset, length, samples, CRC-32]; without a gap, from offset 0 on
        self._tail = bytearray()  # the bytes that follow the last block
        self._ends: deque[tuple[int, int]] = deque()

    def end_block(self, end: int, samples: int) -> None:
        """A block of so many samples ends at this offset, whose bytes may come before or after this call."""
        self._ends.append((end, samples))

    def update(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)
        self._tail += data
        while self._ends and self._ends[0][0] <= self.size:
            end, samples = self._ends.popleft()
            offset = self.size - len(self._tail)
            with memoryview(self._tail)[: end - offset] as block:
                self.blocks.append([offset, end - offset, samples, zlib.crc32(block)])
            del self._tail[: end - offset]


class DigestWriter:
    """A stream to write to that passes everything on, and keeps its digest."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, ShardDigest()

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)


class Stopped(Exception):
    """Another worker failed, or the user pressed ^C: this shard is given up."""


# Set in every worker process by start_worker: images and bytes done, and whether to stop.
progress: tuple = ()


def count_done(size: int) -> None:
    """Tell the main process of one image of `size` bytes; Stopped if it wants no more of them."""
    images_done, bytes_done, stop = progress
    with images_done, bytes_done:
        images_done.value += 1
        bytes_done.value += size
    if stop.value:
        raise Stopped


def start_worker(*shared) -> None:
    """Take the shared counters, leave ^C to the main process, and don't outlive it (it may get a SIGKILL)."""
    global progress
    progress = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait_for_any([parent])
        for command in list(commands):
            end(command)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_ahead(paths: Iterable[Path], count: int = 16) -> Iterator[bytes]:
    """The files' bytes, in order; the kernel fetches `count` of them ahead: a disk asked for one at a time idles."""
    ahead: deque[BinaryIO] = deque()
    try:
        for path in itertools.chain(paths, [None] * count):
            if path:
                ahead.append(open(path, "rb", buffering=0))
                if hasattr(os, "posix_fadvise"):  # not on a Mac
                    os.posix_fadvise(ahead[-1].fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            if ahead and (not path or len(ahead) > count):
                with ahead.popleft() as file:
                    yield file.read()
    finally:
        for file in ahead:
            file.close()


class Rejected(Exception):
    """A shard with bad images, which is not to be kept."""


def write_shard(plan: Plan, number: int, images: list[Image], target: Target, skip_bad: bool) -> dict:
    """Write one shard, return its entry in the index.

    The entry's "skipped" lists [path, flaw] of the bad images. If there are any and skip_bad is off, all images
    are still looked at, so that one run names every bad one, but no shard is left behind.
    """
    name, skipped, resize = plan.name(number), [], plan.recipe["resize"]
    pattern = name.replace(f"{number:06d}", "%06d")
    with contextlib.suppress(Rejected), writing(locate(target.prefix, name)) as file:
        stream, samples = DigestWriter(file), 0
        # mtime=0: a float time would add a kilobyte of PAX headers to every member, other bytes every run.
        options = dict(start_shard=number, maxsize=float("inf"), verbose=0, mtime=0, opener=lambda _: stream)
        with wds.ShardWriter(pattern, maxcount=len(images), **options) as shard:
            for image, data in zip(images, read_ahead(plan.root / image.path for image in images)):
                if len(data) != image.size:
                    raise ShardError(
                        f"{plan.root / image.path}: {len(data)} bytes, {image.size} when listed; "
                        "leave the tree alone and start again"
                    )
                try:
                    check(data)
                    jpg = shrink(data, *resize) if resize else data
                except ValueError as error:
                    skipped.append([image.path, str(error)])
                else:
                    shard.write({"__key__": image.key, "jpg": jpg, "cls": image.label})
                    samples += 1
                    if samples % plan.recipe["blocksize"] == 0:
                        stream.digest.end_block(shard.tarstream.tarstream.offset, plan.recipe["blocksize"])
                count_done(image.size)
            if rest := samples % plan.recipe["blocksize"]:
                stream.digest.end_block(shard.tarstream.tarstream.offset, rest)
        if skipped and not skip_bad:
            raise Rejected
    return {
        "url": name,
        "nsamples": samples,
        "filesize": stream.digest.size,
        "sha256": stream.digest.sha256.hexdigest(),
        "skipped": skipped,
        "blocks": stream.digest.blocks,
    }


# ---------------------------------------------------------------- plan → all shards + index
# Shards in any order, each noted in a journal as it becomes whole; the index comes when none is missing.


def write_text(name: str, text: str, *prefixes: str) -> None:
    """Write a small file under each prefix, one after the other; it is there whole or not at all."""
    for prefix in dict.fromkeys(prefixes):
        with writing(locate(prefix, name)) as file:
            file.write(text.encode())


def finished_shards(plan: Plan, target: Target, skip_bad: bool) -> dict[int, dict]:
    """The index entries, by shard number, of the shards that are whole: of an earlier run, or of other --part's.

    Read from the index or, before there is one, from the journals: a line with the recipe, then a line a shard.
    ShardError if what lies in the folder was made from something else than this plan.
    """
    folder, index = target.record, target.record / f"imagenet-{plan.split}.json"
    advice = "use the same arguments, another --shards, or --overwrite"
    records = [index] if index.exists() else sorted(folder.glob(f"imagenet-{plan.split}.*journal"))
    if not records and (shards := list(folder.glob(f"imagenet-{plan.split}-*.tar"))):
        raise ShardError(f"{folder}: holds {len(shards)} {plan.split} shards without an index; {advice}")
    entries = {}
    for record in records:
        try:
            if record == index:
                content = json.loads(index.read_text())
                recipe, found = content["recipe"], content["shardlist"]
            else:
                recipe, *found = map(json.loads, record.read_text().split("\n")[:-1])  # a crash may cut the last line
            entries |= {e["url"]: e for e in found if e["filesize"] >= 0 and e["skipped"] is not None}
            pairs = [(key, recipe.get(key), value) for key, value in plan.recipe.items()]
            odd = [f"{key} {then} then, {now} now" for key, then, now in pairs if then != now]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ShardError(f"{record}: not written by this program; {advice}") from None
        if odd:
            raise ShardError(f"{folder}: its {plan.split} shards have another recipe ({'; '.join(odd)}); {advice}")

    whole = {}
    for number in range(len(plan.shards)):
        name = plan.name(number)
        if (entry := entries.get(name)) and (skip_bad or not entry["skipped"]):
            path = folder / name
            if target.command or path.is_file() and path.stat().st_size == entry["filesize"]:
                whole[number] = entry
    return whole


def in_processes(
    function: Callable, jobs: dict[int, tuple], lines: dict[int, str], workers: int, bar: tqdm, size: int
) -> Iterator[tuple[int, Any]]:
    """Call function(*jobs[n]) for each job in `workers` processes; yield (n, result) as they come, in any order.

    lines[n] is printed when job n begins; the bar follows the images that the workers count, of `size` bytes in all.
    """
    images_done, bytes_done, stop = counters = [multiprocessing.Value("q", 0) for _ in range(3)]
    waiting, running = list(jobs), {}
    # Not Python's own handler: its KeyboardInterrupt gets lost if ^C comes while a process is forked.
    handler = signal.signal(signal.SIGINT, lambda *_: setattr(stop, "value", 1))
    with bar, ProcessPoolExecutor(workers, initializer=start_worker, initargs=counters) as pool:
        try:
            while waiting or running:
                for number in waiting[: workers - len(running)]:
                    tqdm.write(lines[number], file=sys.stdout)
                    sys.stdout.flush()  # into a log file too
                    running[pool.submit(function, *jobs[number])] = number
                    waiting.remove(number)
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop.value:
                    raise KeyboardInterrupt
                bar.set_postfix_str(f"{human(bytes_done.value)} of {human(size)}", refresh=False)
                bar.update(images_done.value - bar.n)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise ShardError(
                "a worker process was killed (out of memory?); start again with fewer --workers: whole shards are kept"
            ) from None
        finally:
            stop.value = 1
            signal.signal(signal.SIGINT, handler)


def write_all(plan: Plan, target: Target, part: Part, entries: dict[int, dict], skip_bad: bool, workers: int) -> None:
    """Write this part's shards that have no entry yet; journal theirs and those given. ShardError for bad images."""
    todo = [number for number in range(len(plan.shards))[part.number - 1 :: part.parts] if number not in entries]
    for number in todo:
        for leftover in target.record.glob(f"{plan.name(number)}*"):  # of a run that was killed
            leftover.unlink()
    if entries:
        print(f"# keeping {len(entries)} of {len(plan.shards)} {plan.split} shards that are whole")
    journal = f"imagenet-{plan.split}.{part.number}-of-{part.parts}.journal"
    begin = "".join(json.dumps(line) + "\n" for line in (plan.recipe, *entries.values()))
    write_text(journal, begin, str(target.record))
    (target.record / f"imagenet-{plan.split}.json").unlink(missing_ok=True)

    starts = list(itertools.accumulate((len(images) for images in plan.shards), initial=0))
    brief, jobs, lines = plan._replace(shards=[], classes=[]), {}, {}  # a worker needs its own images only
    for number in todo:
        images = plan.shards[number]
        payload = human(sum(image.payload for image in images))
        jobs[number] = brief, number, images, target, skip_bad
        place = locate(target.prefix, plan.name(number)).removeprefix("pipe:")
        lines[number] = f"# writing {place} {len(images)} {payload} {starts[number]}"
    images, size = sum(len(plan.shards[n]) for n in todo), sum(image.size for n in todo for image in plan.shards[n])
    bar = tqdm(total=images, desc=plan.split, unit=" images", disable=None)
    bad, begun = [], time.monotonic()
    with open(target.record / journal, "a", encoding="utf-8") as log:
        for _, entry in in_processes(write_shard, jobs, lines, workers, bar, size):
            bad += entry["skipped"]
            if skip_bad or not entry["skipped"]:
                log.write(json.dumps(entry) + "\n")
                log.flush()
    for path, problem in sorted(bad):
        print(f"# bad image {plan.root / path}: {problem}", file=sys.stderr)
    if bad and not skip_bad:
        raise ShardError(
            f"{plan.root / plan.split}: {len(bad)} bad images, named above; mend or remove them, "
            "or start again with --skip-bad to leave them out (the whole shards are kept)"
        )
    print(f"# {plan.split}: {images / (time.monotonic() - begun):,.0f} images/s")


def format_index(content: dict) -> str:
    """The index as JSON with a line a shard: readable, and small."""
    shards = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in content["shardlist"])
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "shardlist")
    return "{\n" + ",\n".join(lines) + f',\n"shardlist": [\n{shards}\n]\n}}\n'


def write_index(plan: Plan, target: Target, entries: dict[int, dict]) -> None:
    """Write imagenet-SPLIT.json, and remove the journals."""
    shardlist = [entries[number] for number in range(len(plan.shards))]
    samples, size = (sum(entry[name] for entry in shardlist) for name in ("nsamples", "filesize"))
    content = {
        "__kind__": "wids-shard-index-v1",  # github.com/webdataset/webdataset: wids; other keys are ours
        "wids_version": 1,
        "name": f"imagenet-{plan.split}",
        "shardlist": shardlist,
        "classes": plan.classes,
        "class_names": None,
        "recipe": plan.recipe,
    }
    name = f"imagenet-{plan.split}.json"
    write_text(name, format_index(content), target.prefix, str(target.record))
    for journal in target.record.glob(f"imagenet-{plan.split}.*journal"):
        journal.unlink(missing_ok=True)
    skipped = sum(len(entry["skipped"]) for entry in shardlist)
    note = f", {skipped} bad images left out" if skipped else ""
    place = locate(target.prefix, name).removeprefix("pipe:")
    print(f"# {place}: {len(shardlist)} shards, {samples} images, {human(size)}, {len(plan.classes)} classes{note}")


def convert(plan: Plan, target: Target, part: Part | None, skip_bad: bool, workers: int) -> None:
    """Write the part's shards that are not whole yet and then, if no other's lacks, the index. No part: only the index.

    ShardError leaves no index.
    """
    index = target.record / f"imagenet-{plan.split}.json"
    entries = finished_shards(plan, target, skip_bad or index.exists())
    if part and len(entries) < len(plan.shards):
        write_all(plan, target, part, finished_shards(plan, target, skip_bad), skip_bad, workers)
        entries = finished_shards(plan, target, skip_bad)
    lacking = [plan.name(number) for number in range(len(plan.shards)) if number not in entries]
    if not lacking:
        write_index(plan, target, entries)
    elif part:
        print(f"# {plan.split}: {len(lacking)} shards of other parts are to come; who ends last writes the index")
    else:
        raise ShardError(
            f"{target.record}: {len(lacking)} of {len(plan.shards)} {plan.split} shards lack (first {lacking[0]}); "
            "write them (--part), or bring them here with their journals"
        )


def write_info(target: Target) -> None:
    """_info.json for timm's reader (--dataset wds/imagenet --data-dir FOLDER), from the indexes that are there."""
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        index = target.record / f"imagenet-{split}.json"
        if index.exists():
            shards = json.loads(index.read_text())["shardlist"]
            splits[name] = {
                "name": name,
                "num_samples": sum(shard["nsamples"] for shard in shards),
                "filenames": [shard["url"] for shard in shards],
                "shard_lengths": [shard["nsamples"] for shard in shards],
            }
    if splits:
        write_text("_info.json", json.dumps({"splits": splits}, indent=1) + "\n", target.prefix, str(target.record))


# ---------------------------------------------------------------- index → all is well
# The other way round, and through any prefix: what the index promises is counted, summed and looked at again.


def verify_shard(prefix: str, entry: dict, classes: int, decode: bool) -> tuple[list[str], list[str]]:
    """Read one shard to its end; (its keys, what is wrong with it). Its checksum, then each sample."""
    keys, wrong, sha256, size = [], [], hashlib.sha256(), 0

    class Tee(io.RawIOBase):
        def read(self, count: int) -> bytes:
            nonlocal size
            data = stream.read(count)
            sha256.update(data)
            size += len(data)
            return data

    try:
        with wds.gopen(locate(prefix, entry["url"])) as stream:
            tee = Tee()
            with tarfile.open(fileobj=tee, mode="r|") as tar:
                members = ((member.name, tar.extractfile(member).read()) for member in tar if member.isfile())
                for (cls, label), (jpg, data) in itertools.zip_longest(members, members, fillvalue=("nothing", b"")):
                    tar.members = []  # or it remembers them all
                    keys.append(key := cls.removesuffix(".cls"))
                    if (cls, jpg) != (f"{key}.cls", f"{key}.jpg") or not KEY.fullmatch(key):
                        wrong.append(f"members {cls}, {jpg} instead of KEY.cls, KEY.jpg")
                    if not label.isdigit() or int(label) >= classes:
                        wrong.append(f"{key}: label {label[:20]!r} is not below {classes}")
                    try:
                        check(data, decode)
                    except ValueError as error:
                        wrong.append(f"{key}: {error}")
                    count_done(len(data))
            while tee.read(1 << 20):
                pass
    except (OSError, ValueError, tarfile.TarError) as error:
        wrong.append(str(error))
    found = {"filesize": size, "nsamples": len(keys), "sha256": sha256.hexdigest()}
    odd = [f"{name} {value} found, {entry[name]} in the index" for name, value in found.items() if value != entry[name]]
    wrong += odd[: not wrong]  # one reason is enough
    return keys, [f"{entry['url']}: {line}" for line in wrong]


def verify(prefix: str, split: str, decode: bool, workers: int) -> None:
    """Check a finished split under a prefix against its index, every byte of it. ShardError if anything is wrong."""
    place = locate(prefix, f"imagenet-{split}.json")
    try:
        with wds.gopen(place) as stream:
            index = json.loads(stream.read())
        entries = dict(enumerate(index["shardlist"]))
        jobs = {n: (prefix, entry, len(index["classes"]), decode) for n, entry in entries.items()}
        images, size = (sum(entry[key] for entry in entries.values()) for key in ("nsamples", "filesize"))
        odd = [e["url"] for e in entries.values() if not re.fullmatch(r"\w[\w.-]*\.tar", e["url"]) or not e["sha256"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{place}: not an index ({error or 'nothing came'}); is --shards={prefix} right?") from None
    if odd:
        raise ShardError(f"{place}: lists {odd[0]!r}, which is no shard's name; don't trust it")
    bar = tqdm(total=images, desc=f"verify {split}", unit=" images", disable=None)
    lines = {n: f"# reading {e['url']} {e['nsamples']} {human(e['filesize'])}" for n, e in entries.items()}
    owner, wrong = {}, []
    for number, (keys, lines_wrong) in in_processes(verify_shard, jobs, lines, workers, bar, size):
        wrong += lines_wrong
        for key in keys:
            if owner.setdefault(key, number) != number:
                wrong.append(f"{entries[number]['url']}: {key}: also in {entries[owner[key]]['url']}")
    for line in sorted(wrong):
        print(f"# wrong: {line}", file=sys.stderr)
    if wrong:
        raise ShardError(f"{place}: {len(wrong)} faults, listed above; make or fetch those shards again")
    print(f"# {place}: {len(entries)} shards, {images} images, {human(size)}: all as the index says")


# ---------------------------------------------------------------- command line


def positive(text: str) -> float:
    """An argparse type: a number above zero; 1e9 is as good as 1000000000."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")


def kth_of(text: str) -> Part:
    """An argparse type: K/N."""
    with contextlib.suppress(ValueError):
        number, parts = map(int, text.split("/"))
        if 1 <= number <= parts:
            return Part(number, parts)
    raise argparse.ArgumentTypeError(f"{text!r} is not K/N, say 2/8 for the second of eight parts")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that tell something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description="Convert the ImageNet tree into WebDataset shards and an index.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--imagenet", metavar="DIR", type=Path, help="folder with train/ and val/ of class folders")
    task.add_argument("--verify", action="store_true", help="read finished shards again, check all that the index says")
    add("--shards", metavar="PREFIX", default="./data",
        help="folder for the shards and the index, or pipe:COMMAND that stores its standard input, %%s becomes a "
        "file's name; with --verify also a URL, or pipe:COMMAND that prints a file")
    add("--splits", default="train,val", help="what to convert: train, val or both with a comma")
    add("--seed", type=int, default=0, help="of the one shuffle over each split")
    add("--maxsize", metavar="BYTES", type=positive, default="1e9", help="a shard is closed when it holds as many")
    add("--maxcount", metavar="N", type=positive, default=100000, help="… or as many samples")
    add("--block-size", metavar="N", type=positive, default=64,
        help="samples in a block, the unit of which the index has a checksum and which a reader fetches")
    add("--workers", metavar="N", type=positive, default=cores, help="processes, each writing whole shards")
    add("--resize", metavar="PX", type=positive, default=None,
        help="shrink images to a shorter side of PX and encode them again; the same images in the same shards")
    add("--quality", metavar="Q", type=int, default=90, help="of the JPEGs that --resize makes")
    add("--part", metavar="K/N", type=kth_of, default="1/1",
        help="write every N-th shard only, from the K-th; the part that ends last writes the index")
    add("--index-only", action="store_true", help="write no shards, only the index of those that all parts wrote")
    add("--record", metavar="DIR", type=Path, default=None,
        help="with a pipe: command: where to keep a folder that records finished shards, for restarts and --part "
        "(default: the current folder)")
    add("--decode", action="store_true", help="with --verify: decode every image too")
    add("--skip-bad", action="store_true", help="leave out, and list, images that are no JPEG or PNG")
    add("--overwrite", action="store_true", help="replace shards that were made with other arguments")
    args = parser.parse_args(argv)
    if not set(args.splits.split(",")) <= set(ARCHIVES):
        parser.error(f"argument --splits: {args.splits!r} is not train, val or train,val")
    if not 1 <= args.quality <= 95:
        parser.error(f"argument --quality: {args.quality} is not within 1 and 95")
    if args.decode and not args.verify:
        parser.error("argument --decode: goes with --verify")
    if args.overwrite and (args.index_only or args.part.parts > 1):
        parser.error("argument --overwrite: would remove what other parts wrote; remove the old shards first")
    return args


def find_target(shards: str, record: Path | None) -> Target:
    """Where --shards and --record lead; ShardError for what can't be written to."""
    if shards.startswith("pipe:"):
        # The place's own name: to a restart, another bucket is another conversion.
        name = f"imagenet-shards-{hashlib.sha256(shards.encode()).hexdigest()[:8]}"
        return Target(shards, (record or Path()).expanduser() / name)
    if re.match("[a-z0-9]+://", shards):
        raise ShardError(
            f"--shards={shards}: can be read from (--verify), not written to; name a folder or a command that stores "
            "its input, say pipe:gsutil cp - gs://bucket/%s"
        )
    folder = Path(shards).expanduser()
    if record and record.expanduser().resolve() != folder.resolve():
        raise ShardError(f"--record={record}: goes with a pipe: command; the record of a folder lies in it")
    return Target(str(folder), folder)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    splits = dict.fromkeys(args.splits.split(","))  # once each, in the order given
    try:
        if args.verify:
            for split in splits:
                verify(args.shards, split, args.decode, int(args.workers))
            return 0
        target = find_target(args.shards, args.record)
        root = args.imagenet.expanduser()
        if not root.is_dir():
            raise ShardError(f"--imagenet={args.imagenet}: no such folder; name the one that holds train/ and val/")
        limits = args.maxsize, int(args.maxcount), args.resize and int(args.resize), args.quality, int(args.block_size)
        plans = [make_plan(root, split, args.seed, *limits) for split in splits]
        target.record.mkdir(parents=True, exist_ok=True)
        if target.command:
            print(f"# finished shards are recorded in {target.record}")
        if args.part.parts == 1 and not args.index_only:  # nobody else writes here
            for leftover in (*target.record.glob("imagenet-*.tmp-*"), *target.record.glob("_info.json.tmp-*")):
                leftover.unlink()
        for plan in plans:
            if args.overwrite:  # the index first: it vouches for the shards
                for pattern in (".json", ".*journal", "-*.tar"):
                    for old in target.record.glob(f"imagenet-{plan.split}{pattern}"):
                        old.unlink()
            else:
                finished_shards(plan, target, args.skip_bad)  # refuse before hours of work, not after
        for plan in plans:
            convert(plan, target, None if args.index_only else args.part, args.skip_bad, int(args.workers))
        write_info(target)
    except ShardError as error:
        print(f"imagenet_shards.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        what = error.filename or args.shards
        print(f"imagenet_shards.py: {what}: {error.strerror}; mend that and start again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("imagenet_shards.py: interrupted; the same command goes on from the whole shards", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
