"""Blocks → streams → samples: checked bytes from the source or the cache, read ahead, expanded by WebDataset."""

import gc
import gzip
import io
import multiprocessing
import os
import shutil
import tarfile
import threading
import zlib
from pathlib import Path

import faults
import pytest
from conftest import VAL_IMAGES
from faults import damaged, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import NAME, at, expected, found, index_of, read_samples, read_shard, unpack
from runs import train
from webdataset.tariterators import group_by_keys, tar_file_expander

import imagenet_shards as script
from imagenet_shards import PermanentError, UserError, open_writer, read_index
from imagenet_train import IGNORE_INDEX, Loader, LoaderConfig, in_order

pytestmark = pytest.mark.quick


def ustar(*members: tuple[str, bytes]) -> bytes:
    """A run of tar members, without the archive's trailer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()[: tar.offset]


# ---------------------------------------------------------------- tar members

SAMPLE = ("a.cls", b"0"), ("a.jpg", b"1")


def test_members_in_any_order_of_any_image_kind_with_others_between():
    samples = unpack(ustar(("a.jpg", b"1"), ("a.json", b"{}"), ("a.cls", b"0"), ("b.cls", b"1"), ("b.PNG", b"2"),
                           ("README", b""), ("c.jpeg", b"3"), ("c.cls", b"2")), 3)
    assert [(s["__key__"], s["__url__"], s["cls"]) for s in samples] == [
        ("a", "0.tar", b"0"), ("b", "0.tar", b"1"), ("c", "0.tar", b"2"),
    ]  # fmt: skip
    assert (samples[0]["jpg"], samples[1]["png"], samples[2]["jpeg"]) == (b"1", b"2", b"3")


def header(kind: bytes = b"0", size: bytes = b"00000000001\0", name: bytes = b"a.jpg") -> bytes:
    """A tar member's header with a size of any kind, and the checksum that fits it."""
    data = bytearray(ustar((name.decode(), b"x"))[:512])
    data[124:136], data[156:157] = size, kind
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:]))
    return bytes(data)


BASE_256 = [b"\x80" + n.to_bytes(11, "big") for n in (1 << 60,)] + [b"\xff" * 11 + bytes([0]), b"\xff" * 12]
MEMBERS = {  # bytes of a block of one sample: the error
    "no image": (ustar(("a.cls", b"0")), "sample 'a' has no image or no cls"),
    "no label": (ustar(("a.jpg", b"0")), "sample 'a' has no image or no cls"),
    "twice the same": (ustar(*SAMPLE, *SAMPLE), "duplicate file name"),
    "no sample": (ustar(("__meta__", b"")), "fewer samples than"),
    "8 GiB": (header(size=b"77777777777\0"), "a member of 8589934591 bytes is not in its block"),
    "2**60 bytes": (header(size=BASE_256[0]), "a member of 1152921504606846976 bytes is not in its block"),
    "-256 bytes": (header(size=BASE_256[1]), "a member of -256 bytes is not in its block"),
    "-1 bytes": (header(size=BASE_256[2]), "a member of -1 bytes is not in its block"),
    "a size that is no number": (header(size=b"9" * 12), "a member of -1 bytes is not in its block"),
    "a sparse file": (header(kind=b"S"), "is not in its block|a member is a sparse file"),
    "a sparse file of 0 bytes": (header(kind=b"S", size=b"0" * 11 + b"\0"), "a member is a sparse file"),
    "a PAX sparse file": (header(b"x", b"%011o\0" % 22) + b"22 GNU.sparse.size=9e9".ljust(512, b"\0"), "sparse file"),
    "compressed": (gzip.compress(ustar(*SAMPLE) * 9), "not a tar header at byte 0"),
    "a page": (b"<html>404 Not Found</html>", "not a tar header at byte 0: a page that says '404 Not Found'"),
    "an invalid checksum": (ustar(*SAMPLE)[:148] + b"0" * 8 + ustar(*SAMPLE)[156:], "checksum|fewer samples"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_block_must_not_hold_is_one_error(name):
    data, problem = MEMBERS[name]
    with pytest.raises(PermanentError, match=problem) as error:
        unpack(data, 1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_block_of_more_samples_than_the_index_lists():
    data = ustar(*SAMPLE, ("b.cls", b"1"), ("b.jpg", b"2"))
    streams = [{"url": f"0.tar#{number}", "stream": io.BytesIO(data)} for number in (0, 1)]
    with pytest.raises(PermanentError, match="0.tar, block 0: more samples than the 1 that the index lists"):
        list(in_order(group_by_keys(tar_file_expander(streams)), [0, 1], index_of([[1, 1]])))


def test_a_hostile_block_is_named(tmp_path):
    data = header(size=BASE_256[1])
    (tmp_path / "0.tar").write_bytes(data)
    index = index_of([[1]], str(tmp_path))
    index.blocks[0] = script.Block(0, 0, 512, 1, zlib.crc32(data))
    with pytest.raises(PermanentError, match="^0.tar#0, block at byte 0: a member of -256 .*; make the index again"):
        list(read_samples(index, [0], [0]))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        damaged(ustar(("a.cls", b"0"), ("a.jpg", b"x" * 700), ("b.cls", b"1"), ("b.jpg", b"y" * 30))),
        st.builds(header, st.binary(min_size=1, max_size=1), st.binary(min_size=12, max_size=12)),
        st.binary(max_size=2000),
    )
)
def test_whatever_passes_a_checksum_is_samples_or_one_error(data):
    try:
        assert all({"__key__", "cls"} <= set(sample) for sample in unpack(data, 2))
    except PermanentError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)


