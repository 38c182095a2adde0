"""All that only a GPU can answer about imagenet_train.py, in one command of at most nine minutes, without a network.

    python3 tests/benchmarks/gpu.py --out=DIR [--photos=TREE.tar] [--budget=500]
    python3 tests/benchmarks/gpu.py --out=DIR --tiny      on a CPU with tiny sizes, to see that it runs

In:  drawn images only: the stand-in, and 24,576 images that take as long to decode and as many bytes as ImageNet's.
     --photos: a tree of photographs in train/ and val/, to compare the accuracy with that of a plain PyTorch loop.
Out: a line for each figure as it is found, and a table at the end; DIR/gpu.txt, gpu.json, log.txt, trace.json.gz.

The steps run in order of value, in processes of their own. A step that fails or takes too long is a line, not the end.
Speed is of ResNet-50 in training, 224 px, 256 images a batch, bf16-mixed, channels_last; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
TRAIN, PACK = HERE.parents[1] / "imagenet_train.py", HERE.parents[1] / "imagenet_shards.py"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "helpers"), str(TRAIN.parent)]

# Steps in order of value with their limits in seconds. The groups of a stage run at once, each in a process of its own;
# the first stage times nothing.
STAGES = [
    [{"machine": 60, "data": 60}, {"works": 150}, {"photos": 150}],
    [{"speed": 70, "loading": 130, "trace": 40, "formats": 40, "compiled": 150}],
    [{"ddp": 60, "buffers": 30, "out_of_memory": 50}],
]


class Run:
    """What a step is given: its flags, its folders, where its figures go; and the network and data of the speeds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tiny, self.work = args, args.tiny, args.work
        self.cores = len(os.sched_getaffinity(0))
        self.skip, self.steps, self.rounds = (2, 2, 1) if args.tiny else (10, 40, 3)

    def record(self, name: str, value: float | str, unit: str = "") -> None:
        """Print a figure and keep it, even if this process is killed afterwards."""
        text = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        print(f"  {name}: {text} {unit}".rstrip(), flush=True)
        with open(self.work / "figures.jsonl", "a") as file:
            file.write(json.dumps({"name": name, "text": f"{text} {unit}".rstrip(), "value": value}) + "\n")

    def figures(self) -> dict[str, dict]:
        path = self.work / "figures.jsonl"
        return {x["name"]: x for x in map(json.loads, path.read_text().splitlines() if path.exists() else [])}

    def share(self, name: str, part: str, *wholes: str) -> None:
        """Record what one speed is of the slowest of others, if all were measured."""
        speeds = [self.figures().get(key, {}).get("value") for key in (part, *wholes)]
        if all(speeds):
            self.record(name, f"{100 * speeds[0] / min(speeds[1:]):.1f} %")

    def interleave(self, ways: dict[str, Callable[[], float]], rounds: int = 2) -> None:
        """Call each in turn for its seconds, and record medians in images/s, also of the rounds before a failure."""
        rates: dict[str, list[float]] = {name: [] for name in ways}
        try:
            for _ in range(min(rounds, self.rounds)):
                for name, way in ways.items():
                    with contextlib.redirect_stdout(io.StringIO()):
                        rates[name].append(self.steps * self.config.batch / way())
                    print(f"    {name}: {rates[name][-1]:,.0f}", flush=True)
        finally:
            for name, found in rates.items():
                if found:
                    self.record(name, statistics.median(found), f"images/s  ({' '.join(f'{x:,.0f}' for x in found)})")

    @functools.cached_property
    def config(self):
        """The drawn images. Imports what the following methods use."""
        import limit
        import torch

        self.limit, self.script, self.torch = limit, limit.script, torch
        tiny = ["--train-size=32", "--val-size=32", "--val-resize=36", "--batch-size=4", "--workers=1", "--model=tiny"]
        if self.tiny:
            import tiny as _  # noqa: F401
        self.flags = self.script.parse_args([f"--shards={self.work}/speed", f"--output={self.work}/speed-output",
                                             "--devices=1", *(tiny if self.tiny else [f"--workers={self.cores}"])])
        trainer = self.script.make_trainer(self.flags)
        self.device, self.bf16 = trainer.strategy.root_device, "bf16" in trainer.precision
        self.cuda = self.device.type == "cuda"
        return self.script.LoaderConfig(
            self.script.read_index(f"{self.work}/speed", "train"), True, self.flags.batch_size, self.flags.train_size,
            shuffle=self.flags.shuffle, workers=self.flags.workers, pin=self.cuda)

    def module(self, **compile):
        """The script's module; if there are arguments, compiled with these."""
        index = self.config.index
        module = self.script.make_model(self.flags, index, 0)
        if compile:
            module.model.compile(**{"backend": "eager"} if self.tiny else compile)
        return module

    def ours(self, module, one_batch: bool = True, **changes) -> float:
        """Seconds of the script's training on one batch on the device, or on its loader's."""
        skip = self.skip if one_batch else 5 + 2 * self.config.workers  # batches that the workers make ahead
        return self.limit.timed_fit(self.flags, self.config, skip, self.steps, one_batch, module=module, **changes)[0]

    def bare(self, module) -> float:
        """Seconds of a plain PyTorch loop with the same network, optimiser and precision on one batch on the device."""
        torch, flags = self.torch, self.flags
        torch.backends.cudnn.benchmark = True
        module = module.to(self.device).train()
        groups = [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": flags.weight_decay},
                  {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=0.001, momentum=flags.momentum)
        images, labels = next(iter(self.limit.OneBatch(self.config, self.device)))
        for step in range(self.skip + self.steps):
            if step == self.skip:
                begun = self.limit.device_clock()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = module.model((images.permute(0, 3, 1, 2) - module.mean) / module.std)
                loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=flags.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = self.limit.device_clock() - begun
        module.zero_grad()
        module.cpu()
        return seconds

    def peak(self, name: str, module, **options) -> None:
        """Record the device's memory that tensors take at most."""
        gc.collect()
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(io.StringIO()):
            self.ours(module, **options)
        self.record(name, self.torch.cuda.max_memory_allocated() / 1e9, "GB")

    def profile(self):
        """A profile of CPU and device, which events_of() stops."""
        torch = self.torch
        self.limit.device_clock()
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.cuda]
        profile = torch.profiler.profile(activities=kinds)
        profile.start()
        return profile

    def events_of(self, profile, name: str) -> list[dict]:
        """The events in order of time, which are also written to this file."""
        self.limit.device_clock()
        profile.stop()
        profile.export_chrome_trace(str(self.work / name))
        events = json.loads((self.work / name).read_text(errors="replace"))["traceEvents"]
        return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])


