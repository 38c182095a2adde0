"""Where a loader process spends its time: milliseconds of CPU an image, by stage.

    python tests/benchmarks/profile_loading.py --tree=/data/imagenet --images=1000
    python tests/benchmarks/profile_loading.py --standin

In:  a tree with train/<wnid>/*.JPEG, or the drawn stand-in; it is converted to shards in a temporary folder.
Out: a table, medians over the rounds. Time within a stage that another stage calls counts for the other.

Stages are the library's calls that the loader makes, timed where they are made, in the main process. `hand-over` is
what a worker process and the main one take on top: pickling, shared memory, and starting the process, which
an epoch of so few images makes dear. `Pillow's bare load` is the same files, opened and decoded, and nothing else.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageFile

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

from loading import cpu_seconds, prepare  # noqa: E402

import imagenet_train  # noqa: E402

STAGES = {  # stage: (owner, function) of the calls that belong to it
    "unpack": [(imagenet_train, "unpack")],
    "open": [(Image, "open")],
    "decode": [(ImageFile.ImageFile, "load")],
    "crop, to RGB": [(Image.Image, "convert"), (Image.Image, "crop")],
    "to a tensor": [(Image.Image, "tobytes"), (torch, "frombuffer")],
    "resize": [(Image.Image, "resize"), (torch.nn.functional, "interpolate")],
    "flip": [(torch.Tensor, "flip")],
    "draw the crop": [(imagenet_train, "random_crop")],
    "batch": [(imagenet_train.Collate, "__call__")],
}


class Clock:
    """CPU seconds of each stage in the main thread, without those of the stages that it called."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.inner = [0.0]  # of each open call: seconds of the stages called in it

    def timed(self, stage: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            begun = time.thread_time()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - begun
                self.spent[stage] += whole - self.inner.pop()
                self.inner[-1] += whole

        return call

    def run(self, action: Callable) -> float:
        """Seconds of the whole action."""
        calls = [(stage, owner, name) for stage, found in STAGES.items() for owner, name in found]
        wrapped = [(owner, name, getattr(owner, name), stage) for stage, owner, name in calls]
        for owner, name, function, stage in wrapped:
            setattr(owner, name, self.timed(stage, function))
        try:
            begun = time.thread_time()
            action()
            return time.thread_time() - begun
        finally:
            for owner, name, function, _ in wrapped:
                setattr(owner, name, function)


def main() -> int:
    parser = argparse.ArgumentParser(description="Milliseconds an image, by stage of the loader.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tree", metavar="DIR", type=Path, help="folder that holds train/<wnid>/*.JPEG")
    source.add_argument("--standin", action="store_true", help="draw the stand-in and use that")
    parser.add_argument("--images", type=int, default=1000, help="training images (default: 1000)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default: 224)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        prepare(Path(folder), a)
        index = imagenet_train.read_index(f"{folder}/data", "train")
        reader = imagenet_train.LoaderConfig(index, True, batch=min(64, index.total), size=a.size, shuffle=100)
        images = reader.steps * reader.batch
        files = [path.read_bytes() for path in Path(folder).glob("tree/train/*/*")][:images]
        rows: dict[str, list[float]] = {}

        def epoch(workers: int) -> None:
            for _ in imagenet_train.Loader(replace(reader, workers=workers)):
                pass

        for _ in range(a.rounds):
            clock = Clock()
            whole = clock.run(lambda: epoch(0))
            begun = cpu_seconds()
            epoch(1)
            apart = cpu_seconds() - begun
            begun = time.thread_time()
            for data in files:
                Image.open(io.BytesIO(data)).load()
            bare = time.thread_time() - begun
            rest = whole - sum(clock.spent.values())
            parts = clock.spent | {"tar, shuffle, rest": rest, "= in one process": whole}
            parts |= {"hand-over": apart - whole, "= with a worker": apart, "Pillow's bare load": bare}
            for stage, seconds in parts.items():
                rows.setdefault(stage, []).append(seconds * 1000 / images)
    print(f"| stage | ms an image | range of {a.rounds} rounds, {images} images, {a.size} px |\n|---|---|---|")
    for stage, found in rows.items():
        print(f"| {stage} | {statistics.median(found):.3f} | {min(found):.3f}–{max(found):.3f} |")
    bare, one, apart = (
        statistics.median(rows[name]) for name in ("Pillow's bare load", "= in one process", "= with a worker")
    )
    print(f"# of Pillow's bare load rate: {bare / one:.2f} in one process, {bare / apart:.2f} with a worker")
    return 0


if __name__ == "__main__":
    sys.exit(main())
