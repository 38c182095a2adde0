"""Loaders of the same images side by side: this project's, and what else reads ImageNet into PyTorch.

    python3 tests/benchmarks/loading.py --tree=/data/imagenet --images=4000 --workers=2
    python3 tests/benchmarks/loading.py --standin --only=project-bytes,webdataset-bytes

In:  a tree with train/<wnid>/*.JPEG, or the drawn stand-in, whose images are small: its figures say little.
Out: a table of images per CPU-second, of all processes, and per second, medians over interleaved rounds.

Each gives batches of RandomResizedCrop + flip. Compare rows that return the same: `bytes` are uint8 [B, S, S, 3], of
which a GPU makes the floats; `floats` are normalised float32 [B, 3, S, S]. Each loader runs in a process of its own,
and the start of its workers counts. `pillow` only reads and decodes each file, in one process: no crop, no batches. A
peer that is not installed is left out; requirements.txt beside this file names them.

What floats cost, measured for batches of 64 on one core: 0.68 ms an image if a whole batch is converted by
`x.permute(0, 3, 1, 2).float().sub_(mean).div_(std)`, 0.16 ms as project_floats() does it. 0.25 ms are page faults of 39
MB of fresh memory for each batch, which is larger than the cache, so each of the three passes goes through memory; and
a broadcast over three channels that lie side by side has inner loops of three values. The others pay the same and
more: ToTensor makes two copies, and the floats, four times the bytes, are copied into shared memory.
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
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import imagenet_train as script  # noqa: E402

MEAN, STD = script.MEAN, script.STD


def make_shards(work: Path, name: str, images: int, *flags: str) -> None:
    """Convert work/tree into eight shards in work/name."""
    count = f"--maxcount={-(-images // 8)}"
    flags = (f"--imagenet={work}/tree", f"--shards={work / name}", "--splits=train", count, *flags)
    command = [sys.executable, TESTS.parent / "imagenet_shards.py", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True)


def to_bytes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def crops(size: int, floats: bool) -> T.Compose:
    """What torchvision's users do to a training image."""
    last = [T.ToTensor(), T.Normalize(MEAN, STD)] if floats else [to_bytes]
    return T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *last])


# ---------------------------------------------------------------- loaders: (work folder, flags) → batches


def project(work: Path, a: argparse.Namespace, shards: str = "data") -> Iterable:
    index = script.read_index(str(work / shards), "train")
    return script.Loader(script.LoaderConfig(index, True, a.batch, a.size, shuffle=500, workers=a.workers))


def project_256(work: Path, a: argparse.Namespace) -> Iterable:
    """As project, from shards made with --resize=256."""
    if not (work / "data-256/imagenet-train.json").exists():
        make_shards(work, "data-256", a.images, "--resize=256")
    return project(work, a, "data-256")


class Floats(script.Collate):
    """Also normalises, image by image, into floats [B, 3, S, S] channels_last, in memory that is used again."""

    def __init__(self, config: script.LoaderConfig) -> None:
        super().__init__(config)
        # A row of pixels is one run of values; mean and std are repeated along it.
        self.mean, self.std = (torch.tensor(x).repeat(config.size) * 255 for x in (MEAN, STD))
        self.floats = deque(torch.empty(self.shape).share_memory_() for _ in range(4))

    def __call__(self, samples: list) -> list:
        images, labels, errors = super().__call__(samples)
        self.floats.rotate(-1)
        for image, normalised in zip(images.flatten(2), self.floats[0].flatten(2)):
            normalised.copy_(image).sub_(self.mean).div_(self.std)
        return [self.floats[0].permute(0, 3, 1, 2), labels, errors]


def project_floats(work: Path, a: argparse.Namespace) -> Iterable:
    script.Collate = Floats  # of the processes that are forked from this one
    return project(work, a)


