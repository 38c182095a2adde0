"""Planning at ImageNet's real size, without ImageNet: seconds and memory.

    python tests/benchmarks/planning.py
    python tests/benchmarks/planning.py --full

Out: time and peak memory of planning 1,281,167 images of drawn sizes into shards; then of the readers' plans of one
     epoch, on 1 to 1,024 ranks of 8 workers, and whether they hold every sample once. --full also makes 1,281,167
     sparse files in a folder on a tmpfs (about 2 GB of memory), lists and plans them, and removes them.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imagenet_shards import Image, make_plan, plan_shards  # noqa: E402
from imagenet_train import pieces_of, steps_per_epoch  # noqa: E402

IMAGES, CLASSES, BATCH, WORKERS = 1_281_167, 1000, 256, 8


def peak() -> float:
    """MB that this process has had in memory at once, up to now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def draw() -> list[Image]:
    """ImageNet's names and, drawn about its average of 115 KB, sizes."""
    rng = random.Random(0)
    images = []
    for i in range(IMAGES):
        wnid = f"n{i % CLASSES:08d}"
        size = int(rng.lognormvariate(11.5, 0.55))
        images.append(Image(f"train/{wnid}/{wnid}_{i // CLASSES}.JPEG", i % CLASSES, size))
    return images


def say(what: str, begun: float, cpu: float, more: str = "") -> None:
    wall, spent = time.perf_counter() - begun, time.process_time() - cpu
    print(f"| {what} | {wall:.2f} | {spent:.2f} | {peak():,.0f} | {more} |", flush=True)


def readers(counts: list[int]) -> None:
    total = sum(counts)
    for world in (1, 8, 64, 256, 1024):
        begun, cpu = time.perf_counter(), time.process_time()
        seen = [bytearray(count) for count in counts]  # how often each sample is read
        for rank in range(world):
            for worker in range(WORKERS):
                for shard, start, stop in pieces_of(counts, True, 0, 0, rank, world, worker, WORKERS, BATCH):
                    if any(seen[shard][start:stop]):
                        raise SystemExit(f"planning.py: {world} ranks: a sample of shard {shard} is read twice")
                    seen[shard][start:stop] = b"\1" * (stop - start)
        found, wanted = sum(map(sum, seen)), steps_per_epoch(total, True, world, BATCH) * world * BATCH
        if found != wanted:
            raise SystemExit(f"planning.py: {world} ranks: {found} samples are read, expected {wanted}")
        say(f"all readers' plans, {world:,} × {WORKERS}", begun, cpu, f"{found:,} samples once, {total - found:,} rest")


def full(place: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="planning-", dir=place))
    try:
        begun, cpu = time.perf_counter(), time.process_time()
        for number in range(CLASSES):
            os.makedirs(folder / f"train/n{number:08d}")
        for image in draw():
            with open(folder / image.path, "wb") as file:
                file.truncate(image.size)
        say("making the files", begun, cpu)
        begun, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(folder, "train", 0, 1e9, 100_000)
        if sum(map(len, plan.shards)) != IMAGES:
            raise SystemExit(f"planning.py: {sum(map(len, plan.shards))} files are planned, expected {IMAGES}")
        say("listing and planning them", begun, cpu, f"{len(plan.shards)} shards")
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
    shards = plan_shards(images, 0, 1e9, 100_000)
    say("planning shards", begun, cpu, f"{len(shards)} shards")
    readers([len(shard) for shard in shards])
    return 0


if __name__ == "__main__":
    sys.exit(main())
