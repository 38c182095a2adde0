"""Reads and writes shards without imagenet_shards.py."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any


def samples(folder: Path, split: str) -> list[tuple[str, int, bytes]]:
    """(key, label, image bytes) in the order of the shards, read with Python's tarfile; each key's members adjacent."""
    found = []
    for shard in sorted(folder.glob(f"imagenet-{split}-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        for (cls_name, cls), (jpg_name, jpg) in zip(members[::2], members[1::2], strict=True):
            key = cls_name.removesuffix(".cls")
            assert (cls_name, jpg_name) == (f"{key}.cls", f"{key}.jpg")
            found.append((key, int(cls), jpg))
    return found


def everything(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of every file in a folder, apart from the records of finished shards."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def recipe(**changes: int) -> dict[str, Any]:
    """What decides the bytes of a conversion without flags."""
    return {"seed": 0, "maxsize": 10**9, "maxcount": 100_000, "block_size": 64, "resize": None} | changes


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
