"""What only a GPU can answer about imagenet_train.py, without a network.

    python3 tests/benchmarks/gpu.py --out=DIR --work=DIR --only=data,step,runs,s3
    python3 tests/benchmarks/gpu.py --out=DIR --work=DIR --only=loading
    python3 tests/benchmarks/gpu.py --out=DIR --tiny      on a CPU with tiny sizes, to see that it runs

In:  drawn images only: the stand-in, and 24,576 images that take as long to decode and as many bytes as ImageNet's.
Out: a row of a table for each figure as it is found, and DIR/gpu.json, DIR/log.txt.

Each measurement is a process of its own. A step that fails or takes too long is a row, not the end. Speed is of
ResNet-50 in training, 224 px, 256 images a batch, bf16-mixed, channels_last; medians of interleaved rounds. For
accuracy use accuracy.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
TRAIN, PACK = HERE.parents[1] / "imagenet_train.py", HERE.parents[1] / "imagenet_shards.py"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "helpers"), str(TRAIN.parent)]
TINY = ["--model=shufflenet_v2_x0_5", "--train-size=32", "--val-size=32", "--val-resize=36", "--accelerator=cpu"]


# ---------------------------------------------------------------- one speed, in a process of its own


def plain_steps(script, args: argparse.Namespace, device: torch.device) -> Iterator[None]:
    """A plain PyTorch loop with the same network, optimiser and precision, on one batch on the device."""
    torch.backends.cudnn.benchmark = True
    model = script.build_model(args.model, 1000).to(device, memory_format=torch.channels_last).train()
    if args.compile:
        model.compile()
    mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (script.MEAN, script.STD))
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=args.momentum, weight_decay=args.weight_decay)
    images, labels = one_batch(args.batch_size, args.train_size, device)
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model((images.permute(0, 3, 1, 2) - mean) / std)
            loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def one_batch(batch: int, size: int, device: torch.device) -> list[torch.Tensor]:
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    return [images, torch.zeros(batch, dtype=torch.long, device=device)]


def measure(way: str, flags: list[str]) -> None:
    """Print images/s and the peaks of memory in GB, of one of these ways:

    plain   a plain PyTorch loop on one batch on the device
    one     the script with a loader that gives the same batch on the device again and again
    loader  the script's loader alone
    train   the script
    """
    import imagenet_train as script

    class OneBatch(script.Loader):
        def __iter__(self):
            if not self.config.training:
                return (yield from super().__iter__())
            self.advance()
            batch = one_batch(self.config.batch, self.config.size, device)
            for _ in range(len(self) - self.done):
                self.history[-1] = self.history[-1]._replace(done=self.history[-1].done + 1)
                yield batch

    args = script.parse_args(flags)
    device = torch.device("cuda" if torch.cuda.is_available() and args.accelerator != "cpu" else "cpu")
    if way in ("one", "train"):
        script.Loader = OneBatch if way == "one" else script.Loader
        if status := script.main(flags):
            raise SystemExit(status)
        [path] = args.output.glob("*/metrics.csv")
        rates = [float(row["train_images/s"] or 0) for row in csv.DictReader(path.open(newline=""))]
    else:
        index, rates, begun = script.read_index(args.shards, "train"), [], time.perf_counter()
        loader = script.make_loader(args, index, True, script.make_trainer(args))
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        steps = plain_steps(script, args, device) if way == "plain" else epochs
        for number, _ in enumerate(itertools.islice(steps, args.max_steps), 1):
            if number % args.log_every == 0:
                torch.cuda.synchronize() if device.type == "cuda" else None
                before, begun = begun, time.perf_counter()
                rates.append(args.log_every * args.batch_size / (begun - before))
    peaks = [resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    rates = [rate for rate in rates if rate]  # validation's entry has none
    # The first third, with the start and with what was made ahead, does not count.
    rate = statistics.median(rates[len(rates) // 3 :])
    print(json.dumps({"rate": rate, "GB": [*peaks, torch.cuda.max_memory_allocated() / 1e9]}))


# ---------------------------------------------------------------- all figures


class Run:
    """The folder to work in, the figures that were found, and the processes that find them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny, self.work, self.figures = args.tiny, args.work, {}
        self.jobs: list[subprocess.Popen] = []
        self.cores, self.deadline = len(os.sched_getaffinity(0)), time.monotonic() + args.budget

    def record(self, name: str, figure: float | str, unit: str = "") -> None:
        self.figures[name] = figure
        print(f"| {name} | {figure if isinstance(figure, str) else f'{figure:,.0f}'} {unit} |", flush=True)

    def start(self, *command: str | Path, **env: str) -> subprocess.Popen:
        """A Python script, whose output goes to a file."""
        with tempfile.NamedTemporaryFile("w", dir=self.work, prefix="log-", delete=False) as log:
            job = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=os.environ | env)
        job.path = Path(log.name)
        self.jobs.append(job)
        return job

    def finish(self, job: subprocess.Popen) -> str:
        """What it printed. RuntimeError if it failed, or was killed here because there is no time left."""
        try:
            job.wait(max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        text = job.path.read_text(errors="replace")
        if job.returncode:
            raise RuntimeError(f"status {job.returncode}: {text.strip()[-300:]}")
        return text

    def interleave(self, ways: dict[str, tuple]) -> None:
        """Record images/s, and memory, of each: (a way of measure(), shards, flags …)."""
        rates: dict[str, list[float]] = {name: [] for name in ways}
        flags = [*TINY, "--batch-size=4", "--log-every=2", "--max-steps=6"] if self.tiny else [
            "--log-every=20", "--max-steps=120", "--devices=1"]
        for name in [*ways] * (1 if self.tiny else 2):
            way, shards, *more = ways[name]
            with tempfile.TemporaryDirectory(dir=self.work) as output:
                places = f"--shards={self.work / shards}", f"--output={output}"
                job = self.start(__file__, f"--measure={way}", *places, *flags, *more)
                found = json.loads(self.finish(job).splitlines()[-1])
            rates[name].append(found["rate"])
            main, loader, device = found["GB"]
            self.record(name, statistics.median(rates[name]), f"images/s, median of {len(rates[name])}; memory: main "
                        f"process {main:.1f} GB, largest child {loader:.1f} GB, device {device:.1f} GB")


def draw(path: Path) -> None:
    """A picture that takes as long to decode and as many bytes as ImageNet's do on average, within 15 %."""
    rng = random.Random(path.name)
    size = rng.choice([(500, 375), (500, 333), (375, 500), (500, 400), (400, 300), (500, 500)])
    slopes = (Image.linear_gradient("L").rotate(rng.randrange(360)).resize(size) for _ in "RGB")
    bands = [Image.blend(slope, Image.effect_noise(size, 9), 0.5) for slope in slopes]
    Image.merge("RGB", bands).save(path, "JPEG", quality=95, subsampling=0)


def data(run: Run) -> None:
    """Shards: some drawn pictures, each many times under other names, in 1,000 classes; and the stand-in."""
    from standin import make_tree

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    run.record("machine", f"{device}, {run.cores} cores, torch {torch.__version__}")
    drawn, images, classes = (8, (48, 4), 4) if run.tiny else (1024, (24_576, 1000), 1000)
    (run.work / "drawn").mkdir()
    paths = [run.work / f"drawn/{n}.JPEG" for n in range(drawn)]
    with multiprocessing.get_context("spawn").Pool(run.cores) as processes:
        processes.map(draw, paths)
    for split, total in zip(("train", "val"), images):
        for number in range(total):
            path = run.work / f"tree/{split}/n{number % classes:08d}/{split}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(paths[number % drawn], path)
    make_tree(run.work / "standin-tree", *((6, 3) if run.tiny else (60, 30)))
    for name, tree, *flags in (("speed", "tree", "--maxcount=2048"), ("standin", "standin-tree", "--maxcount=100"),
                               ("speed-256", "tree", "--maxcount=2048", "--resize=256"))[: 2 if run.tiny else 3]:
        run.finish(run.start(PACK, f"--imagenet={run.work / tree}", f"--shards={run.work / name}", *flags))


def step(run: Run) -> None:
    """The training step on one batch that is on the device: plain PyTorch, and the script."""
    for suffix, *flags in (("",), (", compiled", "--compile"))[: 1 if run.tiny else 2]:
        kinds = ("plain PyTorch", "plain"), ("this script, one batch", "one")
        run.interleave({name + suffix: (way, "speed", "--workers=1", *flags) for name, way in kinds})


def loading(run: Run) -> None:
    """The loader alone, and with the training step: with all cores but one, with all cores, with smaller images."""
    fewer = max(1, run.cores - 1)
    ways = {}
    for n, shards in ((fewer, "speed"), (fewer, "speed-256"), (run.cores, "speed"))[: 1 if run.tiny else 3]:
        what, flag = f"{n} workers, {shards}", f"--workers={n}"
        ways |= {f"loader, {what}": ("loader", shards, flag), f"this script, {what}": ("train", shards, flag)}
        if n < run.cores and not run.tiny:
            ways[f"this script, compiled, {what}"] = "train", shards, flag, "--compile"
    run.interleave(ways)


def small(run: Run, output: str, *flags: str, shards: str = "", **env: str) -> subprocess.Popen:
    """A ResNet-18 on the stand-in."""
    size = [*TINY, "--batch-size=5", "--max-epochs=2"] if run.tiny else [
        "--model=resnet18", "--train-size=64", "--val-size=64", "--val-resize=72", "--batch-size=30", "--max-epochs=8"]
    return run.start(TRAIN, f"--shards={shards or run.work / 'standin'}", f"--output={run.work / output}", *size,
                     "--workers=2", "--warmup-epochs=1", "--log-every=5", *flags, **env)


def validated(run: Run, job: subprocess.Popen) -> str:
    """What its last validation gave."""
    return re.findall(r"validated (.*loss [\d.]+)", run.finish(job))[-1]


def runs(run: Run) -> None:
    """The script trains, is ended by a signal after a checkpoint, and resumed; its weights are evaluated."""
    signals = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
    jobs = {name: small(run, name, "--checkpoint-every=3") for name in (*signals, "train")}
    for name, number in signals.items():
        while jobs[name].poll() is None and not [*(run.work / name).glob("*/last.ckpt")]:
            time.sleep(0.02)
        jobs[name].send_signal(number)
        run.record(f"{name} ends it", str(jobs[name].wait() == -number))
        time.sleep(1)
        pgrep = ["pgrep", "-c", "-r", "DRST", "-s", str(jobs[name].pid)]
        run.record(f"{name}: processes left", subprocess.run(pgrep, stdout=subprocess.PIPE, text=True).stdout.strip())
        jobs[name] = small(run, name, "--resume")
    for name, job in jobs.items():
        run.record(name + ", resumed" * (name in signals), validated(run, job))
    [weights] = (run.work / "train").glob("*/model.pt")
    for name, *flags in (("evaluated",), ("evaluated on the CPU", "--accelerator=cpu"))[: 1 if run.tiny else 2]:
        run.record(name, validated(run, small(run, name, "--evaluate", f"--weights={weights}", *flags)))


def s3(run: Run) -> None:
    """From a bucket: a local server, forked loader processes, pinned memory."""
    import places

    with places.s3("imagenet", run.work / "standin") as env:
        run.record("from s3://", validated(run, small(run, "s3", shards="s3://imagenet", **env)))


STEPS = {"data": data, "step": step, "loading": loading, "runs": runs, "s3": s3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", metavar="DIR", type=Path, help="folder to work in, 8 GB, which the step `data` fills")
    parser.add_argument("--budget", metavar="S", type=float, default=570, help="seconds in all (default: 570)")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, with commas (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        args.work = (args.work or Path(folder)).resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{args.work}/inductor"
        run = Run(args)
        for name in args.only.split(","):
            try:
                STEPS[name](run)
            except Exception as error:
                run.record(f"{name}: failed", " ".join(str(error).split())[-400:])
        for job in run.jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        (args.out / "gpu.json").write_text(json.dumps(run.figures, indent=1))
        logs = [path.read_text(errors="replace")[-100_000:] for path in args.work.glob("log-*")]
        (args.out / "log.txt").write_text("\n====\n".join(logs))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--measure="):
        measure(sys.argv[1].partition("=")[2], sys.argv[2:])
    else:
        main()