# ---------------------------------------------------------------- runs of the scripts, as a user starts them


def start(run: Run, name: str, *command: str | Path, **env: str) -> subprocess.Popen:
    """A Python script in this process's group, with its output in work/name.log."""
    with open(run.work / f"{name}.log", "wb") as log:
        command = [sys.executable, "-u", *map(str, command)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | env)


def finish(run: Run, jobs: dict[str, subprocess.Popen]) -> dict[str, str]:
    """Wait for all; the output of each. A status that is not 0 is a figure. Kills them if this step ends."""
    try:
        texts = {}
        for name, job in jobs.items():
            job.wait()
            texts[name] = (run.work / f"{name}.log").read_text(errors="replace")
            if job.returncode:
                run.record(f"{name}: status", f"{job.returncode}, last line: {texts[name].strip()[-200:]!r}")
        return texts
    finally:
        for job in jobs.values():
            job.kill()


def pack(run: Run, tree: Path, name: str, maxcount: int) -> None:
    """Shards of a tree in work/name, which has the name when they are complete."""
    partial = run.work / f"{name}.partial"
    finish(run, {f"pack-{name}": start(run, f"pack-{name}", PACK, f"--imagenet={tree}", f"--shards={partial}",
                                       f"--maxcount={maxcount}")})
    partial.rename(run.work / name)


def validated(text: str) -> str:
    """What the last validation of a run gave."""
    found = re.findall(r"validated (\d+/\d+) images: (top-1 [\d.]+ %), top-5 [\d.]+ %, (loss \S+)", text)
    return ", ".join(found[-1]) if found else "no validation"


