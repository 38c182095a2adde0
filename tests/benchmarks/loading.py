"""Loaders of the same images side by side: this project's, and what else reads ImageNet into PyTorch.

    python3 tests/benchmarks/loading.py --tree=/data/imagenet --images=4000 --rounds=6
    python3 tests/benchmarks/loading.py --tree=DIR --only=project-bytes,dali-bytes --python=dali=/other/venv/bin/python
    python3 tests/benchmarks/loading.py --tree=DIR --images=1000 --parts

In:  a tree with train/<wnid>/*.JPEG. Fewer files than --images are linked under several names.
Out: a table of images per CPU-second, of all processes, and of images a second, both from the first batch to the last;
     and of the start-up: seconds and CPU-seconds from the start of the process to its first batch, imports included.
     Medians over interleaved rounds, after one round that does not count.

Each loader gives batches of RandomResizedCrop and flip, and runs in a process of its own. Compare rows that return the
same: `bytes` are uint8 [B, S, S, 3] or [B, 3, S, S], of which a GPU makes the floats; `floats` are normalised float32
[B, 3, S, S]. `pillow` only reads and decodes each file, in one process: no crop, no batches. What is not installed is
left out; requirements.txt beside this file has the packages. --python names the interpreter of a loader that needs an
environment of its own. --parts: where the time of an image goes, in one process of this project's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
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
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_shards(work: Path, name: str, images: int, *flags: str) -> None:
    """Convert work/tree into eight shards in work/name."""
    command = [sys.executable, TOP / "imagenet_shards.py", f"--imagenet={work}/tree", f"--shards={work / name}"]
    flags = ("--splits=train", f"--maxcount={-(-images // 8)}", *flags)
    subprocess.run([*command, *flags], check=True, capture_output=True, text=True)


def prepare(work: Path, tree: Path, images: int, copy: bool = False) -> None:
    """A tree of so many files, linked or copied from the given one, in work/tree, and shards of it in work/data."""
    files = sorted(path for path in (tree / "train").glob("*/*") if path.is_file())
    if not files:
        raise SystemExit(f"{tree}/train: no class folders with images in it; give another --tree")
    if len(files) > images:  # of all classes, as evenly as they come
        files = random.Random(0).sample(files, images)
    for number, path in zip(range(images), itertools.cycle(files)):
        link = work / "tree/train" / path.parent.name / f"{path.stem}-{number // len(files)}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            (shutil.copyfile if copy else os.link)(path, link)
        except OSError:  # a link, to another disk
            shutil.copyfile(path, link)
    make_shards(work, "data", images)


# ---------------------------------------------------------------- loaders: (work folder, flags, floats) → batches


def project(work: Path, a: argparse.Namespace, floats: bool, shards: str = "data") -> Iterable:
    import imagenet_train as script

    index = script.read_index(str(work / shards), "train")
    if floats:
        script.collate = normalise(script.collate)  # of the processes that are forked from this one
    return script.Loader(script.LoaderConfig(index, True, a.batch, a.size, shuffle=500, workers=a.workers, epochs=1))


def project_256(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """As project, from shards made with --resize=256."""
    if not (work / "data-256/imagenet-train.json").exists():
        make_shards(work, "data-256", a.images, "--resize=256")
    return project(work, a, floats, "data-256")


def normalise(collate: Callable) -> Callable:
    """A collate() that also normalises, image by image, into memory that is used again: floats [B, 3, S, S]."""
    memory: list[torch.Tensor] = []

    def collate_floats(rows: list, buffers: Iterable) -> list:
        images, *rest = collate(rows, buffers)
        if not memory:
            memory.extend(torch.empty(images.shape).share_memory_() for _ in range(4))
        memory.append(memory.pop(0))
        mean, std = (torch.tensor(x).repeat(images.shape[1]) * 255 for x in (MEAN, STD))  # along a row of pixels
        for image, normalised in zip(images.flatten(2), memory[0].flatten(2)):
            normalised.copy_(image).sub_(mean).div_(std)
        return [memory[0].permute(0, 3, 1, 2), *rest]

    return collate_floats


def crops(a: argparse.Namespace, floats: bool) -> T.Compose:
    """What torchvision's users do to a training image."""
    last = [T.ToTensor(), T.Normalize(MEAN, STD)] if floats else [np.array, torch.from_numpy]
    return T.Compose([T.RandomResizedCrop(a.size), T.RandomHorizontalFlip(), *last])


