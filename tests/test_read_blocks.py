"""Blocks → streams → samples: checked bytes from the source or the cache, read ahead, expanded by WebDataset."""

import gc
import io
import multiprocessing
import os
import shutil
import tarfile
import threading
from pathlib import Path

import faults
import pytest
from conftest import VAL_IMAGES
from faults import damaged, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import NAME, at, expected, found, index_of, labels_of, read_shard, unpack
from runs import train

import imagenet_shards as script
from imagenet_shards import PermanentError, UserError, read_index
from imagenet_train import Loader, LoaderConfig

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
    samples = unpack(ustar(("a.jpg", b"1"), ("a.json", b"{}"), ("a.cls", b"0"), ("._b.jpg", b""), ("b.cls", b"1"),
                           ("b.PNG", b"2"), ("README", b""), ("c.jpeg", b"3"), ("c.cls", b"2")), 3)
    assert [(s["__key__"], s["__url__"], s["cls"]) for s in samples] == [
        ("a", "0.tar", b"0"), ("b", "0.tar", b"1"), ("c", "0.tar", b"2"),
    ]  # fmt: skip
    assert (samples[0]["jpg"], samples[1]["png"], samples[2]["jpeg"]) == (b"1", b"2", b"3")


PICKLE = b"cos\nsystem\n(S'touch unpickled'\ntR."


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extensions = "pyd", "pkl", "pickle", "pth", "npy", "mp"
    [sample] = unpack(ustar(*SAMPLE, *((f"a.{extension}", PICKLE) for extension in extensions)), 1)
    assert [sample[extension] for extension in extensions] == [PICKLE] * 6 and not list(tmp_path.iterdir())


def header(kind: bytes = b"0", size: bytes = b"00000000001\0", name: str = "a.jpg") -> bytes:
    """A tar member's header with a size of any kind, and the checksum that fits it."""
    data = bytearray(ustar((name, b"x"))[:512])
    data[124:136], data[156:157] = size, kind
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:]))
    return bytes(data)


MEMBERS = {  # bytes of a block of one sample: the error
    "no image": (ustar(("a.cls", b"0")), "sample 'a' has no image or no cls"),
    "no label": (ustar(("\x1b[31ma.jpg", b"0")), r"sample '\\x1b\[31ma' has no image or no cls"),
    "twice the same": (ustar(*SAMPLE, *SAMPLE), "duplicate file name"),
    "two samples": (ustar(*SAMPLE, ("b.cls", b"1"), ("b.jpg", b"2")), "2 samples, but the index lists 1"),
    "8 GiB": (header(size=b"77777777777\0"), "unexpected end of data"),
    "2**60 bytes": (header(size=b"\x80" + (1 << 60).to_bytes(11, "big")), "unexpected end of data|header"),
    "-1 bytes": (header(size=b"\xff" * 12), "no image or no cls"),
    "a size that is no number": (header(size=b"9" * 12), "header"),
    "a page": (b"<html>404 Not Found</html>", "header"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_block_must_not_hold_is_one_error(name):
    data, problem = MEMBERS[name]
    with pytest.raises(PermanentError, match=f"block 0: .*({problem}).*; make the index again") as error:
        unpack(data, 1)
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    assert str(error.value).startswith("0.tar, ") or name == "twice the same"


def test_a_key_with_control_characters_is_escaped(tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(ustar(("\x1b[31m.cls", b"0"), ("\x1b[31m.jpg", b"no image")) + bytes(1024))
    flags = [f"--shards={tmp_path}", "--index-only", "--splits=train", "--names=x.tar", "--workers=1"]
    assert script.main(flags) == 0
    assert script.run_script(lambda: labels_of(read_index(str(tmp_path), "train"), 0)) == 1
    assert "\x1b" not in (error := capsys.readouterr().err) and r"x.tar: \x1b[31m: " in error


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        damaged(ustar(("a.cls", b"0"), ("a.jpg", b"x" * 700), ("b.cls", b"1"), ("b.jpg", b"y" * 30))),
        st.builds(header, st.sampled_from([b"0", b"1", b"5", b"x", b"L"]), st.binary(min_size=12, max_size=12)),
        st.binary(max_size=2000),
    )
)
def test_whatever_passes_a_checksum_is_samples_or_one_error(data):
    try:
        assert all({"__key__", "cls"} <= set(sample) for sample in unpack(data, 2))
    except PermanentError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)


# ---------------------------------------------------------------- the cache

ALL = list(range(VAL_IMAGES))


