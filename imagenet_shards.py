"""Packs ImageNet's image files, unmodified, into 147 tar shards plus a JSON index that WebDataset can train from.

    python imagenet_shards.py --imagenet=/data/imagenet --shards=./data
    python imagenet_shards.py --imagenet=/data/imagenet --shards='pipe:gsutil cp - gs://bucket/%s'

In:  DIR/{train,val}/CLASS/*.JPEG: any tree that torchvision.datasets.ImageFolder reads, or Kaggle's with a flat val/
Out: imagenet-train-000000.tar …, imagenet-val-000000.tar …   two members per image: KEY.cls, KEY.jpg
     imagenet-train.json, imagenet-val.json                   the index (wids v1): shards, blocks, checksums, classes
     _info.json                                               the number of samples per shard, for timm's reader

KEY is the file's stem, KEY.cls the class number in ASCII (the rank of the class folder), KEY.jpg the file's bytes.
The images of a split are shuffled once. A block is a run of 64 samples; the index has its offset, length and CRC-32.

Guarantee: if the index exists, every shard that it lists is complete. Rerun the same command to resume; finished
shards are kept. The bytes do not depend on the number of workers, on interruptions, or on --part.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import PIL.features
import torch
import webdataset as wds
from PIL import Image as PillowImage
from tqdm import tqdm

SHARD_NAME, INDEX_NAME = "imagenet-{}-{:06d}.tar", "imagenet-{}.json"


class ShardError(Exception):
    """A user-fixable error, in one line: the input, the problem, the remedy."""


def format_bytes(size: float) -> str:
    """A size in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """The number and its noun: 1 shard, 2 shards, 3 classes."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def summarize(entries: list[dict[str, Any]]) -> str:
    """What these entries of an index amount to."""
    samples, size = (sum(entry[field] for entry in entries) for field in ("nsamples", "filesize"))
    return f"{count(len(entries), 'shard')}, {count(samples, 'image')}, {format_bytes(size)}"


# ---------------------------------------------------------------- tree → classes and images

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


def find_classes(root: Path, split: str) -> list[str]:
    """The sorted names of a split's class folders; none for a flat val/ of images."""
    folder = root / split
    if not folder.is_dir():
        advice = "--imagenet must name the folder that holds train/ and val/"
        if (root / ARCHIVES[split]).exists():
            advice = f"unpack {ARCHIVES[split]} with torchvision.datasets.ImageNet({str(root)!r}, {split!r})"
        raise ShardError(f"{folder}: no such folder; {advice}")
    names = sorted(os.listdir(folder))
    if archives := [name for name in names if re.fullmatch(r"n\d{8}\.tar", name)]:
        found = f"{count(len(archives), 'class archive')} (first {archives[0]})"
        raise ShardError(f"{folder}: {found} among the class folders; unpack each into its folder and remove it")
    classes = [name for name in names if (folder / name).is_dir()]
    if strange := [name for name in classes if not name.isprintable()]:  # for example not UTF-8
        raise ShardError(f"{folder}: class folder {strange[0]!a} has an unprintable name; rename it")
    if not classes and not (split == "val" and any(name.lower().endswith(EXTENSIONS) for name in names)):
        raise ShardError(f"{folder}: no class folders; expected one folder per class, {folder}/n01440764/*.JPEG")
    return classes


def find_files(folder: Path) -> list[str]:
    """The image files below a folder, sorted as torchvision sorts them; OSError if any part of it can't be read."""
    files: list[str] = []
    folders = [str(folder)]
    for parent in folders:  # which grows meanwhile
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
    try:
        names, wnids = torch.load(path, weights_only=True)
        return {wnid: ", ".join(words) for wnid, words in names.items()}, list(wnids)
    except Exception as error:  # torch raises many kinds
        raise ShardError(f"{path}: not torchvision's meta.bin ({type(error).__name__}); remove it") from None


def read_val_labels(root: Path, path: Path | None, files: list[str]) -> list[str]:
    """The wnid of each file of a flat val/, from LOC_val_solution.csv or meta.bin: `path`, or found beside the tree."""
    path = path or find_beside(root, "LOC_val_solution.csv", "meta.bin")
    if not path:
        raise ShardError(
            f"{root / 'val'}: {count(len(files), 'image')} but no class folders; name Kaggle's LOC_val_solution.csv or "
            "torchvision's meta.bin with --val-labels, move the images into class folders, or use --splits=train"
        )
    labels, wnids = read_labels(path)
    try:  # a line is ILSVRC2012_val_00048981,n03995372 85 1 499 272 …
        wnids = wnids or [labels[Path(file).stem].split()[0] for file in files]
        return [wnid for _, wnid in zip(files, wnids, strict=True)]
    except (ValueError, LookupError) as error:
        raise ShardError(f"{path}: not a label for each image of {root / 'val'} ({error}); check both") from None


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