def webdataset(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """WebDataset as its documentation shows it."""
    import webdataset as wds

    urls = sorted(map(str, (work / "data").glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(500).decode("pil")
    data = data.to_tuple("jpg cls").map_tuple(crops(a, floats), int).batched(a.batch, partial=False)
    return wds.WebLoader(data, batch_size=None, num_workers=a.workers)


def wids(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """The random access to the same shards that comes with WebDataset."""
    from wids import ShardListDataset

    transform = crops(a, floats)
    data = ShardListDataset(str(work / "data/imagenet-train.json"), localname=str)
    data.add_transform(lambda sample: (transform(sample[".jpg"].convert("RGB")), sample[".cls"]))
    sampler = DistributedSampler(data, num_replicas=1, rank=0, drop_last=True)
    return DataLoader(data, a.batch, sampler=sampler, num_workers=a.workers, drop_last=True)


def imagefolder(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    data = ImageFolder(work / "tree/train", crops(a, floats))
    return DataLoader(data, a.batch, shuffle=True, num_workers=a.workers, drop_last=True)


def timm(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """Its prefetcher makes floats of bytes on the device; without it, its loader processes make floats."""
    from timm.data import create_dataset, create_loader

    data = create_dataset("wds/imagenet", root=str(work / "data"), split="train", is_training=True, batch_size=a.batch)
    loader = create_loader(
        data, a.size, a.batch, is_training=True, use_prefetcher=not floats, num_workers=a.workers, mean=MEAN, std=STD,
        color_jitter=None, interpolation="bilinear", device=torch.device("cpu"), persistent_workers=False,
    )
    return loader if floats else loader.loader


def image_and_label(item: tuple) -> dict:
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def cropped(transform: Callable, item: dict) -> tuple[torch.Tensor, int]:
    return transform(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]


def litdata(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    import litdata as ld

    folder = str(work / "litdata")
    if not os.path.exists(f"{folder}/index.json"):
        items = ImageFolder(work / "tree/train").samples
        ld.optimize(image_and_label, inputs=items, output_dir=folder, chunk_bytes="64MB", num_workers=2)
    transform = partial(cropped, crops(a, floats))
    data = ld.StreamingDataset(folder, shuffle=True, drop_last=True, transform=transform)
    return ld.StreamingDataLoader(data, batch_size=a.batch, num_workers=a.workers)


def mosaicml(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    from streaming import MDSWriter, StreamingDataset

    folder = str(work / "mosaicml")
    if not os.path.exists(f"{folder}/index.json"):
        with MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}, size_limit=64 << 20) as writer:
            for item in ImageFolder(work / "tree/train").samples:
                writer.write(image_and_label(item))

    class Images(StreamingDataset):
        def __getitem__(self, place):
            return cropped(transform, super().__getitem__(place))

    transform, data = crops(a, floats), Images(local=folder, shuffle=True, batch_size=a.batch)
    return DataLoader(data, a.batch, num_workers=a.workers, drop_last=True)


def dali(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """DALI's native pipeline on the CPU; `workers` are its threads."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=a.batch, num_threads=max(1, a.workers), device_id=None)
    def pipeline():
        data, label = fn.readers.file(file_root=str(work / "tree/train"), random_shuffle=True, name="files")
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        image = fn.decoders.image_random_crop(data, device="cpu", random_area=area, random_aspect_ratio=ratio)
        image = fn.resize(image, size=(a.size, a.size), interp_type=types.INTERP_LINEAR, antialias=True)
        if not floats:
            return fn.flip(image, horizontal=fn.random.coin_flip()), label
        mean, std = ([255 * x for x in values] for values in (MEAN, STD))
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, output_layout="CHW"), label

    batches = DALIGenericIterator([pipeline()], ["x", "y"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP)
    return ((batch[0]["x"], batch[0]["y"]) for batch in batches)


def pillow(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    paths = sorted(work.glob("tree/train/*/*"))
    random.Random(0).shuffle(paths)
    for start in range(0, len(paths), a.batch):
        for path in paths[start : start + a.batch]:
            Image.open(path).load()
        yield paths[start : start + a.batch], None


MAKERS = (project, webdataset, wids, imagefolder, timm, litdata, mosaicml, dali)
LOADERS = {f"{make.__name__}-{kind}": partial(make, floats=kind == "floats")
           for kind in ("bytes", "floats") for make in MAKERS}
LOADERS |= {"project_256-bytes": partial(project_256, floats=False), "pillow": partial(pillow, floats=False)}


# ---------------------------------------------------------------- one measurement


def cpu_seconds(running: Iterable[int] = ()) -> float:
    """Of this process, of its children that have ended, and of these processes as long as they run."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(used.ru_utime + used.ru_stime for used in usage)
    for pid in running:
        with contextlib.suppress(OSError):  # its own time, and that of its children
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
            seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure(name: str, work: Path, a: argparse.Namespace) -> dict[str, float]:
    """Load one epoch. ValueError if a batch is not what this comparison is about."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images, running = 0, None
    for x, *_ in LOADERS[name](work, a):
        if running is None:
            running = [child.pid for child in multiprocessing.active_children()]
            first = time.monotonic(), cpu_seconds(running)
        else:
            images, last = images + len(x), (time.monotonic(), cpu_seconds(running))
        if name != "pillow":
            shapes, floats = [[3, a.size, a.size], [a.size, a.size, 3]], name.endswith("floats")
            if list(x.shape[1:]) not in shapes[: 1 if floats else 2] or x.is_floating_point() != floats:
                raise ValueError(f"{name}: a batch of {x.dtype} {list(x.shape)}")
    seconds, cpu = (after - before for before, after in zip(first, last))
    return {"cpu": images / cpu, "wall": images / seconds, "start_cpu": first[1], "start": first[0] - a.begun}


def measure_apart(name: str, work: Path, a: argparse.Namespace) -> dict[str, float] | None:
    """measure() in a process of its own; None, and its last words on stderr, if that fails."""
    python = dict(text.split("=", 1) for text in a.python).get(name.partition("-")[0], sys.executable)
    flags = [f"--{key}={getattr(a, key)}" for key in ("batch", "size", "images", "workers")]
    command = [python, __file__, f"--measure={name}", f"--work={work}", f"--begun={time.monotonic()}", *flags]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    if done.returncode:  # of DALI's messages the last line says the least
        print(f"# {name}: left out: {' '.join(done.stderr.split())[-300:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the parts of an image's time


def parts(work: Path, a: argparse.Namespace) -> None:
    """Print CPU milliseconds an image, medians over rounds: of each part without those that it calls, and of all."""
    import imagenet_shards as shards
    import imagenet_train as script

    found: Counter[str] = Counter()
    callers: list[float] = []  # of each part that has begun, the seconds of those that it called

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            callers.append(0.0)
            begun = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - begun
                found[name] += spent - callers.pop()
                if callers:
                    callers[-1] += spent

        return call

    def timed_stage(name: str, stage: Callable) -> Callable:
        def call(*samples) -> Iterable:
            items, end = iter(stage(*samples)), object()
            yield from iter(partial(timed(name, next), items, end), end)

        return call

    functions = {script: "sample_rng random_crop shorten_jpeg pixels_of resize_pixels", shards: "open_image to_rgb",
                 ImageFile.ImageFile: "load", Image.Image: "crop tobytes", torch.Tensor: "flip", torch: "stack"}
    stages = "list_blocks open_blocks tar_file_expander group_by_keys in_order map(decode) fill batched(collate)"
    for owner, names in functions.items():
        for name in names.split():
            setattr(owner, name, timed(name, getattr(owner, name)))
    config = script.LoaderConfig(script.read_index(str(work / "data"), "train"), True, a.batch, a.size, shuffle=500)
    rounds: list[Counter[str]] = []
    for _ in range(1 + a.rounds):
        found.clear()
        pipeline = script.make_pipeline(config, 0, [config.division], 0, itertools.cycle(script.make_buffers(config)))
        pipeline.pipeline = [timed_stage(name, stage) for name, stage in zip(stages.split(), pipeline.pipeline)]
        whole, thread = time.process_time(), time.thread_time()
        images = sum(len(batch[1]) for batch in pipeline)
        whole, thread = time.process_time() - whole, time.thread_time() - thread
        found |= {"thread that reads and checks blocks": whole - thread, "the whole pipeline": whole}
        rounds.append(Counter({name: 1000 * seconds / images for name, seconds in found.items()}))
    print("| part | ms an image |\n|---|---|")
    for name in rounds[0]:
        print(f"| {name} | {statistics.median(each[name] for each in rounds[1:]):.3f} |")


# ---------------------------------------------------------------- all measurements


def table(rows: dict[str, list[dict]]) -> Iterable[str]:
    """Lines of Markdown: medians, the range of the rounds, and each rate in that of the first that returns the same."""
    yield "| loader | returns | images/CPU-s | range | × | images/s | start-up, s | CPU-s |"
    yield "|---" * 8 + "|"
    first: dict[str, float] = {}
    for name, found in rows.items():
        loader, _, kind = name.replace("pillow", "pillow-nothing").partition("-")
        columns = {key: [each[key] for each in found] for key in found[0]}
        cpu, wall, start_cpu, start = map(statistics.median, columns.values())
        span = f"{min(columns['cpu']):.0f}–{max(columns['cpu']):.0f}"
        times = cpu / first.setdefault(kind, cpu)
        yield f"| {loader} | {kind} | {cpu:.0f} | {span} | {times:.2f} | {wall:.0f} | {start:.1f} | {start_cpu:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tree", metavar="DIR", type=Path, help="folder that holds train/<wnid>/*.JPEG")
    add("--images", type=int, default=4000, help="training images; fewer files are repeated (default: 4000)")
    add("--workers", type=int, default=2, help="worker processes (default: 2)")
    add("--batch", type=int, default=64, help="images a batch (default: 64)")
    add("--size", type=int, default=224, help="side of a crop, pixels (default: 224)")
    add("--rounds", type=int, default=6, help="of all loaders in turn (default: 6)")
    add("--only", default=",".join(LOADERS), help="loaders, with commas (default: all that are installed)")
    add("--python", metavar="LOADER=PATH", action="append", default=[], help="the Python that runs this loader")
    add("--work", metavar="DIR", type=Path, help="folder to work in (default: a temporary one)")
    add("--parts", action="store_true", help="the parts of an image's time, in one process")
    add("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    add("--begun", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return print(json.dumps(measure(a.measure, a.work, a)))
    if not a.tree or not set(a.only.split(",")) <= set(LOADERS):
        parser.error(f"give --tree, and of --only these: {', '.join(LOADERS)}")
    with tempfile.TemporaryDirectory(dir=a.work, prefix="loading-") as folder:
        work = Path(folder)
        prepare(work, a.tree, a.images)
        if a.parts:
            torch.set_num_threads(1)
            return parts(work, a)
        print(f"# {a.images} images, {a.workers} workers, batches of {a.batch}, {a.size} px", flush=True)
        # The first round converts, where a loader has a format of its own, and fills the page cache.
        rows: dict[str, list[dict]] = {name: [] for name in a.only.split(",") if measure_apart(name, work, a)}
        for _, name in itertools.product(range(a.rounds), list(rows)):
            if found := measure_apart(name, work, a):
                rows[name].append(found)
                print(f"# {name} {found['cpu']:.0f}/CPU-s {found['wall']:.0f}/s", flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
