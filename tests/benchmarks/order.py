"""The order of an epoch at ImageNet's size: how well it shuffles, and how much it reads.

    python3 tests/benchmarks/order.py [--blocks=16,64,256] [--shuffles=2000,4000]

Out: two tables. No data is read: the order is a function of the index, which is made here, of 147 shards.

Shuffle: how many times likelier than under a full shuffle two samples of one batch are in one batch of the next epoch
again, for 8 ranks × 8 workers of 256 images. 1 is a full shuffle.
Resume: bytes that 8 × 8 readers fetch a second time if a run is resumed after half an epoch: blocks of which some
samples were used and some were not. (A command reads more: from the beginning of each shard.)
Traffic: bytes of the blocks that all readers fetch in an epoch ÷ bytes of the shards. A block at the boundary of two
readers is fetched by both. A command is read from the shard's beginning to the last wanted block.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imagenet_shards import Block, Index  # noqa: E402
from imagenet_train import Division, count_steps, plan_epoch  # noqa: E402

TOTAL, SHARD, IMAGE = 1_281_167, 8_716, 115_000  # samples, samples, bytes


def imagenet(block: int, total: int) -> Index:
    """A split of `total` samples in ImageNet's shards, in blocks of `block` samples."""
    blocks, entries = [], []
    for start in range(0, total, SHARD):
        size = min(SHARD, total - start)
        for place in range(0, size, block):
            samples = min(block, size - place)
            blocks.append(Block(len(entries), place * IMAGE, samples * IMAGE, samples, 0))
        entries.append({"url": f"{len(entries):06d}.tar", "nsamples": size, "filesize": size * IMAGE})
    return Index("", ["n0"], entries, blocks)


def batch_numbers(index: Index, division: Division, epoch: int) -> np.ndarray:
    """Sample → number of its batch, over all ranks; −1: left out."""
    batches = plan_epoch(index, True, 0, epoch, [division])[0].reshape(-1, division.batch)
    numbers = np.full(index.total, -1)
    numbers[batches] = np.arange(len(batches))[:, None]
    return numbers


def meet_again(index: Index, division: Division) -> float:
    """How many times likelier than under a full shuffle batch-mates meet again in the next epoch."""
    one, two = (batch_numbers(index, division, epoch) for epoch in (0, 1))
    both = (one >= 0) & (two >= 0)
    _, together = np.unique(one[both] * (two.max() + 1) + two[both], return_counts=True)
    _, before = np.unique(one[one >= 0], return_counts=True)
    pairs, possible = ((n * (n - 1) // 2).sum() for n in (together, before))
    return pairs / possible / ((division.batch - 1) / (index.total - 1))


def read_again(index: Index, division: Division) -> float:
    """Bytes of the blocks of which some samples, but not all, were used when `done` batches were made."""
    _, used = plan_epoch(index, True, 0, 0, [division])
    samples = np.add.reduceat(used, index.starts[:-1], dtype=int)
    return sum(block.length for block, n in zip(index.blocks, samples) if 0 < n < block.samples)


def traffic(index: Index, division: Division) -> float:
    """Bytes fetched by all readers ÷ bytes of the shards."""
    plan, _ = plan_epoch(index, True, 0, 0, [division])
    ranks, steps = np.arange(division.world)[:, None], np.arange(plan.shape[1])[None]
    reader = np.repeat((ranks * division.workers + steps % division.workers).ravel(), division.batch)
    block = np.searchsorted(index.starts, plan.ravel(), side="right") - 1
    reader, block = np.divmod(np.unique(reader * len(index.blocks) + block), len(index.blocks))
    shard, offset, length = np.array([(b.shard, b.offset, b.length) for b in index.blocks]).T
    fetched = length[block]
    if not division.seekable:  # up to the last wanted block of each shard
        last = np.append(np.diff(reader * len(shard) + shard[block]) != 0, True)
        fetched = (offset + length)[block[last]]
    return fetched.sum() / (index.total * IMAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="16,64,256", help="samples in a block")
    parser.add_argument("--shuffles", default="2000,4000", help="samples by which the shuffle may delay a sample")
    parser.add_argument("--images", type=int, default=TOTAL, help="samples in the split (default: ImageNet's)")
    args = parser.parse_args()
    sizes, shuffles = ([int(x) for x in text.split(",")] for text in (args.blocks, args.shuffles))
    half = count_steps(args.images, True, Division(True, 8, 8, 256, 0)) // 2

    head = " | ".join(f"shuffle {n:,}" for n in shuffles)
    print(f"shuffle: times likelier to meet again; then resume: GB read again\n| unit | {head} | {head} |")
    print("|---|" + 2 * len(shuffles) * "---|")
    rows = [(f"blocks of {size}", True, size) for size in sizes] + [("whole shards (a command)", False, 64)]
    for name, seekable, size in rows:
        index = imagenet(size, args.images)
        divisions = [Division(seekable, 8, 8, 256, shuffle) for shuffle in shuffles]
        values = [f"{meet_again(index, division):.1f}" for division in divisions]
        done = [division._replace(done=half) for division in divisions]
        values += [f"{read_again(index, division) / 1e9:.1f}" if seekable else "" for division in done]
        print(f"| {name} | " + " | ".join(values) + " |", flush=True)

    index = imagenet(64, args.images)
    print("\ntraffic: bytes read ÷ bytes of the shards\n| readers | ranges | a command |\n|---|---|---|")
    for world, workers in ((1, 8), (8, 8), (128, 8)):
        values = [traffic(index, Division(seekable, world, workers, 32, 4000)) for seekable in (True, False)]
        print(f"| {world * workers:,} | {values[0]:.3f} | {values[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