def list_split(root: Path, split: str, val_labels: Path | None) -> tuple[list[str], list[Image]]:
    """The classes and images of a split, sorted. ShardError or OSError for a tree that can't be read completely."""
    folders = find_classes(root, split)
    train = find_classes(root, "train") if split == "val" and (root / "train").is_dir() else folders
    files = [(file, name) for name in folders for file in find_files(root / split / name)]
    if not folders:
        names = find_files(root / split)
        files = list(zip(names, read_val_labels(root, val_labels, names)))
    found = sorted({name for _, name in files})
    if empty := sorted(set(folders) - set(found)):
        raise ShardError(f"{root / split / empty[0]}: no images in this class folder; remove it")
    classes = folders or (train if set(found) <= set(train) else found)
    if train and train != classes:  # a class that only one split has would shift the numbers of those after it
        differing = sorted(set(train) ^ set(classes))
        first = f"{', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}"
        problem = f"train/ and val/ differ in {count(len(differing), 'class')} ({first})"
        raise ShardError(f"{root}: {problem}, so class numbers would; give both the same")
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
    path = root and find_beside(root, "LOC_synset_mapping.txt", "meta.bin")
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
        print(f"# warning: {root / split}: {count(len(images), 'image')}, {expected}", file=sys.stderr)
    tree = hashlib.sha256()
    for image in images:
        tree.update(b"%s %d %d\n" % (os.fsencode(image.path), image.label, image.size))
    shards = plan_shards(images, recipe["seed"], recipe["maxsize"], recipe["maxcount"])
    recipe = recipe | {"images": len(images), "shards": len(shards), "tree": tree.hexdigest()}
    about = {"classes": classes, "class_names": find_class_names(root, classes), "recipe": recipe}
    return Plan(root, split, shards, recipe, about)


# ---------------------------------------------------------------- worker processes

stop: Any = None  # in worker processes: shared memory, without a lock that a killed worker could leave locked


def check_stop() -> None:
    """Raise KeyboardInterrupt in a worker if the user pressed ^C, or another worker or the main process ended."""
    if stop and stop.value:
        raise KeyboardInterrupt


def start_worker(shared: Any) -> None:
    """Initialize a worker, which leaves ^C to the main process and ends, with its command, when that is killed."""
    global stop
    stop = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while not stop.value and multiprocessing.parent_process().is_alive():
            time.sleep(0.1)
        stop.value = 1
        time.sleep(5)  # in which jobs end their commands and remove their temporary files
        os._exit(1)  # it may wait for a disk, or for a lock of another worker that was killed

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(function: Callable, jobs: dict[Any, tuple], workers: int) -> Iterator[tuple[Any, Future]]:
    """Call function(*jobs[key]) for each key in `workers` processes; yield (key, future) of those that end."""
    shared = multiprocessing.RawValue("b", 0)
    # Python's own handler raises KeyboardInterrupt anywhere, and loses it while a process is forked.
    handler = signal.signal(signal.SIGINT, lambda *_: setattr(shared, "value", 1))
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(shared,))
    try:
        keys = {pool.submit(function, *job): key for key, job in jobs.items()}
        for future in as_completed(keys):
            yield keys[future], future
        if shared.value:
            raise KeyboardInterrupt
    finally:
        shared.value = 1
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------- URL → bytes, bytes → URL
# A file gets its name only when it is complete. A command reads from, or writes to, an unnamed file on this machine: it
# never sees a part of a shard, whichever process is killed, and it can be run again if it fails.

READ_COMMANDS = {"gs": "gsutil -q cat {}", "s3": "aws s3 cp {} -"} | dict.fromkeys(["http", "https"], "curl -sSfL {}")


class Target(NamedTuple):
    """Where the files of a data set are, and how hard to try to transfer them."""

    prefix: str  # a folder, a URL, or pipe:COMMAND
    record: Path  # folder of the index and of .finished/, an entry per finished shard; the prefix, if that is a folder
    retries: int
    timeout: float  # seconds without progress

    def locate(self, name: str) -> str:
        """The path or URL of a file, or pipe:COMMAND; %s in the prefix becomes the name, or it is appended."""
        if "%s" in self.prefix:
            return self.prefix.replace("%s", name)
        return self.prefix + ("" if self.prefix.startswith("pipe:") or self.prefix.endswith("/") else "/") + name

    def record_path(self, name: str) -> Path:
        return self.record / ".finished" / f"{name}.json"


