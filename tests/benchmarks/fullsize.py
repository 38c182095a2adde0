"""ImageNet's number of files without ImageNet: seconds, CPU-seconds and memory of all that depends on it.

    python3 tests/benchmarks/fullsize.py [--images=1281167,50000] [--workers=2] [--work=DIR]

In:  nothing. The tree, 1,000 class folders a split, is of hard links to 400 drawn JPEGs of about 800 bytes.
Out: a row for each command: packing, which SIGKILL ends when half of the shards are there; the same resumed, and once
     more; packing undisturbed; --verify; --index-only. Then a row for reading the index, for the plan of one of 64
     ranks × 8 workers, and for the same after two other divisions. Memory is that of the largest process.
"""

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

PACK = Path(__file__).resolve().parents[2] / "imagenet_shards.py"
sys.path.insert(0, str(PACK.parent))


def make_tree(folder: Path, images: dict[str, int]) -> None:
    """folder/tree, of links to pictures in the folder."""
    for number in range(400):
        noise = random.Random(number).randbytes(3 * 14 * 14)
        Image.frombytes("RGB", (14, 14), noise).save(folder / f"{number}.JPEG", quality=75)
    for split, total in images.items():
        for number in range(total):
            path = folder / f"tree/{split}/n{number % 1000:08d}/{split}_{number:08d}.JPEG"
            if number < 1000:
                path.parent.mkdir(parents=True)
            os.link(folder / f"{number % 400}.JPEG", path)


def row(name: str, begun: float, usage: resource.struct_rusage, cpu: float, remark: str) -> None:
    seconds, megabytes = time.perf_counter() - begun, usage.ru_maxrss / 1000
    print(f"| {name} | {seconds:,.2f} | {cpu:,.2f} | {megabytes:,.0f} | {remark} |", flush=True)


def run(name: str, data: Path, *flags: str, kill_at: int = 0) -> None:
    """Run imagenet_shards.py; kill it when that many shards are there. SystemExit if it fails."""
    begun = time.perf_counter()
    job = subprocess.Popen([sys.executable, PACK, f"--shards={data}", *flags], stdout=subprocess.DEVNULL)
    while kill_at and job.poll() is None and len(list(data.glob("*.tar"))) < kill_at:
        time.sleep(0.01)
    if kill_at:
        job.kill()
    _, status, usage = os.wait4(job.pid, 0)
    if status and not kill_at:
        raise SystemExit(f"{name}: status {status}")
    row(name, begun, usage, usage.ru_utime + usage.ru_stime, f"{len(list(data.glob('*.tar')))} shards")


def read_and_plan(data: Path) -> None:
    import imagenet_train as script  # not before: commands would inherit this process's peak of memory

    index = script.read_index(str(data), "train")
    config = script.LoaderConfig(index, True, 256, 224, world=64, workers=8, shuffle=4000)
    now, done = config.division, script.count_steps(index.total, True, config.division) // 4
    others = [now._replace(world=world, workers=4, done=done) for world in (32, 16)]
    size = f"{len(index.blocks):,} blocks, {(data / 'imagenet-train.json').stat().st_size:,} bytes"
    for name, remark, work in (
        ("read_index()", size, lambda: script.read_index(str(data), "train")),
        ("plan_reader()", "", lambda: script.plan_reader(config, 0, [now], 0)),
        ("the same, resumed twice", "", lambda: script.plan_reader(config, 0, [*others, now], 0)),
    ):
        begun, cpu = time.perf_counter(), time.process_time()
        work()
        row(name, begun, resource.getrusage(resource.RUSAGE_SELF), time.process_time() - cpu, remark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1281167,50000", help="in train and val")
    parser.add_argument("--maxcount", type=int, default=8716, help="samples in a shard (default: as ImageNet's)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", metavar="DIR", type=Path, help="where to make a temporary folder")
    args = parser.parse_args()
    images = dict(zip(("train", "val"), map(int, args.images.split(","))))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        make_tree(Path(folder), images)
        print("| what | seconds | CPU-seconds | MB | |\n|---|---|---|---|---|")
        data, workers = Path(folder, "data"), f"--workers={args.workers}"
        flags = f"--imagenet={folder}/tree", workers, f"--maxcount={args.maxcount}"
        run("packing, killed", data, *flags, kill_at=max(1, images["train"] // args.maxcount // 2))
        run("the same, resumed", data, *flags)
        run("the same, nothing to do", data, *flags)
        shutil.rmtree(data)
        run("packing, undisturbed", data, *flags)
        run("--verify", data, "--verify", workers)
        run("--index-only, train", data, "--index-only", "--splits=train", f"--index={folder}/index", workers)
        read_and_plan(data)


if __name__ == "__main__":
    main()
