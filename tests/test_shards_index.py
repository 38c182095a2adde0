"""The index: its blocks tile a shard's data and hold exactly its samples, and other libraries read it."""

import io
import itertools
import json
import random
import tarfile
import zlib
from pathlib import Path

import pytest
import wids
from conftest import convert
from hypothesis import given, settings
from hypothesis import strategies as st

import imagenet_shards as script


def tar_members(data: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of a tar's members, read with Python's tarfile; the trailer may be missing."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def check_blocks(shard: Path, entry: dict, block_size: int) -> None:
    """The blocks tile the shard's data; each one alone is a tar of exactly its samples, and its CRC-32 is right."""
    data, members = shard.read_bytes(), []
    end = 0
    for offset, length, samples, crc32 in entry["blocks"]:
        assert offset == end
        end += length
        block = data[offset:end]
        assert zlib.crc32(block) == crc32
        assert len({name.split(".")[0] for name, _ in tar_members(block)}) == samples
        members += tar_members(block)
    assert members == tar_members(data)
    assert data[end:] == bytes(len(data) - end) and len(data) - end >= 1024  # the trailer
    *full, last = (samples for _, _, samples, _ in entry["blocks"])
    assert set(full) <= {block_size} and 1 <= last <= block_size
    assert sum(full) + last == entry["nsamples"]


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_blocks_tile_the_shard_and_hold_its_samples(tree, tmp_path, block_size):
    assert convert(tree, tmp_path, "--maxcount=25", f"--block-size={block_size}") == 0
    for split in ("train", "val"):
        index = json.loads((tmp_path / f"imagenet-{split}.json").read_text())
        for entry in index["shardlist"]:
            check_blocks(tmp_path / entry["url"], entry, block_size)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(0, 60), st.integers(1, 50), st.randoms())
def test_blocks_do_not_depend_on_how_the_bytes_arrive(lengths, trailer, chunk, rng):
    """A block's end may be announced before or after its bytes have passed."""
    data = rng.randbytes(sum(lengths) + trailer)
    ends = list(itertools.accumulate(lengths))
    digest, waiting = script.ShardStream(io.BytesIO()), list(zip(ends, range(1, 100)))
    for start in range(0, len(data), chunk):
        while waiting and rng.random() < 0.5:
            digest.end_block(*waiting.pop(0))
        digest.write(data[start : start + chunk])
    for block in waiting:
        digest.end_block(*block)
    digest.update(b"")
    expected = [
        [start, end - start, number, zlib.crc32(data[start:end])]
        for number, (start, end) in enumerate(zip([0, *ends], ends), 1)
    ]
    assert digest.blocks == expected and digest.size == len(data)


def test_full_scale_index_is_small():
    """1,281,167 samples in 147 shards: below 2 MB."""
    rng = random.Random(0)
    shards = []
    for number, samples in enumerate([8716] * 146 + [1_281_167 - 146 * 8716]):
        sizes = [rng.randint(6_500_000, 8_500_000) // 512 * 512 for _ in range(-(-samples // 64))]
        offsets = [0, *itertools.accumulate(sizes)]
        blocks = [[o, n, 64, rng.getrandbits(32)] for o, n in zip(offsets, sizes)]
        shards.append({
            "url": f"imagenet-train-{number:06d}.tar", "nsamples": samples, "filesize": offsets[-1] + 10240,
            "sha256": f"{rng.getrandbits(256):064x}", "skipped": [], "blocks": blocks,
        })
    classes = [f"n{number:08d}" for number in range(1000)]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "imagenet-train", "shardlist": shards,
               "classes": classes, "class_names": ["great white shark, white shark"] * 1000, "recipe": {}}
    text = script.format_index(content)
    assert json.loads(text) == content
    assert len(text) < 2e6 and max(map(len, text.splitlines())) < 1e5


def test_wids_reads_the_index(tree, shards):
    dataset = wids.ShardListDataset(str(shards / "imagenet-val.json"), cache_dir=None)
    assert len(dataset) == 30
    assert {int(sample[".cls"]) for sample in map(dataset.__getitem__, range(30))} == set(range(10))