def try_command(command: str, file: BinaryIO, output: bool, timeout: float) -> str:
    """Run a shell command with a file as its standard input or output; what went wrong, or nothing."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if output:
        file.truncate()
    with tempfile.TemporaryFile() as messages:
        files = {"stdin": subprocess.DEVNULL, "stdout": file} if output else {"stdin": file, "stdout": messages}
        process = subprocess.Popen(command, shell=True, stderr=messages, start_new_session=True, **files)
        position, deadline = 0, time.monotonic() + timeout
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline:
                check_stop()
                if position != (position := os.lseek(file.fileno(), 0, os.SEEK_CUR)):  # the command moves it
                    deadline = time.monotonic() + timeout
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status == 0 and (output or os.lseek(file.fileno(), 0, os.SEEK_CUR) == size):
            return ""
        messages.seek(0)
        text = " ".join(messages.read().decode(errors="replace").split())[-300:]
    problem = f"failed with exit status {status}" if status else "exit status 0 before it had read all of its input"
    problem = f"no progress for {timeout:g} s" if status is None else problem
    return f"{problem}: {text}" if text else problem


def run_command(target: Target, command: str, file: BinaryIO, output: bool) -> None:
    """try_command(), up to `retries` times again with exponential back-off. ShardError if it fails in the end."""
    for failures in itertools.count(1):
        if not (problem := try_command(command, file, output, target.timeout)):
            return
        if failures > target.retries:
            raise ShardError(f"{command}: {problem}; fix it and rerun")
        pause = min(60, 2 ** (failures - 1)) * random.uniform(0.5, 1)
        print(f"# {command}: {problem}; retry {failures} of {target.retries} in {pause:.1f} s", file=sys.stderr)
        for _ in range(int(pause * 20)):
            check_stop()
            time.sleep(0.05)


@contextlib.contextmanager
def open_reader(target: Target, url: str) -> Iterator[BinaryIO]:
    """A stream of a file's bytes. ShardError or OSError if they can't be read."""
    if (scheme := url.split("://")[0]) in READ_COMMANDS:
        url = "pipe:" + READ_COMMANDS[scheme].format(shlex.quote(url))
    with tempfile.TemporaryFile() if url.startswith("pipe:") else open(url, "rb") as file:
        if url.startswith("pipe:"):
            run_command(target, url.removeprefix("pipe:"), file, output=True)
            file.seek(0)
        yield file


@contextlib.contextmanager
def open_writer(target: Target, url: str) -> Iterator[BinaryIO]:
    """A stream to write one file to, which exists, complete, only if the block ends without an exception.

    Then temporary files that earlier runs left of the same file are removed.
    """
    if url.startswith("pipe:"):
        with tempfile.TemporaryFile(dir=target.record) as file:
            yield file
            file.flush()
            run_command(target, url.removeprefix("pipe:"), file, output=False)
        return
    temporary = f"{url}.tmp-{uuid.uuid4().hex[:12]}"  # no two processes or machines share one
    try:
        with open(temporary, "xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the renamed file without its bytes
        with contextlib.suppress(FileNotFoundError):  # another run has written the same file and removed this one
            os.replace(temporary, url)
        os.stat(url)
        for leftover in Path(url).parent.glob(f"{Path(url).name}.tmp-*"):  # of a killed run, or one with the same bytes
            leftover.unlink(missing_ok=True)
        folder = os.open(os.path.dirname(url) or ".", os.O_RDONLY)
        os.fsync(folder)  # or it could undo the rename
        os.close(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


def store(target: Target, name: str, text: str) -> None:
    """Write a small file under the prefix and, if that is a command, a copy into the record."""
    for url in dict.fromkeys((target.locate(name), str(target.record / name))):
        with open_writer(target, url) as file:
            file.write(text.encode())


# ---------------------------------------------------------------- images → one shard
# The only part that touches images: their bytes are copied unmodified after a look at both ends.


def decode_image(data: bytes) -> PillowImage.Image:
    """The decoded image; ValueError says why it can't be decoded."""
    if not data:
        raise ValueError("empty file")
    try:
        image = PillowImage.open(io.BytesIO(data), formats=["JPEG", "PNG"])
        image.load()
    except PillowImage.UnidentifiedImageError:
        raise ValueError("neither JPEG nor PNG") from None
    except Exception as error:  # Pillow raises many kinds on invalid bytes
        raise ValueError(str(error)) from None
    return image


def validate_image(data: bytes, decode: bool = False) -> None:
    """ValueError if these bytes are not a JPEG or PNG that can be decoded.

    Nearly all complete files pass by their first and last bytes; only others are decoded, or all with `decode`.
    """
    jpeg = data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in data[-1024:]
    png = data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-1024:]
    if decode or not (jpeg or png):
        decode_image(data)