# ---------------------------------------------------------------- checked bytes


def test_a_shard_that_is_not_what_the_index_says(blocks, tmp_path):
    """A new shard under an old index, of the right size or not; then none."""
    folder = shutil.copytree(blocks, tmp_path / "data")
    shutil.copy(folder / "imagenet-train-000002.tar", folder / NAME)
    index = read_index(str(folder), "train")
    with pytest.raises(PermanentError, match=f"{NAME}, 3 samples at byte 0, .*: (CRC-32|found).*copy or convert"):
        list(read_shard(index))
    (folder / NAME).unlink()
    with pytest.raises(PermanentError, match=f"{NAME}, 3 samples at byte 0, from {folder}/{NAME}: No such file"):
        list(read_shard(index, retry_for=60))


def test_a_folder_whose_bytes_are_wrong_once_is_read_a_second_time(blocks, monkeypatch):
    reads, read, index = [], script.Folder.read, read_index(str(blocks), "train")

    def wrong_once(self, name: str, offset: int = 0, length: int = script.LIMIT) -> bytes:
        reads.append(self.prefix)
        return bytes(length) if reads.count(str(blocks)) == 1 else read(self, name, offset, length)

    monkeypatch.setattr(script.Folder, "read", wrong_once)
    assert found(read_shard(index)) == expected(blocks) and reads.count(str(blocks)) == 4


# ---------------------------------------------------------------- the cache


def labels_of(index: script.Index, cache: Path, workers: int = 2) -> list[int]:
    loader = Loader(LoaderConfig(index, False, 5, 32, 36, workers=workers, cache=cache, retry_for=0))
    return sorted(label for _, labels in loader for label in labels.tolist() if label != IGNORE_INDEX)


ALL = list(range(VAL_IMAGES))


def test_a_block_is_fetched_once(unique, tmp_path):
    with faults.fault_server(unique) as server:
        index = read_index(server.url, "val")
        assert labels_of(index, tmp_path) == ALL and len(list(tmp_path.iterdir())) == len(index.blocks)
        server.requests.clear()
        assert labels_of(index, tmp_path) == ALL and server.requests == []


def test_many_processes_share_a_cache(unique, tmp_path):
    """24 processes want all blocks at once."""
    index, context = read_index(f"pipe:cat {unique}/", "val"), multiprocessing.get_context("fork")
    readers = [context.Process(target=labels_of, args=(index, tmp_path, 3)) for _ in range(8)]
    [reader.start() for reader in readers]
    [reader.join() for reader in readers]
    assert [reader.exitcode for reader in readers] == [0] * 8
    assert len(list(tmp_path.iterdir())) == len(index.blocks)


def replace_by(make):
    return lambda path: (path.unlink(), make(path))


