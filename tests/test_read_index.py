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

from imagenet_shards import UserError, parse_index, read_index


def test_what_an_index_lists(blocks):
    index = read_index(str(blocks), "train")
    assert index.total == 60 and len(index.classes) == 10 and index.starts[:4].tolist() == [0, 3, 6, 7]
    assert [entry["url"] for entry in index.shards] == sorted(p.name for p in blocks.glob("imagenet-train-*.tar"))
    assert index.digest != read_index(str(blocks), "val").digest


def test_an_index_that_lies_elsewhere(blocks, tmp_path):
    for split in ("train", "val"):
        shutil.copy(blocks / f"imagenet-{split}.json", tmp_path)
    with faults.fault_server(blocks) as server:
        index = read_index(server.url, "train", index=str(tmp_path))
        assert index.prefix == server.url and found(read_shard(index)) == expected(blocks)
        assert "imagenet-train.json" not in server.requests
    with pytest.raises(UserError, match="--index=/nowhere: no such folder"):
        read_index(str(blocks), "train", index="/nowhere")


# ---------------------------------------------------------------- something else in its place

HINTS = {  # a wrong prefix: what the message advises. {b}: a folder of shards, {t}: a tree, {e}: an empty folder
    "{e}/nowhere": "no such folder; imagenet_shards.py makes it",
    "{e}": "imagenet-train.json: No such file or directory; make it with imagenet_shards.py",
    "{t}": "a tree of images, not shards; pack it with imagenet_shards.py --imagenet",
    "{b}/imagenet-train-{{000000..000008}}.tar": "give the prefix only: the index lists the shards",
    "{b}/imagenet-train-000000.tar": "give the prefix only: the index lists the shards",
    "http://127.0.0.1:1/imagenet-train-{{000000..000008}}.tar": "give the prefix only: the index lists the shards",
    "{b}/*.tar": "give the prefix only: the index lists the shards",
    "http:/host/data": "a URL begins with PROTOCOL://",
    "gs:/bucket": "a URL begins with PROTOCOL://",
    "localhost:8080/data": "a URL begins with PROTOCOL://",
    "curl -s http://host/": "a command begins with pipe:|cannot read|curl",
    "gsutil cat gs://bucket/%s": "a command begins with pipe:",
    "cat {b}/": "a command begins with pipe:",
    "pipe:true ": "found nothing",
    "pipe:cat {b}/imagenet-val-000000.tar #": "expected an index, found .* bytes that begin b'",
    "pipe:echo '<html><h1>404 Not Found</h1></html>' #": "expected an index, found a page that says '404 Not Found'",
    "pipe:cat /dev/zero; true ": "expected an index, found 67108864 bytes",
}


@pytest.mark.parametrize("prefix", HINTS)
def test_a_wrong_prefix_gets_the_right_hint(blocks, tree, tmp_path, prefix):
    with pytest.raises(UserError, match=HINTS[prefix]) as error:
        read_index(prefix.format(b=blocks, t=tree, e=tmp_path), "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


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
    "an option": shard(url="-o.tar"), "a newline": shard(url="a.tar\n"),
    "a checksum with a path": shard(sha256="../../x"), "a size that is none": shard(filesize="1e9"),
    "no name": shard(url=None), "a negative count": shard(blocks=[[0, 9, -2, 7]]),
    "a fraction": shard(blocks=[[0, 9, 2.5, 7]]), "true": shard(blocks=[[0, 9, True, 7]]),
    "a block without samples": shard(blocks=[[0, 9, 0, 7]]),
    "a block beyond the shard": shard(blocks=[[0, 100, 2, 7]]),
    "blocks with a gap": shard(blocks=[[0, 9, 2, 7], [10, 5, 1, 8]]),
    "a huge block": shard(blocks=[[0, 1 << 40, 2, 7]], filesize=1 << 41),
    "ten million samples in a block": shard(blocks=[[0, 9, 10**7, 7]], nsamples=10**7),
    "another number of samples": shard(nsamples=4), "a short block entry": shard(blocks=[[0, 9, 2]]),
    "blocks that are none": shard(blocks=3), "twice": shard(url="b.tar"), "no samples": top(shardlist=[]),
    "no classes": top(classes=[]), "classes that are no names": top(classes=[1, 2]),
    "too few class names": top(class_names=["tench"]), "a recipe that is a list": top(recipe=[1]),
    "another kind": top(__kind__=7, shardlist=None), "a list": b"[]", "deep": b"[" * 100_000,
    "a large number": b"9" * 100_000, "a text": b"hello", "not UTF-8": b"\xff\xfe\x00", "cut": top(x=0)[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_one_clear_error(tmp_path, name):
    (tmp_path / "imagenet-train.json").write_bytes(HOSTILE[name])
    said = r"imagenet-train\.json: (expected an index|the index|Exceeds the limit)"
    with pytest.raises(UserError, match=said) as error:
        read_index(str(tmp_path), "train")
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_the_index_that_the_hostile_ones_were_made_of_is_read():
    assert parse_index(top(), "").total == 6


def test_an_unfinished_conversion_and_an_index_without_blocks(blocks, tmp_path):
    content, path = json.loads((blocks / "imagenet-train.json").read_text()), tmp_path / "imagenet-train.json"
    for entry in content["shardlist"]:
        del entry["blocks"]
    path.write_text(json.dumps(content))
    advice = f"no blocks; add them with: python3 imagenet_shards.py --index-only --shards={tmp_path}"
    with pytest.raises(UserError, match=advice):
        read_index(str(tmp_path), "train")
    path.write_text('{"__kind__": "imagenet-conversion-not-finished"}')
    with pytest.raises(UserError, match="the conversion is not finished"):
        read_index(str(tmp_path), "train")


def test_a_large_index_takes_little_time_and_memory():
    """100,000 classes; and ImageNet's, ten times."""
    classes = [f"n{number:08d}" for number in range(100_000)]
    entries = [{"url": f"{n}.tar", "nsamples": 64 * 137, "filesize": 137, "sha256": "ab" * 32,
                "blocks": [[at, 1, 64, 7] for at in range(137)]} for n in range(1470)]
    data = top(classes=classes, class_names=classes, shardlist=entries)

    def work() -> int:
        limit = resource.RLIMIT_CPU
        resource.setrlimit(limit, (int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 20,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index = parse_index(data, "")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return 10 + (index.total == 1470 * 137 * 64 and len(index.classes) == 100_000) + 2 * (grown < 400_000)

    assert in_terminal(80, work) == (13, "")


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ["shardlist", "url", "filesize", "sha256", "classes", "blocks", "class_names", "__kind__"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=12,
)


@FUZZ
@given(st.one_of(damaged(top()), JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200)))
def test_whatever_is_found_is_an_index_or_one_line(tmp_path, data):
    Path(tmp_path, "imagenet-train.json").write_bytes(data)
    try:
        index = read_index(str(tmp_path), "train")
        assert index.total > 0 and all("/" not in entry["url"] for entry in index.shards)
    except UserError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)