def resize_image(data: bytes, pixels: int, quality: int) -> bytes:
    """A JPEG of the image with a shorter side of `pixels`; the bytes unmodified if it has no more than that.

    ValueError if they can't be decoded. `quality` is libjpeg's, 1 to 95.
    """
    image = decode_image(data)
    scale = pixels / min(image.size)
    if scale >= 1:
        return data
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode not in ("RGB", "L"):  # CMYK, a PNG's palette
        image = image.convert("RGB")
    size = round(image.width * scale), round(image.height * scale)
    stream = io.BytesIO()
    image.resize(size, PillowImage.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def read_ahead(paths: list[Path], number: int = 16) -> Iterator[bytes]:
    """The files' bytes, in order. The kernel fetches `number` of them ahead, which keeps a disk busy."""
    for path, later in itertools.zip_longest(paths, paths[number:]):
        try:
            if later and hasattr(os, "posix_fadvise"):  # macOS lacks it
                with open(later, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(f"{error.filename or path}: {error.strerror}; fix it and rerun") from None
        yield data


def make_samples(plan: Plan, images: list[Image], invalid: list[list[str]]) -> Iterator[dict[str, Any]]:
    """WebDataset's samples of these images. Those of invalid images are left out; [path, problem] tells of each."""
    resize = plan.recipe["resize"]
    for image, data in zip(images, read_ahead([plan.root / image.path for image in images])):
        check_stop()
        if len(data) != image.size:
            problem = f"{len(data)} bytes, but {image.size} when listed; do not change the tree and rerun"
            raise ShardError(f"{plan.root / image.path}: {problem}")
        try:
            validate_image(data)
            jpg = resize_image(data, *resize[:2]) if resize else data
        except ValueError as error:
            invalid.append([image.path, str(error)])
        else:
            yield {"__key__": image.key, "jpg": jpg, "cls": image.label}


def tar_samples(samples: Iterator[dict[str, Any]]) -> Iterator[tuple[bytes, int]]:
    """A tar file of these samples: (the bytes of a sample's members, 1) each, and (the file's trailer, 0)."""
    written: list[bytes] = []
    size = 0
    # mtime=0: a float time would add a kilobyte of PAX headers to every member, and change with every run.
    tar = wds.TarWriter(io.BytesIO(), mtime=0)
    # Without tarfile's buffer, and a file in one piece: 1.2 times as fast.
    tar.tarstream.fileobj, tar.tarstream.copybufsize = SimpleNamespace(write=written.append), 1 << 30
    for sample in samples:
        tar.write(sample)
        data = b"".join(written)
        yield data, 1
        size += len(data)
        written.clear()
    yield bytes(1024 + -(size + 1024) % tarfile.RECORDSIZE), 0


def make_entry(
    name: str, parts: Iterable[tuple[bytes, int]], block_size: int, file: BinaryIO | None = None
) -> dict[str, Any]:
    """A shard's entry in the index, from its bytes as tar_samples() has them; writes them to a file if there is one."""
    sha256, crc32, start, size, samples = hashlib.sha256(), 0, 0, 0, 0
    blocks: list[list[int]] = []  # [offset, length, samples, CRC-32]
    for data, added in parts:
        check_stop()
        if samples == block_size or (samples and not added):
            blocks.append([start, size - start, samples, crc32])
            start, samples, crc32 = size, 0, 0
        if file:
            file.write(data)
        sha256.update(data)
        crc32, size, samples = zlib.crc32(data, crc32), size + len(data), samples + added
    counts = {"nsamples": sum(block[2] for block in blocks), "filesize": size}
    return {"url": name} | counts | {"sha256": sha256.hexdigest(), "blocks": blocks}


class InvalidImagesError(Exception):
    """A shard with invalid images, which is not kept; args[0] lists their [path, problem]."""


def write_shard(plan: Plan, number: int, images: list[Image], target: Target, skip_invalid: bool) -> dict[str, Any]:
    """Write one shard and return its entry in the index, in which "skipped" lists [path, problem] of invalid images.

    InvalidImagesError if there are any and they are not to be skipped: all images are read, but no shard is stored.
    """
    name = SHARD_NAME.format(plan.split, number)
    invalid: list[list[str]] = []
    with open_writer(target, target.locate(name)) as file:
        entry = make_entry(name, tar_samples(make_samples(plan, images, invalid)), plan.recipe["block_size"], file)
        if invalid and not skip_invalid:
            raise InvalidImagesError(invalid)
    return entry | ({"skipped": invalid} if invalid else {})


# ---------------------------------------------------------------- plan → all shards and the index

UNFINISHED = "imagenet-conversion-not-finished"  # kind of the file that takes the index's place meanwhile


def format_index(content: dict[str, Any]) -> str:
    """The index as JSON with one line per shard, so that it is readable and small."""
    shards = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in content["shardlist"])
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "shardlist")
    return "{\n" + ",\n".join(lines) + f',\n"shardlist": [\n{shards}\n]\n}}\n'


