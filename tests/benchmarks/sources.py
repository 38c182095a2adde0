"""How much CPU it takes to read shards: from a folder, from servers in ranges, and through a command.

    python3 tests/benchmarks/sources.py --shards=./data [--rounds=5]

Out: MB per CPU-second and per second, medians over interleaved rounds after one that does not count, of reading and
checking all training blocks, without decoding. CPU-seconds are those of this process and of its commands, not of the
servers. These run here: nginx, moto for s3://, fake-gcs-server for gs://; a server that is not installed is left out.
The reader goes through the blocks in the shards' order, which is the best case for a command.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, [HERE, HERE.parent / "helpers", HERE.parents[1]])

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


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """What reads the files of a folder, and the prefix for it."""
    prefixes = {"folder": str(folder)}
    with contextlib.ExitStack() as servers:
        root = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        try:
            url = servers.enter_context(places.nginx(folder))
            prefixes |= {"nginx, in ranges": url, "nginx, pipe:curl": f"pipe:curl -sSf {url}"}
            os.environ |= servers.enter_context(places.s3("imagenet", folder))
            prefixes["s3:// (moto)"] = "s3://imagenet"
            shutil.copytree(folder, root / "imagenet")
            os.environ |= servers.enter_context(places.gcs(root))
            prefixes["gs:// (fake-gcs-server)"] = "gs://imagenet"
        except (FileNotFoundError, RuntimeError, AttributeError) as error:
            print(f"# {error}: what follows is left out", file=sys.stderr)
        yield prefixes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="DIR", type=Path, required=True)
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    args = parser.parse_args()
    with serve(args.shards.resolve()) as prefixes:
        rounds = [{name: read(prefix) for name, prefix in prefixes.items()} for _ in range(1 + args.rounds)]
    print("| source | MB per CPU-second | MB/s |\n|---|---|---|")
    for name in prefixes:
        columns = zip(*(found[name] for found in rounds[1:]))
        print(f"| {name} | {' | '.join(f'{statistics.median(column):,.0f}' for column in columns)} |")


if __name__ == "__main__":
    main()