def webdataset(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    """WebDataset as its documentation shows it."""
    import webdataset as wds

    urls = sorted(map(str, (work / "data").glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(500).decode("pil")
    data = data.to_tuple("jpg cls").map_tuple(crops(a.size, floats), int).batched(a.batch, partial=False)
    return wds.WebLoader(data, batch_size=None, num_workers=a.workers)


def imagefolder(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(work / "tree/train", crops(a.size, floats))
    return DataLoader(data, a.batch, shuffle=True, num_workers=a.workers, drop_last=True)


def timm(work: Path, a: argparse.Namespace) -> Iterable:
    from timm.data import create_dataset, create_loader

    data = create_dataset("wds/imagenet", root=str(work / "data"), split="train", is_training=True, batch_size=a.batch)
    return create_loader(
        data, (3, a.size, a.size), a.batch, is_training=True, use_prefetcher=False, num_workers=a.workers, mean=MEAN,
        std=STD, color_jitter=None, interpolation="bilinear", device=torch.device("cpu"), persistent_workers=False,
    )


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
    transform = partial(cropped, crops(a.size, True))
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

    transform, data = crops(a.size, True), Images(local=folder, shuffle=True, batch_size=a.batch)
    return DataLoader(data, a.batch, num_workers=a.workers, drop_last=True)


def dali(work: Path, a: argparse.Namespace, floats: bool) -> Iterable:
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


def pillow(work: Path, a: argparse.Namespace) -> Iterable:
    paths = sorted(work.glob("tree/train/*/*"))
    random.Random(0).shuffle(paths)
    for path in paths:
        Image.open(path).load()
        yield [path], [0]


LOADERS: dict[str, tuple[Callable, str | None]] = {  # and the package that it needs beyond the project's
    "project-bytes": (project, None),
    "webdataset-bytes": (partial(webdataset, floats=False), None),
    "imagefolder-bytes": (partial(imagefolder, floats=False), None),
    "dali-bytes": (partial(dali, floats=False), "nvidia.dali"),
    "project-256-bytes": (project_256, None),
    "project-floats": (project_floats, None),
    "webdataset-floats": (partial(webdataset, floats=True), None),
    "imagefolder-floats": (partial(imagefolder, floats=True), None),
    "timm-floats": (timm, "timm"),
    "litdata-floats": (litdata, "litdata"),
    "mosaicml-floats": (mosaicml, "streaming"),
    "dali-floats": (partial(dali, floats=True), "nvidia.dali"),
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
            floats, number = name.endswith("floats"), len(y.flatten())
            wanted = [number, 3, a.size, a.size] if floats else [number, a.size, a.size, 3]
            if list(x.shape) != wanted or x.is_floating_point() != floats:
                raise ValueError(f"{name}: a batch of {x.dtype} {list(x.shape)}, expected {wanted}")
        images += len(x)
    wall = time.perf_counter() - begun
    if name.startswith("project"):
        loader.batches = None  # ends the loader processes
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
        raise SystemExit(f"{root}/train: no class folders with images in it; give another --tree")
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
    return script.read_index(str(work / "data"), "train").total


def table(rows: dict[tuple[str, int], list[dict]]) -> Iterable[str]:
    """Lines of Markdown: medians, the range of the rounds, and each rate in that of the first that returns the same."""
    yield "| loader | returns | workers | images/CPU-s | range | × | images/s | rounds |"
    yield "|---|---|---|---|---|---|---|---|"
    first: dict[str, float] = {}
    for (name, workers), found in rows.items():
        if not found:
            continue
        loader, _, kind = name.rpartition("-") if "-" in name else (name, "", "nothing")
        cpu = [each["cpu"] for each in found]
        rate, wall = statistics.median(cpu), statistics.median(each["wall"] for each in found)
        yield (
            f"| {loader} | {kind} | {workers} | {rate:.0f} | {min(cpu):.0f}–{max(cpu):.0f} "
            f"| {rate / first.setdefault(kind, rate):.2f} | {wall:.0f} | {len(found)} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare loaders of ImageNet's training images.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tree", metavar="DIR", type=Path, help="folder that holds train/<wnid>/*.JPEG")
    source.add_argument("--standin", action="store_true", help="draw the stand-in and use that")
    source.add_argument("--measure", metavar="LOADER", choices=LOADERS, help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--images", type=int, default=2000, help="training images; fewer files are repeated (default: 2000)")
    add("--workers", type=int, default=2, help="worker processes (default: 2)")
    add("--batch", type=int, default=64, help="images a batch (default: 64)")
    add("--size", type=int, default=224, help="side of a crop, pixels (default: 224)")
    add("--rounds", type=int, default=3, help="of all loaders in turn (default: 3)")
    add("--only", default=",".join(LOADERS), help="loaders, with commas (default: all that are installed)")
    add("--work", metavar="DIR", type=Path, help="folder to work in (default: a temporary one)")
    add("--timeout", type=float, default=600, help="seconds that one measurement may take (default: 600)")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure, a.work, a)))
        return 0
    names = [name for name in a.only.split(",") if name]
    if not (a.tree or a.standin) or not set(names) <= set(LOADERS):
        parser.error(f"give --tree or --standin, and of --only these: {', '.join(LOADERS)}")
    for name in [name for name in names if not installed(LOADERS[name][1])]:
        print(f"# {name}: {LOADERS[name][1]} is not installed, left out")
        names.remove(name)
    with tempfile.TemporaryDirectory(dir=a.work, prefix="loading-") as folder:
        work = Path(folder)
        print(f"# {prepare(work, a)} images, batches of {a.batch}, {a.size} px, {a.rounds} rounds", flush=True)
        rows: dict[tuple[str, int], list[dict]] = {(name, a.workers): [] for name in names}
        for name in {"project-256-bytes", "litdata-floats", "mosaicml-floats"} & set(names):  # they convert first
            measure_apart(name, work, a, a.workers)
        for _, name in itertools.product(range(a.rounds), names):
            if found := measure_apart(name, work, a, a.workers):
                rows[name, a.workers].append(found)
                print(f"# {name} {found['cpu']:.0f}/CPU-s {found['wall']:.0f}/s", flush=True)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
