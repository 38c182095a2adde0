"""Files against shards on a disk that spins, as far as a kernel can play one.

    sudo python3 tests/benchmarks/disk.py --tree=/data/imagenet --work=/mnt/disk

In:  a tree with train/<wnid>/*.JPEG; --work, a folder on a disk of its own device number.
Out: images and megabytes a second, read (not decoded) from files in shuffled order and from shards, with an empty
     cache, by a process that cgroup v1's blkio controller holds to --iops operations and --mbps megabytes a second.

It models operations and bytes a second, the two figures of a disk's data sheet. It does not model the distance of a
seek, the order of a queue or the disk's own cache. Needs root and a kernel with cgroup v1's blkio throttling.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import webdataset as wds

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 2)]

from loading import prepare  # noqa: E402
from sharding import drop_from_cache  # noqa: E402

import imagenet_train as script  # noqa: E402
from imagenet_shards import image_bytes  # noqa: E402


def read(work: Path, how: str) -> dict[str, float]:
    """Read all images once, in this process; images/s and MB/s."""
    paths = sorted(work.glob("tree/train/*/*"))
    random.Random(0).shuffle(paths)
    config = script.LoaderConfig(script.read_index(str(work / "data"), "train"), True, batch=1, size=224)
    stages = script.make_pipeline(config, 0, [config.division], 0, iter(())).pipeline[:5]  # without map and so on
    begun = time.perf_counter()
    if how == "files":
        sizes = [len(path.read_bytes()) for path in paths]
    else:
        sizes = [len(image_bytes(sample)) for sample in wds.DataPipeline(*stages)]
    seconds = time.perf_counter() - begun
    assert len(sizes) == len(paths)
    return {"images": len(sizes) / seconds, "MB": sum(sizes) / seconds / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", metavar="DIR", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="fewer files are copied repeatedly (default: 2000)")
    parser.add_argument("--iops", type=int, default=120, help="default: 120, of a disk at 7,200 rpm")
    parser.add_argument("--mbps", type=int, default=150, help="default: 150")
    parser.add_argument("--rounds", type=int, default=3, help="of both in turn (default: 3)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--read", choices=("files", "shards"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return print(json.dumps(read(args.work, args.read)))
    number, results = os.stat(args.work).st_dev, {"files": [], "shards": []}
    group = Path(f"/sys/fs/cgroup/blkio/imagenet-disk-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(f"disk.py: {group}: {error.strerror}; needs root and cgroup v1's blkio controller") from None
    try:
        for limit, value in (("iops", args.iops), ("bps", args.mbps * 1_000_000)):
            path = group / f"blkio.throttle.read_{limit}_device"
            path.write_text(f"{os.major(number)}:{os.minor(number)} {value}")
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            work = Path(folder)
            prepare(work, args.tree, args.images, copy=True)  # others may use a linked file and keep it in the cache
            os.sync()
            for how in [*results] * args.rounds:
                drop_from_cache([path for path in work.rglob("*") if path.is_file()])
                shell = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', group]
                command = [*shell, sys.executable, __file__, f"--read={how}", f"--work={work}"]
                results[how].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    finally:
        group.rmdir()
    print(f"{args.images} images, {args.iops} operations and {args.mbps} MB a second; seeks are not modelled")
    print("| from | images/s | MB/s |\n|---|---|---|")
    for how, found in results.items():
        images, megabytes = (statistics.median(each[key] for each in found) for key in ("images", "MB"))
        print(f"| {how} | {images:,.0f} | {megabytes:.1f} |")


if __name__ == "__main__":
    main()
