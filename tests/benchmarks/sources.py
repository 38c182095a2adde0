"""How much CPU it takes to read shards: from a folder, from nginx in ranges, and through commands.

    python3 tests/benchmarks/sources.py --shards=./data [--rounds=5]

Out: MB per CPU-second and per second, medians over interleaved rounds, of reading and checking all training blocks,
without decoding; CPU seconds are those of this process and of its commands, not of nginx. The reader goes through the
blocks in the shards' order, which is the best case for a command: what it skips in an epoch's order costs more.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = map(str, [HERE, HERE.parent / "helpers", HERE.parent.parent])

import places  # noqa: E402
from loading import cpu_seconds  # noqa: E402

import imagenet_shards as shards  # noqa: E402


def read(prefix: str) -> tuple[float, float]:
    """MB per CPU-second and per second."""
    index = shards.read_index(prefix, "train")
    cpu, begun, source = cpu_seconds(), time.perf_counter(), shards.open_source(index.prefix, 60)
    size = sum(len(shards.fetch(source, index, block)) for block in index.blocks)
    source.close()
    return size / 1e6 / (cpu_seconds() - cpu), size / 1e6 / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="DIR", type=Path, required=True)
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    args = parser.parse_args()
    with places.nginx(args.shards.resolve()) as url:
        prefixes = {
            "folder": str(args.shards),
            "nginx, in ranges": url,
            "nginx, pipe:curl": f"pipe:curl -s {url}",
            "folder, pipe:cat": f"pipe:cat {args.shards}/",
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in prefixes}
        for _ in range(args.rounds):
            for name, prefix in prefixes.items():
                results[name].append(read(prefix))
    print("| source | MB per CPU-second | MB/s |\n|---|---|---|")
    for name, rows in results.items():
        print(f"| {name} | {' | '.join(f'{statistics.median(column):,.0f}' for column in zip(*rows))} |")


if __name__ == "__main__":
    main()
