"""Loaders of the same images side by side: this project's, and what else reads ImageNet into PyTorch.

    python tests/benchmarks/loading.py --tree=/data/imagenet --images=4000 --workers=2
    python tests/benchmarks/loading.py --standin --only=project,webdataset

In:  a tree with train/<wnid>/*.JPEG, or the drawn stand-in, whose images are small: its figures say little.
Out: a table of images per CPU-second, of all processes, and per second, medians over interleaved rounds.

Each gives batches of RandomResizedCrop + flip: float32, normalised, NCHW; where its name ends in -u8, uint8 NHWC,
of which a GPU makes the floats. Each runs in a process of its own, and the start of its workers counts. `pillow` only
reads and decodes each file, in one process: no crop, no batches. A peer that is not installed is left out:

    pip install timm litdata mosaicml-streaming spdl nvidia-dali-cuda120
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import itertools
import json
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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import imagenet_train  # noqa: E402

MEAN, STD = imagenet_train.MEAN, imagenet_train.STD


def make_shards(work: Path, name: str, images: int, *flags: str) -> None:
    """Convert work/tree into eight shards in work/name."""
    count = f"--maxcount={-(-images // 8)}"
    flags = (f"--imagenet={work}/tree", f"--shards={work / name}", "--splits=train", count, *flags)
    command = [sys.executable, TESTS.parent / "imagenet_shards.py", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True)


def crops(size: int) -> T.Compose:
    """What torchvision's users do to a training image."""
    return T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


# ---------------------------------------------------------------- loaders: (work folder, flags) → batches


def project_u8(work: Path, a: argparse.Namespace, shards: str = "data") -> Iterable:
    index = imagenet_train.read_index(str(work / shards), "train")
    reader = imagenet_train.LoaderConfig(index, True, batch=a.batch, size=a.size, shuffle=500, workers=a.workers)
    return imagenet_train.Loader(reader)


def project_256_u8(work: Path, a: argparse.Namespace) -> Iterable:
    """As project-u8, from shards made with --resize=256."""
    if not (work / "data-256/imagenet-train.json").exists():
        make_shards(work, "data-256", a.images, "--resize=256")
    return project_u8(work, a, "data-256")


def project(work: Path, a: argparse.Namespace) -> Iterable:
    """As project-u8, and what the model does first, here on the CPU."""
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (MEAN, STD))
    return ((x.permute(0, 3, 1, 2).float().sub_(mean).div_(std), y) for x, y in project_u8(work, a))