CHANGES = {
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "removed": lambda path: path.unlink(),
    "a folder": replace_by(Path.mkdir),
    "a FIFO": replace_by(os.mkfifo),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_invalid_entry_costs_that_entry_only(blocks, tmp_path, name, capfd):
    """It is fetched, and stored if it can be; the other blocks come from the cache."""
    index = at(read_index(str(blocks), "train"), f"pipe:echo . >>{tmp_path}.log; cat {blocks}/%s")
    cache = tmp_path / "cache"
    cache.mkdir()
    assert found(read_shard(index, cache=cache)) == expected(blocks)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    CHANGES[name](sorted(cache.iterdir())[1])
    for _ in range(2):
        assert found(read_shard(index, cache=cache)) == expected(blocks)
    files = {path.name: path.read_bytes() for path in cache.iterdir() if path.is_file()}
    special = name in ("a folder", "a FIFO")
    assert len(before) == 3 and files.items() <= before.items() and len(files) == (2 if special else 3)
    assert Path(f"{tmp_path}.log").read_text().count(".") == (3 if special else 2)
    assert capfd.readouterr().err == ""


def test_a_failed_or_wrong_download_is_not_kept(blocks, tmp_path):
    with faults.fault_server(blocks) as server:
        index = read_index(server.url, "train")
        for fault in (faults.cut(lambda data: 2000), faults.other_bytes(lambda data: bytes(len(data)))):
            server.faults[NAME] = [fault] * 9
            with pytest.raises(UserError):
                list(read_shard(index, cache=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("readonly, workers", [(False, 1), (True, 3)])
def test_a_cache_gives_way_before_its_disk_is_full(unique, tmp_path, readonly, workers, capfd):
    """A tenth of a small disk stays free, for checkpoints. One line says so, for all loader processes."""
    small_disk(disk := tmp_path / "disk", "size=400k")
    try:
        (disk / "checkpoint").write_bytes(bytes(280_000))
        os.system(f"mount -o remount,ro '{disk}'") if readonly else None
        index = read_index(f"pipe:cat {unique}/", "val")
        loader = Loader(LoaderConfig(index, False, 5, 32, 36, workers=workers, cache=disk, retry_for=0))
        for _ in range(2):
            assert sorted(x for _, labels in loader for x in labels.tolist() if x >= 0) == ALL
        assert capfd.readouterr().err.count("continuing without") == 1
        usage, stored = shutil.disk_usage(disk), len(list(disk.iterdir())) - 1
        assert usage.free > 9 * usage.total // 100 and (stored == 0 if readonly else 0 < stored < len(index.blocks))
    finally:
        os.system(f"umount '{disk}'")


def test_a_cache_that_cannot_be_made_is_one_warning(unique, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert train(unique, tmp_path / "out", f"--cache={tmp_path}/file/cache", "--workers=2", "--max-epochs=2") == 0
    assert "continuing without" in (error := capfd.readouterr().err) and error.count("\n") == 1


def test_what_killed_runs_left_in_the_cache_is_removed(unique, tmp_path):
    """What running ones are writing is not."""
    left = [tmp_path / f"x.tmp-{n:012}" for n in range(3)]
    [path.touch() for path in (*left, tmp_path / "mine.tmp")]
    with open_writer(tmp_path / "y"):
        [running] = tmp_path.glob("y.tmp-*")
        assert train(unique, tmp_path / "out", f"--cache={tmp_path}") == 0
        assert running.exists() and (tmp_path / "mine.tmp").exists() and not any(path.exists() for path in left)


# ---------------------------------------------------------------- reading ahead


def test_blocks_are_read_ahead_in_order_and_no_more_than_four():
    asked = []
    ahead = script.read_ahead(lambda block: asked.append(block) or bytes([block]), range(20))
    assert next(ahead) == (0, b"\0")
    assert len(asked) <= 1 + 4 + 1
    assert [data[0] for _, data in ahead] == list(range(1, 20)) and asked == list(range(20))


def test_an_error_is_raised_where_its_block_is_due():
    def fetch(block: int) -> bytes:
        if block == 3:
            raise UserError("three")
        return b""

    ahead = script.read_ahead(fetch, range(9))
    assert [next(ahead)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="three"):
        next(ahead)


def test_nothing_is_left_behind_over_many_epochs(unique):
    """Neither processes, threads nor descriptors, though most readers end within a shard."""
    loader = Loader(LoaderConfig(read_index(f"pipe:cat {unique}/%s", "train"), True, 3, 32, world=5, rank=2))
    assert len(list(loader)) == 3
    gc.collect()  # what earlier tests left

    def open_now() -> tuple[int, ...]:
        return len(os.listdir("/proc/self/fd")), len(faults.descendants(os.getpid())), threading.active_count()

    before = open_now()
    for _ in range(12):
        assert len(list(loader)) == len(loader)
    gc.collect()
    assert all(now <= then + 3 for now, then in zip(open_now(), before))
