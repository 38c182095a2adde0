"""Planning and the index at ImageNet's real size, without ImageNet: seconds and memory.

    python tests/benchmarks/planning.py
    python tests/benchmarks/planning.py --full

Prints time and peak memory of planning 1,281,167 images of random sizes into shards, and the size and loading time of
their index. --full also makes 1,281,167 sparse files in a folder on a tmpfs (about 2 GB of memory), lists and plans
them, and removes them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imagenet_shards import Image, format_index, make_plan, plan_shards  # noqa: E402

IMAGES, CLASSES, BLOCK = 1_281_167, 1000, 64


def peak() -> float:
    """The most memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def draw() -> list[Image]:
    """ImageNet's names, and random sizes around its average of 115 KB."""
    rng = random.Random(0)
    images = []
    for i in range(IMAGES):
        wnid = f"n{i % CLASSES:08d}"
        size = int(rng.lognormvariate(11.5, 0.55))
        images.append(Image(f"train/{wnid}/{wnid}_{i // CLASSES}.JPEG", i % CLASSES, size, f"{wnid}_{i // CLASSES}"))
    return images


def report(what: str, begun: float, cpu: float, more: str = "") -> None:
    wall, spent = time.perf_counter() - begun, time.process_time() - cpu
    print(f"| {what} | {wall:.2f} | {spent:.2f} | {peak():,.0f} | {more} |", flush=True)


def index(shards: list[list[Image]]) -> None:
    """Write and load an index of these shards with random checksums."""
    rng = random.Random(0)
    entries = []
    for number, images in enumerate(shards):
        offset, blocks = 0, []
        for start in range(0, len(images), BLOCK):
            block = images[start : start + BLOCK]
            length = sum(2048 + -(-image.size // 512) * 512 for image in block)
            blocks.append([offset, length, len(block), rng.getrandbits(32)])
            offset += length
        entry = {"url": f"imagenet-train-{number:06d}.tar", "nsamples": len(images), "filesize": offset + 10240}
        entries.append(entry | {"sha256": f"{rng.getrandbits(256):064x}", "blocks": blocks})
    classes = [f"n{number:08d}" for number in range(CLASSES)]
    text = format_index({"shardlist": entries, "classes": classes, "class_names": ["great white shark"] * CLASSES})
    begun, cpu = time.perf_counter(), time.process_time()
    json.loads(text)
    report("loading the index", begun, cpu, f"{len(text) / 1e6:.2f} MB")


def full(place: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="planning-", dir=place))
    try:
        begun, cpu = time.perf_counter(), time.process_time()
        for number in range(CLASSES):
            os.makedirs(folder / f"train/n{number:08d}")
        for image in draw():
            with open(folder / image.path, "wb") as file:
                file.truncate(image.size)
        report("making the files", begun, cpu)
        begun, cpu = time.perf_counter(), time.process_time()
        recipe = {"seed": 0, "maxsize": 10**9, "maxcount": 100_000, "block_size": BLOCK, "resize": None}
        plan = make_plan(folder, "train", recipe)
        if sum(map(len, plan.shards)) != IMAGES:
            raise SystemExit(f"planning.py: {sum(map(len, plan.shards))} files are planned, expected {IMAGES}")
        report("listing and planning them", begun, cpu, f"{len(plan.shards)} shards")
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time planning at ImageNet's size.", allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="also make, list and plan 1,281,167 sparse files")
    parser.add_argument("--tmpfs", metavar="DIR", type=Path, default=Path("/dev/shm"), help="where (default: /dev/shm)")
    a = parser.parse_args()
    print("| what | seconds | CPU | peak MB of the process | |\n|---|---|---|---|---|")
    print(f"| starting | | | {peak():,.0f} | |")
    if a.full:  # first, so that the peak is its own
        full(a.tmpfs)
    images = draw()
    print(f"| {IMAGES:,} images drawn | | | {peak():,.0f} | {sum(i.size for i in images) / 1e9:.1f} GB |", flush=True)
    begun, cpu = time.perf_counter(), time.process_time()
    shards = plan_shards(images, 0, 10**9, 100_000)
    report("planning shards", begun, cpu, f"{len(shards)} shards")
    index(shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