def webdataset(work: Path, a: argparse.Namespace) -> Iterable:
    """WebDataset as its documentation shows it."""
    import webdataset as wds

    urls = sorted(map(str, (work / "data").glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(500).decode("pil")
    data = data.to_tuple("jpg cls").map_tuple(crops(a.size), int).batched(a.batch, partial=False)
    return wds.WebLoader(data, batch_size=None, num_workers=a.workers)


def imagefolder(work: Path, a: argparse.Namespace) -> Iterable:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(work / "tree/train", crops(a.size))
    return DataLoader(data, a.batch, shuffle=True, num_workers=a.workers, drop_last=True)


def timm(work: Path, a: argparse.Namespace) -> Iterable:
    from timm.data import create_dataset, create_loader

    data = create_dataset("wds/imagenet", root=str(work / "data"), split="train", is_training=True, batch_size=a.batch)
    return create_loader(
        data, (3, a.size, a.size), a.batch, is_training=True, use_prefetcher=False, num_workers=a.workers, mean=MEAN,
        std=STD, color_jitter=None, interpolation="bilinear", device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip


def image_and_label(item: tuple) -> dict:
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def cropped(transform: Callable, item: dict) -> tuple[torch.Tensor, int]:
    return transform(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]


def litdata(work: Path, a: argparse.Namespace) -> Iterable:
    import litdata as ld
    from torchvision.datasets import ImageFolder

    folder = str(work / "litdata")
    if not os.path.exists(f"{folder}/index.json"):
        items = ImageFolder(work / "tree/train").samples
        ld.optimize(image_and_label, inputs=items, output_dir=folder, chunk_bytes="64MB", num_workers=2)
    transform = partial(cropped, crops(a.size))
    data = ld.StreamingDataset(folder, shuffle=True, drop_last=True, transform=transform)
    return ld.StreamingDataLoader(data, batch_size=a.batch, num_workers=a.workers)


def mosaicml(work: Path, a: argparse.Namespace) -> Iterable:
    from streaming import MDSWriter, StreamingDataset
    from torchvision.datasets import ImageFolder

    folder = str(work / "mosaicml")
    if not os.path.exists(f"{folder}/index.json"):
        with MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}, size_limit=64 << 20) as writer:
            for item in ImageFolder(work / "tree/train").samples:
                writer.write(image_and_label(item))

    class Images(StreamingDataset):
        def __getitem__(self, place):
            return cropped(transform, super().__getitem__(place))

    transform, data = crops(a.size), Images(local=folder, shuffle=True, batch_size=a.batch)
    return DataLoader(data, a.batch, num_workers=a.workers, drop_last=True)


def dali(work: Path, a: argparse.Namespace, floats: bool = True) -> Iterable:
    """DALI's native pipeline on the CPU; `workers` are its threads."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=a.batch, num_threads=max(1, a.workers), device_id=None)
    def pipeline():
        data, label = fn.readers.file(file_root=str(work / "tree/train"), random_shuffle=True, name="files")
        image = fn.decoders.image_random_crop(
            data, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        image = fn.resize(image, size=(a.size, a.size), interp_type=types.INTERP_LINEAR, antialias=True)
        if not floats:
            return fn.flip(image, horizontal=fn.random.coin_flip()), label
        mean, std = ([255 * x for x in values] for values in (MEAN, STD))
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, output_layout="CHW"), label

    pipe = pipeline()
    pipe.build()
    batches = DALIGenericIterator([pipe], ["x", "y"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP)
    return ((batch[0]["x"], batch[0]["y"]) for batch in batches)


def dali_u8(work: Path, a: argparse.Namespace) -> Iterable:
    return dali(work, a, floats=False)


def spdl(work: Path, a: argparse.Namespace) -> Iterable:
    """SPDL with torchvision's transforms, as its own example: threads in one process."""
    from spdl.pipeline import PipelineBuilder
    from torchvision.datasets import ImageFolder

    def load(item: tuple[str, int]) -> tuple[torch.Tensor, int]:
        with Image.open(item[0]) as image:
            return transform(image.convert("RGB")), item[1]

    def collate(rows: list) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])

    transform, items = crops(a.size), ImageFolder(work / "tree/train").samples
    random.shuffle(items)
    stages = PipelineBuilder().add_source(items).pipe(load, concurrency=a.workers)
    stages = stages.aggregate(a.batch, drop_last=True).pipe(collate).add_sink(4)
    pipeline = stages.build(num_threads=a.workers + 1)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator(timeout=120)


def pillow(work: Path, a: argparse.Namespace) -> Iterable:
    paths = sorted(work.glob("tree/train/*/*"))
    random.Random(0).shuffle(paths)
    for path in paths:
        Image.open(path).load()
        yield [path], [0]


LOADERS: dict[str, tuple[Callable, str | None]] = {  # and the package that it needs beyond the project's
    "project-u8": (project_u8, None),
    "project-256-u8": (project_256_u8, None),
    "project": (project, None),
    "webdataset": (webdataset, None),
    "imagefolder": (imagefolder, None),
    "timm": (timm, "timm"),
    "litdata": (litdata, "litdata"),
    "mosaicml": (mosaicml, "streaming"),
    "spdl": (spdl, "spdl.pipeline"),
    "dali": (dali, "nvidia.dali"),
    "dali-u8": (dali_u8, "nvidia.dali"),
    "pillow": (pillow, None),
}


def installed(package: str | None) -> bool:
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False


