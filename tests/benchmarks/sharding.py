"""Sharding against its peers: the same tree, files not in the page cache, interleaved rounds.

    python3 tests/benchmarks/sharding.py --tree=DIR [--rounds=3] [--workers=1,2] [--other=imagenet_shards.py] [--warm]

In:  DIR/train/WNID/*.JPEG, ideally a few thousand. The files are dropped from the page cache before each run, unless
     --warm; a run ends when everything is on the disk.
Out: medians of images/s and MB/s, the ratio to the loop, CPU-seconds, and the memory of the largest process, libraries
     included, which must not grow with the tree; of a loop over webdataset.ShardWriter, in one process and without
     checksums, of GNU tar of the same files in the same order, of imagenet_shards.py, and of another version of it.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import webdataset as wds

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
Images = list[tuple[Path, int]]  # (file, label)


def drop_from_cache(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(tree: Path, images: Images, out: Path, script: Path, workers: int) -> None:
    flags = [f"--imagenet={tree}", f"--shards={out}", "--splits=train", "--maxsize=6e7", f"--workers={workers}"]
    spec = importlib.util.spec_from_file_location("script", script)
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # in this process, as the others: imports, which take seconds, do not count
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert module.main(flags) == 0


def loop(tree: Path, images: Images, out: Path) -> None:
    with wds.ShardWriter(str(out / "imagenet-train-%06d.tar"), maxsize=6e7, verbose=0, mtime=0) as shard:
        for path, label in images:
            shard.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})


def gnu_tar(tree: Path, images: Images, out: Path) -> None:
    names = "\n".join(str(path.relative_to(tree)) for path, _ in images)
    command = ["tar", "-C", tree, "--format=ustar", "-cf", out / "all.tar", "-T", "-"]
    subprocess.run(command, input=names, text=True, check=True)


def measure(write: Callable, tree: Path, images: Images, warm: bool) -> tuple[float, float, float]:
    """(Seconds until everything is on the disk, CPU-seconds, MB of the largest process) in a process of its own."""
    os.sync()
    if not warm:
        drop_from_cache([path for path, _ in images])
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        process = multiprocessing.get_context("fork").Process(target=write, args=(tree, images, Path(out)))
        process.start()
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()  # some programs sync by themselves; the others have to wait for the disk too
        assert status == 0
        return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--other", type=Path)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    classes = sorted(path.name for path in (args.tree / "train").iterdir())
    paths = sorted((args.tree / "train").rglob("*.*"))
    random.Random(0).shuffle(paths)  # as all but our own plan and GNU tar would otherwise do themselves
    images = [(path, classes.index(path.parent.name)) for path in paths]
    size = sum(path.stat().st_size for path in paths) / 1e6
    rivals = {"a loop over ShardWriter": loop, "GNU tar": gnu_tar}
    for name, script in {"ours": TOP / "imagenet_shards.py", "other": args.other}.items():
        for workers in map(int, args.workers.split(",") if script else []):
            rivals[f"{name}, {workers} workers"] = partial(convert, script=script, workers=workers)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in rivals}
    for name in [*rivals] * args.rounds:
        found[name].append(measure(rivals[name], args.tree, images, args.warm))
    print(f"{len(images):,} images, {size:,.0f} MB\n| | images/s | MB/s | × | CPU-s | MB |\n|---|---|---|---|---|---|")
    base = statistics.median(took for took, *_ in found["a loop over ShardWriter"])
    for name, rows in found.items():
        took, cpu, peak = (statistics.median(column) for column in zip(*rows))
        rates = f"{len(images) / took:,.0f} | {size / took:,.0f} | {base / took:.2f}"
        print(f"| {name} | {rates} | {cpu:.1f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