def test_a_block_is_fetched_once(unique, tmp_path):
    with faults.fault_server(unique) as server:
        index = read_index(server.url, "val")
        assert labels_of(index, cache=tmp_path) == ALL and len(list(tmp_path.iterdir())) == len(index.blocks)
        server.requests.clear()
        assert labels_of(index, cache=tmp_path) == ALL and server.requests == []


def test_many_processes_share_a_cache(unique, tmp_path):
    """24 processes want all blocks at once."""
    index, context = read_index(f"pipe:cat {unique}/", "val"), multiprocessing.get_context("fork")
    readers = [context.Process(target=labels_of, args=(index, 3), kwargs={"cache": tmp_path}) for _ in range(8)]
    [reader.start() for reader in readers]
    [reader.join() for reader in readers]
    assert [reader.exitcode for reader in readers] == [0] * 8
    assert len(list(tmp_path.iterdir())) == len(index.blocks)
    with faults.fault_server(unique) as server:
        assert labels_of(at(index, server.url), cache=tmp_path) == ALL and server.requests == []  # all are complete


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
    assert len(before) == 3 and files.items() <= before.items() and len(files) == 3 - (name == "a folder")
    assert Path(f"{tmp_path}.log").read_text().count(".") == 2 + (name == "a folder")


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
    """A tenth of a small disk stays free, for checkpoints. A line says so."""
    small_disk(disk := tmp_path / "disk", "size=400k")
    try:
        (disk / "checkpoint").write_bytes(bytes(280_000))
        os.system(f"mount -o remount,ro '{disk}'") if readonly else None
        index = read_index(f"pipe:cat {unique}/", "val")
        loader = Loader(LoaderConfig(index, False, 5, 32, 36, workers=workers, cache=disk, retry_for=0))
        for _ in range(2):
            assert sorted(x for _, labels in loader for x in labels.tolist() if x >= 0) == ALL
        assert "continuing without" in (error := capfd.readouterr().err) and len({*error.splitlines()}) == 1
        usage, stored = shutil.disk_usage(disk), len(list(disk.iterdir())) - 1
        assert usage.free > 9 * usage.total // 100 and (stored == 0 if readonly else 0 < stored < len(index.blocks))
    finally:
        os.system(f"umount '{disk}'")


@pytest.mark.parametrize("below", ["file/cache", "x" * 300, "loop/cache"])
def test_a_cache_that_cannot_be_made_is_one_warning(unique, tmp_path, below, capfd):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert train(unique, tmp_path / "out", f"--cache={tmp_path}/{below}", "--workers=2", "--max-epochs=2") == 0
    assert "continuing without" in (error := capfd.readouterr().err) and len({*error.splitlines()}) == 1


def test_a_cache_that_may_not_be_entered_is_one_warning(blocks, tmp_path, capsys, monkeypatch):
    """Also for another user than root, whom no folder stops: so is_file() fails here as the system would."""

    def refuse(path: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    index, real = read_index(str(blocks), "train"), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: (refuse if str(tmp_path) in str(path) else real)(path, **how))
    monkeypatch.setattr(os, "statvfs", refuse)
    assert found(read_shard(index, cache=tmp_path)) == expected(blocks)
    assert "Permission denied; continuing without" in (error := capsys.readouterr().err) and error.count("\n") == 1


# ---------------------------------------------------------------- reading ahead


def read_ahead(monkeypatch, fetch) -> list:
    """The streams of 20 blocks that fetch(number of the block) returns; the rest of the stage is as it is."""
    index, how = index_of([[1] * 20]), {"retry_for": 0, "timeout": 1}
    monkeypatch.setattr(script, "fetch", lambda source, index, block: fetch(block.offset))
    return script.open_blocks(({"url": "", "block": n} for n in range(20)), index, **how)


def test_blocks_are_read_ahead_in_order_and_no_more_than_four(monkeypatch):
    asked = []
    ahead = read_ahead(monkeypatch, lambda block: asked.append(block) or bytes([block]))
    assert next(ahead)["stream"].read() == b"\0"
    assert len(asked) <= 1 + 4 + 1
    assert [item["stream"].read()[0] for item in ahead] == list(range(1, 20)) and asked == list(range(20))


@pytest.mark.parametrize("kind", [UserError, RuntimeError, SystemExit])
def test_an_error_is_raised_where_its_block_is_due(monkeypatch, kind):
    def fetch(block: int) -> bytes:
        if block == 3:
            raise kind("three")
        return b""

    ahead = read_ahead(monkeypatch, fetch)
    assert [next(ahead)["block"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(kind, match="three"):
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