# ---------------------------------------------------------------- one measurement


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(name: str, work: Path, a: argparse.Namespace) -> dict[str, float]:
    """Load one epoch. Raises ValueError if a batch is not what this comparison is about."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    loader = LOADERS[name][0](work, a)  # shards of its own, if it needs any, are made here, before the clock starts
    cpu, begun, images, batches = cpu_seconds(), time.perf_counter(), 0, iter(loader)
    for x, y in batches:
        if name != "pillow":
            shape = (a.size, a.size, 3) if name.endswith("-u8") else (3, a.size, a.size)
            if tuple(x.shape[1:]) != shape or len(x) != len(y.flatten()):
                raise ValueError(f"{name}: a batch of {tuple(x.shape)}, expected [B, {shape}]")
        images += len(x)
    wall = time.perf_counter() - begun
    del loader, batches
    gc.collect()  # ends worker processes, so that their time is counted
    return {"images": images, "wall": images / wall, "cpu": images / (cpu_seconds() - cpu)}


def measure_apart(name: str, work: Path, a: argparse.Namespace, workers: int) -> dict[str, float] | None:
    """measure() in a process of its own; None, and its last words on stderr, if that fails."""
    flags = [f"--{key}={getattr(a, key)}" for key in ("batch", "size", "images")]
    command = [sys.executable, __file__, f"--measure={name}", f"--work={work}", f"--workers={workers}", *flags]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=a.timeout)
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        print(f"{name}: {words[-1][:300]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- all measurements


def prepare(work: Path, a: argparse.Namespace, copy: bool = False) -> int:
    """A tree of --images files, linked or copied from the given one, repeated under other names, and shards of it."""
    root = a.tree
    if a.standin:
        from standin import make_tree

        root = work / "standin"
        make_tree(root, train=50, val=1)
    files = sorted(path for path in (root / "train").glob("*/*") if path.is_file())
    if not files:
        raise SystemExit(f"loading.py: {root}/train: no class folders with images in it; give another --tree")
    if len(files) > a.images:  # of all classes, as evenly as they come
        files = random.Random(0).sample(files, a.images)
    for turn, path in itertools.islice(((n, path) for n in itertools.count() for path in files), a.images):
        link = work / "tree/train" / path.parent.name / f"{path.stem}-{turn}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            (shutil.copyfile if copy else os.link)(path, link)
        except OSError:  # a link, to another disk
            shutil.copyfile(path, link)
    make_shards(work, "data", a.images)
    return imagenet_train.read_index(str(work / "data"), "train").total


def table(rows: dict[tuple[str, int], list[dict]]) -> Iterable[str]:
    """Lines of Markdown: medians, the range of the rounds, and each one's rate in the first one's."""
    yield "| loader | workers | images/CPU-s | range | × | images/s | rounds |"
    yield "|---|---|---|---|---|---|---|"
    first = None
    for (name, workers), found in rows.items():
        if not found:
            continue
        cpu = [each["cpu"] for each in found]
        rate, wall = statistics.median(cpu), statistics.median(each["wall"] for each in found)
        first = first or rate
        yield (
            f"| {name} | {workers} | {rate:.0f} | {min(cpu):.0f}–{max(cpu):.0f} | {rate / first:.2f} | {wall:.0f} "
            f"| {len(found)} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare loaders of ImageNet's training images.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tree", metavar="DIR", type=Path, help="folder that holds train/<wnid>/*.JPEG")
    source.add_argument("--standin", action="store_true", help="draw the stand-in and use that")
    source.add_argument("--measure", metavar="LOADER", choices=LOADERS, help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--images", type=int, default=2000, help="training images; fewer files are repeated (default: 2000)")
    add("--workers", default="2", help="worker processes, or several numbers with commas for `project-u8` (default: 2)")
    add("--batch", type=int, default=64, help="images a batch (default: 64)")
    add("--size", type=int, default=224, help="side of a crop, pixels (default: 224)")
    add("--rounds", type=int, default=3, help="of all loaders in turn (default: 3)")
    add("--only", default=",".join(LOADERS), help="loaders, with commas (default: all that are installed)")
    add("--work", metavar="DIR", type=Path, help="folder to work in (default: a temporary one)")
    add("--timeout", type=float, default=600, help="seconds that one measurement may take (default: 600)")
    a = parser.parse_args()
    workers = [int(number) for number in a.workers.split(",")]
    if a.measure:
        a.workers = workers[0]
        print(json.dumps(measure(a.measure, a.work, a)))
        return 0
    names = [name for name in a.only.split(",") if name]
    if not (a.tree or a.standin) or not set(names) <= set(LOADERS):
        parser.error(f"give --tree or --standin, and of --only these: {', '.join(LOADERS)}")
    for name in [name for name in names if not installed(LOADERS[name][1])]:
        print(f"# {name}: {LOADERS[name][1]} is not installed, left out")
        names.remove(name)
    jobs = [(name, n) for name in names for n in (workers if name == "project-u8" else workers[:1])]
    with tempfile.TemporaryDirectory(dir=a.work, prefix="loading-") as folder:
        work = Path(folder)
        print(f"# {prepare(work, a)} images, batches of {a.batch}, {a.size} px, {a.rounds} rounds", flush=True)
        rows: dict[tuple[str, int], list[dict]] = {job: [] for job in jobs}
        for name in {"project-256-u8", "litdata", "mosaicml"} & set(names):  # they convert first
            measure_apart(name, work, a, workers[0])
        for _, job in itertools.product(range(a.rounds), jobs):
            if found := measure_apart(job[0], work, a, job[1]):
                rows[job].append(found)
                print(f"# {job[0]} {job[1]} {found['cpu']:.0f}/CPU-s {found['wall']:.0f}/s", flush=True)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