def write_index(target: Target, split: str, about: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write imagenet-SPLIT.json in the format of wids, which ignores the keys that are ours; without entries, a stub.

    Then _info.json for timm's reader (--dataset wds/imagenet --data-dir FOLDER), from the complete indexes.
    """
    index = INDEX_NAME.format(split)
    head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"imagenet-{split}"}
    message = "The conversion is not finished: rerun the same imagenet_shards.py command to resume it."
    stub = json.dumps({"__kind__": UNFINISHED, "message": message} | about, indent=1) + "\n"
    store(target, index, format_index(head | about | {"shardlist": entries}) if entries else stub)
    splits = {}
    for ours, name in (("train", "train"), ("val", "validation")):
        with contextlib.suppress(FileNotFoundError, KeyError):  # no index, or a stub
            shards = json.loads((target.record / INDEX_NAME.format(ours)).read_text())["shardlist"]
            lengths, files = [shard["nsamples"] for shard in shards], [shard["url"] for shard in shards]
            splits[name] = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
    store(target, "_info.json", json.dumps({"splits": splits}, indent=1) + "\n")
    if entries:
        skipped = sum(len(entry.get("skipped", [])) for entry in entries)
        note = f", {count(skipped, 'invalid image')} skipped" if skipped else ""
        place = target.locate(index).removeprefix("pipe:")
        print(f"# {place}: {summarize(entries)}, {count(len(about['classes']), 'class')}{note}")


def check_target(plan: Plan, target: Target, overwrite: bool) -> None:
    """ShardError if the target holds shards of another conversion; with `overwrite` these lose their index instead."""
    index, problem = target.record / INDEX_NAME.format(plan.split), ""
    shards = list(target.record.glob(f"imagenet-{plan.split}-*.tar"))
    if index.exists():
        try:
            then = json.loads(index.read_text())["recipe"] or {}
            differing = [key for key, value in plan.recipe.items() if then.get(key) != value]
            changes = "; ".join(f"{key} {then.get(key)} then, {plan.recipe[key]} now" for key in differing)
            problem = changes and f"its {plan.split} shards have another recipe ({changes})"
        except (ValueError, LookupError, TypeError, AttributeError):
            problem = f"{index.name} was not written by this program"
    elif shards:
        problem = f"holds {count(len(shards), f'{plan.split} shard')} without an index"
    if problem and not overwrite:
        advice = "use the same tree and arguments, another --shards, --overwrite to start over, or --index-only"
        raise ShardError(f"{target.record}: {problem}; {advice}")
    if problem:
        write_index(target, plan.split, plan.about, [])  # a stub
    for path in shards if overwrite else []:
        if path.name >= SHARD_NAME.format(plan.split, len(plan.shards)):  # the others will be replaced
            path.unlink(missing_ok=True)


def finished_shards(plan: Plan, target: Target) -> dict[int, dict[str, Any]]:
    """Index entries, by shard number, of the shards that any run of this conversion has finished."""
    finished = {}
    for number in range(len(plan.shards)):
        name = SHARD_NAME.format(plan.split, number)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            recipe, entry = json.loads(target.record_path(name).read_text()).values()
            stored = target.prefix.startswith("pipe:") or (target.record / name).stat().st_size == entry["filesize"]
            if stored and recipe == plan.recipe:
                finished[number] = entry
    return finished


def write_shards(plan: Plan, target: Target, numbers: list[int], skip_invalid: bool, workers: int) -> None:
    """Write these shards and record each. ShardError if there are invalid images that are not to be skipped."""
    starts = list(itertools.accumulate(map(len, plan.shards), initial=0))
    brief = plan._replace(shards=[])  # a worker gets the images of its shard only
    jobs = {number: (brief, number, plan.shards[number], target, skip_invalid) for number in numbers}
    images, invalid, start = sum(len(plan.shards[n]) for n in numbers), [], time.monotonic()
    with tqdm(total=images, desc=plan.split, unit=" images", disable=None) as bar:
        for number, future in run_jobs(write_shard, jobs, workers):
            bar.update(len(plan.shards[number]))
            try:
                entry = future.result()
            except InvalidImagesError as error:
                invalid += error.args[0]
                continue
            name, record = entry["url"], {"recipe": plan.recipe, "entry": entry}
            with open_writer(target, str(target.record_path(name))) as file:
                file.write(json.dumps(record).encode())
            invalid += entry.get("skipped", [])
            place, size = target.locate(name).removeprefix("pipe:"), format_bytes(entry["filesize"])
            tqdm.write(f"# writing {place} {entry['nsamples']} {size} {starts[number]}")
    for path, problem in sorted(invalid):
        print(f"# invalid image {plan.root / path}: {problem}", file=sys.stderr)
    if invalid and not skip_invalid:
        problem = f"{count(len(invalid), 'invalid image')}, listed above; rerun with --skip-bad to leave them out"
        advice = "(finished shards are kept), or fix them and rerun with --overwrite (starts over)"
        raise ShardError(f"{plan.root / plan.split}: {problem} {advice}")
    print(f"# {plan.split}: {images / (time.monotonic() - start):,.0f} images/s")


def convert(plan: Plan, target: Target, part: slice, skip_invalid: bool, workers: int) -> None:
    """Write the part's shards that are not finished and, once those of all parts are, the index."""
    numbers, finished = range(len(plan.shards)), finished_shards(plan, target)
    if todo := [number for number in numbers[part] if number not in finished]:
        if finished:
            print(f"# {plan.split}: keeping {len(finished)} of {count(len(numbers), 'shard')} that are finished")
        write_index(target, plan.split, plan.about, [])  # a stub, before any shard is replaced
        write_shards(plan, target, todo, skip_invalid, workers)
        finished = finished_shards(plan, target)
    missing = [number for number in numbers if number not in finished]
    if lost := sorted({*missing} & {*numbers[part]}):
        name = SHARD_NAME.format(plan.split, lost[0])
        raise ShardError(f"{target.record}: {name} was removed or changed meanwhile; rerun to write it again")
    if missing:
        print(f"# waiting for {count(len(missing), f'{plan.split} shard')}; the last part to finish writes the index")
    else:
        write_index(target, plan.split, plan.about, [finished[number] for number in numbers])


# ---------------------------------------------------------------- shards → index entries
# One function reads a shard and returns its entry: --verify compares that with the index, --index-only stores it.

SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")  # names that are safe in a path and in a command


def read_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """(key, {extension: bytes}, offset of its end) of each sample, grouped as webdataset does it."""
    split_name = wds.tariterators.base_plus_ext
    for key, members in itertools.groupby(tar, lambda member: split_name(member.name)[0]):
        if key is None:  # webdataset ignores other names, such as those of folders
            continue
        sample = {}
        for member in members:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
            if not member.isreg() or member.issparse():  # a sparse one may claim any size
                raise tarfile.ReadError(f"{member.name}: not a regular file")
            sample[split_name(member.name)[1].lower()] = tar.extractfile(member).read()
        yield key, sample, member.offset_data + -(-member.size // 512) * 512


def read_label(sample: dict[str, bytes], classes: int | None, decode: bool) -> int:
    """The class number of a sample of one image and one label. ValueError says what is wrong with it."""
    images = [data for extension, data in sample.items() if extension in ("jpg", "jpeg", "png")]
    if len(images) != 1 or "cls" not in sample:
        raise ValueError(f"members {', '.join(sample)}; expected cls and one of jpg, jpeg, png")
    validate_image(images[0], decode)
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", sample["cls"]) or classes and int(sample["cls"]) >= classes:
        raise ValueError(f"label {sample['cls'][:20]!r} is not a number below {classes or 10**9}")
    return int(sample["cls"])


def read_parts(file: BinaryIO, ends: list[int]) -> Iterator[tuple[bytes, int]]:
    """A shard's bytes as tar_samples() has them, from the positions where its samples end."""
    file.seek(0)
    for end in ends:
        yield file.read(end - file.tell()), 1
    while data := file.read(1 << 20):
        yield data, 0
    yield b"", 0


def read_shard(
    target: Target, name: str, block_size: int, classes: int | None, decode: bool
) -> tuple[dict[str, Any], list[str], int, list[str]]:
    """Read a shard to its end: (its entry in the index, keys, highest label, problems)."""
    keys, ends, highest, problems = [], [], -1, []
    with open_reader(target, target.locate(name)) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for key, sample, end in read_samples(tar):
                    check_stop()
                    keys.append(key)
                    ends.append(end)
                    try:
                        highest = max(highest, read_label(sample, classes, decode))
                    except ValueError as error:
                        problems.append(f"{key}: {error}")
        except tarfile.TarError as error:
            problems.append(str(error))
        file.seek(max(ends, default=0))
        trailer = file.read(1 << 20)
        if not problems and (len(trailer) < 1024 or trailer.strip(b"\0")):  # tarfile ends at a damaged header
            problems.append(f"no end of a tar file after {count(len(keys), 'sample')}; is it truncated or damaged?")
        entry = make_entry(name, read_parts(file, ends), block_size)
    return entry, keys, highest, problems


def read_shards(
    target: Target, names: list[str], expected: dict[str, dict], options: tuple, unique: bool, workers: int
) -> tuple[list[dict[str, Any]], int]:
    """Read all shards with read_shard(*options): (their entries, highest label).

    ShardError, after a list of all problems, if there are any. Problems are also differences from the `expected`
    entries, and a key that two samples of a shard or, if `unique`, of all shards have.
    """
    entries, highest, problems = {}, -1, []
    owner: dict[str, str] = {}  # shard of each key
    jobs = {name: (target, name, *options) for name in names}
    for name, future in tqdm(run_jobs(read_shard, jobs, workers), total=len(names), unit=" shards", disable=None):
        try:
            entries[name], keys, label, found = future.result()
        except (ShardError, OSError) as error:
            problems.append(f"{name}: {error}")
            continue
        tqdm.write(f"# reading {name} {len(keys)} {format_bytes(entries[name]['filesize'])}")
        owner, highest = owner if unique else {}, max(label, highest)
        for key in keys:
            found += [f"{key}: also in {owner[key]}"] if key in owner else []
            owner[key] = name
        if name in expected and not found:
            pairs = [(key, value, expected[name].get(key)) for key, value in entries[name].items()]
            found = [f"{key} differs: {now} found, {then} in the index" for key, now, then in pairs if now != then][:1]
        problems += [f"{name}: {problem[:200]}" for problem in found]
    for problem in sorted(problems):
        print(f"# problem: {problem}", file=sys.stderr)
    if problems:
        advice = f"{count(len(problems), 'problem')}, listed above; write or fetch those shards again"
        raise ShardError(f"--shards={target.prefix}: {advice}")
    return [entries[name] for name in names], highest


def verify(args: argparse.Namespace, target: Target, split: str) -> None:
    """Compare every byte of a split's shards with the index. ShardError if anything differs."""
    name = INDEX_NAME.format(split)
    url = str(args.index / name) if args.index else target.locate(name)
    try:
        with open_reader(target, url) as file:
            index = json.loads(file.read())
        if index["__kind__"] == UNFINISHED:
            raise ShardError(f"{url}: conversion not finished; rerun its imagenet_shards.py command to resume it")
        entries = {entry["url"]: entry for entry in index["shardlist"]}
        block_size = max(block[2] for entry in entries.values() for block in entry["blocks"])
        options, unique = (block_size, len(index["classes"]), args.decode), index["recipe"] is not None
        summary = summarize(index["shardlist"])
        if strange := [name for name in entries if not SHARD.fullmatch(name)]:
            raise ShardError(f"{url}: lists {strange[0]!r}, which is no shard's name; do not use this index")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"not an index of this version ({error!r})"
        raise ShardError(f"{url}: {problem}; correct --shards or make a new index with --index-only") from None
    read_shards(target, list(entries), entries, options, unique, args.workers)
    print(f"# {url.removeprefix('pipe:')}: {summary}: all as the index says")


def index_only(args: argparse.Namespace, target: Target, split: str) -> None:
    """Make an index of shards that exist, of this program or of another, and write it into a folder."""
    source, output = Path(target.prefix), args.index or Path(target.prefix)
    names = wds.shardlists.expand_urls(args.names) if args.names else []
    if strange := [name for name in names if not SHARD.fullmatch(name)]:
        raise ShardError(f"--names: {strange[0]!r} is not a file name that ends in .tar; folders belong into --shards")
    if not source.is_dir() and not (names and args.index):
        raise ShardError(f"--shards={target.prefix}: not a folder, so --index-only needs --names and --index")
    output.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # of an earlier version, or of a conversion in parts
        known = dict(json.loads((output / INDEX_NAME.format(split)).read_text()))
    about = {key: known.get(key) for key in ("classes", "class_names", "recipe")}
    if names or "shards" not in (about["recipe"] or {}):
        about["recipe"] = None
    found = len(list(source.glob(f"imagenet-{split}-*.tar")))
    recipe = about["recipe"] or {"block_size": args.block_size, "shards": found}
    names = names or [SHARD_NAME.format(split, number) for number in range(recipe["shards"])]
    missing = [name for name in names if source.is_dir() and not (source / name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {count(len(names), f'{split} shard')} missing (first {[*missing, 'any'][0]})"
        raise ShardError(f"{source}: {what}; write them, copy them here, or name others with --names")
    if args.classes:  # a class a line, or "n01440764 tench, Tinca tinca"
        lines = args.classes.read_text(encoding="utf-8").splitlines()
        wnids = all(re.match(r"n\d{8} ", line) for line in lines)
        about["classes"] = [line[:9] for line in lines] if wnids else lines
        about["class_names"] = [line[10:] for line in lines] if wnids else None
    options = recipe["block_size"], about["classes"] and len(about["classes"]), args.decode
    entries, highest = read_shards(target, names, {}, options, about["recipe"] is not None, args.workers)
    about["classes"] = about["classes"] or [str(label) for label in range(highest + 1)]
    about["class_names"] = about["class_names"] or find_class_names(None, about["classes"])
    write_index(target._replace(prefix=str(output), record=output), split, about, entries)


# ---------------------------------------------------------------- command line


def whole(text: str) -> int:
    """An argparse type: a positive whole number; 1e9 is as good as 1000000000."""
    with contextlib.suppress(ValueError):
        if float(text).is_integer() and float(text) >= 1:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")


def k_of_n(text: str) -> slice:
    """An argparse type: K/N, as the slice of every N-th item from the K-th on."""
    with contextlib.suppress(ValueError):
        number, parts = map(int, text.split("/"))
        if 1 <= number <= parts:
            return slice(number - 1, None, parts)
    raise argparse.ArgumentTypeError(f"{text!r} is not K/N, for example 2/8 for the second of eight parts")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description="Pack ImageNet's image files into WebDataset shards and an index.",
        epilog="Each finished shard is a line: # writing NAME SAMPLES SIZE BEFORE, the number of samples before it.",
        allow_abbrev=False,
    )
    parser.print_usage = lambda file=None: None  # type: ignore[method-assign]  # so that an error is one line
    add = parser.add_mutually_exclusive_group().add_argument
    add("--imagenet", metavar="DIR", type=Path, help="convert the folder that holds train/ and val/")
    add("--verify", action="store_true", help="read finished shards and compare every byte with the index")
    add("--index-only", action="store_true", help="make an index of shards that parts or another program wrote")
    add = parser.add_argument
    add("--shards", metavar="PREFIX", type=os.path.expanduser, default="./data",
        help="folder of shards and index, or pipe:COMMAND that stores its standard input, where %%s becomes the file's "
        "name; to read also http(s)://, gs://, s3://, or pipe:COMMAND that prints a file [%(default)s]")
    add("--splits", metavar="NAMES", default="train,val", choices=["train", "val", "train,val"],
        help="train, val or train,val [%(default)s]")
    add("--workers", metavar="N", type=whole, default=cores, help="processes, with a shard each [%(default)s]")
    add("--retries", metavar="N", type=int, default=5, help="per shard whose command fails or stalls [%(default)s]")
    add("--timeout", metavar="S", type=whole, default=300, help="seconds without progress of a command [%(default)s]")
    add("--block-size", metavar="N", type=whole, default=64, help="samples in a block [%(default)s]")
    add = parser.add_argument_group("with --imagenet").add_argument
    add("--seed", type=int, default=0, help="of the one shuffle of each split [%(default)s]")
    add("--maxsize", metavar="BYTES", type=whole, default="1e9", help="a shard ends when it has as many [%(default)s]")
    add("--maxcount", metavar="N", type=whole, default=100000, help="… or this many samples [%(default)s]")
    add("--resize", metavar="PX", type=whole, help="shrink images to a shorter side of PX pixels, encoded as JPEG")
    add("--quality", metavar="Q", type=int, default=90, choices=range(1, 96), help="of these JPEGs, 1–95 [%(default)s]")
    add("--val-labels", metavar="FILE", type=Path, help="LOC_val_solution.csv or meta.bin for a flat val/ [if found]")
    add("--part", metavar="K/N", type=k_of_n, default="1/1", help="write every N-th shard, starting with the K-th")
    add("--record", metavar="DIR", type=Path, default=".", help="for pipe:, folder of the finished shards' records [.]")
    add("--skip-bad", action="store_true", help="leave out, and list, images that are not a valid JPEG or PNG")
    add("--overwrite", action="store_true", help="replace shards of another tree or of other arguments")
    add = parser.add_argument_group("with --verify and --index-only").add_argument
    add("--decode", action="store_true", help="decode every image")
    add("--index", metavar="DIR", type=Path, help="folder of the index, if it is not with the shards")
    add("--names", help="with --index-only: shards of one split, for example 'imagenet1k-train-{0000..1023}.tar'")
    add("--classes", metavar="FILE", type=Path, help="with --index-only: the classes in label order, one a line")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[a-z-]+", parser.format_help())
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
    if not (args.imagenet or args.verify or args.index_only):
        parser.error("one of the arguments --imagenet --verify --index-only is required")
    if args.imagenet and (args.decode or args.index or args.names or args.classes):
        parser.error("argument --imagenet: not allowed with --decode, --index, --names or --classes")
    if args.names and (args.verify or "," in args.splits):
        parser.error("argument --names: needs --index-only, and --splits=train or --splits=val")
    for name in ("imagenet", "val_labels", "record", "index", "classes"):
        setattr(args, name, getattr(args, name) and getattr(args, name).expanduser())
    return args


def find_target(args: argparse.Namespace) -> Target:
    """Where the shards are. ShardError if --imagenet can't write there."""
    record = Path(args.shards)
    if args.shards.startswith("pipe:"):  # named after the command: to a restart, another bucket is another conversion
        record = args.record / f"imagenet-shards-{hashlib.sha256(args.shards.encode()).hexdigest()[:8]}"
    elif args.imagenet and ("://" in args.shards or "%s" in args.shards):
        advice = "name a folder, or a command that stores its input: pipe:gsutil cp - gs://bucket/%s"
        raise ShardError(f"--shards={args.shards}: neither a folder nor pipe:COMMAND; {advice}")
    return Target(args.shards, record, args.retries, args.timeout)


def convert_all(args: argparse.Namespace, target: Target) -> None:
    """Convert the splits. What can be refused is refused before the first shard is written."""
    if not args.imagenet.is_dir():
        raise ShardError(f"--imagenet={args.imagenet}: no such folder; name the one that holds train/ and val/")
    recipe = {name: getattr(args, name) for name in ("seed", "maxsize", "maxcount", "block_size")} | {"resize": None}
    if args.resize:  # encoders differ in bytes
        libjpeg = PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")
        recipe["resize"] = [args.resize, args.quality, f"Pillow {PIL.__version__}, libjpeg {libjpeg}"]
    plans = [make_plan(args.imagenet, split, recipe, args.val_labels) for split in args.splits.split(",")]
    target.record_path("").parent.mkdir(parents=True, exist_ok=True)
    if target.prefix.startswith("pipe:"):
        print(f"# finished shards are recorded in {target.record}")
    for plan in plans:
        check_target(plan, target, args.overwrite)
    for plan in plans:
        convert(plan, target, args.part, args.skip_bad, args.workers)


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit status: 0, 1 after an error, 130 after ^C."""
    args, status = parse_args(argv), 1
    try:
        target = find_target(args)
        if args.imagenet:
            convert_all(args, target)
        else:
            for split in args.splits.split(","):
                (verify if args.verify else index_only)(args, target, split)
        return 0
    except (ShardError, OSError) as error:
        problem = error if isinstance(error, ShardError) else f"{error.filename or args.shards}: {error.strerror}"
    except BrokenProcessPool:
        problem = "a worker process was killed (out of memory?); rerun with fewer --workers; finished shards are kept"
    except KeyboardInterrupt:
        status, problem = 130, "interrupted; rerun the same command to resume"
    print(f"imagenet_shards.py: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # into a log file too
    sys.exit(main())
