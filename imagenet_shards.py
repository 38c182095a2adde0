"""ImageNet tree → WebDataset shards: 1,281,167 files become 147 tar files, byte for byte, and an index that says so.

    python imagenet_shards.py --imagenet=/data/imagenet --shards=./data

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
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, NamedTuple

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
    recipe: dict[str, int | str]  # what decides the bytes; kept in the index, compared on a restart

    def name(self, number: int) -> str:
        return f"imagenet-{self.split}-{number:06d}.tar"


def make_plan(root: Path, split: str, seed: int, maxsize: float, maxcount: int) -> Plan:
    """List one split and plan its shards; reads no image. ShardError as find_classes and list_images."""
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
    }
    return Plan(root, split, classes, plan_shards(images, seed, maxsize, maxcount), recipe)


# ---------------------------------------------------------------- plan → one shard


def flaw(data: bytes, decode: bool = False) -> str | None:
    """Why these bytes are no JPEG or PNG that can be decoded; None if all is well.

    Whole files, nearly all, pass by their first and last bytes; unless `decode`, only a suspect is decoded.
    """
    jpeg = data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in data[-1024:]
    png = data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-1024:]
    if (jpeg or png) and not decode:
        return None
    if not data:
        return "empty file"
    try:
        PillowImage.open(io.BytesIO(data), formats=["JPEG", "PNG"]).load()
    except Exception as error:  # Pillow raises many kinds on bad bytes
        return "neither JPEG nor PNG" if isinstance(error, PillowImage.UnidentifiedImageError) else str(error)
    return None


class Checksummed:
    """A stream to write to that keeps the size and the SHA-256 of what went through."""

    def __init__(self, stream: io.BufferedWriter) -> None:
        self.stream, self.size, self.sha256 = stream, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.size += len(data)
        self.sha256.update(data)


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
    threading.Thread(target=lambda: (wait_for_any([parent]), os._exit(1)), daemon=True).start()


def write_shard(plan: Plan, number: int, folder: Path, images: list[Image], skip_bad: bool) -> dict:
    """Write one shard under a temporary name, rename it when whole, return its entry in the index.

    The entry's "skipped" lists [path, flaw] of the bad images. If there are any and skip_bad is off, all images
    are still looked at, so that one run names every bad one, but no shard is left behind.
    """
    path = folder / plan.name(number)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")  # no two processes ever share one
    skipped = []
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            stream = Checksummed(file)
            pattern = f"imagenet-{plan.split}-%06d.tar"
            # mtime=0: a float time would add a kilobyte of PAX headers to every member, other bytes every run.
            options = dict(start_shard=number, maxsize=float("inf"), verbose=0, mtime=0, opener=lambda _: stream)
            with wds.ShardWriter(pattern, maxcount=len(images), **options) as shard:
                for image in images:
                    data = (plan.root / image.path).read_bytes()
                    if len(data) != image.size:
                        raise ShardError(
                            f"{plan.root / image.path}: {len(data)} bytes, {image.size} when listed; "
                            "leave the tree alone and start again"
                        )
                    if problem := flaw(data):
                        skipped.append([image.path, problem])
                    else:
                        shard.write({"__key__": image.key, "jpg": data, "cls": image.label})
                    count_done(image.size)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a renamed file without its bytes
        if skip_bad or not skipped:
            os.rename(temporary, path)
    except OSError as error:
        raise ShardError(f"{error.filename or path}: {error.strerror}; mend that and start again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "url": path.name,
        "nsamples": len(images) - len(skipped),
        "filesize": stream.size,
        "sha256": stream.sha256.hexdigest(),
        "skipped": skipped,
    }


# ---------------------------------------------------------------- plan → all shards + index


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finished_shards(plan: Plan, folder: Path, skip_bad: bool) -> dict[int, dict]:
    """The index entries, by shard number, of the shards that an earlier run left whole.

    Read from the index or, before there is one, from the journal: a line with the recipe, then a line a shard.
    ShardError if what lies in the folder was made from something else than this plan.
    """
    index, journal = folder / f"imagenet-{plan.split}.json", folder / f"imagenet-{plan.split}.journal"
    advice = "use the same arguments, another --shards folder, or --overwrite"
    record = index if index.exists() else journal
    if not record.exists():
        if shards := list(folder.glob(f"imagenet-{plan.split}-*.tar")):
            raise ShardError(f"{folder}: holds {len(shards)} {plan.split} shards without an index; {advice}")
        return {}
    try:
        if record == index:
            content = json.loads(index.read_text())
            recipe, entries = content["recipe"], content["shardlist"]
        else:
            recipe, *entries = map(json.loads, journal.read_text().split("\n")[:-1])  # a crash may cut the last line
        entries = {entry["url"]: entry for entry in entries if entry["filesize"] >= 0 and entry["skipped"] is not None}
        odd = [f"{name} {recipe[name]} then, {value} now" for name, value in plan.recipe.items() if recipe[name] != value]
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{record}: not written by this program; {advice}") from None
    if odd:
        raise ShardError(f"{folder}: its {plan.split} shards have another recipe ({'; '.join(odd)}); {advice}")

    whole = {}
    for number in range(len(plan.shards)):
        path = folder / plan.name(number)
        entry = entries.get(path.name)
        if entry and path.is_file() and path.stat().st_size == entry["filesize"]:
            if skip_bad or not entry["skipped"]:
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
    with bar, ProcessPoolExecutor(workers, initializer=start_worker, initargs=counters) as pool:
        try:
            while waiting or running:
                for number in waiting[: workers - len(running)]:
                    tqdm.write(lines[number], file=sys.stdout)
                    sys.stdout.flush()  # into a log file too
                    running[pool.submit(function, *jobs[number])] = number
                    waiting.remove(number)
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
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


def write_all(plan: Plan, folder: Path, entries: dict[int, dict], skip_bad: bool, workers: int) -> None:
    """Write the shards that have no entry yet, and add theirs, in memory and in the journal. ShardError for bad images."""
    todo = [number for number in range(len(plan.shards)) if number not in entries]
    for number in todo:
        for leftover in folder.glob(f"{plan.name(number)}*"):  # of a run that was killed
            leftover.unlink()
    if entries:
        print(f"# keeping {len(entries)} of {len(plan.shards)} {plan.split} shards that are whole")
    journal = folder / f"imagenet-{plan.split}.journal"
    write_whole(journal, "".join(json.dumps(line) + "\n" for line in (plan.recipe, *entries.values())))

    starts = list(itertools.accumulate((len(images) for images in plan.shards), initial=0))
    brief, jobs, lines = plan._replace(shards=[], classes=[]), {}, {}  # a worker needs its own images only
    for number in todo:
        images = plan.shards[number]
        payload = human(sum(image.payload for image in images))
        jobs[number] = brief, number, folder, images, skip_bad
        lines[number] = f"# writing {folder / plan.name(number)} {len(images)} {payload} {starts[number]}"
    images, size = sum(len(plan.shards[n]) for n in todo), sum(image.size for n in todo for image in plan.shards[n])
    bar = tqdm(total=images, desc=plan.split, unit=" images", disable=None)
    bad, begun = [], time.monotonic()
    with open(journal, "a", encoding="utf-8") as log:
        for number, entry in in_processes(write_shard, jobs, lines, workers, bar, size):
            bad += entry["skipped"]
            if skip_bad or not entry["skipped"]:
                entries[number] = entry
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


def convert(plan: Plan, folder: Path, skip_bad: bool, workers: int) -> None:
    """Write all shards of a plan that are not whole yet, then the index. ShardError leaves no index."""
    index = folder / f"imagenet-{plan.split}.json"
    entries = finished_shards(plan, folder, skip_bad or index.exists())
    if not index.exists() or len(entries) < len(plan.shards):
        entries = finished_shards(plan, folder, skip_bad)
        index.unlink(missing_ok=True)
        write_all(plan, folder, entries, skip_bad, workers)
    shardlist = [entries[number] for number in range(len(plan.shards))]
    samples, size = (sum(entry[name] for entry in shardlist) for name in ("nsamples", "filesize"))
    content = {
        "__kind__": "wids-shard-index-v1",  # github.com/webdataset/webdataset: wids; other keys are ours
        "wids_version": 1,
        "name": f"imagenet-{plan.split}",
        "shardlist": shardlist,
        "classes": plan.classes,
        "recipe": plan.recipe,
    }
    write_whole(index, json.dumps(content, indent=1) + "\n")
    (folder / f"imagenet-{plan.split}.journal").unlink(missing_ok=True)
    skipped = sum(len(entry["skipped"]) for entry in shardlist)
    note = f", {skipped} bad images left out" if skipped else ""
    print(f"# {index}: {len(shardlist)} shards, {samples} images, {human(size)}, {len(plan.classes)} classes{note}")


def write_info(folder: Path) -> None:
    """_info.json for timm's reader (--dataset wds/imagenet --data-dir FOLDER), from the indexes that are there."""
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        index = folder / f"imagenet-{split}.json"
        if index.exists():
            shards = json.loads(index.read_text())["shardlist"]
            splits[name] = {
                "name": name,
                "num_samples": sum(shard["nsamples"] for shard in shards),
                "filenames": [shard["url"] for shard in shards],
                "shard_lengths": [shard["nsamples"] for shard in shards],
            }
    write_whole(folder / "_info.json", json.dumps({"splits": splits}, indent=1) + "\n")


