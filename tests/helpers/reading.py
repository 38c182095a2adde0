"""Reads one shard as a loader process does, and says what must come out."""

import io
import multiprocessing
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

import imagenet_shards
from imagenet_shards import Block, Index
from imagenet_train import IGNORE_INDEX, Loader, LoaderConfig, in_order, list_blocks

NAME = "imagenet-train-000001.tar"  # of 7 samples, in blocks of 3, 3 and 1
Sample = dict[str, Any]


def index_of(layout: list[list[int]], prefix: str = "") -> Index:
    """An index of shards whose blocks have these numbers of samples."""
    blocks = [Block(n, place, 1, size, 0) for n, shard in enumerate(layout) for place, size in enumerate(shard)]
    return Index(prefix, ["n0"], [{"url": f"{n}.tar", "sha256": "0" * 64} for n in range(len(layout))], blocks)


def at(index: Index, prefix: str) -> Index:
    """The same index, of shards that are read from another prefix."""
    return replace(index, prefix=prefix)


def read_shard(index: Index, start: int = 0, stop: int | None = None, name: str = NAME, **how: Any) -> Iterator[Sample]:
    """The samples start … stop of a shard, by the first stages of the pipeline, by default without retries."""
    how = {"retry_for": 0, "timeout": 20, "cache_full": multiprocessing.Event()} | how
    blocks = [n for n, block in enumerate(index.blocks) if index.entries[block.shard]["url"] == name]
    numbers = range(index.starts[blocks[0]], index.starts[blocks[-1] + 1])[start:stop]
    wanted = [n for n in blocks if index.starts[n] < numbers.stop and index.starts[n + 1] > numbers.start]
    return iter(wds.DataPipeline(
        partial(list_blocks, wanted, index), partial(imagenet_shards.open_blocks, index=index, **how),
        tar_file_expander, group_by_keys, partial(in_order, order=list(numbers), index=index),
    ))


def unpack(data: bytes, samples: int) -> list[Sample]:
    """The samples of a block that consists of these bytes."""
    streams = [{"url": "0.tar#0", "stream": io.BytesIO(data)}]
    return list(in_order(group_by_keys(tar_file_expander(streams)), list(range(samples)), index_of([[samples]])))


def labels_of(index: Index, workers: int = 2, **how: Any) -> list[int]:
    """The sorted labels of a validation by forked loader processes."""
    loader = Loader(LoaderConfig(index, False, 5, 32, 36, workers=workers, **{"retry_for": 0} | how))
    try:
        return sorted(label for _, labels in loader for label in labels.tolist() if label != IGNORE_INDEX)
    finally:
        loader.batches = None  # ends the processes also if an error's traceback is kept


def found(samples: Iterable[Sample]) -> list[tuple[str, bytes, bytes]]:
    return [(sample["__key__"], sample["cls"], sample["jpg"]) for sample in samples]


def expected(shards: Path, name: str = NAME) -> list[tuple[str, bytes, bytes]]:
    """(key, cls, jpg) of a shard's samples, read with Python's tarfile."""
    with tarfile.open(shards / name) as tar:
        data = [(m.name.partition(".")[0], tar.extractfile(m).read()) for m in tar]
    return [(key, cls, jpg) for (key, cls), (_, jpg) in zip(data[::2], data[1::2])]


def places(data: bytes) -> dict[str, int]:
    """Where a run of tar members may be cut: every kind of place."""
    members = tarfile.open(fileobj=io.BytesIO(data)).getmembers()
    last = members[-1]
    return {
        "at the start": 0,
        "in the first header": 100,
        "between samples": members[2].offset if len(members) > 2 else members[1].offset,
        "between cls and jpg": members[1].offset,
        "in a header": last.offset + 300,
        "in an image": members[1].offset_data + 1000,
        "in the last padding": last.offset_data + last.size - (last.size % 512 == 0),
    }
