"""Reading one shard as a loader process does, and what must come out."""

import io
import multiprocessing
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagenet_train import Index, LoaderConfig, read_samples

NAME = "imagenet-train-000001.tar"  # of 7 samples, in blocks of 3, 3 and 1


def read_shard(
    index: Index, start: int = 0, stop: int | None = None, name: str = NAME, **config
) -> Iterator[dict[str, Any]]:
    """The samples start … stop of a shard, without retries unless `config` says otherwise."""
    blocks = [number for number, block in enumerate(index.blocks) if index.names[block.shard] == name]
    numbers = range(index.starts[blocks[0]], index.starts[blocks[-1] + 1])[start:stop]
    wanted = [n for n in blocks if index.starts[n] < numbers.stop and index.starts[n + 1] > numbers.start]
    how = LoaderConfig(index, True, 4, 32, **{"retries": 0, "timeout": 20} | config)
    return read_samples(numbers, wanted, how, multiprocessing.Event())


def at(index: Index, prefix: str) -> Index:
    """The same index, of shards that are read from another prefix."""
    return replace(index, prefix=prefix)


def expected(shards: Path, name: str = NAME) -> list[tuple[str, bytes, bytes]]:
    with tarfile.open(shards / name) as tar:
        data = [(m.name.partition(".")[0], tar.extractfile(m).read()) for m in tar]
    return [(key, cls, jpg) for (key, cls), (_, jpg) in zip(data[::2], data[1::2])]


def found(samples) -> list[tuple[str, bytes, bytes]]:
    return [(sample["__key__"], sample["cls"], sample["jpg"]) for sample in samples]


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
        "in the last image": last.offset_data + last.size - 1,
        "in the last padding": last.offset_data + last.size if last.size % 512 else last.offset_data + last.size - 1,
    }