# ---------------------------------------------------------------- index → all is well


def locate(prefix: str, name: str) -> str:
    """Where a file lies, for webdataset.gopen: in a folder, at a URL, or from pipe:COMMAND; %s becomes the name."""
    if "%s" in prefix:
        return prefix.replace("%s", name)
    return prefix + name if prefix.startswith("pipe:") or prefix.endswith("/") else f"{prefix}/{name}"


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
                    if problem := flaw(data, decode):
                        wrong.append(f"{key}: {problem}")
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
    lines = {n: f"# reading {entry['url']} {entry['nsamples']} {human(entry['filesize'])}" for n, entry in entries.items()}
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
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description="Convert the ImageNet tree into WebDataset shards and an index.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--imagenet", metavar="DIR", type=Path, help="folder with train/ and val/ of class folders")
    task.add_argument("--verify", action="store_true", help="read finished shards again and check all that the index says")
    add("--shards", metavar="DIR", default="./data",
        help="folder for the shards and the index; with --verify also a URL or pipe:COMMAND, %%s becomes a file's name")
    add("--splits", default="train,val", help="what to convert: train, val or both with a comma")
    add("--seed", type=int, default=0, help="of the one shuffle over each split")
    add("--maxsize", metavar="BYTES", type=positive, default=1e9, help="a shard is closed when it holds as many")
    add("--maxcount", metavar="N", type=positive, default=100000, help="… or as many samples")
    add("--workers", metavar="N", type=positive, default=cores, help="processes, each writing whole shards")
    add("--decode", action="store_true", help="with --verify: decode every image too")
    add("--skip-bad", action="store_true", help="leave out, and list, images that are no JPEG or PNG")
    add("--overwrite", action="store_true", help="replace shards that were made with other arguments")
    args = parser.parse_args(argv)
    if not set(args.splits.split(",")) <= set(ARCHIVES):
        parser.error(f"argument --splits: {args.splits!r} is not train, val or train,val")
    if args.decode and not args.verify:
        parser.error("argument --decode: goes with --verify")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    splits = dict.fromkeys(args.splits.split(","))  # once each, in the order given
    try:
        if args.verify:
            for split in splits:
                verify(args.shards, split, args.decode, int(args.workers))
            return 0
        root, folder = args.imagenet.expanduser(), Path(args.shards).expanduser()
        if re.match("pipe:|[a-z0-9]+://", args.shards):
            raise ShardError(f"--shards={args.shards}: can be read from (--verify), not written to; name a folder")
        if not root.is_dir():
            raise ShardError(f"--imagenet={args.imagenet}: no such folder; name the one that holds train/ and val/")
        plans = [make_plan(root, split, args.seed, args.maxsize, int(args.maxcount)) for split in splits]
        folder.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            if args.overwrite:  # the index first: it vouches for the shards
                for name in (f"imagenet-{plan.split}.json", f"imagenet-{plan.split}.journal"):
                    (folder / name).unlink(missing_ok=True)
                for shard in folder.glob(f"imagenet-{plan.split}-*.tar"):
                    shard.unlink()
            else:
                finished_shards(plan, folder, args.skip_bad)  # refuse before hours of work, not after
        for plan in plans:
            convert(plan, folder, args.skip_bad, int(args.workers))
        write_info(folder)
    except ShardError as error:
        print(f"imagenet_shards.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"imagenet_shards.py: {error.filename}: {error.strerror}; mend that and start again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("imagenet_shards.py: interrupted; the same command goes on from the whole shards", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