def draw(path: Path) -> None:
    """A picture that takes as long to decode and as many bytes as ImageNet's do on average, within 15 %."""
    rng = random.Random(path.name)
    size = rng.choice([(500, 375), (500, 333), (375, 500), (500, 400), (400, 300), (500, 500)])
    slopes = (Image.linear_gradient("L").rotate(rng.randrange(360)).resize(size) for _ in "RGB")
    bands = [Image.blend(slope, Image.effect_noise(size, 9), 0.5) for slope in slopes]
    Image.merge("RGB", bands).save(path, "JPEG", quality=95, subsampling=0)


# ---------------------------------------------------------------- steps


def machine(run: Run) -> None:
    """What the figures are of."""
    import torch

    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "pytorch-lightning", "pillow")]
    run.record("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    run.record("versions", ", ".join([f"Python {sys.version.split()[0]}", *versions, f"CUDA {torch.version.cuda}"]))
    run.record("cores, GB in /dev/shm", f"{run.cores}, {shutil.disk_usage('/dev/shm').total / 1e9:.0f}")


def data(run: Run) -> None:
    """Shards for the speeds: some drawn pictures, each many times under other names, in 1,000 classes."""
    drawn, images, classes = (8, {"train": 48, "val": 4}, 4) if run.tiny else (
        1024, {"train": 24_576, "val": 1000}, 1000)
    (run.work / "drawn").mkdir()
    paths = [run.work / f"drawn/{n}.JPEG" for n in range(drawn)]
    with multiprocessing.get_context("fork").Pool(run.cores) as processes:
        processes.map(draw, paths)
    for split, number in ((split, number) for split, total in images.items() for number in range(total)):
        folder = run.work / f"tree/{split}/n{number % classes:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(paths[number % drawn], folder / f"{split}_{number}.JPEG")
    pack(run, run.work / "tree", "speed", 2048)
    run.record("bytes of a drawn image", sum(path.stat().st_size for path in paths) / drawn)


def works(run: Run) -> None:
    """The script trains, compiles, is killed and resumed, evaluates; the same on a CPU."""
    from standin import make_tree

    make_tree(run.work / "standin-tree", *((6, 3) if run.tiny else (60, 30)))
    pack(run, run.work / "standin-tree", "standin", 100)
    size = (["--model=shufflenet_v2_x0_5", "--train-size=32", "--val-size=32", "--val-resize=36", "--batch-size=5"]
            if run.tiny else
            ["--model=resnet18", "--train-size=64", "--val-size=64", "--val-resize=72", "--batch-size=30"])
    common = [TRAIN, f"--shards={run.work}/standin", *size, "--workers=2"]

    def train(name: str, *more: str, folder: str = "", **env: str) -> subprocess.Popen:
        return start(run, name, *common, "--warmup-epochs=1", "--log-every=5", f"--max-epochs={2 if run.tiny else 8}",
                     f"--output={run.work / (folder or name)}", *more, **env)

    jobs = {"train": train("train")}
    if not run.tiny:
        jobs |= {"train --compile": train("train --compile", "--compile"),
                 "train on CPU": train("train on CPU", "--accelerator=cpu", OMP_NUM_THREADS=str(run.cores // 2))}
    killed = train("killed", "--checkpoint-every=3")
    while not (run.work / "killed/version_0/last.ckpt").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    run.record("ended by SIGKILL after a checkpoint", str(killed.wait() == -signal.SIGKILL))
    jobs["resumed"] = train("resumed", "--resume", folder="killed")
    texts = finish(run, jobs)
    run.record("resumed from", " ".join(re.findall("resuming.*", texts["resumed"])))
    evaluate = [*common, "--evaluate", f"--weights={run.work}/train/version_0/model.pt", f"--output={run.work}/results"]
    jobs = {"evaluate": start(run, "evaluate", *evaluate)}
    if not run.tiny:
        jobs["evaluate on CPU"] = start(run, "evaluate on CPU", *evaluate, "--accelerator=cpu")
    for name, text in (texts | finish(run, jobs)).items():
        run.record(name, validated(text))


def photos(run: Run) -> None:
    """ResNet-18 on photographs against a plain loop, three seeds at once; see accuracy.py."""
    if not run.args.photos:
        return run.record("photographs", "skipped: no --photos")
    with tarfile.open(run.args.photos) as tar:
        tar.extractall(run.work / "photos", filter="data")
    tree = next(path.parent for path in (run.work / "photos").rglob("train"))
    flags = [HERE / "accuracy.py", f"--tree={tree}", "--classes=1000", f"--epochs={1 if run.tiny else 10}", "--seeds=1"]
    precision = [] if run.tiny else ["--precision=bf16-mixed"]
    jobs = {f"photos-{seed}": start(run, f"photos-{seed}", *flags, *precision, f"--seed={seed}")
            for seed in range(run.rounds)}
    rows = [re.findall(r"^\| \d+ \| ([\d.]+) \| ([\d.]+)", text, re.M) for text in finish(run, jobs).values()]
    for name, tops in zip(("plain", "ours"), zip(*(map(float, row[0]) for row in rows))):
        spread = statistics.stdev(tops) if len(tops) > 1 else 0
        run.record(f"photographs, {name}", statistics.mean(tops), f"% top-1 ± {spread:.2f}")


def speed(run: Run) -> None:
    """What Lightning and the script add to a plain loop."""
    plain, ours = run.module(), run.module()
    run.interleave({"bare": lambda: run.bare(plain), "ours": lambda: run.ours(ours)}, rounds=3)
    run.share("ours of bare (goal: ≥ 98 %)", "ours", "bare")


def memory(pid: int) -> str:
    """Resident memory of a process."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = {key: int(value) / 1e6 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
        return f"{found['Rss']:.2f} GB, {found['Rss'] - found['Pss']:.2f} of it in its share of shared memory"
    return " ".join(re.findall(r"VmRSS:.*", Path(f"/proc/{pid}/status").read_text()))


def loading(run: Run) -> None:
    """The loader alone, and with training; memory of the processes."""
    config, module, found = run.config, run.module(), []

    class Memory(run.limit.pl.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == trainer.max_steps:
                found[:] = memory(os.getpid()), memory(multiprocessing.active_children()[0].pid)

    ways = {f"loader, {n} workers": lambda n=n: run.limit.timed_load(replace(config, workers=n), 5 + 2 * n, run.steps)
            for n in (config.workers, max(1, config.workers // 2))}
    ways["together"] = lambda: run.ours(module, one_batch=False, callbacks=(Memory(),))
    run.interleave(ways, rounds=3)
    run.share("together, of the slower one (goal: ≥ 97 %)", "together", "ours", f"loader, {config.workers} workers")
    for name, text in zip(("main process", "a loader process"), found):
        run.record(f"memory of {name}", text)
    run.peak("memory of the device", module, one_batch=False)
    pinned = getattr(run.torch.cuda, "host_memory_stats", dict)() if run.cuda else {}
    run.record("memory, pinned", pinned.get("allocated_bytes.peak", 0) / 1e9, "GB")


def trace(run: Run) -> None:
    """What 20 steps of real training, between two entries of the log, do and wait for."""
    config, events = run.config, []
    first, steps = (1, 1) if run.tiny else (52, 20)  # the log has an entry each 50 steps

    class Profile(run.limit.pl.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_step == first:
                self.profile = run.profile()
            if trainer.global_step == first + steps:
                events.extend(run.events_of(self.profile, "trace.json"))

    with contextlib.redirect_stdout(io.StringIO()):
        run.limit.timed_fit(run.flags, config, 1, first + steps, False, callbacks=(Profile(),))
    for name, text in describe(events, steps).items():
        run.record(f"{steps} steps: {name}", text)
    with open(run.work / "trace.json", "rb") as plain, gzip.open(run.args.out / "trace.json.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)


def describe(events: list[dict], steps: int) -> dict[str, str]:
    """Waits for the device, copies, and the share of time in which the device does nothing; of a trace's events."""
    last = max((event["ts"] for event in events if "LaunchKernel" in event["name"]), default=float("inf"))
    # What the CPU does after the last launch is the profiler's own waiting.
    calls = Counter(e["name"] for e in events if e["ts"] <= last or e.get("cat", "").startswith("gpu"))
    waits = {name: n for name, n in calls.items() if "_local_scalar_dense" in name or "Synchronize" in name}
    copies = {name: n for name, n in calls.items() if name.startswith("Memcpy") or name == "cudaHostAlloc"}
    result = {"waits (goal: none)": waits, "copies": copies}
    result = {key: ", ".join(f"{n} × {name}" for name, n in found.items()) or "none" for key, found in result.items()}
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if kernels:
        busy, until = 0.0, kernels[0]["ts"]
        for event in kernels:
            end = event["ts"] + event["dur"]
            busy, until = busy + max(0.0, end - max(until, event["ts"])), max(until, end)
        whole = until - kernels[0]["ts"]
        result["device idle"] = f"{100 * (1 - busy / whole):.2f} % of {whole / steps / 1000:.2f} ms a step"
        result["kernels a step"] = f"{len(kernels) / steps:.0f}"
    return result


def formats(run: Run) -> None:
    """Dtype and memory format on the way through the network; the kernels of the normalisation."""
    module, torch, seen = run.module(), run.torch, {}

    def note(name: str, tensor) -> None:
        layout = "channels_last" if tensor.is_contiguous(memory_format=torch.channels_last) else "not channels_last"
        seen.setdefault(name, f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {layout}")

    layers = [layer for layer in module.model.modules() if isinstance(layer, torch.nn.Conv2d)]
    for name, layer in (("first", layers[0]), ("middle", layers[len(layers) // 2])):
        layer.register_forward_pre_hook(lambda layer, given, name=name: note(f"{name} convolution, in", given[0]))
        layer.register_forward_hook(lambda layer, given, out, name=name: note(f"{name} convolution, out", out))

    with contextlib.redirect_stdout(io.StringIO()):
        run.limit.timed_fit(run.flags, run.config, 1, 1, False, module=module)
    for name, text in seen.items():
        run.record(name, text)
    images, _ = next(iter(run.limit.OneBatch(run.config, run.device)))
    mean, std, times = module.mean.to(run.device), module.std.to(run.device), []
    profile = run.profile()
    for _ in range(run.steps):
        begun = run.limit.device_clock()
        ((images.permute(0, 3, 1, 2) - mean) / std).to(torch.bfloat16)
        times.append(1000 * (run.limit.device_clock() - begun))
    kernels = sum(event.get("cat") == "kernel" for event in run.events_of(profile, "small.json"))
    run.record("normalisation", statistics.median(times), f"ms a batch, {kernels / run.steps:.0f} kernels")


def compiled(run: Run) -> None:
    """The same with --compile."""
    bare, eager, ours, begun = run.module(mode=None), run.module(), run.module(mode=None), time.perf_counter()
    run.peak("memory of the device, one batch, not compiled", eager)
    run.peak("memory of the device, one batch, compiled", ours)
    run.record("first compiled run", time.perf_counter() - begun, "s")
    run.interleave({
        "ours, not compiled": lambda: run.ours(eager), "ours, compiled": lambda: run.ours(ours),
        "bare, compiled": lambda: run.bare(bare), "together, compiled": lambda: run.ours(ours, one_batch=False)})
    run.share("compiled, ours of bare", "ours, compiled", "bare, compiled")
    run.share("compiled, together, of the slower one", "together, compiled", "ours, compiled",
              f"loader, {run.config.workers} workers")


def ddp(run: Run) -> None:
    """DDP with one rank: its warnings, and what two of its options change."""
    from pytorch_lightning.strategies import DDPStrategy

    module, options = run.module(), dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    run.interleave({"one device": lambda: run.ours(module),
                    "ddp": lambda: run.ours(module, strategy=DDPStrategy()),
                    "ddp, both options": lambda: run.ours(module, strategy=DDPStrategy(**options))})
    sys.stderr.flush()
    text = (run.work / "group-ddp.log").read_text(errors="replace")  # of this process
    for warning in ("AccumulateGrad node's stream", "bucket view strides"):
        run.record(f"warning: {warning}", str(text.count(warning)), "times")


def buffers(run: Run) -> None:
    """Batches that crossed shared and pinned memory and the device are those that the main process makes."""
    config, sums = run.config, []
    index = run.script.read_index(str(run.work / "standin"), "train")
    for workers in (0, 2 if run.tiny else 8):
        held, found = [], Counter()
        config = replace(run.config, index=index, batch=10, size=64, shuffle=100, workers=workers,
                         pin=run.cuda and workers > 0)
        for images, labels in run.script.Loader(config):  # 10 divides the images: an epoch has all of them
            held.append((images.to(run.device, non_blocking=True), labels))
            if len(held) == 3 or not workers:
                for pixels, numbers in held:
                    found.update(zip((zlib.crc32(x.tobytes()) for x in pixels.cpu().numpy()), numbers.tolist()))
                held.clear()
        sums.append(found)
    same, others = (sums[0] & sums[1]).total(), (sums[1] - sums[0]).total()
    run.record("images from the buffers of 8 workers", f"{same} the same, {others} others")


def out_of_memory(run: Run) -> None:
    """A batch that does not fit: one line, status 1."""
    if run.tiny:
        return run.record("--batch-size=4000", "skipped: --tiny")
    flags = [f"--shards={run.work}/speed", f"--output={run.work}/large", "--batch-size=4000", "--workers=4"]
    text = finish(run, {"--batch-size=4000": start(run, "--batch-size=4000", TRAIN, *flags)})["--batch-size=4000"]
    run.record("--batch-size=4000: traceback", str("Traceback" in text))


# ---------------------------------------------------------------- the whole


def do(args: argparse.Namespace) -> None:
    """In a process of its own: the steps of one group, each with its limit."""
    run = Run(args)

    def stop(*_) -> None:
        raise TimeoutError("out of time")

    signal.signal(signal.SIGALRM, stop)
    for name, limit in json.loads(args.do).items():
        begun = time.time()
        signal.setitimer(signal.ITIMER_REAL, max(1, min(limit, args.deadline - begun)))
        try:
            globals()[name](run)
            print(f"{name}: done in {time.time() - begun:.0f} s", flush=True)
        except BaseException as error:  # Lightning makes SystemExit of some
            signal.setitimer(signal.ITIMER_REAL, 0)
            traceback.print_exc()
            run.record(f"{name}: failed", f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
    signal.setitimer(signal.ITIMER_REAL, 0)


def group(args: argparse.Namespace, steps: dict[str, float], deadline: float) -> None:
    """Run some steps in a process; kill it, and all that it started, when their time is over."""
    left = min(deadline - time.time(), sum(steps.values()) + 20)
    if left < 5:
        return print(f"{', '.join(steps)}: no time left", flush=True)
    flags = [f"--{name}={value}" for name in ("out", "work", "photos") if (value := getattr(args, name))]
    command = [sys.executable, __file__, *flags, f"--do={json.dumps(steps)}", f"--deadline={deadline}"]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{args.work}/inductor"}
    with open(args.work / f"group-{next(iter(steps))}.log", "wb") as log:
        process = subprocess.Popen([*command, *["--tiny"] * args.tiny], stderr=log, start_new_session=True, env=env)
    try:
        process.wait(left)
    except subprocess.TimeoutExpired:
        print(f"{', '.join(steps)}: killed, out of time", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Run the stages within the budget, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--photos", metavar="FILE", type=Path, help="a tar file of a tree of photographs")
    parser.add_argument("--budget", metavar="S", type=float, default=500, help="seconds in all (default: 500)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="folder to work in, 8 GB (default: a temporary one)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--only", default="", help="steps, with commas (default: all)")
    parser.add_argument("--do", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        return do(args)
    args.out, begun, scale = args.out.resolve(), time.time(), 3 if args.tiny else 1  # a busy machine may run the tests
    args.out.mkdir(parents=True, exist_ok=True)
    in_memory = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 40e9 else None
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.work or in_memory, ignore_cleanup_errors=True) as folder:
        args.work = Path(folder).resolve()
        try:
            for stage in STAGES:
                only = args.only.split(",") if args.only else [name for steps in stage for name in steps]
                chosen = [{name: scale * s for name, s in steps.items() if name in only} for steps in stage]
                threads = [threading.Thread(target=group, args=(args, steps, begun + args.budget))
                           for steps in chosen if steps]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            figures = Run(args).figures()
            table = ["| what | figure |", "|---|---|", *(f"| {x['name']} | {x['text']} |" for x in figures.values())]
            text = "\n".join([*table, f"\n{time.time() - begun:.0f} s in all\n"])
            print(text, flush=True)
            (args.out / "gpu.txt").write_text(text)
            (args.out / "gpu.json").write_text(json.dumps(figures, indent=1))
            logs = [f"==== {x.name}\n{x.read_text(errors='replace')[-200_000:]}\n" for x in args.work.glob("*.log")]
            (args.out / "log.txt").write_text("".join(sorted(logs)))


if __name__ == "__main__":
    main()
