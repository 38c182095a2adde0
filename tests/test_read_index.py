"""The index: what a reader accepts, and what it says of all else that may be found in its place."""

import json
import resource
import shutil
from pathlib import Path

import faults
import pytest
from faults import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import expected, found, read_shard
from runs import in_terminal

import imagenet_shards as script
from imagenet_shards import UserError, parse_index, read_index


def test_what_an_index_lists(blocks):
    index = read_index(str(blocks), "train")
    assert index.total == 60 and len(index.classes) == 10 and index.starts[:4].tolist() == [0, 3, 6, 7]
    assert [entry["url"] for entry in index.entries] == sorted(p.name for p in blocks.glob("imagenet-train-*.tar"))
    assert index.digest != read_index(str(blocks), "val").digest


def test_an_index_that_lies_elsewhere(blocks, tmp_path):
    shutil.copy(blocks / "imagenet-train.json", tmp_path)
    with faults.fault_server(blocks) as server:
        index = read_index(server.url, "train", index=str(tmp_path))
        assert index.prefix == server.url and found(read_shard(index)) == expected(blocks)
        assert "imagenet-train.json" not in server.requests
    with pytest.raises(UserError, match="/nowhere/imagenet-train.json: no such file"):
        read_index(str(blocks), "train", index="/nowhere")


# ---------------------------------------------------------------- an index that is cut


def test_a_cut_of_the_index_is_repeated_or_an_error(blocks, tmp_path, monkeypatch, capfd):
    """Through a command that fails once, as curl does with exit status 18, and over HTTP."""
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)
    name, once = "imagenet-train.json", f"{{ touch {tmp_path}/x; head -c 300 {blocks}/%s; exit 18; }}"
    assert read_index(f"pipe:[ -e {tmp_path}/x ] || {once}; cat {blocks}/%s", "train", retry_for=60).total == 60
    assert "exit status 18" in (error := capfd.readouterr().err) and "next try in" in error
    with faults.fault_server(blocks) as server:
        server.faults[name] = [faults.cut(lambda data: 300), faults.answer(503, "Busy")]
        assert read_index(server.url, "train", retry_for=60).total == 60 and not server.faults[name]
        server.faults[name] = [faults.cut(lambda data: 300, tell=False)] * 9  # the end of such an answer is not known
        for prefix in (server.url, f"pipe:curl -s {server.url}", f"pipe:head -c 300 {blocks}/"):
            with pytest.raises(UserError, match="expected an index, found b"):
                read_index(prefix, "train")


# ---------------------------------------------------------------- something else in its place


def changed(change) -> bytes:
    shard = {"nsamples": 3, "filesize": 99, "sha256": "ab" * 32}
    shards = [shard | {"url": f"{x}.tar", "blocks": [[0, 9, 2, 7], [9, 5, 1, 8]]} for x in "ab"]
    index = {"__kind__": "wids-shard-index-v1", "shardlist": shards, "classes": ["n0", "n1"], "class_names": None}
    change(index)
    return json.dumps(index).encode()


def shard(**values) -> bytes:
    return changed(lambda index: index["shardlist"][0].update(values))


def top(**values) -> bytes:
    return changed(lambda index: index.update(values))


HOSTILE = {
    "a path": shard(url="../../etc/passwd.tar"), "a command": shard(url="a;touch${IFS}x.tar"),
    "an option": shard(url="-o.tar"), "a newline": shard(url="a.tar\n"), "a long name": shard(url="a" * 300 + ".tar"),
    "a checksum with a path": shard(sha256="../../x"), "a size that is none": shard(filesize="1e9"),
    "no name": shard(url=None), "a negative count": shard(blocks=[[0, 9, -2, 7]]),
    "a fraction": shard(blocks=[[0, 9, 2.5, 7]]), "true": shard(blocks=[[0, 9, True, 7]]),
    "a block without samples": shard(blocks=[[0, 9, 0, 7]]),
    "a block beyond the shard": shard(blocks=[[0, 100, 2, 7]]),
    "blocks with a gap": shard(blocks=[[0, 9, 2, 7], [10, 5, 1, 8]]),
    "a huge block": shard(blocks=[[0, 1 << 40, 2, 7]], filesize=1 << 41),
    "ten million samples in a block": shard(blocks=[[0, 9, 10**7, 7]], nsamples=10**7),
    "another number of samples": shard(nsamples=4), "a short block entry": shard(blocks=[[0, 9, 2]]),
    "no blocks": changed(lambda index: index["shardlist"][0].pop("blocks")),
    "blocks that are none": shard(blocks=3), "twice": shard(url="b.tar"), "no samples": top(shardlist=[]),
    "no classes": top(classes=[]), "classes that are no names": top(classes=[1, 2]),
    "too few class names": top(class_names=["tench"]), "another kind": top(__kind__=7, shardlist=None),
    "a list": b"[]", "deep": b"[" * 100_000, "a large number": b"9" * 100_000, "a text": b"hello", "nothing": b"",
    "not UTF-8": b"\xff\xfe\x00", "cut": top(x=0)[:-1], "a pickle": b"cos\nsystem\n(S'touch x'\ntR.",
    "a page": b"<html><h1>404 Not Found</h1></html>", "a tar": b"x.cls" + bytes(507),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_one_clear_error(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("imagenet-train.json").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=r"imagenet-train\.json: (expected an index|not an index)") as error:
        read_index(str(tmp_path), "train")
    assert len(str(error.value)) < 600 and "\n" not in str(error.value) and len(list(tmp_path.iterdir())) == 1


def test_the_index_that_the_hostile_ones_were_made_of_is_read():
    assert parse_index(top(), "").total == 6


def test_a_large_index_takes_little_time_and_memory():
    """100,000 classes; and ImageNet's, ten times."""
    classes = [f"n{number:08d}" for number in range(100_000)]
    entries = [{"url": f"{n}.tar", "nsamples": 64 * 137, "filesize": 137, "sha256": "ab" * 32,
                "blocks": [[at, 1, 64, 7] for at in range(137)]} for n in range(1470)]
    data = top(classes=classes, class_names=classes, shardlist=entries)

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(before.ru_utime) + 20,) * 2)
        index = parse_index(data, "")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
        return 10 + (index.total == 1470 * 137 * 64 and len(index.classes) == 100_000) + 2 * (grown < 400_000)

    assert in_terminal(80, work) == (13, "")


KEYS = ["shardlist", "url", "filesize", "sha256", "classes", "blocks", "class_names", "__kind__"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(damaged(top()), JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200)))
def test_whatever_is_found_is_an_index_or_one_line(tmp_path, data):
    Path(tmp_path, "imagenet-train.json").write_bytes(data)
    try:
        index = read_index(str(tmp_path), "train")
        assert index.total > 0 and all("/" not in entry["url"] for entry in index.entries)
    except UserError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)
