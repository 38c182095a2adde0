"""Files against shards on a disk that spins, as far as a kernel can play one.

    sudo python3 tests/benchmarks/disk.py --tree=/data/imagenet --work=/mnt/disk

In:  a tree with train/<wnid>/*.JPEG, or --standin; --work, a folder on a disk of its own device number.
Out: images and megabytes a second, read (not decoded) from files in shuffled order and from shards, with an empty
     cache, by a process that cgroup v1's blkio controller holds to --iops operations and --mbps megabytes a second.

It models operations and bytes a second, the two figures of a disk's data sheet. It does not model the distance of a
seek, the order of a queue or the disk's own cache. Needs root and a kernel with cgroup v1's blkio throttling.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import webdataset as wds

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

from loading import prepare  # noqa: E402
from sharding import drop_from_cache  # noqa: E402

import imagenet_train as script  # noqa: E402
from imagenet_shards import image_bytes  # noqa: E402

CGROUPS = Path("/sys/fs/cgroup/blkio")


def read(work: Path, how: str) -> dict[str, float]:
    """Read all images once, in this process; images/s and MB/s."""
    paths = sorted(work.glob("tree/train/*/*"))
    random.Random(0).shuffle(paths)
    index = script.read_index(str(work / "data"), "train")
    config = script.LoaderConfig(index, True, batch=1, size=224)
    stages = script.make_pipeline(config, 0, [config.division], 0, script.Collate(config), multiprocessing.Event())
    begun = time.perf_counter()
    if how == "files":
        sizes = [len(path.read_bytes()) for path in paths]
    else:
        samples = wds.DataPipeline(*stages.pipeline[:-3])  # without map, batched and pad
        sizes = [len(image_bytes(sample)) for sample in samples]
    seconds = time.perf_counter() - begun
    if len(sizes) != len(paths):
        raise SystemExit(f"disk.py: {len(sizes)} images are read, expected {len(paths)}")
    return {"images": len(sizes) / seconds, "MB": sum(sizes) / seconds / 1e6}


def forget(work: Path) -> None:
    """Empty the page cache of these files."""
    drop_from_cache([path for path in work.rglob("*") if path.is_file()])


@contextlib.contextmanager
def throttle(device: str, iops: int, mbps: int):
    """A cgroup held to these limits. SystemExit says what is missing."""
    group = CGROUPS / f"imagenet-disk-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(f"disk.py: {group}: {error.strerror}; needs root and cgroup v1's blkio controller") from None
    try:
        (group / "blkio.throttle.read_iops_device").write_text(f"{device} {iops}")
        (group / "blkio.throttle.read_bps_device").write_text(f"{device} {mbps * 1_000_000}")
        yield group
    except OSError as error:
        raise SystemExit(f"disk.py: {error.filename or group}: {error.strerror}; {device} can't be throttled") from None
    finally:
        group.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description="Files against shards on a slow disk.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tree", metavar="DIR", type=Path, help="folder that holds train/<wnid>/*.JPEG")
    source.add_argument("--standin", action="store_true", help="draw the stand-in and use that")
    source.add_argument("--read", choices=("files", "shards"), help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--images", type=int, default=2000, help="training images; fewer files are repeated (default: 2000)")
    add("--iops", type=int, default=120, help="read operations a second (default: 120, of a disk at 7,200 rpm)")
    add("--mbps", type=int, default=150, help="megabytes a second (default: 150)")
    add("--rounds", type=int, default=3, help="of both in turn (default: 3)")
    add("--work", metavar="DIR", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk")
    a = parser.parse_args()
    if a.read:
        print(json.dumps(read(a.work, a.read)))
        return 0
    if not (a.tree or a.standin):
        parser.error("give --tree or --standin")
    number = os.stat(a.work).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    found: dict[str, list[dict]] = {"files": [], "shards": []}
    with tempfile.TemporaryDirectory(dir=a.work, prefix="disk-") as folder, throttle(device, a.iops, a.mbps) as group:
        work = Path(folder)
        images = prepare(work, a, copy=True)  # a link to a file that others use would be in the cache
        print(f"# {images} images on {device}, {a.iops} operations and {a.mbps} MB a second; seeks are not modelled")
        for _ in range(a.rounds):
            for how, results in found.items():
                forget(work)
                command = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
                script = [sys.executable, __file__, f"--read={how}", f"--work={work}"]
                done = subprocess.run(["sh", "-c", command, group, *script], stdout=subprocess.PIPE, check=True)
                results.append(json.loads(done.stdout))
    print("| from | images/s | MB/s | range, images/s |\n|---|---|---|---|")
    for how, results in found.items():
        rates = [each["images"] for each in results]
        megabytes = statistics.median(each["MB"] for each in results)
        print(f"| {how} | {statistics.median(rates):,.0f} | {megabytes:.1f} | {min(rates):,.0f}–{max(rates):,.0f} |")
    files, shards = (statistics.median(each["images"] for each in found[how]) for how in ("files", "shards"))
    print(f"# shards: {shards / files:.1f} × as many images a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
