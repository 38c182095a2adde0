"""A block's bytes → samples, from the source or the cache."""

import gc
import io
import multiprocessing
import os
import tarfile
import threading
from pathlib import Path

import faults
import pytest
from conftest import VAL_IMAGES
from faults import damaged, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import NAME, expected, found, read_shard

import imagenet_train as script

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


def unpack(data: bytes, samples: int) -> list[dict]:
    block = script.Block(0, 0, len(data), samples, 0)
    return script.unpack(data, block, script.Index("", ["n0"], ["0.tar"], [0], [""], [block]))


# ---------------------------------------------------------------- unpacking


def test_members_in_any_order_of_any_image_kind_with_others_between():
    data = ustar(
        ("a.jpg", b"1"),
        ("a.json", b"{}"),
        ("a.cls", b"0"),
        ("b.cls", b"1"),
        ("b.PNG", b"2"),
        ("c.jpeg", b"3"),
        ("c.cls", b"2"),
    )
    samples = unpack(data, 3)
    assert [(s["__key__"], s["__url__"], s["cls"]) for s in samples] == [
        ("a", "0.tar", b"0"),
        ("b", "0.tar", b"1"),
        ("c", "0.tar", b"2"),
    ]
    assert (samples[0]["jpg"], samples[1]["png"], samples[2]["jpeg"]) == (b"1", b"2", b"3")


@pytest.mark.parametrize(
    "data, problem",
    [
        (ustar(("a.cls", b"0"), ("b.cls", b"0"), ("b.jpg", b"1")), "'a' has no image"),
        (ustar(("a.jpg", b"0")), "'a' has no image or no cls"),
        (ustar(("a.jpg", b"0"), ("a.jpg", b"0")), "duplicate file name"),
    ],
)
def test_incomplete_samples_are_an_error(data, problem):
    with pytest.raises(script.PermanentError, match=f"0.tar, block at byte 0: .*{problem}"):
        unpack(data, 2 if b"b.jpg" in data else 1)


def test_a_member_that_claims_to_be_huge_is_refused():
    header = bytearray(ustar(("k.jpg", b"x"))[:512])
    header[124:136] = b"77777777777\0"  # 8 GiB
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    with pytest.raises(script.PermanentError, match="member 'k.jpg' of 8589934591 bytes is not in its block"):
        unpack(bytes(header), 1)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        damaged(ustar(("a.cls", b"0"), ("a.jpg", b"x" * 700), ("b.cls", b"1"), ("b.jpg", b"y" * 30))),
        st.binary(max_size=2000),
    )
)
def test_fuzz_unpack(data):
    """Whatever passes a checksum is samples, or an error of the kinds that become one line."""
    try:
        assert all({"__key__", "cls"} <= set(sample) for sample in unpack(data, 2))
    except script.PermanentError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)


# ---------------------------------------------------------------- the cache


def labels_of(index: script.Index, cache: Path, workers: int = 2) -> list[int]:
    loader = script.Loader(script.LoaderConfig(index, False, 5, 32, 36, workers=workers, cache=cache, retries=0))
    return sorted(label for _, labels in loader for label in labels.tolist() if label != script.IGNORE_INDEX)


ALL = list(range(VAL_IMAGES))


def test_a_block_is_fetched_once(unique, tmp_path):
    with faults.fault_server(unique) as server:
        index = script.read_index(server.url, "val")
        assert labels_of(index, tmp_path) == ALL
        assert len(list(tmp_path.iterdir())) == len(index.blocks)
        server.requests.clear()
        assert labels_of(index, tmp_path) == ALL
        assert server.requests == []


def test_many_processes_share_a_cache(unique, tmp_path):
    """24 processes want all blocks at once."""
    with faults.fault_server(unique) as server:
        index = script.read_index(server.url, "val")
        context = multiprocessing.get_context("fork")
        readers = [context.Process(target=labels_of, args=(index, tmp_path, 3)) for _ in range(8)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
    assert [reader.exitcode for reader in readers] == [0] * 8
    assert len(list(tmp_path.iterdir())) == len(index.blocks)


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


CHANGES = {
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cached_block_that_is_not_right_is_fetched_again(blocks, tmp_path, name):
    index = script.read_index(f"pipe:cat {blocks}/", "train")
    assert found(read_shard(index, cache=tmp_path)) == expected(blocks)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    CHANGES[name](sorted(tmp_path.iterdir())[1])
    assert found(read_shard(index, cache=tmp_path)) == expected(blocks)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 3


def test_a_failed_or_wrong_download_is_not_kept(blocks, tmp_path):
    with faults.fault_server(blocks) as server:
        index = script.read_index(server.url, "train")
        for fault in (faults.cut(lambda data: 2000), faults.other_bytes(lambda data: bytes(len(data)))):
            server.faults[NAME] = [fault] * 9
            with pytest.raises(script.TrainError):
                list(read_shard(index, cache=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["size=32k"], ["size=32k", "ro"]])
def test_a_full_or_read_only_cache_costs_one_warning(unique, tmp_path, options, capfd):
    disk = tmp_path / "disk"
    small_disk(disk, *options)
    try:
        index = script.read_index(f"pipe:cat {unique}/", "val")
        loader = script.Loader(script.LoaderConfig(index, False, 5, 32, 36, workers=3, cache=disk, retries=0))
        for _ in range(2):
            assert sorted(x for _, labels in loader for x in labels.tolist() if x >= 0) == ALL
        assert capfd.readouterr().err.count("continuing without") == 1
        assert not list(disk.glob("tmp-*"))
    finally:
        os.system(f"umount '{disk}'")


def test_a_cache_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.make_cache(tmp_path / "file" / "cache") is None
    assert "continuing without" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_what_killed_runs_left_in_the_cache_is_removed(tmp_path):
    old, new = tmp_path / "tmp-1", tmp_path / "tmp-2"
    [path.touch() for path in (old, new)]
    os.utime(old, (0, 0))
    assert script.make_cache(tmp_path) == tmp_path and list(tmp_path.iterdir()) == [new]


# ---------------------------------------------------------------- reading ahead


def test_blocks_are_read_ahead_in_order_and_no_more_than_four():
    asked = []

    def fetch(block: int) -> bytes:
        asked.append(block)
        return bytes([block])

    ahead = script.read_ahead(fetch, range(20))
    assert next(ahead) == b"\0"
    assert len(asked) <= 1 + 4 + 1
    assert [data[0] for data in ahead] == list(range(1, 20)) and asked == list(range(20))


def test_an_error_is_raised_where_its_block_is_due():
    def fetch(block: int) -> bytes:
        if block == 3:
            raise script.TrainError("three")
        return b""

    ahead = script.read_ahead(fetch, range(9))
    assert [next(ahead) for _ in range(3)] == [b""] * 3
    with pytest.raises(script.TrainError, match="three"):
        next(ahead)


def test_nothing_is_left_behind_over_a_hundred_epochs(unique):
    """Neither processes, threads nor descriptors, though most readers end within a shard."""
    index = script.read_index(f"pipe:cat {unique}/%s", "train")
    loader = script.Loader(script.LoaderConfig(index, True, 3, 32, world=5, rank=2, workers=0, epochs=102))
    list(loader)
    gc.collect()  # what earlier tests left

    def open_now() -> tuple[int, ...]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), len(children), threading.active_count()

    before = open_now()
    for _ in range(100):
        assert len(list(loader)) == len(loader)
    gc.collect()
    assert all(now <= then + 5 for now, then in zip(open_now(), before))
