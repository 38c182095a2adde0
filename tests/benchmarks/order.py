"""The order of an epoch at ImageNet's size: how well it shuffles, how much it reads, how long it takes to compute.

    python tests/benchmarks/order.py
    python tests/benchmarks/order.py --blocks=16,64,256 --buffers=2000,4000

Out: three tables. No data is read: the order is a function of the index, which is made here, of 147 shards.

Shuffle: how many times likelier than under a full shuffle two samples of one batch are in one batch of the next epoch
again, for 8 ranks × 8 workers of 256 images. 1 is a full shuffle.
Traffic: bytes of the blocks that all readers fetch in an epoch ÷ bytes of the shards. A block at the boundary of two
readers is fetched by both. A command is read from the shard's beginning to the last wanted block.
Time: CPU-seconds of one process; for a resume with other settings, after half an epoch of 8 × 8 readers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from array import array
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from imagenet_train import Block, Division, Index, batches_of, plan_reader, steps_of  # noqa: E402

TOTAL, SHARD, IMAGE = 1_281_167, 8_716, 115_000  # samples, samples, bytes


def imagenet(block: int, total: int) -> Index:
    """A split of `total` samples in ImageNet's shards, in blocks of `block` samples."""
    blocks, names = [], []
    for start in range(0, total, SHARD):
        size = min(SHARD, total - start)
        for place in range(0, size, block):
            count = min(block, size - place)
            blocks.append(Block(len(names), place * IMAGE, count * IMAGE, count, 0))
        names.append(f"{len(names):06d}.tar")
    return Index("", ["n0"], names, [0] * len(names), [""] * len(names), blocks)


def batch_numbers(index: Index, division: Division, epoch: int) -> array:
    """Sample → number of its batch, over all ranks; −1: left out."""
    numbers, batch = array("l", [-1]) * index.total, division.batch
    steps = steps_of(index.total, True, division.world, batch)
    for rank, worker in itertools.product(range(division.world), range(division.workers)):
        first = rank * steps + batches_of(steps, worker, division.workers).start
        for place, number in enumerate(plan_reader(index, True, 0, epoch, [division], rank, worker)[0]):
            numbers[number] = first + place // batch
    return numbers


def meet_again(index: Index, division: Division) -> float:
    """How many times likelier than under a full shuffle batch-mates meet again in the next epoch."""
    one, two = (batch_numbers(index, division, epoch) for epoch in (0, 1))
    both = Counter((a, b) for a, b in zip(one, two) if a >= 0 and b >= 0)
    pairs = sum(n * (n - 1) // 2 for n in both.values())
    possible = sum(n * (n - 1) // 2 for n in Counter(a for a in one if a >= 0).values())
    return pairs / possible / ((division.batch - 1) / (index.total - 1))


def traffic(index: Index, division: Division) -> float:
    """Bytes fetched by all readers ÷ bytes of the shards."""
    fetched = 0
    for rank, worker in itertools.product(range(division.world), range(division.workers)):
        blocks = [index.blocks[n] for n in plan_reader(index, True, 0, 0, [division], rank, worker)[1]]
        if division.seekable:
            fetched += sum(block.length for block in blocks)
        else:
            fetched += sum(
                max(b.offset + b.length for b in shard) for _, shard in itertools.groupby(blocks, lambda b: b.shard)
            )
    return fetched / (index.total * IMAGE)


def seconds(index: Index, *history: Division) -> float:
    begun = time.process_time()
    plan_reader(index, True, 0, 0, history, 0, 0)
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="16,64,256", help="samples in a block")
    parser.add_argument("--buffers", default="2000,4000", help="samples in a shuffle buffer")
    parser.add_argument("--images", type=int, default=TOTAL, help="samples in the split (default: ImageNet's)")
    args = parser.parse_args()
    sizes, buffers = ([int(x) for x in text.split(",")] for text in (args.blocks, args.buffers))

    print("shuffle: times likelier to meet again\n| unit | " + " | ".join(f"buffer {n:,}" for n in buffers) + " |")
    print("|---|" + "---|" * len(buffers))
    rows = [(f"blocks of {size}", True, size) for size in sizes] + [("whole shards (a command)", False, 64)]
    for name, seekable, size in rows:
        index = imagenet(size, args.images)
        values = [meet_again(index, Division(seekable, 8, 8, 256, buffer)) for buffer in buffers]
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |", flush=True)

    index = imagenet(64, args.images)
    print("\ntraffic: bytes read ÷ bytes of the shards\n| readers | ranges | a command |\n|---|---|---|")
    for world, workers in ((1, 8), (8, 8), (128, 8)):
        values = [traffic(index, Division(seekable, world, workers, 32, 0)) for seekable in (True, False)]
        print(f"| {world * workers:,} | {values[0]:.3f} | {values[1]:.2f} |", flush=True)

    half = Division(True, 8, 8, 256, 2000, done=steps_of(args.images, True, 8, 256) // 2)
    print("\ntime of one reader's plan, CPU-seconds\n| readers | fresh | resumed with other settings |\n|---|---|---|")
    for world, workers in ((1, 1), (1, 8), (8, 8), (128, 8)):
        division = Division(True, world, workers, 256, 2000)
        print(
            f"| {world * workers:,} | {seconds(index, division):.2f} | {seconds(index, half, division):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
