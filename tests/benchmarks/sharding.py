"""Sharding against its peers: the same tree, files not in the page cache, interleaved rounds.

    python3 tests/benchmarks/sharding.py --tree=DIR [--rounds=3] [--workers=1,2] [--other=imagenet_shards.py] [--warm]

DIR holds train/WNID/*.JPEG, ideally a few thousand. Without --tree a stand-in is drawn, whose images are far smaller
than ImageNet's. The peers: a plain loop over webdataset.ShardWriter, in one process and without checksums, GNU tar of
the same files in the same order, and, where they are installed, litdata's optimize and MosaicML's MDSWriter; --other
names another version of imagenet_shards.py. The files are dropped from the page cache before each run, unless --warm;
a run ends when everything is on the disk. Prints medians in images/s and MB/s, the ratio to the loop, CPU seconds and
the memory of the largest process, libraries included; it must not grow with the tree.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import webdataset as wds

TOP = Path(__file__).parent.parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]

from standin import make_tree  # noqa: E402


def drop_from_cache(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(tree: Path, images: list[tuple[Path, int]], out: Path, workers: int, script: Path) -> None:
    flags = [f"--imagenet={tree}", f"--shards={out}", "--splits=train", "--maxsize=6e7", f"--workers={workers}"]
    spec = importlib.util.spec_from_file_location("script", script)
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # in this process, as the others: imports, which take seconds, do not count
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert module.main(flags) == 0


def loop(tree: Path, images: list[tuple[Path, int]], out: Path) -> None:
    pattern = str(out / "imagenet-train-%06d.tar")
    with wds.ShardWriter(pattern, maxsize=6e7, maxcount=100000, verbose=0, mtime=0) as shard:
        for path, label in images:
            shard.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})


def gnu_tar(tree: Path, images: list[tuple[Path, int]], out: Path) -> None:
    names = "\n".join(str(path.relative_to(tree)) for path, _ in images)
    command = ["tar", "-C", tree, "--format=ustar", "-cf", out / "all.tar", "-T", "-"]
    subprocess.run(command, input=names, text=True, check=True)


def read_item(item: tuple[Path, int]) -> dict:
    return {"image": item[0].read_bytes(), "cls": item[1]}


def litdata(tree: Path, images: list[tuple[Path, int]], out: Path) -> None:
    from litdata import optimize

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        optimize(fn=read_item, inputs=images, output_dir=str(out), chunk_bytes="60MB", num_workers=2)


def mosaic(tree: Path, images: list[tuple[Path, int]], out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes", "cls": "int"}, size_limit=60_000_000) as writer:
        for item in images:
            writer.write(read_item(item))


def measure(write: Callable, tree: Path, images: list[tuple[Path, int]], out: Path, warm: bool) -> tuple[float, ...]:
    """(Seconds until everything is on the disk, CPU seconds, MB of the largest process) in a process of its own."""
    os.sync()
    if not warm:
        drop_from_cache([path for path, _ in images])
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()

    def run() -> None:
        begun = time.perf_counter()
        write(tree, images, out)
        os.sync()  # some programs sync by themselves; the others have to wait for the disk too
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu, peak = sum(used.ru_utime + used.ru_stime for used in usage), max(used.ru_maxrss for used in usage)
        answer.put((time.perf_counter() - begun, cpu, peak / 1000))

    process = context.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    return answer.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--other", type=Path)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = args.tree or Path(folder, "tree")
        if not args.tree:
            make_tree(tree, train=100, val=1)
        classes = sorted(path.name for path in (tree / "train").iterdir())
        paths = sorted((tree / "train").rglob("*.*"))
        random.Random(0).shuffle(paths)  # as all but our own plan and GNU tar would otherwise do themselves
        images = [(path, classes.index(path.parent.name)) for path in paths]
        size = sum(path.stat().st_size for path in paths)
        rivals = {"a loop over ShardWriter": loop, "GNU tar": gnu_tar}
        for script in filter(None, (TOP / "imagenet_shards.py", args.other)):
            name = "ours" if script != args.other else "other"
            run = partial(convert, script=script)
            rivals |= {f"{name}, {n} workers": partial(run, workers=int(n)) for n in args.workers.split(",")}
        rivals |= {"litdata optimize, 2 workers": litdata} if importlib.util.find_spec("litdata") else {}
        rivals |= {"MosaicML MDSWriter": mosaic} if importlib.util.find_spec("streaming") else {}
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in rivals}
        for _ in range(args.rounds):
            for name, write in rivals.items():
                out = Path(folder, "out")
                out.mkdir()
                times[name].append(measure(write, tree, images, out, args.warm))
                shutil.rmtree(out)
        print(f"{len(images):,} images, {size / 1e6:,.0f} MB; {args.rounds} rounds, medians")
        base = statistics.median(took for took, *_ in times["a loop over ShardWriter"])
        for name, found in times.items():
            took, cpu, peak = (statistics.median(column) for column in zip(*found))
            speed = f"{len(images) / took:8,.0f} images/s {size / took / 1e6:7,.0f} MB/s"
            print(f"{name:28} {speed} {base / took:6.2f} × {cpu:6.1f} CPU s {peak:6,.0f} MB")


if __name__ == "__main__":
    main()
